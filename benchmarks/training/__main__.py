"""Measures what training costs on this machine, on one GPU or, under torchrun, on several.

    python -m benchmarks.training
    torchrun --standalone --nproc-per-node 2 -m benchmarks.training --distributed
    python -m benchmarks.training.page
    python -m benchmarks.training.several_page

Each row goes to benchmarks/results/training.json, or to distributed.json beside it, as soon as it is there; a case that
fails is a row with its failure.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from benchmarks.rows import FOLDER, Cases
from benchmarks.training import distributed, single, tasks

RESULTS = FOLDER / "training.json"
RESULTS_OF_SEVERAL = FOLDER / "distributed.json"


@click.command()
@click.option("--distributed", "several", is_flag=True, help="On several GPUs: run it under torchrun.")
@click.option("--only", default="", metavar="PATTERN", help="Regular expression of cases, as bert-base/eager/ratio=10.")
@click.option("--smoke", is_flag=True, help="Narrow models instead: shows in seconds whether everything runs.")
@click.option("--steps", default=25, show_default=True, help="How many steps each side is timed for, at least.")
@click.option("--minutes", default=8.0, show_default=True, help="Begin no case after so long; what is left is named.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: GPUs if there are any.")
@click.option("--missing", is_flag=True, help="Pass over cases that have a row already, other than a failure.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The JSON file.")
def main(
    several: bool,
    only: str,
    smoke: bool,
    steps: int,
    minutes: float,
    device: str | None,
    missing: bool,
    output: Path | None,
) -> None:
    """Measure training, dense and converted."""
    if smoke and output is None:
        raise click.UsageError("--smoke measures nothing of interest; name another file for it with --output")
    output = output or (RESULTS_OF_SEVERAL if several else RESULTS)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if several:
        chosen = tasks.DISTRIBUTED_SMOKE_TASKS if smoke else tasks.DISTRIBUTED_TASKS
        distributed.measure(output, only, minutes, chosen, kind, steps, missing)
        return
    rows = Cases(output, only, minutes, missing=missing)
    single.measure(rows, tasks.SMOKE_TASKS if smoke else tasks.TASKS, torch.device(kind), steps)
    rows.close()


if __name__ == "__main__":
    main()

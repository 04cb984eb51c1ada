"""Recovered pretrained models against training from scratch, for the same time on the same device.

A dense model of each task and seed is trained once. At each ratio one side starts from it (`init="project"`, then
`roastify.recover`, without labels) and the other from random values (`init="match"`, labels, AdamW); both are given as
many seconds, the same batches, and a learning rate that each chooses from the same few, by accuracy on examples that
neither trains on, with the first seed. Every finished run goes to benchmarks/results/recovery.json at once; the results
in docs/recovery.md are written from it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.marks import insert
from benchmarks.recovery_page import BEGIN, DOCUMENT, RESULTS, best_rate, markdown
from benchmarks.recovery_runs import DENSE, RATES, RECOVERED, SCRATCH, Bench, Run, compete, teacher
from benchmarks.signs import OUT, earlier_rows, machine, write
from benchmarks.signs_tasks import FULL, QUICK, TASKS, prepare


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder with imdb.jsonl.xz and cifar10_jpeg.npz.")  # fmt: skip
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Only this task.")
@click.option("--ratio", "ratios", multiple=True, type=float, default=(3.0, 10.0), show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Runs of each kind.")
@click.option("--seconds", default=2.0, show_default=True, help="Of training for each side.")
@click.option("--minutes", type=float, help="Start no run after so long.")
@click.option("--device", help="Default: the GPU if there is one.")
@click.option("--resume", is_flag=True, help="Keep the rows of the file and add those that it lacks.")
@click.option("--smoke", is_flag=True, help="Tiny models and samples; results go to out/.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Raw rows.")
@click.option("--document", type=click.Path(dir_okay=False, path_type=Path), help="The page with the results.")
def main(
    data: Path,
    tasks: tuple[str, ...],
    ratios: tuple[float, ...],
    seeds: int,
    seconds: float,
    minutes: float | None,
    device: str | None,
    resume: bool,
    smoke: bool,
    out: Path | None,
    document: Path | None,
) -> None:
    """Train every model that is asked for; write the raw rows and the results."""
    begun = time.perf_counter()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = QUICK if smoke else FULL
    out = out or (OUT / RESULTS.name if smoke else RESULTS)
    document = document or (OUT / DOCUMENT.name if smoke else DOCUMENT)
    described = {**dataclasses.asdict(settings), "seconds": seconds, "rates": list(RATES)}
    result: dict[str, Any] = {"machine": machine(device), "settings": described, "rows": []}
    if resume and out.exists():
        result["rows"] = earlier_rows(out, result["machine"], result["settings"])
    folder = out.with_suffix(".work")
    if not resume:
        for old in folder.glob("*.safetensors"):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)

    def late() -> bool:
        return minutes is not None and time.perf_counter() - begun > 60 * minutes

    def keep(row: dict[str, Any]) -> None:
        same = [old for old in result["rows"] if run_of(old) != run_of(row)]
        result["rows"] = [*same, row]
        write(out, json.dumps(result, indent=1) + "\n")
        passed = time.perf_counter() - begun
        click.echo(
            f"[{passed:4.0f} s] {row['task']} ratio {row['ratio']:g} {row['arm']} seed {row['seed']} "
            f"lr {row['lr']:g}: {100 * row['accuracy']:.2f} % after {row['steps']} steps in {row['seconds']:.2f} s"
        )

    for name in tasks or TASKS:
        prepare(name, data, settings, folder)
        bench = Bench(name, settings.task(name), folder, device, seconds)
        # A seed after another: a result that is cut off still has whole pairs.
        for seed in range(seeds):
            if late():
                break
            dense, row = teacher(bench, seed)
            if row is not None:
                keep(row)
            for ratio in ratios:
                for arm in (RECOVERED, SCRATCH):
                    done = {run_of(row) for row in result["rows"]}
                    chosen = best_rate(result["rows"], name, ratio, arm)
                    rates = RATES if seed == 0 else () if chosen is None else (chosen,)
                    for run in (Run(name, ratio, arm, seed, lr) for lr in rates):
                        if run not in done and not late():
                            keep(compete(bench, run, dense))
    if result["rows"]:
        order = [DENSE, RECOVERED, SCRATCH]
        result["rows"].sort(
            key=lambda row: (TASKS.index(row["task"]), row["ratio"], order.index(row["arm"]), row["seed"], row["lr"])
        )
        write(out, json.dumps(result, indent=1) + "\n")
        text = DOCUMENT.read_text(encoding="utf-8")
        write(document, insert(text, BEGIN, markdown(result)))
        click.echo(markdown(result))
        click.echo(f"written to {out} and {document} in {time.perf_counter() - begun:.0f} s")


def run_of(row: dict[str, Any]) -> Run:
    return Run(*(row[field] for field in Run._fields))


if __name__ == "__main__":
    main()

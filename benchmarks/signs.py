"""Accuracy by the sign's granularity: two models trained from scratch at several ratios, signs and seeds.

For each seed the model's initial values, the order of the data, augmentation and the slots are the same for every sign,
so signs are compared in pairs. Worker processes share one GPU and take a run at a time. Every finished run goes to
benchmarks/results/signs.json at once; docs/signs.md is written from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import torch

import roastify
from benchmarks.rows import machine, write
from benchmarks.signs_page import DOCUMENT, RESULTS, markdown
from benchmarks.signs_tasks import (
    DENSE,
    FEWEST_SLOTS,
    FULL,
    QUICK,
    SIGNS,
    TASKS,
    Run,
    Settings,
    new_model,
    prepare,
    train,
)
from roastify.config import RoastConfig

OUT = Path(__file__).parents[1] / "out"


def planned_runs(tasks: Iterable[str], ratios: Iterable[float], signs: Iterable[str], seeds: int) -> list[Run]:
    """Return all runs, a seed after another: a result that is cut off still has whole pairs."""
    kinds = [(1.0, DENSE), *((float(ratio), sign) for ratio in ratios for sign in signs)]
    return [Run(task, *kind, seed) for seed in range(seeds) for kind in kinds for task in tasks]


def report_slots(runs: Iterable[Run], settings: Settings, quick: bool) -> None:
    """Print every pool's number of slots; refuse pools that the question is not about."""
    for task, ratio in sorted({(run.task, run.ratio) for run in runs if run.sign != DENSE}):
        with torch.device("meta"):
            model = new_model(task, settings.task(task))
        plan = roastify.plan(model, ratio, config=RoastConfig(tile=settings.tile))
        click.echo(
            f"{task}, ratio {ratio:g}: {plan.total_numel:,} → {plan.stored_numel:,} parameters, "
            f"{plan.num_slots} slots of {settings.tile}"
        )
        if plan.num_slots < FEWEST_SLOTS and not quick:
            raise click.ClickException(f"the question is about pools of {FEWEST_SLOTS} slots or more: smaller tiles")


def attempt(
    run: Run, settings: Settings, folder: Path, device: str, deadline: float = math.inf
) -> dict[str, Any] | str | None:
    """Return a run's row, the traceback of its failure, or None if the deadline (`time.time()`) is past."""
    if time.time() > deadline:
        return None
    try:
        return train(run, settings, folder, device)
    except Exception:
        return traceback.format_exc()


def outcomes(
    runs: list[Run], data: Path, settings: Settings, device: str, workers: int, deadline: float
) -> Iterator[tuple[Run, dict[str, Any] | str | None]]:
    """Yield each run with what came of it, in the order in which they end."""
    names = sorted({run.task for run in runs})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not workers:
            for name in names:
                prepare(name, data, settings, folder)
            for run in runs:
                yield run, attempt(run, settings, folder, device, deadline)
            return
        # CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        threads = (max(1, (os.cpu_count() or 1) // workers),)
        with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=threads) as executor:
            for prepared in [executor.submit(prepare, name, data, settings, folder) for name in names]:
                prepared.result()
            futures = {executor.submit(attempt, run, settings, folder, device, deadline): run for run in runs}
            for future in as_completed(futures):
                yield futures[future], future.result()


def earlier_rows(path: Path, made: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an earlier result that this one continues.

    Raises:
        click.ClickException: its settings, device or versions are others.
    """
    earlier = json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = {**made, "date": None, **settings}, {**earlier["machine"], "date": None, **earlier["settings"]}
    changed = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if changed:
        raise click.ClickException(
            f"{path.name} was made with another {changed[0]} ({theirs.get(changed[0])}, now {ours.get(changed[0])}); "
            f"leave out --resume to start anew"
        )
    return earlier["rows"]


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder with imdb.jsonl.xz and cifar10_jpeg.npz.")  # fmt: skip
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Only this task.")
@click.option("--ratio", "ratios", multiple=True, type=float, default=(10.0, 30.0), show_default=True)
@click.option("--seeds", default=4, show_default=True, help="Runs of each kind.")
@click.option("--workers", type=int, help="Processes that train side by side; 0: in this one. [10 on a GPU]")
@click.option("--device", help="Default: the GPU if there is one.")
@click.option("--minutes", type=float, help="Start no run after so long.")
@click.option("--resume", is_flag=True, help="Keep the rows of the file and add those that it lacks.")
@click.option("--quick", is_flag=True, help="Tiny models and samples, a smoke test; results go to out/.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Raw rows.")
@click.option("--document", type=click.Path(dir_okay=False, path_type=Path), help="Tables.")
def main(
    data: Path,
    tasks: tuple[str, ...],
    ratios: tuple[float, ...],
    seeds: int,
    workers: int | None,
    device: str | None,
    minutes: float | None,
    resume: bool,
    quick: bool,
    out: Path | None,
    document: Path | None,
) -> None:
    """Train every model that is asked for; write the raw rows and the tables."""
    begun = time.perf_counter()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if workers is None:
        workers = min(10, os.cpu_count() or 1) if device != "cpu" else 0
    settings = QUICK if quick else FULL
    out = out or (OUT / RESULTS.name if quick else RESULTS)
    document = document or (OUT / DOCUMENT.name if quick else DOCUMENT)
    result: dict[str, Any] = {"machine": machine(device), "settings": dataclasses.asdict(settings), "rows": []}
    if resume and out.exists():
        result["rows"] = earlier_rows(out, result["machine"], result["settings"])
    done = {Run(*(row[field] for field in Run._fields)) for row in result["rows"]}
    runs = [run for run in planned_runs(tasks or TASKS, ratios, SIGNS, seeds) if run not in done]
    report_slots(runs, settings, quick)
    failed = 0
    deadline = math.inf if minutes is None else time.time() + 60 * minutes
    for run, outcome in outcomes(runs, data, settings, device, workers, deadline):
        if outcome is None:
            continue
        if isinstance(outcome, str):
            failed += 1
            click.echo(f"{run} failed:\n{outcome}", err=True)
            continue
        result["rows"].append(outcome)
        write(out, json.dumps(result, indent=1) + "\n")
        click.echo(
            f"[{time.perf_counter() - begun:4.0f} s, {len(result['rows'])} runs] {run.task} ratio {run.ratio:g} "
            f"{run.sign} seed {run.seed}: {100 * outcome['accuracy'][-1]:.2f} % in {outcome['seconds']:.1f} s"
        )
    if result["rows"]:
        result["rows"].sort(key=lambda row: (TASKS.index(row["task"]), row["ratio"], row["sign"], row["seed"]))
        write(out, json.dumps(result, indent=1) + "\n")
        write(document, markdown(result))
        click.echo(markdown(result))
        click.echo(f"written to {out} and {document} in {time.perf_counter() - begun:.0f} s")
    if failed:
        raise click.ClickException(f"{failed} of {len(runs)} runs failed; --resume tries them again")


if __name__ == "__main__":
    main()

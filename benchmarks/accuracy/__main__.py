"""Trains models of as many stored parameters from scratch, ours and rivals, and records their rows.

Every finished run goes to benchmarks/results/accuracy.json at once, and a run that has a row is not made again, so a
campaign is resumed by the same command. `python -m benchmarks.accuracy.page` writes docs/accuracy.md from the rows.

    python -m benchmarks.accuracy --data DIR --group main --minutes 8
    python -m benchmarks.accuracy --data DIR --task resnet9 --method ours --ratio 100 --seeds 1
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.accuracy import tasks as recipes
from benchmarks.accuracy.campaign import Campaign, Failure
from benchmarks.accuracy.groups import GROUPS
from benchmarks.accuracy.methods import METHODS, check_changes
from benchmarks.accuracy.runs import Run, of_row
from benchmarks.accuracy.table import RESULTS
from benchmarks.rows import Row, dump_lines, load

OUT = Path(__file__).parents[2] / "out"
PER_GPU = 3
# Numbers above are slips, infinite ones too.
MOST = 1e9


class Number(click.FloatRange):
    """A range without NaN, which no comparison leaves out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number", param, ctx)
        return number


ABOVE_0 = Number(0, MOST, min_open=True)


def planned(
    groups: tuple[str, ...],
    tasks: tuple[str, ...],
    methods: tuple[str, ...],
    ratios: tuple[float, ...],
    seeds: int,
    rate: float | None,
) -> list[Run]:
    """Return the groups' runs, of the tasks, methods and ratios asked for; without a group, those of the cells named.

    Raises:
        click.UsageError: neither a group nor a whole cell is named.
    """  # fmt: skip
    if groups:
        runs = itertools.chain.from_iterable(GROUPS[group]() for group in groups)
        chosen = (
            run
            for run in runs
            if (not tasks or run.task in tasks)
            and (not methods or run.method in methods)
            and (not ratios or run.ratio in ratios)
            and run.seed < seeds
        )
    elif tasks and methods:
        cells = itertools.product(range(seeds), tasks, ratios or (1.0,), methods)
        chosen = (
            Run(task, method, 1.0 if method == "dense" else ratio, seed, rate) for seed, task, ratio, method in cells
        )
    else:
        raise click.UsageError("say what to train: --group, or --task and --method (and --ratio)")
    found = list(dict.fromkeys(chosen))
    for run in found:
        check_changes(run)
    return found


def devices_of(device: str | None, gpus: int | None, workers: int | None) -> list[str]:
    """Return a device for each worker, spread over the GPUs.

    Raises:
        click.UsageError: more GPUs are asked for than there are.
    """
    present = torch.cuda.device_count() if device is None else 0
    if not present:
        return [device or "cpu"] * (workers or 1)
    if gpus is not None and not 1 <= gpus <= present:
        raise click.UsageError(f"--gpus {gpus}: this machine has {present}")
    used = gpus or present
    return [f"cuda:{index % used}" for index in range(workers or PER_GPU * used)]


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other campaigns from the same rows: each writes all that it knows of.

    Raises:
        click.ClickException: another has them.
    """
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    # It goes with the process, however that ends. Each user has files of their own there.
    with (Path(tempfile.gettempdir()) / f"accuracy-{os.getuid()}-{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException(
                f"another campaign is writing {out}; wait for it, or give this one a file of its own (--out)"
            ) from None
        yield


def rows_in(path: Path, smoke: bool) -> list[Row]:
    """Return a file's rows.

    Raises:
        click.ClickException: it holds something else, or rows of a smoke test beside others.
    """
    try:
        rows: list[Row] = load(path)["rows"]
        for row in rows:
            of_row(row)
        mixed = any(row["smoke"] != smoke for row in rows)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise click.ClickException(
            f"{path} is no file of rows ({type(error).__name__}: {error}); repair it, or name another by --out"
        ) from error
    if mixed:
        found, made = ("real runs", "a smoke test's") if smoke else ("a smoke test", "real")
        raise click.ClickException(f"{path} has rows of {found}, and {made} do not go with them; name another by --out")
    return rows


def outcome_text(row: Row) -> str:
    if "unreachable" in row:
        return f"not reachable: {row['unreachable']}"
    captured = "" if row["captured"] or row["machine"]["cuda"] is None else ", without a CUDA graph"
    return f"{100 * row['accuracy'][-1]:.2f} %, {row['stored']:,} stored, {row['seconds']:.1f} s{captured}"


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder with CIFAR-10 and IMDB, packed or in their usual formats.")  # fmt: skip
@click.option("--group", "groups", multiple=True, type=click.Choice(list(GROUPS)), help="Named group of runs.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(recipes.TASKS)), help="Only this task.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Only this method.")
@click.option("--ratio", "ratios", multiple=True, type=Number(1, MOST), help="Only this ratio.")
@click.option("--rate", type=ABOVE_0, help="Learning rate, without trials (not with --group).")
@click.option("--seeds", default=3, type=click.IntRange(1), show_default=True, help="Seeds at most.")
@click.option("--gpus", type=int, help="GPUs to use.  [all]")
@click.option(
    "--workers", type=click.IntRange(0), help=f"Processes, spread over the GPUs; 0: in this one.  [{PER_GPU} a GPU]"
)
@click.option("--device", help="Instead of the GPUs, such as cpu.")
@click.option("--minutes", type=Number(0, MOST), help="Start no run that would end later.")
@click.option("--epochs-scale", default=1.0, type=ABOVE_0, show_default=True, help="Multiplies all epochs.")
@click.option("--no-graph", is_flag=True, help="Do not replay steps from CUDA graphs.")
@click.option("--smoke", is_flag=True, help="Tiny models, few examples, one epoch; rows go to out/.")
@click.option("--list", "only_list", is_flag=True, help="Print what would run, and stop.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path),
              help="Raw rows. They do not tell data sets apart: give other data another file.")  # fmt: skip
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), default=OUT / "accuracy-data",
              help="Folder for decoded data.")  # fmt: skip
def main(
    data: Path,
    groups: tuple[str, ...],
    tasks: tuple[str, ...],
    methods: tuple[str, ...],
    ratios: tuple[float, ...],
    rate: float | None,
    seeds: int,
    gpus: int | None,
    workers: int | None,
    device: str | None,
    minutes: float | None,
    epochs_scale: float,
    no_graph: bool,
    smoke: bool,
    only_list: bool,
    out: Path | None,
    cache: Path,
) -> None:
    begun = time.time()
    console = Console(soft_wrap=True, highlight=False)
    if groups and rate is not None:
        raise click.UsageError("--rate is for the cells that --task and --method name; a group's runs have their own")
    out = out or (OUT / RESULTS.name if smoke else RESULTS)
    names = {name: recipes.smoke(task) if smoke else recipes.scaled(task, epochs_scale)
             for name, task in recipes.TASKS.items()}  # fmt: skip
    asked = planned(groups, tasks, methods, ratios, seeds, rate)
    if not asked:
        raise click.UsageError("the groups have no run of that task, method, ratio and seed")
    if not only_list:
        # Before rows are read, until they are written.
        click.get_current_context().with_resource(alone(out))
    campaign = Campaign(
        names,
        data,
        cache,
        devices_of(device, gpus, 1 if workers == 0 else workers),
        rows_in(out, smoke),
        in_process=workers == 0,
        scale=epochs_scale,
        deadline=math.inf if minutes is None else begun + 60 * minutes,
        graph=not no_graph,
        smoke=smoke,
    )
    runs = campaign.missing(asked)
    if only_list:
        for run in runs:
            console.print(str(run))
        console.print(f"{len(runs)} runs")
        return
    if not runs:
        console.print(f"nothing to do: every run asked for has a row in {out}; --out names another file")
        return
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=len(runs))
        for run, outcome in campaign.outcomes(runs):
            progress.advance(bar)
            if isinstance(outcome, Failure):
                failed.append(run)
                progress.console.print(f"{run} failed:\n{outcome.text}", markup=False)
                continue
            dump_lines(out, campaign.rows)
            progress.console.print(f"[{time.time() - begun:4.0f} s] {run}: {outcome_text(outcome)}", markup=False)
        progress.advance(bar, len(campaign.unchanged))
    done = len(runs) - len(failed) - len(campaign.skipped) - len(campaign.unchanged)
    console.print(f"{done} of {len(runs)} runs done in {time.time() - begun:.0f} s; rows in {out}")
    if campaign.unchanged:
        console.print(f"{len(campaign.unchanged)} have a row with what the new trials chose")
    if campaign.skipped:
        console.print(f"{len(campaign.skipped)} did not fit in the time; the same command goes on with them")
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()

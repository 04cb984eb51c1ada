"""Trains language models of as many stored parameters from scratch, ours and rivals, and records their rows.

Every finished run goes to benchmarks/results/language.json at once, and a run that has a row is not made again, so a
campaign is resumed by the same command. `python -m benchmarks.accuracy.page` writes docs/accuracy.md from the rows.

    python -m benchmarks.accuracy.language.tokens --data DIR
    python -m benchmarks.accuracy.language --minutes 8
    python -m benchmarks.accuracy.language --only "global, ratio 10, seed 0" --rate 4e-3
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks.accuracy.__main__ import ABOVE_0, MOST, OUT, Number, alone, devices_of
from benchmarks.accuracy.campaign import Failure
from benchmarks.accuracy.language import methods, tokens, trials
from benchmarks.accuracy.language.campaign import Campaign
from benchmarks.accuracy.language.methods import METHODS
from benchmarks.accuracy.language.runs import RECIPE, SMOKE, Recipe, Run, of_row
from benchmarks.accuracy.language.sizes import RULES
from benchmarks.accuracy.language.table import RESULTS
from benchmarks.rows import Row, dump_lines, load
from roastify.errors import ConfigError

# Most important first.
RATIOS = (10.0, 100.0, 30.0, 3.0)


def asked_for(
    ratios: Sequence[float], names: Sequence[str], seeds: int, recipe: Recipe, settings: dict[str, Any]
) -> list[Run]:
    """Return the runs of all methods, ratios and seeds: of one seed all, then of the next.

    Args:
        ratios: for all methods but the dense model.
        names: of methods.
        seeds: how many.
        recipe: whose steps and width they take.
        settings: `rate`, `sizes` and `changes`, where they are given.
    """
    cells = [(name, ratio) for ratio in ratios for name in names if name != "dense"]
    if "dense" in names:
        cells.insert(0, ("dense", 1.0))
    settings = {**settings, "width": recipe.shape.width}
    runs = [Run(name, ratio, seed, recipe.steps, **settings) for seed in range(seeds) for name, ratio in cells]
    # A method without rules has no sizes to choose.
    return [dataclasses.replace(run, sizes="") if run.method not in RULES else run for run in runs]


def rows_in(path: Path, digest: str, smoke: bool) -> list[Row]:
    """Return a file's rows.

    Raises:
        click.ClickException: it holds something else, or rows that do not go with those to be made.
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
    others = sorted({row["tokens"] for row in rows if row.get("tokens") not in (None, digest)})
    if others:
        raise click.ClickException(
            f"{path} has rows of other tokens ({', '.join(others)}) than these ({digest}), and their losses cannot be "
            f"compared; read the same reviews, or name another file by --out"
        )
    return rows


def changed(texts: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """Return the settings that NAME=VALUE texts give; a value is JSON, or else a word.

    Raises:
        click.BadParameter: a text has no =.
    """
    found = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not given:
            raise click.BadParameter(f"{text!r}: expected NAME=VALUE, such as fold=8", param_hint="--set")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return tuple(sorted(found.items()))


def outcome_text(row: Row) -> str:
    if "unreachable" in row:
        return f"not reachable: {row['unreachable']}"
    captured = "" if row["captured"] or row["machine"]["cuda"] is None else ", without a CUDA graph"
    loss = "diverged" if row["loss"] is None else f"loss {row['loss']:.4f}"
    return (
        f"{loss}, {row['stored']:,} stored, {row['multiply_adds'] / 1e6:.2f} M multiply-adds a token, "
        f"{row['step']['median_ms']:.2f} ms a step, {row['seconds']:.1f} s{captured} ({row['note']})"
    )


@click.command(help=__doc__)
@click.option("--tokens", "path", type=click.Path(dir_okay=False, path_type=Path), default=tokens.FILE,
              show_default=True, help="The tokens' file.")  # fmt: skip
@click.option(
    "--only", multiple=True, help="Regular expression of runs, such as 'smaller, ratio 10, seed 0'; see --list."
)
@click.option("--method", "names", multiple=True, type=click.Choice(list(METHODS)), help="Only this method.")
@click.option("--ratio", "ratios", multiple=True, type=Number(1, MOST), help="These ratios.  [10, 100, 30, 3]")
@click.option("--seeds", default=3, type=click.IntRange(1), show_default=True, help="Seeds at most.")
@click.option("--rate", type=ABOVE_0, help="Learning rate, without trials of it.")
@click.option("--sizes", help="Name of a rule for a rival's sizes, without trials of them; --list has the names.")
@click.option("--set", "changes", multiple=True, help="NAME=VALUE: a setting of the conversion, such as fold=8.")
@click.option("--width", type=click.IntRange(8, 4096), help=f"Width of the dense model.  [{RECIPE.shape.width}]")
@click.option("--steps", type=click.IntRange(1), help=f"Steps of a run.  [{RECIPE.steps:,}]")
@click.option("--minutes", type=Number(0, MOST), help="Start no run that would end later.")
@click.option("--gpus", type=int, help="GPUs to use.  [all]")
@click.option(
    "--workers", type=click.IntRange(0), help="Processes; 0: in this one. Two on a GPU spoil times.  [1 a GPU]"
)
@click.option("--device", help="Instead of the GPUs, such as cpu.")
@click.option("--no-graph", is_flag=True, help="Do not replay steps from CUDA graphs.")
@click.option("--smoke", is_flag=True, help="Tiny models and a few steps; rows go to out/.")
@click.option(
    "--list", "only_list", is_flag=True, help="Print what would run, and the trials that are known, and stop."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Raw rows.")
def main(
    path: Path,
    only: tuple[str, ...],
    names: tuple[str, ...],
    ratios: tuple[float, ...],
    seeds: int,
    rate: float | None,
    sizes: str | None,
    changes: tuple[str, ...],
    width: int | None,
    steps: int | None,
    minutes: float | None,
    gpus: int | None,
    workers: int | None,
    device: str | None,
    no_graph: bool,
    smoke: bool,
    only_list: bool,
    out: Path | None,
) -> None:
    begun = time.time()
    console = Console(soft_wrap=True, highlight=False)
    out = out or (OUT / RESULTS.name if smoke else RESULTS)
    recipe = SMOKE if smoke else RECIPE
    shape = recipe.shape.at_width(width or recipe.shape.width)
    recipe = dataclasses.replace(recipe, shape=shape, steps=steps or recipe.steps)
    settings = {"rate": rate, "sizes": sizes, "changes": changed(changes)}
    runs = asked_for(ratios or RATIOS, names or tuple(METHODS), seeds, recipe, settings)
    try:
        runs = [run for run in runs if not only or any(re.search(pattern, str(run)) for pattern in only)]
    except re.error as error:
        raise click.UsageError(f"--only is a regular expression: {error}") from error
    if not runs:
        raise click.UsageError(f"no run matches {' or '.join(map(repr, only))}; --list has the names")
    for run in runs:
        check(run, recipe)
    digest = tokens.read(path).digest
    if not only_list:
        # Before rows are read, until they are written.
        click.get_current_context().with_resource(alone(out))
    campaign = Campaign(
        recipe,
        path,
        ["cpu"] if only_list else devices(device, gpus, workers),
        rows_in(out, digest, smoke),
        in_process=workers == 0,
        deadline=math.inf if minutes is None else begun + 60 * minutes,
        graph=not no_graph,
        smoke=smoke,
    )
    left = campaign.missing(runs)
    if only_list:
        known = [trial for run in left for trial in trials.wanted(run, recipe, campaign.by_run)]
        for run in dict.fromkeys(itertools.chain((t for t in known if t not in campaign.by_run), left)):
            console.print(str(run), markup=False)
        for name in sorted({run.method for run in left} & set(RULES)):
            console.print(f"--sizes of {name}: {'; '.join(RULES[name])}", markup=False)
        return
    if not left:
        console.print(f"nothing to do: every run asked for has a row in {out}; --out names another file")
        return
    failed = made = 0
    for run, outcome in campaign.outcomes(left):
        if isinstance(outcome, Failure):
            failed += 1
            console.print(f"{run} failed:\n{outcome.text}", markup=False)
            continue
        made += 1
        dump_lines(out, campaign.rows)
        console.print(f"[{time.time() - begun:4.0f} s] {run}: {outcome_text(outcome)}", markup=False)
    console.print(f"{made} rows, trials included, in {time.time() - begun:.0f} s; rows in {out}")
    if campaign.skipped:
        console.print(f"{len(campaign.skipped)} runs did not fit in the time; the same command goes on with them")
    if failed:
        raise click.ClickException(f"{failed} runs failed; the same command tries them again")


def devices(device: str | None, gpus: int | None, workers: int | None) -> list[str]:
    """Return a device for each worker: by default one on each GPU, so that steps are timed alone."""
    present = torch.cuda.device_count() if device is None else 0
    if present and workers is None:
        workers = gpus or present
    return devices_of(device, gpus, workers or 1)


def check(run: Run, recipe: Recipe) -> None:
    """Raise an error for a run whose settings mean nothing.

    Raises:
        click.UsageError: it names sizes that its method has no rule for, or a setting that nothing reads.
    """
    if run.sizes and run.sizes not in RULES.get(run.method, {}):
        rules = "; ".join(RULES.get(run.method, {})) or "none"
        raise click.UsageError(f"--sizes {run.sizes!r}: the rules of {run.method} are {rules}")
    try:
        methods.check(run)
        if METHODS[run.method].is_ours:
            methods.conversion(run)
    except (ValueError, ConfigError) as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    main()

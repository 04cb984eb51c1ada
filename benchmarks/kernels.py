"""Benchmark of the operators on a GPU: beside cuBLAS, HashedNet, and what the GPU itself allows.

Every case is checked against float64 first. Raw rows go to benchmarks/results/kernels.json as they are measured, so a
run that is cut short keeps what it has; rows of regimes that are not run stay if they are of the same GPU and versions.
`python -m benchmarks.page` makes docs/performance.md of them.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks import timing
from benchmarks.cases import REGIMES, Case, Effort, forget
from benchmarks.layers import TILE
from benchmarks.rows import FOLDER, Row, Rows, machine

RESULTS = FOLDER / "kernels.json"
# What must agree for rows of another run to stay beside this one's.
SAME = ("gpu", "torch", "triton", "cuda", "roastify")
QUICK_CASES, QUICK_RUNS = 2, 5


def attempt(case: Case) -> Row:
    """Return the case's row; one that fails says why, and the others are still measured."""
    try:
        return case.facts | case.measure()
    except Exception as error:
        with contextlib.suppress(Exception):
            forget()
        return case.facts | {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def line(row: Row) -> str:
    """Return a row in one line."""
    name = f"{row['regime']:9} {row.get('what', ''):18} {row['shape'][0]}×{row['shape'][1]}"
    parts = [f"{name:42} {row['dtype']:8} {row['pool_mb']:6.1f} MB {row['rows']:5} rows {row['sign']:7}"]
    if row["regime"] == "folded":
        parts.append(f"fold {row['fold']} {'with backward' if row['backward'] else 'forward      '}")
    if "tf32" in row:
        parts.append("tf32" if row["tf32"] else "    ")
    sides = ("dense", "pool", "folded", "gathered", "hashednet", "hashednet_gathered")
    parts += [f"{side} {row[side]['median_us']:.2f}" for side in sides if side in row]
    parts += [f"{name} {row[name]:.2f}" for name in row if name.endswith("_over_pool")]
    parts += [f"{name} {row[name]}" for name in row if name.endswith("_equal")]
    if "floor" in row:
        parts.append(f"floor {row['floor']['pool_us']:.2f} ({row['floor']['bound']})")
    if "gb_s" in row:
        parts.append(f"{row['gb_s']:.0f} GB/s")
    if row.get("aim") is not None:
        parts.append(f"aim {row['aim']:g}")
    return "  ".join([*parts, row.get("failed", "")])


@click.command()
@click.option("--regime", "chosen", default=",".join(REGIMES), show_default=True, help="Which to measure.")
@click.option("--quick", is_flag=True, help="The first cases of each regime, few replays, nothing written by default.")
@click.option("--output", type=click.Path(path_type=Path), help=f"Where to write; by default {RESULTS.name}.")
def main(chosen: str, quick: bool, output: Path | None) -> None:
    """Measure the operators on this machine's GPU."""
    regimes = chosen.split(",")
    if unknown := [name for name in regimes if name not in REGIMES]:
        raise click.BadParameter(
            f"unknown: {', '.join(unknown)}; there are {', '.join(REGIMES)}", param_hint="--regime"
        )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    begun = time.perf_counter()
    torch.manual_seed(0)
    ceilings = timing.ceilings()
    made = machine("cuda", *SAME, "date") | {"tile": list(TILE), "ceilings": ceilings}
    console.print(made)
    results = Rows(output or (None if quick else RESULTS), made, SAME, lambda row: list(REGIMES).index(row["regime"]))
    results.rows = [row for row in results.rows if row["regime"] not in regimes]
    effort = Effort(QUICK_RUNS if quick else timing.MOST_RUNS, ceilings)
    failed = 0
    for regime in regimes:
        start = time.perf_counter()
        cases = list(REGIMES[regime](effort))
        for case in cases[:QUICK_CASES] if quick else cases:
            row = {"regime": regime, **attempt(case), "date": made["date"]}
            failed += "failed" in row
            results.add(row)
            console.print(line(row))
        forget()
        console.print(f"{regime}: {time.perf_counter() - start:.0f} s")
    console.print(f"{time.perf_counter() - begun:.0f} s in all; {failed} failed; written to {results.path}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

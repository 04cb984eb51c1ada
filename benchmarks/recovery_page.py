"""The results in docs/recovery.md, from the raw rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.recovery_runs import DENSE, RECOVERED, SCRATCH
from benchmarks.signs_tasks import TASKS
from benchmarks.stats import Difference, mean_and_error

RESULTS = Path(__file__).parent / "results" / "recovery.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "recovery.md"
BEGIN = "<!-- results: written by `python -m benchmarks.recovery` -->"
# A difference of a larger p is none.
_UNCLEAR = 0.05


def best_rate(rows: list[dict[str, Any]], task: str, ratio: float, arm: str) -> float | None:
    """Return the learning rate with the best accuracy on held-out examples with the first seed; None before any."""
    tried = [row for row in rows if (row["task"], row["ratio"], row["arm"], row["seed"]) == (task, ratio, arm, 0)]
    return max(tried, key=lambda row: row["validation"])["lr"] if tried else None


def by_seed(rows: list[dict[str, Any]], task: str, ratio: float, arm: str) -> dict[int, dict[str, Any]]:
    """Return a cell's rows at the rate that was chosen."""
    lr = best_rate(rows, task, ratio, arm)
    return {
        row["seed"]: row
        for row in rows
        if (row["task"], row["ratio"], row["arm"]) == (task, ratio, arm) and row["lr"] == lr
    }


def _percent(values: list[float]) -> str:
    mean, error = mean_and_error(100 * value for value in values)
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {error:.2f}"


def _mean(rows: dict[int, dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows.values()) / len(rows)


def markdown(result: dict[str, Any] | None) -> str:
    """Return the results as a table and what it says; without any, that there are none."""
    if result is None:
        return "Not measured yet.\n"
    rows, made, settings = result["rows"], result["machine"], result["settings"]
    cells = sorted(
        {(row["task"], row["ratio"]) for row in rows if row["arm"] != DENSE},
        key=lambda cell: (TASKS.index(cell[0]), cell[1]),
    )
    versions = f"torch {made['torch']}" + (f", Triton {made['triton']}" if made["triton"] else "")
    lines = [
        f"Test accuracy in %, mean ± standard error over seeds, from [the raw rows](../benchmarks/results/"
        f"{RESULTS.name}): {made['device']}, {versions}, {made['date']}. Each side takes as many steps as "
        f"{settings['seconds']:g} s allow by a timing of it beforehand (alignment included); in brackets are steps, "
        f"the seconds that they then took, and the learning rate. `projected` is the recovered side before anything is "
        f"done.",
        "",
        "| task | ratio | dense (s) | projected | recovered | from scratch | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    for task, ratio in cells:
        dense, ours, theirs = (
            by_seed(rows, task, each, arm) for each, arm in ((1.0, DENSE), (ratio, RECOVERED), (ratio, SCRATCH))
        )
        seeds = [seed for seed in ours if seed in theirs]
        pairs = [100 * (ours[seed]["accuracy"] - theirs[seed]["accuracy"]) for seed in seeds]
        difference = Difference(*mean_and_error(pairs), len(pairs) - 1) if pairs else None
        title = settings[task]["title"]
        lines.append(
            f"| {title} | {ratio:g} | {_cell(dense)} ({_mean(dense, 'seconds'):.1f}) | "
            f"{_percent([row['projected'] for row in ours.values()]) if ours else '–'} | "
            f"{_side(ours)} | {_side(theirs)} | {difference or '–'} |"
        )
        if difference is not None:
            unclear = math.isnan(difference.p) or difference.p > _UNCLEAR
            what = "not to be told apart from" if unclear else "above" if difference.mean > 0 else "below"
            verdicts.append(f"- {title}, ratio {ratio:g}: recovered is {what} trained from scratch.")
    return "\n".join([*lines, "", *verdicts, ""])


def _cell(rows: dict[int, dict[str, Any]]) -> str:
    return _percent([row["accuracy"] for row in rows.values()]) if rows else "–"


def _side(rows: dict[int, dict[str, Any]]) -> str:
    if not rows:
        return "–"
    first = next(iter(rows.values()))
    return f"{_cell(rows)} ({first['steps']}, {_mean(rows, 'seconds'):.1f}, {first['lr']:g})"

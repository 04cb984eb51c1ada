"""The plots of docs/accuracy.md: accuracy against stored parameters, a line for each kind of method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import matplotlib.ticker
from matplotlib.figure import Figure

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.pruning import SCORES
from benchmarks.accuracy.table import Table
from benchmarks.accuracy.tasks import TASKS
from benchmarks.plots import BLACK, BLUE, GREEN, ORANGE, PINK, WIDTH, YELLOW, name_ends, save

# Points below our lowest that the picture still shows: a rival that learned nothing would press all others together.
_BELOW = 8


class Kind(NamedTuple):
    """A line of the plots: which methods it is of, the best of them at each ratio, and how it looks."""

    wanted: Callable[[str], bool]
    colour: str
    marker: str


KINDS = {
    "roastify": Kind(lambda name: name == "ours", BLUE, "o"),
    "best other hashing": Kind(lambda name: METHODS[name].kind == "hash", YELLOW, "^"),
    "smaller dense model": Kind(lambda name: name == "smaller", ORANGE, "s"),
    "low rank": Kind(lambda name: name == "lowrank", GREEN, "D"),
    "best pruned": Kind(lambda name: name in SCORES, PINK, "v"),
}


def compare(table: Table, task: str) -> Figure:
    """Mean accuracy by stored parameters, with the range of the seeds; fewer parameters are further right."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.9))
    ends, stored_at, lowest = {}, {}, []
    for name, kind in KINDS.items():
        points = []
        for ratio in table.ratios(task):
            if ratio > 1 and (best := table.best(task, ratio, kind.wanted)) is not None:
                values = table.accuracies(task, best[0], ratio).values()
                points.append((table.stored(task, best[0], ratio), best[1], min(values), max(values)))
                stored_at[ratio] = points[-1][0] if ratio not in stored_at else stored_at[ratio]
        if points:
            stored, mean, low, high = zip(*points, strict=True)
            ours = name == "roastify"
            axes.errorbar(
                stored,
                mean,
                [[m - x for m, x in zip(mean, low, strict=True)], [x - m for m, x in zip(mean, high, strict=True)]],
                color=kind.colour,
                marker=kind.marker,
                linewidth=2.6 if ours else 1.6,
                markersize=7 if ours else 5.5,
                capsize=2.5,
                zorder=3 if ours else 2,
            )
            ends[name] = mean[-1], kind.colour
            lowest += mean if ours else []
    dense = table.mean(task, "dense", 1.0)
    if dense is not None:
        axes.axhline(dense, color=BLACK, linewidth=1.2, linestyle="--", zorder=1)
        ends[f"dense, {table.stored(task, 'dense', 1.0) / 1e6:.1f} M"] = dense, BLACK
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(list(stored_at.values()), [f"{_short(n)}\nratio {ratio:g}" for ratio, n in stored_at.items()])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("stored parameters")
    axes.set_ylabel("test accuracy, %")
    if lowest and axes.get_ylim()[0] < min(lowest) - _BELOW:
        axes.set_ylim(bottom=min(lowest) - _BELOW)
        axes.set_xlabel("stored parameters (what lies below the picture is in the tables)")
    axes.set_title(f"{TASKS[task].title}: means, with the lowest and highest of the seeds")
    name_ends(axes, ends)
    return figure


def _short(count: float) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def draw(table: Table, folder: Path) -> list[Path]:
    """Draw every task that there are rows for; return the files written."""
    return save({f"accuracy-{task}": partial(compare, table, task) for task in table.tasks()}, folder)

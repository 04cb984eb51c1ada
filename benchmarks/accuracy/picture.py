"""The plots of docs/accuracy.md: accuracy against stored parameters, a line for each method."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.table import Table
from benchmarks.accuracy.tasks import TASKS
from benchmarks.plots import COLOURS, MARKERS, save
from benchmarks.stats import mean_and_error

# Ours in front, in the first colour; the others by their kind.
_LINES = {"ours": "-", "hash": "--", "other": "-."}
# Points below our lowest that the picture still shows: a rival that learned nothing would press all others together.
_BELOW = 10


def compare(table: Table, task: str) -> Figure:
    """Mean accuracy with standard error by stored parameters, every method."""
    figure, axes = plt.subplots(figsize=(10, 5.5))
    methods = [method for method in table.methods(task) if METHODS[method].kind != "dense"]
    dense = table.mean(task, "dense", 1.0)
    if dense is not None:
        axes.axhline(dense, color="#444444", linewidth=1.2, label=f"dense, {dense:.1f} %", zorder=1)
    for method in methods:
        _line(axes, table, task, method)
    axes.set_xscale("log")
    axes.set_xlabel("stored parameters")
    axes.set_ylabel("test accuracy, %")
    ours = [mean for ratio in table.ratios(task) if (mean := table.mean(task, "ours", ratio)) is not None]
    if ours and axes.get_ylim()[0] < min(ours) - _BELOW:
        axes.set_ylim(bottom=min(ours) - _BELOW)
        axes.set_xlabel("stored parameters (what lies below the picture is in the table)")
    axes.set_title(TASKS[task].title, loc="left")
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    return figure


def _line(axes: Axes, table: Table, task: str, method: str) -> None:
    # By the place in the list of all, so that a method looks the same in every picture.
    index = list(METHODS).index(method) - 1
    points = []
    for ratio in table.ratios(task):
        values = table.accuracies(task, method, ratio)
        if values:
            points.append((table.stored(task, method, ratio), *mean_and_error(values.values())))
    if not points:
        return
    stored, mean, error = zip(*sorted(points), strict=True)
    axes.errorbar(
        stored,
        mean,
        [0 if value != value else value for value in error],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
        linestyle=_LINES[METHODS[method].kind],
        linewidth=2.4 if method == "ours" else 1.4,
        markersize=7 if method == "ours" else 5,
        zorder=3 if method == "ours" else 2,
        label=METHODS[method].title,
    )


def draw(table: Table, folder: Path) -> list[Path]:
    """Draw every task that there are rows for; return the files written."""
    figures = {f"accuracy-{task}": partial(compare, table, task) for task in table.tasks()}
    return list(save(figures, folder).values())

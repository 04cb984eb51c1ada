"""The plots of docs/training-cost.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import BLACK, BLUE, GREEN, ORANGE, SKY, WIDTH, YELLOW, bars, line_at_one, save
from benchmarks.rows import Row

# From the axis outwards; their sum is the peak.
PARTS = {
    "parameters": BLUE,
    "buffers": SKY,
    "gradients": GREEN,
    "optimizer": YELLOW,
    "rest": "#bbbbbb",
}
NAMES = {"optimizer": "optimizer state", "rest": "activations and the rest"}


def with_memory(rows: Sequence[Row]) -> list[Row]:
    """Return each case once, whose memory a GPU counted in steps that were neither compiled nor replayed."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row["mode"] in ("eager", "graphed") and row["dense"]["memory"]["peak"] is not None:
            found.setdefault((row["task"], row["ratio"]), row)
    return list(found.values())


def memory(rows: Sequence[Row]) -> Figure | None:
    """The parts of peak memory, dense and converted, of training without a compiler; a panel for each model."""
    rows = with_memory(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if not tasks:
        return None
    bars = {
        task: [
            ("dense", next(row for row in rows if row["task"] == task)["dense"]["memory"]),
            *((f"ratio {row['ratio']}", row["converted"]["memory"]) for row in rows if row["task"] == task),
        ]
        for task in tasks
    }
    heights = [len(found) for found in bars.values()]
    figure, grid = plt.subplots(
        len(tasks), 1, figsize=(WIDTH, 0.5 * sum(heights) + 1.8), squeeze=False, height_ratios=heights
    )
    for axes, (task, found) in zip(grid[:, 0], bars.items(), strict=True):
        _stack(axes, [name for name, _ in found], [held for _, held in found])
        axes.set_title(task, loc="left")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    grid[-1, 0].set_xlabel("peak memory of a training step, GB")
    return figure


def _stack(axes: Axes, names: Sequence[str], held: Sequence[dict[str, int]]) -> None:
    begins = [0.0] * len(names)
    for part, colour in PARTS.items():
        widths = [found[part] / 1e9 for found in held]
        axes.barh(names, widths, left=begins, color=colour, height=0.65, label=NAMES.get(part, part))
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def time(rows: Sequence[Row]) -> Figure | None:
    """Converted step time over dense step time, with the aims."""
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 0.34 * len(rows) + 1.6))
    values = [row["step_ratio"] for row in rows]
    names = [f"{row['task']}, {row['mode']}, ratio {row['ratio']}" for row in rows]
    bars(axes, names, values, [value <= 1 for value in values])
    aims = [(row["time_aim"], place) for place, row in enumerate(rows) if row["time_aim"] is not None]
    if aims:
        axes.plot(*zip(*aims, strict=True), "|", color="#000000", markersize=16, markeredgewidth=2, label="aims")
        axes.legend(frameon=False)
    axes.set_xlim(0, max(*values, 1) * 1.12)
    axes.set_xlabel("time of a converted training step ÷ time of a dense one")
    return figure


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Scaling efficiency and bytes of gradients, on the most GPUs that were measured."""
    rows = [row for row in rows if row.get("efficiency") is not None]
    if not rows:
        return None
    most = max(row["gpus"] for row in rows)
    rows = [row for row in rows if row["gpus"] == most]
    groups = list(dict.fromkeys((row["task"], row["kind"]) for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.6))
    width = 0.8 / len(sides)
    for index, (side, colour) in enumerate(zip(sides, [BLACK, BLUE, ORANGE], strict=False)):
        for axes, value in zip(panels, ("efficiency", "gradient_mb"), strict=True):
            found = {
                groups.index((row["task"], row["kind"])): row[value]
                for row in rows
                if row["side"] == side and row[value] is not None
            }
            places = [place + (index - (len(sides) - 1) / 2) * width for place in found]
            axes.bar(places, list(found.values()), width * 0.92, color=colour, label=side.replace("=", " "))
    for axes, title in zip(panels, (f"scaling efficiency on {most} GPUs", "MB of gradients a step"), strict=True):
        axes.set_xticks(range(len(groups)), [f"{task}\n{kind}" for task, kind in groups])
        axes.grid(axis="x", visible=False)
        axes.set_title(title, loc="left")
    line_at_one(panels[0])
    panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(sides), frameon=False)
    return figure


def draw(single: Sequence[Row], several: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what there are rows for; return the files written."""
    figures = {"memory": partial(memory, single), "time": partial(time, single), "scaling": partial(scaling, several)}
    return save({f"training-{name}": figure for name, figure in figures.items()}, folder)

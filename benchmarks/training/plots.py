"""The plots of docs/training-cost.md: the time of a step, and the memory it takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.plots import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, WIDTH, YELLOW, line_at_one, save
from benchmarks.rows import Row, is_folded

# How a step runs: its colour and marker.
MODES = {
    "graphed": ("as a CUDA graph", BLUE, "o"),
    "reduce-overhead": ('compiled, "reduce-overhead"', SKY, "D"),
    "compiled": ("compiled by default", PINK, "s"),
    "eager": ("eager", ORANGE, "^"),
}
# From the axis outwards; their sum is the peak.
PARTS = {
    "parameters": ("parameters", BLUE),
    "gradients": ("gradients", GREEN),
    "optimizer": ("optimizer's state", YELLOW),
    "rest": ("activations and the rest", "#bbbbbb"),
}


def with_memory(rows: Sequence[Row]) -> list[Row]:
    """Return each model's row of the lowest ratio whose memory a GPU counted, in steps that were not compiled.

    Variants of a model ("bert-base, no folds" beside "bert-base") are left out.
    """
    tasks = {row["task"] for row in rows}
    found: dict[str, Row] = {}
    for row in rows:
        of_another = row["task"].partition(", ")[0] in tasks - {row["task"]}
        counted = row["mode"] in ("eager", "graphed") and row["dense"]["memory"]["peak"] is not None
        if counted and not of_another and row["ratio"] <= found.get(row["task"], row)["ratio"]:
            found.setdefault(row["task"], row)
    return list(found.values())


def memory(rows: Sequence[Row]) -> Figure | None:
    """The parts of peak memory, converted under dense, in percent of the dense model's peak."""
    rows = with_memory(rows)
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 0.62 * len(rows) + 1.3))
    names, begins = [], [0.0] * (2 * len(rows))
    sides = [(row, side) for row in rows for side in ("dense", "converted")]
    # A little room between models.
    places = [index + 0.3 * (index // 2) for index in range(len(sides))]
    for part, (title, colour) in PARTS.items():
        widths = []
        for row, side in sides:
            held = row[side]["memory"]
            size = held[part] + (held["buffers"] if part == "rest" else 0)
            widths.append(100 * size / row["dense"]["memory"]["peak"])
        axes.barh(places, widths, left=begins, color=colour, height=0.8, label=title)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    for row, side in sides:
        name = "dense" if side == "dense" else f"ratio {row['ratio']:g}"
        names.append(f"{row['task']}, {name}" if side == "dense" else name)
    for place, end, (row, side) in zip(places, begins, sides, strict=True):
        text = f"{row[side]['memory']['peak'] / 1e9:.1f} GB"
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_yticks(places, names)
    axes.set_xlim(0, 113)
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("peak memory of a training step, % of the dense model's")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def time(rows: Sequence[Row]) -> Figure | None:
    """Converted step time over dense step time: a line for each model and ratio, a marker for each way to run it."""
    if not rows:
        return None
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = sorted(
        {(row["task"], row["ratio"]) for row in rows}, key=lambda cell: (_first(tasks, cell[0]), cell[0], cell[1])
    )
    figure, axes = plt.subplots(figsize=(WIDTH, 0.33 * len(cells) + 1.6))
    line_at_one(axes, horizontal=False)
    for mode, (title, colour, marker) in MODES.items():
        label: str | None = title
        for row in rows:
            if row["mode"] == mode:
                place = cells.index((row["task"], row["ratio"]))
                filled = colour if is_folded(row) else "white"
                axes.plot(
                    row["step_ratio"],
                    place,
                    marker,
                    color=colour,
                    markerfacecolor=filled,
                    markeredgewidth=1.8,
                    markersize=7,
                    label=label if is_folded(row) else None,
                )
                label = None if is_folded(row) else label
        if label is not None and any(row["mode"] == mode for row in rows):
            axes.plot([], [], marker, color=colour, markersize=7, label=title, linestyle="none")
    if not all(is_folded(row) for row in rows):
        title = "hollow: no layer folded"
        axes.plot([], [], "o", color=BLACK, markerfacecolor="white", markeredgewidth=1.8, label=title, linestyle="none")
    aims = [(row["time_aim"], cells.index((row["task"], row["ratio"])), row["mode"]) for row in rows]
    aims = [aim for aim in aims if aim[0] is not None]
    for value, place, mode in aims:
        axes.plot(value, place, "|", color=MODES[mode][1], markersize=13)
    if aims:
        axes.plot([], [], "|", color=BLACK, markersize=13, label="aim, in its marker's colour", linestyle="none")
    axes.set_yticks(range(len(cells)), [f"{task}, ratio {ratio:g}" for task, ratio in cells])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("time of a converted training step ÷ time of a dense one")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _first(tasks: Sequence[str], task: str) -> int:
    """Return the place of a model, or of the model that a task is a variant of, so that variants stand beside it."""
    base = task.partition(", ")[0]
    return tasks.index(base if base in tasks else task)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what there are rows for; return the files written."""
    return save({"training-time": partial(time, rows), "training-memory": partial(memory, rows)}, folder)

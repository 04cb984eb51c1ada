"""The plot of the language model: loss against stored parameters, multiply-adds and a step's time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.accuracy.language.methods import METHODS
from benchmarks.accuracy.language.table import Table
from benchmarks.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, WIDTH, YELLOW, plain_ticks, save
from benchmarks.stats import mean_and_error

NAME = "accuracy-language"
# Colour, marker and line of each method.
LOOKS = {
    "dense": (BLACK, "*", "none"),
    "scaled": (BLUE, "o", "-"),
    "folded": (SKY, "o", "-"),
    "global": (GREY, "o", "-"),
    "smaller": (ORANGE, "s", "-."),
    "lowrank": (GREEN, "D", "-."),
    "monarch": (YELLOW, "^", "-."),
    "tied": (PINK, "v", "-."),
}


def compare(table: Table) -> Figure:
    """Mean loss with the range of the seeds; the cheapest is left in every panel."""
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 4.5), sharey=True)
    of: dict[str, Callable[[str, float], Any]] = {
        "stored parameters, M": lambda *cell: table.first(*cell)["stored"] / 1e6,
        "multiply-adds a token, M": lambda *cell: table.first(*cell)["multiply_adds"] / 1e6,
        "a training step, ms": table.step,
    }
    for axes, (label, cost) in zip(panels, of.items(), strict=True):
        found = []
        for method in table.methods():
            colour, marker, line = LOOKS[method]
            cells = sorted(cell for cell in table.by_cell if cell[0] == method)
            if not cells:
                continue
            losses = [list(table.losses(*cell).values()) for cell in cells]
            mean = [mean_and_error(values)[0] for values in losses]
            below = [middle - min(values) for middle, values in zip(mean, losses, strict=True)]
            above = [max(values) - middle for middle, values in zip(mean, losses, strict=True)]
            found += [cost(*cell) for cell in cells]
            axes.errorbar(
                found[-len(cells) :],
                mean,
                [below, above],
                color=colour,
                marker=marker,
                linestyle=line,
                linewidth=2.2 if METHODS[method].is_ours else 1.5,
                markersize=11 if method == "dense" else 6,
                capsize=2.5,
                zorder=3 if METHODS[method].is_ours else 2,
                label=METHODS[method].title,
            )
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, [tick for tick in _TICKS if min(found) * 0.9 <= tick <= max(found) * 1.1])
        axes.set_xlabel(label)
    panels[0].set_ylabel("held-out loss, nats a token")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=10, ncols=3, loc="outside lower center")
    return figure


_TICKS = [unit * part for unit in (0.1, 1, 10, 100) for part in (1, 2, 5)]


def draw(table: Table, folder: Path) -> list[Path]:
    """Draw the picture, if there are rows of the comparison; return the files written."""
    return save({NAME: partial(compare, table)}, folder) if table.by_cell else []

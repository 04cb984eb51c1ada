"""How every page's plots look and are written: colours, names at the ends of lines, files that rows alone decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK = COLOURS
GREY = "#777777"
# Inches; 72 points an inch make a point about a pixel where a page is this wide.
WIDTH = 9.0
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    # The names inside an SVG follow from this and the drawing alone.
    "svg.hashsalt": "roastify",
}
# What one name under another takes, in points.
_LINE = 13.5


def line_at_one(axes: Axes, horizontal: bool = True) -> None:
    """Draw the line where both sides are equal."""
    draw = axes.axhline if horizontal else axes.axvline
    draw(1, color="#444444", linewidth=1.2, linestyle="--", zorder=1)


def plain_ticks(axis: matplotlib.axis.Axis, ticks: Sequence[float]) -> None:
    """Mark a logarithmic axis at some values, written as plain numbers."""
    axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def name_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Write names of lines right of the axes, each as near its height as the others allow.

    The limits of the vertical axis must be set.

    Args:
        axes: of the lines.
        ends: by name, the height of the line's right end and its colour.
    """
    if not ends:
        return
    transform = axes.yaxis.get_transform()
    low, high = transform.transform(np.array(axes.get_ylim()))
    height = axes.figure.get_size_inches()[1] * 72 * axes.get_subplotspec().get_position(axes.figure).height
    # As a part of the axes' height; labels and ticks below take about a sixth of it.
    step = _LINE / (height * 0.83)
    names = sorted(ends, key=lambda name: ends[name][0])
    parts = [float((transform.transform(np.array([ends[name][0]]))[0] - low) / (high - low)) for name in names]
    parts = _apart(parts, step)
    right = axes.secondary_yaxis("right")
    right.set_yscale(axes.get_yscale())
    heights = transform.inverted().transform(np.array([low + part * (high - low) for part in parts]))
    right.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    right.set_yticks(list(heights), names)
    right.tick_params(length=0, pad=4)
    right.spines["right"].set_visible(False)
    for label, name in zip(right.get_yticklabels(), names, strict=True):
        # Light colours are hard to read as letters.
        label.set_color([0.75 * part for part in matplotlib.colors.to_rgb(ends[name][1])])


def _apart(places: Sequence[float], step: float) -> list[float]:
    """Return ascending places in [0, 1] at least a step apart, with the least squares of their moves."""
    # Without the steps, the places need only not to fall: neighbours that do share their mean.
    groups: list[list[float]] = []
    for index, place in enumerate(places):
        groups.append([place - index * step])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [float(np.mean(group)) for group in groups for _ in group]
    most = max(0.0, 1 - (len(places) - 1) * step)
    return [min(max(mean, 0.0), most) + index * step for index, mean in enumerate(means)]


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], faster: Sequence[bool]) -> None:
    """Draw a bar for each ratio of times, with its value; the colour says whether the converted model is faster."""
    places = range(len(names))
    axes.barh(places, values, color=[BLUE if each else ORANGE for each in faster], height=0.65)
    for place, value in zip(places, values, strict=True):
        text = axes.annotate(f"{value:.2f}", (value, place), (4, 0), textcoords="offset points", va="center")
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    line_at_one(axes, horizontal=False)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def save(figures: Mapping[str, Callable[[], Figure | None]], folder: Path) -> list[Path]:
    """Draw each figure that there are rows for into a file of its name; return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({**STYLE, "backend": "agg"}):
        for name, draw_figure in figures.items():
            if (figure := draw_figure()) is not None:
                written.append(folder / f"{name}.svg")
                # No version or date in the file: the same rows give the same bytes.
                figure.savefig(written[-1], metadata={"Date": None, "Creator": None})
                plt.close(figure)
    return written

"""The plots of docs/performance.md, and how every page's plots look and are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.layers import SIGN
from benchmarks.rows import Row

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
SIDES = {
    "dense": ("dense, cuBLAS", "#000000", "o"),
    "gathered": ("gather + cuBLAS", "#009E73", "D"),
    "hashednet_gathered": ("HashedNet, materialised", "#E69F00", "s"),
    "hashednet": ("HashedNet, fused", "#D55E00", "^"),
}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "savefig.dpi": 130,
    "figure.constrained_layout.use": True,
}


def line_at_one(axes: Axes, horizontal: bool = True) -> None:
    draw = axes.axhline if horizontal else axes.axvline
    draw(1, color="#444444", linewidth=1.2, linestyle="--", zorder=1)


def linear(rows: Sequence[Row]) -> Figure | None:
    """Dense time over pool time by rows of the batch, a line for each layer; bfloat16, a sign for each row of tiles."""
    series: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["regime"] == "linear" and row["dtype"] == "bfloat16" and row["sign"] == SIGN and "pool" in row:
            name = f"{row['shape'][0]}×{row['shape'][1]}"
            series.setdefault((name, row["pool_mb"]), []).append(row)
    if not series:
        return None
    figure, axes = plt.subplots(figsize=(9, 5))
    line_at_one(axes)
    for (found, colour), marker in zip(zip(series.items(), COLOURS, strict=False), MARKERS, strict=False):
        (name, pool_mb), points = found
        points = sorted(points, key=lambda row: row["rows"])
        x, y = [row["rows"] for row in points], [row["dense_over_pool"] for row in points]
        axes.plot(x, y, color=colour, marker=marker, linewidth=1.8, markersize=6, label=f"{name}, pool {pool_mb:g} MB")
    # An aim may be several layers', so aims have one look and no line.
    aims = sorted({(row["rows"], row["aim"]) for points in series.values() for row in points if row["aim"] is not None})
    if aims:
        axes.plot(*zip(*aims, strict=True), "_", color="#888888", markersize=16, markeredgewidth=2, label="aims")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["rows"] for points in series.values() for row in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of the batch")
    axes.set_ylabel("cuBLAS on the dense weight ÷ pool")
    axes.set_title("Linear layers, bfloat16: above 1 the pool is faster", loc="left")
    axes.legend(frameon=False, fontsize=9.5)
    return figure


def hashednet(rows: Sequence[Row]) -> Figure | None:
    """Times of the others over the pool's, on a logarithmic scale."""
    rows = [row for row in rows if row["regime"] == "hashednet" and "pool" in row]
    if not rows:
        return None
    precisions = sorted({row["dtype"] for row in rows}, key=lambda dtype: dtype != "float32")
    whats = [what for what in ("inference", "training") if any(row["what"] == what for row in rows)]
    size = 6.5 * len(precisions), 3.6 * len(whats) + 0.6
    figure, grid = plt.subplots(len(whats), len(precisions), figsize=size, sharey="row", squeeze=False)
    for i, what in enumerate(whats):
        for j, dtype in enumerate(precisions):
            axes = grid[i][j]
            chosen = [row for row in rows if row["what"] == what and row["dtype"] == dtype]
            chosen.sort(key=lambda row: (row["shape"], row["rows"], row["budget_mb"]))
            line_at_one(axes)
            for side, (label, colour, marker) in SIDES.items():
                y = [row[side]["median_us"] / row["pool"]["median_us"] for row in chosen]
                axes.plot(range(len(y)), y, marker, color=colour, markersize=7, label=label, linestyle="none")
            for place, row in enumerate(chosen):
                if row["aim"] is not None:
                    label = "aim for HashedNet, fused" if (i, j) == (0, 0) and row is chosen[-1] else None
                    axes.plot(place, row["aim"], "_", color="#888888", markersize=18, markeredgewidth=2, label=label)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            names = [f"{row['budget_mb']:g}" for row in chosen]
            axes.set_xticks(range(len(chosen)), names)
            axes.grid(axis="x", visible=False)
            name_groups(axes, chosen)
            axes.set_title(f"{what}, {'float32 with tf32' if dtype == 'float32' else dtype}", loc="left")
            if j == 0:
                axes.set_ylabel("time ÷ the pool's time")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.supxlabel("D×D layer, rows of the batch, and the pool's budget in MB of float32", fontsize=11)
    return figure


def name_groups(axes: Axes, rows: Sequence[Row]) -> None:
    """Name the layer and batch of neighbouring places once, under them, with a rule between groups."""
    begin = 0
    for place, row in enumerate(rows):
        group = row["shape"], row["rows"]
        if place + 1 < len(rows) and (rows[place + 1]["shape"], rows[place + 1]["rows"]) == group:
            continue
        text = f"{row['shape'][0]}²\n{row['rows']} rows"
        middle = (begin + place) / 2
        axes.annotate(text, (middle, 0), (0, -20), ("data", "axes fraction"), "offset points", ha="center", va="top")
        if place + 1 < len(rows):
            axes.axvline(place + 0.5, color="#cccccc", linewidth=0.8, zorder=0)
        begin = place + 1


def models(rows: Sequence[Row]) -> Figure | None:
    """Dense time over converted time of whole models."""
    rows = [row for row in rows if row.get("dense_over_converted")]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.4))
    values = [row["dense_over_converted"] for row in rows]
    names = [f"{row['model']}, {row['kind']}, batch {row['batch']}, ratio {row['ratio']:g}" for row in rows]
    bars(axes, names, values, [value >= 1 for value in values])
    axes.set_xlim(0, max(*values, 1) * 1.1)
    axes.set_xlabel("time of the dense model ÷ time of the converted one")
    axes.set_title("Whole models: above 1 the converted model is faster", loc="left")
    return figure


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], faster: Sequence[bool]) -> None:
    """Draw a bar for each ratio of times, with its value; the colour says whether the converted model is faster."""
    places = range(len(names))
    axes.barh(places, values, color=[COLOURS[0] if each else COLOURS[1] for each in faster], height=0.65)
    for place, value in zip(places, values, strict=True):
        text = axes.annotate(
            f"{value:.2f}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=10
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    line_at_one(axes, horizontal=False)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def save(figures: Mapping[str, Callable[[], Figure | None]], folder: Path) -> dict[str, Path]:
    """Draw each figure that there are rows for into a file of its name; return the files written, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    with matplotlib.rc_context({**STYLE, "backend": "agg"}):
        for name, draw_figure in figures.items():
            if (figure := draw_figure()) is not None:
                written[name] = folder / f"{name}.png"
                # No version or date in the file: the same rows give the same bytes.
                figure.savefig(written[name], metadata={"Software": None})
                plt.close(figure)
    return written


def draw(kernel_rows: Sequence[Row], model_rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what there are rows for; return the files written."""
    drawn = {figure.__name__: partial(figure, kernel_rows) for figure in (linear, hashednet)}
    return list(save({**drawn, "models": partial(models, model_rows)}, folder).values())

"""The plots of docs/performance.md: layers by rows, whole models, and HashedNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.layers import SIGN
from benchmarks.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    WIDTH,
    YELLOW,
    bars,
    line_at_one,
    name_ends,
    plain_ticks,
    save,
)
from benchmarks.rows import Row, is_folded

# The layers that are drawn; the tables have the others.
LAYERS = {
    (11008, 4096): (PINK, "D"),
    (4096, 4096): (BLUE, "o"),
    (2048, 2048): (GREEN, "s"),
    (1024, 4096): (SKY, "v"),
    (1024, 1024): (YELLOW, "^"),
    (768, 768): (ORANGE, "X"),
}
# Colour and marker of what a layer on the pool is compared with beside HashedNet.
SIDES = {
    "dense": ("dense, cuBLAS", BLACK, "o"),
    "hashednet_gathered": ("HashedNet, written out for cuBLAS", YELLOW, "s"),
    "hashednet": ("HashedNet, fused", ORANGE, "^"),
}


def is_usual(row: Row) -> bool:
    """Whether a row is of the usual dtype and signs, and was measured."""
    return row["dtype"] == "bfloat16" and row["sign"] == SIGN and "pool" in row


def layers(rows: Sequence[Row]) -> Figure | None:
    """Dense time over ours by rows of the batch, a line for each layer; not folded, folded, and with backward."""
    panels: dict[str, Callable[[Row], bool]] = {
        "not folded, forward": lambda row: row["regime"] == "linear",
        "folded, forward": lambda row: row["regime"] == "folded" and not row["backward"],
        "folded, forward and backward": lambda row: row["regime"] == "folded" and row["backward"],
    }
    chosen = [row for row in rows if row["regime"] in ("linear", "folded") and is_usual(row)]
    found = {title: [row for row in chosen if wanted(row)] for title, wanted in panels.items()}
    found = {title: rows for title, rows in found.items() if rows}
    if not found:
        return None
    figure, grid = plt.subplots(len(found), 1, figsize=(WIDTH, 2.9 * len(found)), sharex=True, squeeze=False)
    ticks = sorted({row["rows"] for rows in found.values() for row in rows})
    for axes, (title, rows) in zip(grid[:, 0], found.items(), strict=True):
        _lines(axes, rows)
        axes.set_title(title)
        axes.set_ylabel("dense time ÷ ours")
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, [tick for tick in ticks if tick not in (128, 256, 1024)])
    axes.set_xlabel("rows of the batch (on a logarithmic scale)")
    return figure


def _lines(axes: Axes, rows: Sequence[Row]) -> None:
    series: dict[tuple[int, ...], dict[tuple[object, ...], list[Row]]] = {}
    for row in rows:
        series.setdefault(tuple(row["shape"]), {}).setdefault((row.get("fold"), row["pool_mb"]), []).append(row)
    line_at_one(axes)
    ends, values = {}, [1.0]
    for shape, (colour, marker) in LAYERS.items():
        if shape not in series:
            continue
        # Of several pools the smallest is drawn, of several folds the largest.
        points = max(series[shape].items(), key=lambda item: (item[0][0] or 0, -float(str(item[0][1]))))[1]
        points = sorted(points, key=lambda row: row["rows"])
        x, y = [row["rows"] for row in points], [row["dense_over_pool"] for row in points]
        axes.plot(x, y, color=colour, marker=marker, linewidth=1.8, markersize=6)
        values += y
        ends[f"{shape[0]}×{shape[1]}" + (f", {fold}×" if (fold := points[0].get("fold")) else "")] = y[-1], colour
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.12, max(values) * 1.12)
    ticks = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10)
    plain_ticks(axes.yaxis, [tick for tick in ticks if min(values) <= tick * 1.1 and tick <= max(values) * 1.1])
    name_ends(axes, ends)


def hashednet(rows: Sequence[Row]) -> Figure | None:
    """Times of the others over the faster of ours, for the largest layer and batch."""
    rows = [row for row in rows if row["regime"] == "hashednet" and "pool" in row]
    if not rows:
        return None
    largest = max((row["shape"], row["rows"]) for row in rows)
    rows = [row for row in rows if (row["shape"], row["rows"]) == largest]
    rows.sort(key=lambda row: (row["what"], row["dtype"], row["budget_mb"]))
    figure, axes = plt.subplots(figsize=(WIDTH, 0.32 * len(rows) + 1.6))
    line_at_one(axes, horizontal=False)
    ours = [min(row[side]["median_us"] for side in ("pool", "folded") if side in row) for row in rows]
    for side, (label, colour, marker) in SIDES.items():
        over = [row[side]["median_us"] / best for row, best in zip(rows, ours, strict=True)]
        axes.plot(over, range(len(rows)), marker, color=colour, markersize=7, label=label)
    aims = [(row["aim"], place) for place, row in enumerate(rows) if row["aim"] is not None]
    if aims:
        axes.plot(*zip(*aims, strict=True), "|", color=GREY, markersize=14, markeredgewidth=2, label="aim, fused")
    names = [f"{row['what']}, {'tf32' if row.get('tf32') else row['dtype']}, {row['budget_mb']:g} MB" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, (0.5, 1, 2, 5, 10, 20, 50))
    axes.grid(axis="y", visible=False)
    (height, width), batch = largest
    axes.set_title(f"A layer of {height}×{width} at {batch} rows, by the pool's budget in float32")
    axes.set_xlabel("time ÷ the faster of a folded and an unfolded layer")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def models(rows: Sequence[Row]) -> Figure | None:
    """Dense time over converted time of whole models."""
    rows = [row for row in rows if row.get("dense_over_converted")]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 0.32 * len(rows) + 1.2))
    values = [row["dense_over_converted"] for row in rows]
    names = [
        f"{row['model']}, {row['kind']}, batch {row['batch']}, ratio {row['ratio']:g}" + ", folds" * is_folded(row)
        for row in rows
    ]
    bars(axes, names, values, [value >= 1 for value in values])
    axes.set_xlim(0, max(*values, 1) * 1.1)
    axes.set_xlabel("time of the dense model ÷ time of the converted one")
    return figure


def draw(kernel_rows: Sequence[Row], model_rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what there are rows for; return the files written."""
    drawn = {"layers": partial(layers, kernel_rows), "hashednet": partial(hashednet, kernel_rows)}
    return save({**drawn, "models": partial(models, model_rows)}, folder)

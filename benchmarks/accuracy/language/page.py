"""The language model's part of docs/accuracy.md: who is better at each ratio, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks.accuracy.language.methods import METHODS
from benchmarks.accuracy.language.picture import NAME
from benchmarks.accuracy.language.runs import DENSE, RECIPE
from benchmarks.accuracy.language.table import Row, Table
from benchmarks.documents import listed, paragraph
from benchmarks.documents import table as table_lines
from benchmarks.stats import Difference, p_text

TITLE = "Language model"
ABOUT = """
A decoder of {size:.1f} M parameters ({width} wide, {depth} layers) learns to predict the next token of film reviews.
Every method trains for {steps:,} steps; trials chose the step size of each, and the sizes of each rival. No rival is
wider than the dense model. Here every linear layer is folded, up to 8 times. Multiply-adds are those of products with
weights in a forward pass; the time is that of a whole training step as one CUDA graph.
"""
DIFFERENCES = """
Nats a token by which the best of roastify has a lower loss than the others (below 0: a higher one, so the other
wins):
"""
FOLDS = "[folding.md](folding.md#what-it-does-to-accuracy) compares numbers of hashes, learned scales and no folds."


def is_ours(method: str) -> bool:
    return METHODS[method].is_ours


def is_rival(method: str) -> bool:
    return method != "dense" and not METHODS[method].is_ours


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the comparison of each width of the dense model that there are rows of, the usual one first."""
    found = sorted({row["width"] for row in rows}, key=lambda width: (width != DENSE.width, width))
    return [table for table in (Table(rows, width) for width in found) if table.ratios()]


def named(table: Table) -> str:
    return TITLE if table.width == DENSE.width else f"{TITLE}, {table.width} wide"


def ahead(table: Table, ratio: float, other: str) -> Difference | None:
    """Return by how much the best of ours is below another method's loss; the dense model has ratio 1."""
    best = table.best(ratio, is_ours)
    if best is None or other == best[0]:
        return None
    difference = table.difference(ratio, best[0], other, 1.0 if other == "dense" else ratio)
    return None if difference is None else difference._replace(mean=-difference.mean)


def cell(difference: Difference | None) -> str:
    """Return a table's cell with a difference in nats, bold if it is clear."""
    if difference is None:
        return "–"
    text = f"{difference.mean:+.3f}" + ("" if difference.degrees else " (one seed)")
    return f"**{text}**" if difference.is_clear else text


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return the section's lines; none without rows of the comparison."""
    found = tables(rows)
    if not found:
        return []
    shape = RECIPE.shape
    facts = {"size": shape.size / 1e6, "width": shape.width, "depth": shape.depth, "steps": RECIPE.steps}
    lines = [f"## {TITLE}", "", *paragraph(ABOUT.format(**facts)).splitlines(), ""]
    lines += [f"![Loss against stored parameters, multiply-adds and time](images/{NAME}.svg)", ""]
    columns = [(table, ratio) for table in found for ratio in table.ratios()]
    methods = [name for name in METHODS if name != "dense" and any(name in table.methods() for table in found)]
    widths = len(found) > 1
    head = [f"{f'{table.width} wide, ' if widths else ''}ratio {ratio:g}" for table, ratio in columns]
    best = [_best(table, ratio) for table, ratio in columns]
    cells = [[METHODS[name].title, *(_cell(*column, name) for column in columns)] for name in methods]
    lines += [paragraph(DIFFERENCES), "", *table_lines(["", *head], [["**best of roastify**", *best], *cells]), ""]
    return [*lines, *costs(found), FOLDS.strip(), ""]


def _best(table: Table, ratio: float) -> str:
    best = table.best(ratio, is_ours)
    return "–" if best is None else f"{best[1]:.3f}, {METHODS[best[0]].title.removeprefix('roastify, ')}"


def _cell(table: Table, ratio: float, method: str) -> str:
    if (method, ratio) in table.unreachable:
        return "not reachable"
    if (method, ratio) in table.diverged:
        return "diverged"
    best = table.best(ratio, is_ours)
    return "the best" if best is not None and best[0] == method else cell(ahead(table, ratio, method))


def costs(found: Sequence[Table]) -> Iterator[str]:
    """Yield what the best of ours and of the rivals cost, a line for each width."""
    for table in found:
        told = [_cost(table, "dense", 1.0)]
        for ratio in table.ratios():
            best = [table.best(ratio, wanted) for wanted in (is_ours, is_rival)]
            told += [f"at ratio {ratio:g} {listed([_cost(table, each[0], ratio) for each in best if each])}"]
        width = "" if table is found[0] else f", {table.width} wide"
        yield paragraph(f"Multiply-adds a token and time of a step{width}: {'; '.join(told)}.")
        yield ""


def _cost(table: Table, method: str, ratio: float) -> str:
    row, step = table.first(method, ratio), table.step(method, ratio)
    cost = "not measured" if row is None else f"{row['multiply_adds'] / 1e6:.1f} M, {step:.1f} ms"
    return f"{METHODS[method].title} ({cost})"


def outcome(table: Table) -> str:
    """Return in words who has the lowest loss at each ratio."""
    found = []
    for ratio in table.ratios():
        ours, rival = table.best(ratio, is_ours), table.best(ratio, is_rival)
        if ours is None or rival is None:
            continue
        difference = table.difference(ratio, ours[0], rival[0])
        won, lost = (ours, rival) if ours[1] < rival[1] else (rival, ours)
        p = "" if difference is None or math.isnan(difference.p) else f" ({p_text(difference.p)})"
        text = f"at ratio {ratio:g} {METHODS[won[0]].title} has the lowest loss, {lost[1] - won[1]:.3f} nats below "
        text += METHODS[lost[0]].title + p
        if lost is ours and ours[0] != "folded" and (plain := table.mean("folded", ratio)) is not None:
            text += f" and {plain - won[1]:.3f} below plain folds"
        found.append(text)
    return "; ".join(found)

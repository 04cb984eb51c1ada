"""The language model's part of docs/accuracy.md: who is better at each ratio, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.accuracy.language.methods import METHODS
from benchmarks.accuracy.language.picture import NAME
from benchmarks.accuracy.language.runs import DENSE, RECIPE
from benchmarks.accuracy.language.table import Row, Table
from benchmarks.documents import listed, paragraph, span
from benchmarks.documents import table as table_lines
from benchmarks.stats import Difference

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
COSTS = "Multiply-adds a token, and time of a training step:"
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
    lines += [COSTS.strip(), ""]
    sides = {"dense": "dense".__eq__, "best of roastify": is_ours, "best rival": is_rival}
    cells = [
        [name, *(_cost(table, 1.0 if name == "dense" else ratio, wanted) for table, ratio in columns)]
        for name, wanted in sides.items()
    ]
    return [*lines, *table_lines(["", *head], cells), "", FOLDS, ""]


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


def _cost(table: Table, ratio: float, wanted: Callable[[str], bool]) -> str:
    """Return the multiply-adds and the time of the best of some methods."""
    best = table.best(ratio, wanted)
    row, step = (None, None) if best is None else (table.first(best[0], ratio), table.step(best[0], ratio))
    return "–" if row is None or step is None else f"{row['multiply_adds'] / 1e6:.1f} M, {step:.1f} ms"


def outcome(table: Table) -> str:
    """Return in words who has the lowest loss at which ratios, and by how much."""
    found: dict[str, list[tuple[float, float, Difference | None]]] = {}
    for ratio in table.ratios():
        ours, rival = table.best(ratio, is_ours), table.best(ratio, is_rival)
        if ours is not None and rival is not None:
            # Over common seeds, because one of two methods may have more seeds than the other.
            amount = table.below(ratio, ours[0], rival[0])
            won = "roastify" if amount > 0 else METHODS[rival[0]].title
            found.setdefault(won, []).append((ratio, abs(amount), table.difference(ratio, ours[0], rival[0])))
    told = []
    for won, cells in found.items():
        ratios = listed([f"{ratio:g}" for ratio, _, _ in cells])
        beside = "the best rival" if won == "roastify" else "the best of roastify"
        article = "the " if won == METHODS["smaller"].title else ""
        verb = "have" if won == METHODS["tied"].title else "has"
        text = f"{article}{won} {verb} the lowest loss at {'ratio' if len(cells) == 1 else 'ratios'} {ratios}, "
        text += f"{span([amount for _, amount, _ in cells], 3)} nats below {beside}"
        clear = [f"{ratio:g}" for ratio, _, difference in cells if difference is not None and difference.is_clear]
        pairs = max(difference.degrees if difference is not None else 0 for _, _, difference in cells)
        text += f" (clear at {listed(clear)})" if clear else " (not clear)" if pairs else " (one seed)"
        best = [(ratio, table.best(ratio, is_rival)) for ratio, _, _ in cells if table.losses("folded", ratio)]
        below = [table.below(ratio, rival[0], "folded") for ratio, rival in best if rival is not None]
        if won != "roastify" and below:
            text += f", {span(below, 3)} below folds without learned scales"
        told.append(text)
    return "; ".join(told)

"""The language models' rows as a table: for every method and ratio the rows by seed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.accuracy.language.methods import METHODS
from benchmarks.accuracy.language.runs import DENSE
from benchmarks.rows import FOLDER
from benchmarks.stats import Difference, mean_and_error, paired

RESULTS = FOLDER / "language.json"
Row = Mapping[str, Any]
Cell = tuple[str, float]


class Other(NamedTuple):
    """What rows beside the comparison share: all but the seed."""

    method: str
    ratio: float
    width: int
    changes: str
    rate: float
    steps: int


class Table:
    """The comparison's rows: no trials, nothing changed, one width, and as many steps as most of them have.

    Where trials chose the rate and the sizes of some rows of a cell, the others do not count. A run that diverged has
    no loss and counts as a failure of its cell.

    Args:
        rows: all of them.
        width: of the dense model.
    """

    def __init__(self, rows: Sequence[Row], width: int = DENSE.width) -> None:
        self.rows, self.width = rows, width
        plain = [row for row in rows if not row["trial"] and not row["changes"] and row["width"] == width]
        self.steps = _commonest(row["steps"] for row in plain)
        plain = [row for row in plain if row["steps"] == self.steps]
        self.by_cell: dict[Cell, dict[int, Row]] = {}
        self.unreachable: dict[Cell, str] = {}
        self.diverged: set[Cell] = set()
        for row in _of_most_tuned(plain):
            cell = row["method"], float(row["ratio"])
            if "unreachable" in row:
                self.unreachable[cell] = row["unreachable"]
            elif row["loss"] is None:
                self.diverged.add(cell)
            else:
                self.by_cell.setdefault(cell, {})[row["seed"]] = row

    def methods(self) -> list[str]:
        cells = {*self.by_cell, *self.unreachable, *self.diverged}
        return [method for method in METHODS if any(cell[0] == method for cell in cells)]

    def ratios(self) -> list[float]:
        """Return the ratios above 1."""
        return sorted({ratio for _, ratio in (*self.by_cell, *self.unreachable, *self.diverged) if ratio > 1})

    def losses(self, method: str, ratio: float) -> dict[int, float]:
        """Return held-out losses by seed; the dense model has ratio 1."""
        return {seed: row["loss"] for seed, row in self.by_cell.get((method, ratio), {}).items()}

    def mean(self, method: str, ratio: float) -> float | None:
        values = self.losses(method, ratio).values()
        return mean_and_error(values)[0] if values else None

    def first(self, method: str, ratio: float) -> Row | None:
        """Return the row of a cell's first seed: sizes and multiply-adds are the same for all."""
        found = self.by_cell.get((method, ratio), {})
        return found[min(found)] if found else None

    def step(self, method: str, ratio: float) -> float | None:
        """Return the median over seeds of the median time of a step, in milliseconds."""
        found = [row["step"]["median_ms"] for row in self.by_cell.get((method, ratio), {}).values()]
        return statistics.median(found) if found else None

    def best(self, ratio: float, wanted: Callable[[str], bool]) -> tuple[str, float] | None:
        """Return the method with the lowest mean loss at a ratio, of those that are wanted, and that mean."""
        found = {method: self.mean(method, ratio) for method in METHODS if wanted(method)}
        known = {method: mean for method, mean in found.items() if mean is not None}
        return min(known.items(), key=lambda item: item[1]) if known else None

    def difference(self, ratio: float, method: str, other: str, other_ratio: float | None = None) -> Difference | None:
        """Return one method's loss less another's, by default at the same ratio, over the seeds that both have."""
        return paired(self.losses(method, ratio), self.losses(other, ratio if other_ratio is None else other_ratio))

    def below(self, ratio: float, method: str, other: str) -> float:
        """Return how far one method's loss is below another's: `difference` or, without a common seed, of the means."""
        if (difference := self.difference(ratio, method, other)) is not None:
            return -difference.mean
        means = self.mean(other, ratio), self.mean(method, ratio)
        assert means[0] is not None and means[1] is not None, "a method has no rows"
        return means[0] - means[1]

    def others(self) -> dict[Other, dict[int, Row]]:
        """Return by seed the rows with a changed setting or of another width."""
        found: dict[Other, dict[int, Row]] = {}
        for row in self.rows:
            if (row["changes"] or row["width"] != DENSE.width) and not row["trial"] and row.get("loss") is not None:
                text = ", ".join(f"{name} {value}" for name, value in row["changes"].items())
                key = Other(row["method"], float(row["ratio"]), row["width"], text, row["rate"], row["steps"])
                found.setdefault(key, {})[row["seed"]] = row
        return dict(sorted(found.items()))

    def without(self, other: Other) -> dict[int, float]:
        """Return the losses by seed of the same runs without the change; none if nothing is changed."""
        if not other.changes:
            return {}
        if other.width == DENSE.width:
            return self.losses(other.method, other.ratio) if other.steps == self.steps else {}
        rows = self.others().get(other._replace(changes=""), {})
        return {seed: row["loss"] for seed, row in rows.items()}

    def trials(self) -> dict[Cell, list[Row]]:
        """Return every trial by its cell, from the lowest loss on; those that have none come last."""
        found: dict[Cell, list[Row]] = {}
        for row in self.rows:
            if row["trial"]:
                found.setdefault((row["method"], float(row["ratio"])), []).append(row)
        order = list(METHODS)
        cells = sorted(found, key=lambda cell: (order.index(cell[0]), cell[1]))
        return {cell: sorted(found[cell], key=_by_loss) for cell in cells}


def _by_loss(row: Row) -> tuple[bool, float]:
    loss = row.get("loss")
    return loss is None, loss or 0.0


def _of_most_tuned(rows: Iterable[Row]) -> list[Row]:
    """Return each cell's rows of which trials chose the most settings."""
    by_cell: dict[Cell, dict[int, list[Row]]] = {}
    for row in rows:
        by_cell.setdefault((row["method"], float(row["ratio"])), {}).setdefault(len(row["tuned"]), []).append(row)
    return [row for found in by_cell.values() for row in found[max(found)]]


def _commonest(steps: Iterable[int]) -> int:
    counts = Counter(steps)
    return max(counts, key=lambda count: (counts[count], count), default=0)

"""The raw rows as a table: for every task, method and ratio the accuracy by seed, in percent."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.runs import Run, of_row
from benchmarks.accuracy.tasks import TASKS
from benchmarks.rows import FOLDER
from benchmarks.stats import Difference, mean_and_error, paired

RESULTS = FOLDER / "accuracy.json"
Row = Mapping[str, Any]
Cell = tuple[str, str, float]


def final(row: Row) -> float:
    """Return a row's accuracy after its last epoch, in percent."""
    return 100 * row["accuracy"][-1]


@dataclass(frozen=True)
class Variant:
    """The comparison of another length, with or without a teacher; the dense model has none in any.

    Args:
        epochs: of every run, or None: what its trials chose.
        distill: the teacher's share of the loss, or None.
        warm: whether training starts from the trained dense model.
    """

    epochs: int | None
    distill: float | None
    warm: bool = False

    def has(self, row: Row) -> bool:
        """Whether a row is this comparison's."""
        of_length = not row["epochs_asked"] if self.epochs is None else row["epochs"] == self.epochs
        changes: dict[str, Any] = {} if self.distill is None else {"distill": self.distill}
        changes |= {"warm": True} if self.warm else {}
        return of_length and row["changes"] == ({} if row["method"] == "dense" else changes)

    def __str__(self) -> str:
        length = [] if self.epochs is None else [f"{self.epochs} epochs"]
        warm = ["from the trained dense model"] if self.warm else []
        return ", ".join([*length, *warm, *([] if self.distill is None else ["distilled"])])


def _is_plain(row: Row) -> bool:
    return not row["changes"] and not row["epochs_asked"]


class Table:
    """The comparison's rows: at the rate that the method's trials chose, and nothing changed.

    Of a task that was run with several scales of its epochs, those with the most rows count, and of equally many the
    longest.

    Args:
        rows: all of them.
        variant: whose comparison, or None: that of the tasks' own epochs, on labels alone.
    """

    def __init__(self, rows: Sequence[Row], variant: Variant | None = None) -> None:
        self.rows = rows
        wanted = _is_plain if variant is None else variant.has
        plain = [row for row in rows if row["tuned"] and not row["trial"] and wanted(row)]
        self.scales = {task: _commonest_scale(row for row in plain if row["task"] == task) for task in TASKS}
        self.chosen = [row for row in plain if row["scale"] == self.scales[row["task"]]]
        self.by_cell: dict[Cell, dict[int, Row]] = {}
        self.unreachable: dict[Cell, str] = {}
        for row in self.chosen:
            cell = row["task"], row["method"], float(row["ratio"])
            if "unreachable" in row:
                self.unreachable[cell] = row["unreachable"]
            else:
                self.by_cell.setdefault(cell, {})[row["seed"]] = row

    def tasks(self) -> list[str]:
        return [task for task in TASKS if any(cell[0] == task for cell in self.by_cell)]

    def methods(self, task: str) -> list[str]:
        cells = [*self.by_cell, *self.unreachable]
        return [method for method in METHODS if any(cell[:2] == (task, method) for cell in cells)]

    def ratios(self, task: str) -> list[float]:
        return sorted({cell[2] for cell in (*self.by_cell, *self.unreachable) if cell[0] == task})

    def accuracies(self, task: str, method: str, ratio: float) -> dict[int, float]:
        """Return final accuracies by seed; the dense model has ratio 1."""
        return {seed: final(row) for seed, row in self.by_cell.get((task, method, ratio), {}).items()}

    def mean(self, task: str, method: str, ratio: float) -> float | None:
        values = self.accuracies(task, method, ratio).values()
        return mean_and_error(values)[0] if values else None

    def stored(self, task: str, method: str, ratio: float) -> int | None:
        rows = list(self.by_cell.get((task, method, ratio), {}).values())
        return rows[0]["stored"] if rows else None

    def difference(self, task: str, ratio: float, method: str, other: str, other_ratio: float) -> Difference | None:
        """Return `method` at a ratio less another method at its ratio, over the seeds that both have."""
        return paired(self.accuracies(task, method, ratio), self.accuracies(task, other, other_ratio))

    def best(self, task: str, ratio: float, wanted: Callable[[str], bool]) -> tuple[str, float] | None:
        """Return the method with the highest mean at a ratio, of those that are wanted, and that mean."""
        found = {
            method: mean
            for method in METHODS
            if wanted(method) and (mean := self.mean(task, method, ratio)) is not None
        }
        return max(found.items(), key=lambda item: item[1]) if found else None

    def pairs(self, method: str, other: str, least_ratio: float) -> dict[tuple[str, float], list[float]]:
        """Return the differences of two methods, seed by seed, for every task and ratio where both were run."""
        found: dict[tuple[str, float], list[float]] = {}
        for task, name, ratio in self.by_cell:
            if name == method and ratio >= least_ratio:
                ours, theirs = self.accuracies(task, method, ratio), self.accuracies(task, other, ratio)
                if shared := sorted(ours.keys() & theirs.keys()):
                    found[task, ratio] = [ours[seed] - theirs[seed] for seed in shared]
        return dict(sorted(found.items(), key=lambda item: (list(TASKS).index(item[0][0]), item[0][1])))

    def experiments(self) -> list[Row]:
        """Return what is not part of the comparison: runs with a change, a rate or a number of epochs of their own.

        Distilled runs are not among them: `distilled` has those.
        """
        beside = {of_row(row) for row in self.chosen}
        return [row for row in self._judged() if of_row(row) not in beside and "distill" not in row["changes"]]

    def distilled(self) -> list[tuple[dict[int, Row], dict[int, Row]]]:
        """Return by seed the rows of each distilled run, and of the same run without a teacher where there is one."""
        by_run = {of_row(row): row for row in self._judged()}
        found: dict[Run, tuple[dict[int, Row], dict[int, Row]]] = {}
        for run, row in by_run.items():
            if run.change("distill") is not None:
                beside, without = found.setdefault(dataclasses.replace(run, seed=0), ({}, {}))
                beside[run.seed] = row
                if (same := by_run.get(undistilled(run))) is not None:
                    without[run.seed] = same
        return list(found.values())

    def _judged(self) -> list[Row]:
        """Return what was judged on the test set."""
        return [row for row in self.rows if not row["trial"] and "accuracy" in row]

    def trials(self) -> dict[Run, Row]:
        return {of_row(row): row for row in self.rows if row["trial"]}


def undistilled(run: Run) -> Run:
    """Return the same run without a teacher."""
    others = tuple((name, value) for name, value in run.changes if name not in ("distill", "temperature"))
    return dataclasses.replace(run, changes=others)


def _commonest_scale(rows: Iterable[Row]) -> float:
    counts = Counter(row["scale"] for row in rows)
    return max(counts, key=lambda scale: (counts[scale], scale), default=1.0)

"""Files of raw rows: where rows were measured, which cases a run measures, and writing whole files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from roastify import RoastPlan
from roastify.checks import clocks

Row = dict[str, Any]
FOLDER = Path(__file__).parent / "results"


def machine(device: str | torch.device, *names: str) -> Row:
    """Return what rows say of where they were measured: the entries that are named, or all that `roastify bench` has.

    `device` (the GPU's name, or else the CPU's) and `numpy` can be named as well. An entry that the machine lacks is
    None.
    """
    found = clocks.machine(torch.device(device))
    more = {"device": found.get("gpu", found["cpu"]), "numpy": np.__version__, **found}
    return {name: more.get(name) for name in names} if names else found


def largest_fold(plan: RoastPlan) -> int:
    """Return the largest fold of a plan's layers, which rows say as `fold`; 1 if none is folded."""
    return max((each.fold for each in plan.folds), default=1)


def is_folded(row: Row) -> bool:
    """Whether a row is of a model with folded layers."""
    return bool(row["fold"] > 1)


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a killed run leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Return what a file holds: its rows, and what it says of them all; no rows if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def dump(path: Path, result: dict[str, Any]) -> None:
    write(path, json.dumps(result, indent=1) + "\n")


def dump_lines(path: Path, rows: Sequence[Row]) -> None:
    """Write rows alone, one a line: thousands of numbers of curves would be a line each."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write(path, f'{{"rows": [\n{lines}\n]}}\n')


class Rows:
    """The rows of a file, which is whole after every row that is added.

    Args:
        path: of the JSON file; None writes nothing.
        machine: what the file says of where all its rows were measured, or None: every row says it itself.
        same: the entries of `machine` that must agree for the rows of an earlier run to stay; default: all but the
            date.
        order: what rows are sorted by; default: nothing.
    """

    def __init__(
        self,
        path: Path | None,
        machine: Row | None = None,
        same: Sequence[str] | None = None,
        order: Callable[[Row], Any] | None = None,
    ) -> None:
        self.path, self.machine, self.order = path, machine, order
        found = load(path) if path is not None else {"rows": []}
        earlier = found.get("machine", {})
        if machine is None:
            same = ()
        elif same is None:
            same = [name for name in {**earlier, **machine} if name != "date"]
        self.rows: list[Row] = found["rows"]
        if any(earlier.get(name) != (machine or {}).get(name) for name in same):
            if self.rows:
                click.echo(f"{path} holds rows of another machine or other versions; they are replaced")
            self.rows = []

    def add(self, row: Row) -> None:
        """Add a row, and write the file."""
        self.rows.append(row)
        if self.order is not None:
            self.rows.sort(key=self.order)
        if self.path is not None:
            header = {} if self.machine is None else {"machine": self.machine}
            dump(self.path, {**header, "rows": self.rows})


class Cases(Rows):
    """The rows of a file by their cases: a run measures some of these, and replaces their rows alone.

    Args:
        path: of the JSON file.
        pattern: regular expression of cases.
        minutes: after which no case begins.
        machine: see `Rows`.
        missing: whether cases that have a row already, other than a failure, are passed over.
    """

    def __init__(
        self, path: Path, pattern: str, minutes: float, machine: Row | None = None, missing: bool = False
    ) -> None:
        super().__init__(path, machine)
        self.minutes, self.missing = minutes, missing
        self.measured: list[Row] = []
        self.left: list[str] = []
        self._pattern = re.compile(pattern)
        self._end = time.perf_counter() + minutes * 60
        self._known: list[str] = []

    def wanted(self, case: str) -> bool:
        """Whether a case was asked for and can still begin; a case for which no time is left is noted."""
        self._known.append(case)
        if not self._pattern.search(case) or (self.missing and self.find(case)):
            return False
        if time.perf_counter() < self._end:
            return True
        self.left.append(case)
        return False

    def find(self, case: str) -> Row | None:
        """Return the row of a case that was measured without a failure, or None."""
        return next((row for row in self.rows if row["case"] == case and "failure" not in row), None)

    def add(self, row: Row, said: str = "") -> None:
        """Keep a row in place of an earlier one of its case, write the file, and print what is said of the row."""
        self.rows = [other for other in self.rows if other["case"] != row["case"]]
        super().add(row)
        self.measured.append(row)
        click.echo(f"{row['case']}: {row.get('failure') or said}")

    def close(self) -> None:
        """Say where the rows are and what was left.

        Raises:
            click.UsageError: no case was asked for.
        """
        if self.measured:
            click.echo(f"written to {self.path}")
        if self.left:
            click.echo(f"not begun within {self.minutes:g} minutes: {', '.join(self.left)}")
        if not any(self._pattern.search(case) for case in self._known):
            raise click.UsageError(f"no case matches {self._pattern.pattern!r}; the cases are {', '.join(self._known)}")

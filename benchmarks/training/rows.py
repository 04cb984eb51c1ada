"""The file of raw rows: a run of some cases replaces theirs alone, and every row says where it was measured."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import click

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / "training.json"


def load(path: Path) -> list[Row]:
    """Return the rows of a file; none if it is not there."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


class Rows:
    """The rows of one run: which cases were asked for, and the file that they go to.

    Args:
        output: the file.
        pattern: regular expression of cases.
        minutes: after which no case begins.
        machine: what every row says of where it was measured.
    """

    def __init__(self, output: Path, pattern: str, minutes: float, machine: dict[str, Any]) -> None:
        self.output = output
        self.machine = machine
        self.measured: list[Row] = []
        self.left: list[str] = []
        self.minutes = minutes
        self._pattern = re.compile(pattern)
        self._end = time.perf_counter() + minutes * 60
        self._known: list[str] = []

    def wanted(self, case: str) -> bool:
        """Whether a case was asked for; one that time no longer allows is noted."""
        self._known.append(case)
        if not self._pattern.search(case):
            return False
        if time.perf_counter() < self._end:
            return True
        self.left.append(case)
        return False

    def add(self, row: Row) -> None:
        """Keep a row in place of an earlier one of that case, write the file, and print what it says of itself."""
        row = {**row, "machine": self.machine}
        said = row.pop("said", None) or row["failure"]
        self.measured.append(row)
        rows = [other for other in load(self.output) if other["case"] != row["case"]] + [row]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        pending = self.output.with_suffix(".pending")
        pending.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        os.replace(pending, self.output)
        click.echo(f"{row['case']}: {said}")

    def close(self) -> None:
        """Say where the rows are and what was left.

        Raises:
            click.UsageError: no case was asked for.
        """
        if self.measured:
            click.echo(f"written to {self.output}")
        if self.left:
            click.echo(f"not begun within {self.minutes:g} minutes: {', '.join(self.left)}")
        if not self.measured and not self.left:
            raise click.UsageError(f"no case matches {self._pattern.pattern!r}; the cases are {', '.join(self._known)}")

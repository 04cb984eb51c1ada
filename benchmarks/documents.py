"""What the pages share: tables, results between two marks, and where rows were measured."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

END = "<!-- end -->"
_VERSIONS = {"torch": "torch", "Triton": "triton", "transformers": "transformers"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def named_once(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return a table's rows with the first cell left empty where it is the last row's."""
    firsts = ["", *(row[0] for row in rows)]
    return [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, firsts, strict=False)]


def paragraph(text: str, bullet: str = "") -> str:
    """Return a paragraph, or a list's item with its bullet, in lines as long as the pages' others."""
    later = " " * len(bullet)
    # Code and the words of a link stay on one line.
    kept = re.sub(r"`[^`]+`|\[[^]]+\]", lambda found: found[0].replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.fill(bullet + kept, 120, subsequent_indent=later, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def listed(items: Sequence[str], last: str = "and") -> str:
    """Return items as a sentence has them: a, b and c."""
    return f" {last} ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def span(values: Iterable[float], digits: int = 2) -> str:
    """Return the lowest and the highest of some numbers."""
    found = sorted(values)
    return "–".join(dict.fromkeys(f"{value:.{digits}f}" for value in (found[0], found[-1])))


def measured_on(machine: Mapping[str, Any]) -> str:
    """Return the device, the versions and the date of some rows, as the pages write them."""
    device = machine.get("device") or machine.get("gpu") or machine["cpu"]
    versions = [f"{name} {machine[key]}" for name, key in _VERSIONS.items() if machine.get(key)]
    return ", ".join([device, *versions, machine["date"]])


def insert(text: str, begin: str, results: str) -> str:
    """Return a page with what stands between a mark and the next end replaced.

    Args:
        text: the page.
        begin: the mark, alone on its line.
        results: whole lines.

    Raises:
        ValueError: the page has no such mark, or no end of its own after it.
    """
    before, found, rest = text.partition(f"{begin}\n")
    replaced, ended, after = rest.partition(END)
    # An end after the next mark is that one's.
    if not found or not ended or "<!--" in replaced:
        raise ValueError(f"the page has no {begin!r} with an {END!r} after it; put both where the results belong")
    return f"{before}{begin}\n{results}{END}{after}"

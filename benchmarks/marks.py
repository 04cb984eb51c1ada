"""Results that a command writes into a page, between two marks, where people wrote the rest."""

from __future__ import annotations

END = "<!-- end -->"


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

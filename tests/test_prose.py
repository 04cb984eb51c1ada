"""The pages' style: width of lines, length of sentences, and words that engineers in a hurry stumble over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Most of these pages is written by the programs that measure.
MEASURED = {f"{name}.md" for name in "accuracy coverage folding performance scale signs training-cost".split()}
QUICKSTARTS = ROOT / "docs" / "quickstart"
PAGES = [
    page
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(QUICKSTARTS.glob("*.md")))
    if page.name not in MEASURED
]
WIDTH, MOST_WORDS = 120, 40
CODE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"<!-- .*?<!-- end -->", re.DOTALL)
LIST_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) ")
# Phrases of no other technical text: name the subject, and say what it does.
BANNED = {
    r"\b(?:to|can|could|cannot) be had\b": "is available",
    r"\b(?:is|are) not to be\b": "cannot be",
    r"\bto be told\b": "can tell",
    r"\bwhich \w+ \w+ has not\b": "that … does not have",
    r"\bwithout a word\b": "without an error",
    r"\bthe whole of\b": "all",
}


def prose(text: str) -> str:
    """Return a page without code, generated blocks, tables and headings; each list item is a paragraph."""
    lines = []
    for line in BLOCK.sub("", CODE.sub("", text)).splitlines():
        if line.startswith(("|", "#", "<!--", "![")):
            line = ""
        elif LIST_ITEM.match(line):
            lines.append("")
            line = LIST_ITEM.sub("", line)
        lines.append(line.strip())
    return "\n".join(lines)


def sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", prose(text)):
        # A piece of code and a link's address are no words of the sentence.
        plain = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", paragraph))
        yield from re.split(r"(?<=[.!?])[)*_\"]*\s+(?=[\"(*_]*[A-Z0-9c`\[])", " ".join(plain.split()))


def test_a_sentence_ends_where_a_reader_sees_its_end() -> None:
    page = "# A b\nOne two.\nThree `four. five` six\n- a [b](c.md). D!\n\n```\nno\n```\n| no |\n"
    assert list(filter(None, sentences(page))) == ["One two.", "Three code six", "a [b].", "D!"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_short_sentences_in_narrow_lines(page: Path) -> None:
    text = page.read_text()
    wide = [line for line in prose(text).splitlines() if len(line) > WIDTH]
    assert not wide, f"lines of more than {WIDTH} characters: {wide}"
    long = [each for each in sentences(text) if len(each.split()) > MOST_WORDS]
    assert not long, f"{len(long)} sentences of more than {MOST_WORDS} words; make two of each:\n" + "\n".join(long)
    for phrase, better in BANNED.items():
        found = re.search(phrase, prose(text).replace("\n", " "))
        assert not found, f"{found and found[0]!r} is hard to read; write: {better}"


def test_the_page_of_compatibility_names_tests_that_exist() -> None:
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "compatibility.md").read_text())
    assert named and not (missing := set(named) - defined), f"no such tests: {sorted(missing)}"

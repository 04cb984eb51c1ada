"""The code blocks of README and of the pages in docs/: what each needs, the commands in it, and how a page is run.

A block is a Python program, a part of one, or a list of commands. Comments right above it, which no reader sees, say
how the tests run it:

- `<!-- given: NAME, NAME as OTHER -->`: what the block takes for granted, by the names of `SETUPS` in page_setups.py;
- `<!-- shortened: OLD to NEW; OLD to NEW -->`: the tests run it with NEW in the place of OLD;
- `<!-- needs: PROGRAM -->`: it is left out where the program is not installed;
- `<!-- long: REASON -->`: `make test-long` alone runs it; the blocks that need it are long too;
- `<!-- not run: REASON -->`: it is only compiled;
- `<!-- run -->`: the commands of a shell block are run; those of others are only parsed;
- `<!-- printed -->`: the block is what the one before it printed; numbers may differ by a fifth.

A Python block whose first line is a comment with a file's name is written to that file as well.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "bash", "console", "sh", "shell")
# A command begins with one of these. Other lines of a block without a language are output, formulas, others' programs.
PROGRAMS = ("roastify", "torchrun", "make", "pip", "python")
MARKS = ("given", "shortened", "needs", "long", "not run", "run", "printed")
_BLOCK = re.compile(r"^( *)```([a-z]*)[^\n`]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMENTS = re.compile(r"(?:^ *<!-- [^\n]* -->\n\s*)+\Z", re.MULTILINE)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `marks` is what the comments above it say."""

    page: str
    line: int
    language: str
    code: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def items(self, mark: str) -> list[str]:
        """Return what a mark lists."""
        return [item.strip() for item in re.split(", " if mark == "given" else "; ", self.marks.get(mark, "")) if item]

    def shortened(self) -> str:
        """Return the code as the tests run it."""
        code = self.code
        for change in self.items("shortened"):
            old, _, new = change.partition(" to ")
            assert new and old in code, f"{self.place}: {old!r}, which is to be shortened, is not in the block"
            code = code.replace(old, new)
        return code


def blocks_of(text: str, page: str) -> list[Block]:
    """Return the blocks of a page's text, in order."""
    found = []
    for match in _BLOCK.finditer(text):
        _, language, code = match.groups()
        above = _COMMENTS.search(text[: match.start()])
        comments = re.findall(r"<!-- (.*?) -->", above[0]) if above else []
        marks = {mark: value.strip() for mark, _, value in (comment.partition(":") for comment in comments)}
        line = text.count("\n", 0, match.start()) + 1
        known = {mark: value for mark, value in marks.items() if mark in MARKS}
        found.append(Block(page, line, language, textwrap.dedent(code), known))
    return found


def commands_of(block: Block) -> list[str]:
    """Return the commands of a shell block that are roastify's or the project's, without prompts and environments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    elif described := re.match(r"\S.*? {2,}(?=[^ #])", lines[0] if lines else ""):
        lines = [_without_description(line, described.end()) for line in lines]
    found = []
    for line in lines:
        line = re.sub(r"^(?:[A-Z_]+=\S* )+", "", line)
        if line.split(" ")[0] in PROGRAMS and "|" not in line:
            found.append(line)
    return found


def _without_description(line: str, column: int) -> str:
    """Return a line of a list of commands whose descriptions begin at a column, or two spaces after a long command."""
    fits = line[column - 1 : column] == " " and "  " not in line[column:]
    command = line[:column] if fits else " ".join(re.split(" {2,}", line)[:-1])
    # Brackets are around what may be left out.
    return re.sub(r"[\[\]]", "", command)


def differences(expected: str, found: str) -> list[str]:
    """Return how a text differs from what a page shows: lines with other words, and numbers more than a fifth apart."""

    def lines_of(text: str) -> list[str]:
        return [" ".join(line.split()) for line in text.strip().splitlines()]

    ours, pages = lines_of(found), lines_of(expected)
    wrong = [f"{len(ours)} lines, and {len(pages)} on the page:\n{found}"] if len(ours) != len(pages) else []
    for our, page in zip(ours, pages, strict=False):
        pairs = zip(_numbers(our), _numbers(page), strict=False)
        if _NUMBER.sub("#", our) != _NUMBER.sub("#", page) or any(abs(a - b) > 0.2 * max(a, b) for a, b in pairs):
            wrong.append(f"{our!r}, and on the page {page!r}")
    return wrong


def _numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(line)]

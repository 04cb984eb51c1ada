"""The file map in CONTRIBUTING.md: every source file with the first sentence of its docstring. `make map` writes it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "CONTRIBUTING.md"
FOLDERS = ("roastify", "kernels", "benchmarks", "examples", "docs")
BEGIN, END = "<!-- map: written by `make map` -->", "<!-- end -->"


def first_sentence(path: Path) -> str:
    """Return the first sentence of a file's or a package's docstring, without the full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s|\n\n", text, maxsplit=1)[0]
    return " ".join(sentence.split()).removesuffix(".")


def markdown() -> str:
    """Return the map: a heading a folder, a line a file."""
    lines = []
    for folder in FOLDERS:
        for package in sorted({path.parent for path in (ROOT / folder).rglob("*.py")}):
            start = package / "__init__.py"
            about = first_sentence(start) if start.is_file() else ""
            lines += ["", f"**`{package.relative_to(ROOT)}/`**" + (f": {about}." if about else ""), ""]
            files = [path for path in sorted(package.glob("*.py")) if path != start]
            lines += [f"- `{path.name}`: {first_sentence(path)}" for path in files]
    return "\n".join(lines).strip()


def with_map(text: str) -> str:
    """Return a document with the map between its marks.

    Raises:
        ValueError: the document lacks a mark.
    """
    head, mark, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{DOCUMENT} lacks the line {BEGIN if not mark else END}")
    return f"{head}{BEGIN}\n\n{markdown()}\n\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_map(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{DOCUMENT.name} is up to date\n")

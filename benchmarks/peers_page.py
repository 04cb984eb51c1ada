"""The tables of docs/peers.md from the answers of `benchmarks/peers.py`: a cell a trial, and each trial's lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.documents import insert, table
from benchmarks.peers import FEATURES, RESULTS, TOOLS
from benchmarks.rows import Row, load, write

DOCUMENT = Path(__file__).parents[1] / "docs" / "peers.md"
TABLE, TRIED = "<!-- peers: written by `python -m benchmarks.peers_page` -->", "<!-- tried: written by the same -->"
_NAMES = {"peft": "PEFT", "llmcompressor": "llm-compressor", "nncf": "NNCF"}


def _number(rows: list[Row]) -> dict[tuple[str, str], int]:
    return {(row["tool"], row["feature"]): number for number, row in enumerate(rows, 1)}


def _tools(rows: list[Row]) -> list[str]:
    return [tool for tool in TOOLS if any(row["tool"] == tool for row in rows)]


def answers(result: dict[str, Any]) -> str:
    """Return the table of features and tools; each answer leads to how it was found."""
    rows = result["rows"]
    found = {(row["tool"], row["feature"]): row["answer"] for row in rows}
    numbers = _number(rows)

    def cell(tool: str, feature: str) -> str:
        key = (tool, feature)
        return f"{found[key]} [{numbers[key]}](#n{numbers[key]})" if key in found else "not tried"

    tools = _tools(rows)
    lines = [[text, *(cell(tool, feature) for tool in tools)] for feature, text in FEATURES.items()]
    return "\n".join(table(["", *(_NAMES.get(tool, tool) for tool in tools)], lines)) + "\n"


def trials(result: dict[str, Any]) -> str:
    """Return for each tool its version, and for each of its cells what was found, and the lines tried."""
    rows, parts = result["rows"], []
    numbers = _number(rows)
    for tool in _tools(rows):
        own = [row for row in rows if row["tool"] == tool]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(own[0]["versions"].items()))
        parts += [f"### {_NAMES.get(tool, tool)}", "", f"With {versions}, on a CPU, {own[0]['date']}.", ""]
        for row in own:
            number = numbers[tool, row["feature"]]
            parts.append(
                f'<a id="n{number}"></a>**{number}: {FEATURES[row["feature"]]}: {row["answer"]}.** {_found(row)}'
            )
            parts += ["", "```text", row["lines"], "```", ""]
    return "\n".join(parts)


def _found(row: Row) -> str:
    # What a tool says may hold marks.
    text = str(row["found"]).replace("<", "&lt;")
    return f"{text[0].upper()}{text[1:]}."


def markdown(page: str, result: dict[str, Any]) -> str:
    """Return docs/peers.md with the tables of a result."""
    return insert(insert(page, TABLE, answers(result)), TRIED, trials(result))


def main() -> None:
    write(DOCUMENT, markdown(DOCUMENT.read_text(), load(RESULTS)))


if __name__ == "__main__":
    main()

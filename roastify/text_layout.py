"""Text in lines of a given width: names are shortened in their middle, and no word is broken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from roastify.printable import printable

# As wide as the longest name, so that lines of several results begin in one column.
_NAMES_WIDTH = len("multiply-adds")


class Words:
    """Text that is wrapped at spaces; a word that is longer than a line is shortened in its middle.

    The ends of names tell tensors apart. rich would break names in the middle of a word.
    """

    def __init__(self, text: str, style: str = "") -> None:
        self.text = printable(text)
        self.style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(" ".join(shortened(word, options.max_width) for word in self.text.split(" ")), self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = min(cell_len(self.text), options.max_width)
        return Measurement(min(map(cell_len, self.text.split(" "))), longest)


def shortened(name: str, width: int) -> str:
    """Return a name in at most so many cells of a terminal; an ellipsis is in the place of what is left out.

    Between dots, the last part and all numbers stay, because they tell tensors apart. Then as many of the other last
    parts stay as fit, and the beginning of the name gets what they leave.
    """
    if cell_len(name) <= width:
        return name
    parts = name.split(".")
    last = len(parts) - 1
    kept = {index for index, part in enumerate(parts) if part.isdigit() or part == "*" or index == last} - {0}
    for index in range(last - 1, 0, -1):
        if index not in kept and cell_len(_elided(parts, kept | {index})) > width:
            break
        kept.add(index)
    end = _elided(parts, kept)
    if not kept or cell_len(end) > width:
        end = "…" + _last_cells(name, width // 2)
    return _last_cells(name[::-1], width - cell_len(end))[::-1] + end


def _elided(parts: list[str], kept: set[int]) -> str:
    """Return a name's kept parts; an ellipsis stands for what is before each of them."""
    return "".join(("" if index - 1 in kept else "…") + f".{parts[index]}" for index in sorted(kept))


def _last_cells(text: str, width: int) -> str:
    while cell_len(text) > width:
        text = text[1:]
    return text


def named_lines(lines: Iterable[tuple[str, str]], style: str = "") -> Table:
    """Return lines, in a style of rich's, beside their names."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=_NAMES_WIDTH, no_wrap=True)
    grid.add_column()
    for name, text in lines:
        grid.add_row(Text(printable(name), style="dim"), Words(text, style))
    return grid


def results_table(*headings: str, left: int = 1) -> Table:
    """Return an empty table for the numbers of a result.

    Args:
        headings: of its columns.
        left: how many columns are words, which begin at the left.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < left else "right", no_wrap=True)
    return table


def legend(meanings: Mapping[str, str]) -> Table:
    """Return what words and columns mean, to be shown below a table."""
    return named_lines(meanings.items(), "dim")


def human_bytes(count: float) -> str:
    """Return a byte count in the largest decimal unit that leaves a number of at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

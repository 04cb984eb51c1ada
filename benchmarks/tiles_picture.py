"""Draws docs/images/tiles.svg: two weight matrices as tiles that read the slots of one pool, by the mapping itself."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.rows import write
from roastify.pool.mapping import TileMap

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "tiles.svg"
SLOTS, ROWS, COLUMNS, SEED = 8, 5, 8, 0
# Light enough for dark letters; Okabe and Ito's hues, which colour-blind readers tell apart.
COLOURS = ["#7FB8E6", "#F2A65A", "#6CC9A1", "#E3A6CB", "#F3DF6B", "#B9A7E8", "#E98B7A", "#C4CBD3"]
# The card is light on any page, so that one file reads well on white and on dark.
CARD, INK, SOFT, LINE = "#F7F8FA", "#1F2328", "#57606A", "#D0D7DE"
SIDE, STEP = 30, 33
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


def text(x: float, y: float, words: str, size: int = 15, colour: str = INK, anchor: str = "middle") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{colour}' text-anchor='{anchor}'>{escape(words)}</text>"


def tile(x: float, y: float, slot: int, words: str, side: float = SIDE) -> str:
    box = f"<rect x='{x:g}' y='{y:g}' width='{side:g}' height='{side:g}' rx='3' fill='{COLOURS[slot]}'/>"
    return box + text(x + side / 2, y + side / 2 + 5, words, 13)


def matrix(mapping: TileMap, first: int, x: float, y: float, title: str) -> list[str]:
    """Return a matrix whose tiles are numbered from `first` on, each with its sign and slot."""
    parts = [text(x + COLUMNS * STEP / 2, y - 12, title)]
    for row in range(ROWS):
        row_tile = first + row * COLUMNS
        for column in range(COLUMNS):
            slot = mapping.slot(row_tile + column)
            sign = "−" if mapping.sign_of(row_tile + column, row_tile=row_tile) < 0 else "+"
            parts.append(tile(x + column * STEP, y + row * STEP, slot, f"{sign}{slot}"))
    return parts


def arrow(x0: float, x1: float, y: float) -> str:
    return f"<path d='M{x0:g} {y:g}H{x1:g}' stroke='{SOFT}' stroke-width='2' marker-end='url(#head)' fill='none'/>"


def svg() -> str:
    """Return the picture."""
    tiles = 2 * ROWS * COLUMNS
    mapping = TileMap(tiles, SLOTS, (128, 64), SEED, sign="row")
    width, height, top = 880, 286, 62
    pool_x, left, right = 396, 32, 584
    middle = top + ROWS * STEP / 2
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {FONT} role='img'>",
        "<title>Two weight matrices, cut into tiles, read the slots of one pool</title>",
        f"<defs><marker id='head' markerWidth='8' markerHeight='8' refX='6' refY='4' orient='auto'>"
        f"<path d='M0 0L8 4L0 8z' fill='{SOFT}'/></marker></defs>",
        f"<rect x='0.5' y='0.5' width='{width - 1}' height='{height - 1}' rx='8' fill='{CARD}' stroke='{LINE}'/>",
        *matrix(mapping, 0, left, top, f"layer 1: {ROWS * COLUMNS} tiles, nothing stored"),
        *matrix(mapping, ROWS * COLUMNS, right, top, f"layer 2: {ROWS * COLUMNS} tiles, nothing stored"),
        text(width / 2, 30, f"one trainable pool: {SLOTS} slots"),
    ]
    for slot in range(SLOTS):
        parts.append(tile(pool_x + (slot % 2) * 46, 46 + slot // 2 * 46, slot, f"{slot}", 42))
    parts += [
        arrow(pool_x - 8, left + COLUMNS * STEP + 8, middle),
        arrow(pool_x + 96, right - 11, middle),
        text(left + COLUMNS * STEP / 2, height - 20, "weight tile = λ · sign · slot", colour=SOFT),
        text(
            right + COLUMNS * STEP / 2,
            height - 20,
            f"{tiles} tiles ÷ {SLOTS} slots = ratio {tiles // SLOTS}",
            colour=SOFT,
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    write(PICTURE, svg())

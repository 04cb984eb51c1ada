"""Draws the diagrams of docs/how-it-works.md: `python docs/site/diagrams.py` writes them to docs/images."""

from __future__ import annotations

from pathlib import Path

from roastify.pool.mapping import TileMap

FOLDER = Path(__file__).parents[1] / "images"
# Colours that people with any colour vision tell apart (Okabe and Ito), one a slot.
_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#b9b9b9")
_INK = "#1f2328"


class Drawing:
    """An SVG that is drawn element by element, on white, because pages may be dark.

    Args:
        width: in pixels.
        height: in pixels.
        title: what the picture shows, for people who cannot see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
            'font-family="Helvetica, Arial, sans-serif">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, label: str = "") -> None:
        """Add a rectangle with a label in its middle."""
        self._lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="#ffffff" stroke-width="2"/>'
        )
        if label:
            self.text(x + width / 2, y + height / 2 + 5, label, anchor="middle")

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """Add an outline."""
        self._lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{_INK}" stroke-width="2"/>'
        )

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Add a line of text whose baseline is at `y`."""
        place = f'x="{x}" y="{y}" text-anchor="{anchor}"'
        self._lines.append(f'<text {place} font-size="14" fill="{_INK}">{text}</text>')

    def __str__(self) -> str:
        return "\n".join([*self._lines, "</svg>\n"])


def tiles() -> str:
    """Two weights of 4×4 and 3×4 tiles in a pool of 6 slots, by the mapping that models use."""
    size, slots, shapes = 44, 6, ((4, 4), (3, 4))
    mapping = TileMap(sum(rows * cols for rows, cols in shapes), slots, (8, 8), seed=3, sign="row")
    picture = Drawing(520, 340, "The tiles of two weights, each in the colour of the slot that it reads")
    framed, top, first, frames = 2, 44, 0, []

    def tile(x: float, y: float, slot: int, label: str) -> None:
        picture.box(x, y, size, size, _COLOURS[slot], label)
        if slot == framed:
            frames.append((x, y))

    for number, (rows, cols) in enumerate(shapes):
        left = 12 + number * 196
        picture.text(left, 30, f"weight {number + 1}: {rows * cols} tiles")
        for index in range(rows * cols):
            row, col = divmod(index, cols)
            slot = mapping.slot(first + index)
            negative = mapping.sign_of(first + index, row_tile=first + row * cols) < 0
            tile(left + col * size, top + row * size, slot, f"−{slot}" if negative else str(slot))
        first += rows * cols
    picture.text(410, 30, f"pool: {slots} slots")
    for slot in range(slots):
        tile(410, top + slot * size, slot, str(slot))
    for x, y in frames:
        picture.frame(x, y, size, size)
    picture.text(12, 250, f"{first} tiles of weights read {slots} slots.")
    picture.text(12, 272, "A tile shows the number of its slot;")
    picture.text(12, 294, "− stands for the opposite sign.")
    picture.text(12, 316, f"Framed: slot {framed} and all its readers.")
    return str(picture)


def fold() -> str:
    """A weight with a fold of 4: four signed copies of a narrow matrix, read through one folded input."""
    size, signs = 20, ("+", "−", "−", "+")
    picture = Drawing(520, 290, "A product with a folded weight, and the smaller product that gives the same result")

    def cells(x: float, y: float, rows: int, colour: str) -> None:
        for row in range(rows):
            for col in range(3):
                picture.box(x + col * size, y + row * size, size, size, colour)

    picture.text(12, 24, "A folded weight W, and its input x")
    for label, y in (("x", 73), ("W", 142)):
        picture.text(12, y, label)
    for part, sign in enumerate(signs):
        x = 40 + part * (3 * size + 10)
        picture.text(x + 1.5 * size, 50, f"x{part + 1}", anchor="middle")
        cells(x, 58, 1, _COLOURS[5])
        cells(x, 88, 5, _COLOURS[0] if sign == "+" else _COLOURS[1])
        picture.text(x + 1.5 * size, 208, f"{sign}A", anchor="middle")
    picture.text(360, 24, "Computed instead")
    for label, y in (("z", 73), ("A", 142)):
        picture.text(360, y, label)
    cells(388, 58, 1, _COLOURS[5])
    cells(388, 88, 5, _COLOURS[0])
    picture.text(12, 244, "z = x1 − x2 − x3 + x4, so that x · Wᵀ = z · Aᵀ.")
    picture.text(12, 266, "A row of W multiplies 12 numbers, a row of A only 3.")
    return str(picture)


if __name__ == "__main__":
    for drawn in (tiles, fold):
        (FOLDER / f"how-{drawn.__name__}.svg").write_text(drawn(), encoding="utf-8")

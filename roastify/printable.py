"""Text that a terminal shows as it is: control characters and other invisible ones are written as escapes."""

from __future__ import annotations

import unicodedata

# Control, format (bidirectional overrides are among them), surrogates, and separators of lines and paragraphs.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str) -> str:
    r"""Return a text in one line, in which every character that a terminal would obey or hide is an escape as `\x1b`.

    Names in artifacts, models and paths are written by others: an escape sequence in one could rewrite the screen.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(each) if unicodedata.category(each) in _HIDDEN else each for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()

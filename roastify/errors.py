"""The errors that roastify raises on purpose.

Each message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from roastify.printable import printable


class RoastError(Exception):
    """Base of every error that roastify raises on purpose. Its message is one printable line, whatever names it quotes.

    Args:
        message: what was found, what was expected and what to do.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ConfigError(RoastError):
    """A setting is unknown, of the wrong type, or out of range."""


class PlanError(RoastError):
    """No plan meets the request: the ratio is unreachable, nothing is eligible, or a pattern matches nothing.

    Args:
        message: what was found, what was expected and what to do.
        largest_ratio: the largest reachable ratio if the ratio was too large; otherwise 0.
    """

    def __init__(self, message: str, largest_ratio: float = 0.0) -> None:
        super().__init__(message)
        self.largest_ratio = largest_ratio


class ConversionError(RoastError):
    """The model cannot be converted as it is."""


class SourceError(RoastError):
    """A model source (a file, a name in it, a local directory) does not yield one model."""


class WriteRefused(RoastError):
    """Code tried to write to a tensor that was read from the pool, and the write would be lost.

    Args:
        message: what was found, what was expected and what to do.
        source: the module and the attribute that the tensor was read from; None for a view of the tensor.
    """

    def __init__(self, message: str, source: tuple[object, str] | None = None) -> None:
        super().__init__(message)
        self.source = source


class CheckpointError(RoastError):
    """An artifact is missing, damaged, newer than this version, or belongs to another architecture."""


class SignatureMismatch(RoastError):
    """The converted model's forward signature differs from the original's."""


class OutputMismatch(RoastError):
    """The converted model's outputs differ from the original's in structure, shape or dtype; timing compares values."""


class BenchError(RoastError):
    """A model cannot be timed as asked: it fails, does not compile, or cannot be captured in a CUDA graph."""


class RecoveryError(RoastError):
    """A recovery cannot go on: the data ended, the models' outputs cannot be compared, or the loss is not finite."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return ``"; closest: 'a', 'b'"`` for the known names most like ``name``, or an empty string if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return "; closest: " + ", ".join(repr(match) for match in matches) if matches else ""

"""Results that print as the tables of the command line, and that a notebook shows as HTML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from roastify.printable import printable

_writers: list[Callable[[object, bool], str]] = []


def show_results_with(writer: Callable[[object, bool], str]) -> None:
    """Set the function that writes results, as text or as HTML. It stands above the results that it knows.

    Args:
        writer: takes a result, and whether HTML is wanted.
    """
    _writers[:] = [writer]


class ShownAsTable(ABC):
    """A result that prints as a table. Its `repr` is one line; `to_dict` has every value."""

    @abstractmethod
    def _headline(self) -> str:
        """Return what the result says, in a few words."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable(self._headline())}>"

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # IPython asks the class that has a `__repr__` of its own, as dataclasses have, and no class above it.
        cls._repr_pretty_ = cls._repr_pretty_  # type: ignore[method-assign]

    def __str__(self) -> str:
        return _writers[0](self, False)

    def _repr_html_(self) -> str:
        return _writers[0](self, True)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the table in IPython, which asks this method."""
        printer.text(str(self))

"""How far a projection has come, kept now and then, so that one that is interrupted can go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from roastify.tensor_values import Moments

# Seconds of work that an interrupted conversion loses at most, and a tensor more.
_SECONDS = 300.0


class KeptProgress:
    """The tensors that were measured, and the sums of those that were projected.

    Args:
        save: writes a state of numbers and tensors.
        state: what an interrupted conversion of the same plan saved last; None: it begins.
    """

    def __init__(self, save: Callable[[dict[str, Any]], None], state: dict[str, Any] | None) -> None:
        self._save, self._saved_at = save, time.monotonic()
        state = state or {"measured": {}, "projected": 0, "sums": None}
        self.measured = {name: Moments(*found) for name, found in state["measured"].items()}
        self.projected: int = state["projected"]
        self.sums: Tensor | None = state["sums"]

    def add_measured(self, name: str, found: Moments) -> None:
        """Note a tensor's moments."""
        self.measured[name] = found
        self._save_now_and_then(None)

    def add_projected(self, sums: Tensor) -> None:
        """Note that one more tensor is in the sums."""
        self.projected += 1
        self._save_now_and_then(sums)

    def _save_now_and_then(self, sums: Tensor | None) -> None:
        if time.monotonic() - self._saved_at < _SECONDS:
            return
        measured = {name: tuple(found) for name, found in self.measured.items()}
        self._save({"measured": measured, "projected": self.projected, "sums": sums})
        self._saved_at = time.monotonic()

"""Where the raw rows are."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "accuracy.json"

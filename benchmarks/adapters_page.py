"""The results in docs/adapters.md from the raw rows of the adapter benchmark."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.adapters import METHODS, RESULTS, SEEDS, chosen_rate, of_method
from benchmarks.documents import insert, measured_on, table
from benchmarks.rows import Row, load, write
from benchmarks.stats import mean_text, paired

DOCUMENT = Path(__file__).parents[1] / "docs" / "adapters.md"
BEGIN = "<!-- results: written by `python -m benchmarks.adapters_page` -->"
# What the others are compared with.
WHOLE = METHODS[0]


def markdown(result: dict[str, Any]) -> str:
    """Return the results as a table and what it says."""
    rows, made = result["rows"], result["machine"]
    sides = {method.name: _tuned(rows, method) for method in METHODS if of_method(rows, method)}
    # What an interrupted run has not come to is left out.
    sides = {name: side for name, side in sides.items() if len(side) == len(SEEDS)}
    whole = {row["seed"]: row["test"] for row in sides[WHOLE.name]}
    lines, verdicts = [], []
    for name, side in sides.items():
        ours = {row["seed"]: row["test"] for row in side}
        difference = paired(ours, whole) if name != WHOLE.name else None
        first = side[0]
        lines.append(
            [
                name,
                f"{first['stored']:,}",
                f"{first['bytes'] / 1000:,.0f}",
                mean_text(ours.values()),
                "" if difference is None else str(difference),
                f"{first['rate']:.2g}",
                f"{sum(row['seconds'] for row in side) / len(side):.0f}",
            ]
        )
        if difference is not None and not math.isnan(difference.p):
            verdicts.append(f"- {name} is {difference.place} LoRA of rank {WHOLE.rank}.")
    first = rows[0]
    about = (
        f"Test accuracy in %, mean ± standard error over {len(SEEDS)} seeds, from [the raw rows](../benchmarks/results/"
        f"{RESULTS.name}): {measured_on(made)}, peft {made['peft']}. Each run trains on {first['train']:,} reviews in "
        f"{first['steps']:,} steps of {first['batch']}, in bfloat16 autocast, replayed from a CUDA graph. The learning "
        f"rate is the best of a grid on held-out reviews with the first seed; a grid grows while its best rate lies at "
        f"an end. Parameters are those that are trained, the head's among them; kB are all files of a saved adapter."
    )
    head = ["", "parameters", "kB", "accuracy", "less LoRA", "rate", "s"]
    return "\n".join([about, "", *table(head, lines), "", *verdicts, ""])


def _tuned(rows: list[Row], method: Any) -> list[Row]:
    rate = chosen_rate(method, rows)
    return sorted((row for row in of_method(rows, method) if row["rate"] == rate), key=lambda row: row["seed"])


if __name__ == "__main__":
    write(DOCUMENT, insert(DOCUMENT.read_text(encoding="utf-8"), BEGIN, markdown(load(RESULTS))))

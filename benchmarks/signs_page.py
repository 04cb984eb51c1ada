"""docs/signs.md from the raw rows: means, paired differences, and what can be told from zero."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.signs_tasks import DENSE, FEWEST_SLOTS, SIGNS, TASKS
from benchmarks.stats import Difference, half_width, mean_and_error, paired

RESULTS = Path(__file__).parent / "results" / "signs.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "signs.md"


class Table:
    """Final accuracies, in percent, by cell and seed."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.final = {(*_cell(row), row["seed"]): 100 * row["accuracy"][-1] for row in rows}
        self.slots = {_cell(row)[:2]: row["slots"] for row in rows if row["sign"] != DENSE}
        self.cells = sorted(self.slots, key=lambda cell: (TASKS.index(cell[0]), cell[1]))

    def by_seed(self, task: str, ratio: float, sign: str) -> dict[int, float]:
        return {key[3]: value for key, value in self.final.items() if key[:3] == (task, ratio, sign)}

    def difference(self, task: str, ratio: float, sign: str, other: str) -> Difference | None:
        """Return `sign` less `other` over the seeds that both have."""
        return paired(self.by_seed(task, ratio, sign), self.by_seed(task, ratio, other))

    def overall(self, sign: str, other: str) -> Difference | None:
        """Return the mean of the cells' differences; each cell's seeds give its own variance."""
        found = [self.difference(*cell, sign, other) for cell in self.cells]
        cells = [difference for difference in found if difference is not None]
        if not cells:
            return None
        error = math.sqrt(sum(cell.error**2 for cell in cells)) / len(cells)
        mean = sum(cell.mean for cell in cells) / len(cells)
        return Difference(mean, error, sum(cell.degrees for cell in cells))


def _cell(row: dict[str, Any]) -> tuple[str, float, str]:
    return row["task"], row["ratio"], row["sign"]


def _cell_text(values: dict[int, float]) -> str:
    if not values:
        return "–"
    mean, error = mean_and_error(values.values())
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def _verdict(other: str, difference: Difference | None) -> str:
    if difference is None or math.isnan(difference.p):
        return f"- Against `{other}`: too few runs to say."
    half = half_width(difference.error, difference.degrees)
    low, high = difference.mean - half, difference.mean + half
    if low <= 0 <= high:
        what = "cannot be told from zero"
    else:
        what = f"shows: `row` is {'better' if difference.mean > 0 else 'worse'}"
    return f"- Against `{other}`: {difference}, 95 % interval {low:+.2f} to {high:+.2f}; the difference {what}."


def markdown(result: dict[str, Any]) -> str:
    """Return docs/signs.md of a raw result."""
    rows, made, settings = result["rows"], result["machine"], result["settings"]
    table = Table(rows)
    versions = f"torch {made['torch']}" + (f", Triton {made['triton']}" if made["triton"] else "")
    seeds = len({row["seed"] for row in rows})
    lines = [
        "# Signs and accuracy",
        "",
        f"Written by `python -m benchmarks.signs` from [the raw rows](../benchmarks/results/{RESULTS.name}): "
        f"{made['device']}, {versions}, {made['date']}; {len(rows)} runs.",
        "",
        f"Does the sign's granularity matter for accuracy in pools of at least {FEWEST_SLOTS} slots? A sign for each "
        f"row of tiles (`row`) costs a product nothing; one for each tile or element (`tile`, `element`) does, and "
        f"`none` is no sign at all.",
        "",
        f"Both models are trained from scratch with AdamW, in tiles of {settings['tile'].replace('x', '×')}, with "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}. A seed fixes initial values, data order, augmentation and slots "
        f"for every sign, so differences are taken in pairs.",
        "",
    ]
    for name in TASKS:
        task = settings[name]
        stored = next((row["stored"] for row in rows if row["task"] == name and row["sign"] == DENSE), None)
        size = "" if stored is None else f" {stored / 1e6:.2f} M parameters,"
        lines.append(
            f"- {task['title']}:{size} {task['epochs']} epochs of {task['train']:,} examples in batches of "
            f"{task['batch']}, learning rate {task['learning_rate']:g}."
        )
    lines += [
        "",
        "Test accuracy after the last epoch, %, mean ± standard error over seeds:",
        "",
        f"| task | ratio | slots | {DENSE} | {' | '.join(SIGNS)} |",
        "|---|---|---|---|" + "---|" * len(SIGNS),
    ]
    for task_name, ratio in table.cells:
        cells = [_cell_text(table.by_seed(task_name, ratio, sign)) for sign in SIGNS]
        dense = _cell_text(table.by_seed(task_name, 1, DENSE))
        title = settings[task_name]["title"]
        lines.append(f"| {title} | {ratio:g} | {table.slots[task_name, ratio]} | {dense} | {' | '.join(cells)} |")
    others = [sign for sign in SIGNS if sign != "row"]
    lines += [
        "",
        "Paired difference of `row` to the others, percentage points, mean ± standard error and a paired t-test's p:",
        "",
        "| task | ratio | " + " | ".join(f"row − {other}" for other in others) + " |",
        "|---|---|" + "---|" * len(others),
    ]
    for task_name, ratio in table.cells:
        found = [table.difference(task_name, ratio, "row", other) for other in others]
        texts = ["–" if difference is None else str(difference) for difference in found]
        lines.append(f"| {settings[task_name]['title']} | {ratio:g} | {' | '.join(texts)} |")
    overall = {other: table.overall("row", other) for other in others}
    texts = ["–" if difference is None else str(difference) for difference in overall.values()]
    lines.append(f"| mean of the above | | {' | '.join(texts)} |")
    lines += ["", "`row` over all the above:", "", *(_verdict(other, found) for other, found in overall.items()), ""]
    return "\n".join(lines)

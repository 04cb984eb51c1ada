"""docs/signs.md from the raw rows of a finished measurement: means and paired differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.documents import measured_on, table
from benchmarks.rows import FOLDER, Row, load, write
from benchmarks.stats import Difference, half_width, mean_text, paired

RESULTS = FOLDER / "signs.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "signs.md"
DENSE, OURS = "dense", "row"
SIGNS = ("none", "row", "tile", "element")
OTHERS = [sign for sign in SIGNS if sign != OURS]


class Table:
    """Final accuracies, in percent, by cell and seed."""

    def __init__(self, rows: list[Row]) -> None:
        self.final = {(*_cell(row), row["seed"]): 100 * row["accuracy"][-1] for row in rows}
        self.slots = {_cell(row)[:2]: row["slots"] for row in rows if row["sign"] != DENSE}

    def by_seed(self, task: str, ratio: float, sign: str) -> dict[int, float]:
        return {key[3]: value for key, value in self.final.items() if key[:3] == (task, ratio, sign)}

    def difference(self, task: str, ratio: float, other: str) -> Difference | None:
        """Return signs by row less another kind, over the seeds that both have."""
        return paired(self.by_seed(task, ratio, OURS), self.by_seed(task, ratio, other))

    def overall(self, other: str) -> Difference | None:
        """Return the mean of the cells' differences; each cell's seeds give its own variance."""
        found = [self.difference(*cell, other) for cell in self.slots]
        cells = [difference for difference in found if difference is not None]
        if not cells:
            return None
        error = math.sqrt(sum(cell.error**2 for cell in cells)) / len(cells)
        mean = sum(cell.mean for cell in cells) / len(cells)
        return Difference(mean, error, sum(cell.degrees for cell in cells))


def _cell(row: Row) -> tuple[str, float, str]:
    return row["task"], row["ratio"], row["sign"]


def _verdict(other: str, difference: Difference | None) -> str:
    if difference is None or math.isnan(difference.p):
        return f"- Against `{other}`: too few runs to say."
    half = half_width(difference.error, difference.degrees)
    low, high = difference.mean - half, difference.mean + half
    if low <= 0 <= high:
        what = "cannot be told from zero"
    else:
        what = f"shows: `{OURS}` is {'better' if difference.mean > 0 else 'worse'}"
    return f"- Against `{other}`: {difference}, 95 % interval {low:+.2f} to {high:+.2f}; the difference {what}."


def markdown(result: dict[str, Any]) -> str:
    """Return docs/signs.md of a raw result."""
    rows, made, settings = result["rows"], result["machine"], result["settings"]
    found = Table(rows)
    tasks = {name: task for name, task in settings.items() if isinstance(task, dict)}
    stored = {row["task"]: row["stored"] for row in rows if row["sign"] == DENSE}
    lines = [
        "# Signs and accuracy",
        "",
        f"Written by `python -m benchmarks.signs_page` from [the raw rows](../benchmarks/results/{RESULTS.name}): "
        f"{measured_on(made)}; {len(rows)} runs. The measurement is finished. The code that trained the models was "
        f"that of roastify {made['roastify']}; it is in the git history (`git log -- benchmarks/signs.py`).",
        "",
        "Does the sign's granularity matter for accuracy in pools of at least 64 slots? A sign for each row of tiles "
        "(`row`) costs a product nothing; one for each tile or element (`tile`, `element`) does, and `none` is no sign "
        "at all.",
        "",
        f"Both models are trained from scratch with AdamW, in tiles of {settings['tile'].replace('x', '×')}, with "
        f"{len({row['seed'] for row in rows})} seeds. A seed fixes initial values, data order, augmentation and slots "
        f"for every sign, so differences are taken in pairs.",
        "",
    ]
    lines += [
        f"- {task['title']}: {stored[name] / 1e6:.2f} M parameters, {task['epochs']} epochs of {task['train']:,} "
        f"examples in batches of {task['batch']}, learning rate {task['learning_rate']:g}."
        for name, task in tasks.items()
    ]
    cells = sorted(found.slots, key=lambda cell: (list(tasks).index(cell[0]), cell[1]))
    accuracies, differences = [], []
    for task, ratio in cells:
        named = [tasks[task]["title"], f"{ratio:g}"]
        dense = mean_text(found.by_seed(task, 1, DENSE).values())
        means = [mean_text(found.by_seed(task, ratio, sign).values()) for sign in SIGNS]
        accuracies.append([*named, str(found.slots[task, ratio]), dense, *means])
        differences.append([*named, *(str(found.difference(task, ratio, other) or "–") for other in OTHERS)])
    overall = {other: found.overall(other) for other in OTHERS}
    lines += ["", "Test accuracy after the last epoch, %, mean ± standard error over seeds:", ""]
    lines += table(["task", "ratio", "slots", DENSE, *SIGNS], accuracies)
    lines += [
        "",
        "Paired difference of `row` to the others, percentage points, mean ± standard error and a paired t-test's p:",
        "",
        *table(["task", "ratio", *(f"{OURS} − {other}" for other in OTHERS)], differences),
        f"| mean of the above | | {' | '.join(str(each or '–') for each in overall.values())} |",
    ]
    return "\n".join([*lines, "", "`row` over all the above:", "", *map(_verdict, overall, overall.values()), ""])


if __name__ == "__main__":
    write(DOCUMENT, markdown(load(RESULTS)))

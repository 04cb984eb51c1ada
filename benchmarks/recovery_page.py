"""The results in docs/recovery.md from the raw rows of a finished measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.documents import insert, measured_on, table
from benchmarks.rows import FOLDER, Row, load, write
from benchmarks.stats import mean_text, paired

RESULTS = FOLDER / "recovery.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "recovery.md"
BEGIN = "<!-- results: written by `python -m benchmarks.recovery_page` -->"
DENSE, RECOVERED, SCRATCH = "dense", "recovered", "scratch"


class Side:
    """One side of a comparison: of each seed the row at the learning rate that was chosen.

    The rate is the one of the best accuracy on held-out examples with the first seed.
    """

    def __init__(self, rows: list[Row], task: str, ratio: float, arm: str) -> None:
        found = [row for row in rows if (row["task"], row["ratio"], row["arm"]) == (task, ratio, arm)]
        self.lr = max((row for row in found if row["seed"] == 0), key=lambda row: row["validation"])["lr"]
        self.by_seed = {row["seed"]: row for row in found if row["lr"] == self.lr}

    def percent(self, name: str = "accuracy") -> dict[int, float]:
        return {seed: 100 * row[name] for seed, row in self.by_seed.items()}

    def seconds(self) -> str:
        return f"{sum(row['seconds'] for row in self.by_seed.values()) / len(self.by_seed):.1f}"

    def __str__(self) -> str:
        steps = next(iter(self.by_seed.values()))["steps"]
        return f"{mean_text(self.percent().values())} ({steps}, {self.seconds()}, {self.lr:g})"


def markdown(result: dict[str, Any]) -> str:
    """Return the results as a table and what it says."""
    rows, made, settings = result["rows"], result["machine"], result["settings"]
    tasks = {name: task["title"] for name, task in settings.items() if isinstance(task, dict)}
    cells = {(list(tasks).index(row["task"]), row["ratio"], row["task"]) for row in rows if row["arm"] != DENSE}
    lines, verdicts = [], []
    for _, ratio, task in sorted(cells):
        dense, ours, theirs = (Side(rows, task, *side) for side in ((1.0, DENSE), (ratio, RECOVERED), (ratio, SCRATCH)))
        difference = paired(ours.percent(), theirs.percent())
        named = [tasks[task], f"{ratio:g}", f"{mean_text(dense.percent().values())} ({dense.seconds()})"]
        lines.append([*named, mean_text(ours.percent("projected").values()), str(ours), str(theirs), str(difference)])
        verdicts.append(f"- {tasks[task]}, ratio {ratio:g}: recovered is {difference.place} trained from scratch.")
    about = (
        f"Test accuracy in %, mean ± standard error over seeds, from [the raw rows](../benchmarks/results/"
        f"{RESULTS.name}): {measured_on(made)}. The measurement is finished. The code that trained the models was that "
        f"of roastify {made['roastify']}; it is in the git history (`git log -- benchmarks/recovery.py`). Each side "
        f"takes as many steps as {settings['seconds']:g} s allow by a timing of it beforehand (alignment included); in "
        f"brackets are steps, the seconds that they then took, and the learning rate. `projected` is the recovered "
        f"side before anything is done."
    )
    head = ["task", "ratio", "dense (s)", "projected", "recovered", "from scratch", "difference"]
    return "\n".join([about, "", *table(head, lines), "", *verdicts, ""])


if __name__ == "__main__":
    write(DOCUMENT, insert(DOCUMENT.read_text(encoding="utf-8"), BEGIN, markdown(load(RESULTS))))

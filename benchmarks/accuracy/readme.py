"""The README's table of accuracy, from the raw rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.accuracy.pruning import SCORES
from benchmarks.accuracy.table import Row, Table, Variant
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.verdicts import TEXT_VARIANT, not_hashed

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- accuracy: written by `python -m benchmarks.accuracy.page` -->"
CELLS = (
    *((task, ratio) for task in ("resnet9", "vgg11", "imdb") for ratio in (10.0, 100.0)),
    ("resnet20", 10.0),
)
# With a teacher, for as many epochs as without.
TAUGHT = {"resnet9": Variant(24, 0.9), "imdb": TEXT_VARIANT}
COLUMNS = ("dense", "roastify", "taught", "smaller dense", "low rank", "best pruned", "best of these, taught")


def markdown(rows: Sequence[Row]) -> str:
    """Return the means over seeds of roastify and what else stores as many parameters, in percent."""
    table = Table(rows)
    taught = {task: Table(rows, variant) for task, variant in TAUGHT.items()}
    lines = [f"| | ratio | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for task, ratio in CELLS:
        of_taught = taught.get(task)
        texts = [
            _mean(table, task, "dense", 1.0),
            _mean(table, task, "ours", ratio),
            _mean(of_taught, task, "ours", ratio),
            _mean(table, task, "smaller", ratio),
            _mean(table, task, "lowrank", ratio),
            _best(table, task, ratio, SCORES.__contains__),
            _best(of_taught, task, ratio, not_hashed),
        ]
        lines.append(f"| {TASKS[task].title} | {ratio:g} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _mean(table: Table | None, task: str, method: str, ratio: float) -> str:
    if table is not None and (task, method, ratio) in table.unreachable:
        return "not reachable"
    mean = None if table is None else table.mean(task, method, ratio)
    return "–" if mean is None else f"{mean:.1f}"


def _best(table: Table | None, task: str, ratio: float, wanted: Callable[[str], bool]) -> str:
    best = None if table is None else table.best(task, ratio, wanted)
    return "–" if best is None else f"{best[1]:.1f}"

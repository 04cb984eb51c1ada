"""How each method gets its step size: by short runs that are judged on held-out training examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.runs import Run
from benchmarks.accuracy.tasks import Task

# Other ratios above 1 take what was chosen at the nearest of these.
RATIOS = (10.0, 100.0)


def grid(method: str, task: Task) -> tuple[tuple[float, int], ...]:
    """Return the `(learning rate, epochs)` among which a method chooses."""
    factors = METHODS[method].rates
    if factors and task.optimizer == "sgd":
        rate, epochs = task.grid[0]
        return tuple((rate * factor, epochs) for factor in factors)
    return task.grid


def trials(run: Run, task: Task) -> dict[Run, tuple[float, int]]:
    """Return the trial runs that a run without a rate waits for, each with what it would choose.

    At ratio 1 every method is the dense model in other memory, and takes the dense model's choice.
    """
    if run.ratio == 1:
        method, ratio = "dense", 1.0
    else:
        method, ratio = run.method, min(RATIOS, key=lambda ratio: abs(math.log(ratio / run.ratio)))
    return {
        Run(run.task, method, ratio, 0, rate, task.trial_epochs or epochs, True, _of_model(run)): (rate, epochs)
        for rate, epochs in grid(method, task)
    }


def _of_model(run: Run) -> tuple[tuple[str, Any], ...]:
    # A narrower or wider rival is another model, and chooses for itself; other changes take the method's choice.
    return tuple((name, value) for name, value in run.changes if name == "width")


def decided(run: Run, task: Task, rows: Mapping[Run, Mapping[str, Any]]) -> bool:
    """Whether all trials of the run gave rows, be it that its method cannot store so few parameters."""
    return run.rate is not None or all(trial in rows for trial in trials(run, task))


def choose(run: Run, task: Task, rows: Mapping[Run, Mapping[str, Any]]) -> Run:
    """Return the run with the best trial's rate and epochs; with the first of the grid if none could be reached.

    Of equally good ones it takes the smaller rate, and then the fewer epochs.
    """
    candidates = trials(run, task)
    judged = {trial: rows[trial]["accuracy"][-1] for trial in candidates if "accuracy" in rows.get(trial, {})}
    if judged:
        _, rate, epochs = min((-accuracy, *candidates[trial]) for trial, accuracy in judged.items())
    else:
        rate, epochs = next(iter(candidates.values()))
    return dataclasses.replace(run, rate=run.rate or rate, epochs=run.epochs or epochs)


def with_trials(runs: Iterable[Run], tasks: Mapping[str, Task]) -> list[Run]:
    """Return the runs, each cell's trials in front of the first run that waits for them."""
    found: dict[Run, None] = {}
    for run in runs:
        if run.rate is None:
            found |= dict.fromkeys(trials(run, tasks[run.task]))
        found[run] = None
    return list(found)

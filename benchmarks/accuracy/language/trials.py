"""How each method gets its rate and its sizes: by shorter runs, judged on reviews that no model trains on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from benchmarks.accuracy.budget import UnreachableError
from benchmarks.accuracy.language import methods
from benchmarks.accuracy.language.runs import Recipe, Run

# Other ratios above 1 take what was chosen at the nearest of these.
RATIOS = (10.0, 100.0)
Rows = Mapping[Run, Mapping[str, Any]]


def place(run: Run) -> float:
    """Return the ratio at which a run's rate and sizes are chosen."""
    return 1.0 if run.ratio == 1 else min(RATIOS, key=lambda ratio: abs(math.log(ratio / run.ratio)))


def wanted(run: Run, recipe: Recipe, rows: Rows) -> list[Run]:
    """Return the trials that decide a run, as far as rows say: first those of sizes, then those of the rate.

    Sizes are compared at the first rate, and rates with the best sizes. A setting of the conversion that is changed
    takes what was chosen without the change. A run that names its rate or its sizes needs no trials of these.
    """
    if run.rate is not None and run.sizes is not None:
        return []
    ratio, first = place(run), recipe.rates[0]
    try:
        names = methods.candidates(run.method, ratio, recipe) if run.sizes is None else [run.sizes]
    except UnreachableError:
        return []
    of_sizes = [_trial(run, recipe, ratio, run.rate or first, name) for name in names]
    found = of_sizes if len(names) > 1 else []
    if run.rate is None and all(trial in rows for trial in found):
        best = min(of_sizes, key=lambda trial: _loss(rows.get(trial)))
        assert best.sizes is not None
        found = [*found, *(_trial(run, recipe, ratio, rate, best.sizes) for rate in recipe.rates)]
    return list(dict.fromkeys(found))


def _trial(run: Run, recipe: Recipe, ratio: float, rate: float, sizes: str) -> Run:
    return Run(run.method, ratio, 0, min(recipe.trial_steps, run.steps), rate, sizes, trial=True, width=run.width)


def choose(run: Run, recipe: Recipe, rows: Rows) -> Run:
    """Return the run with the best trial's rate, and its sizes or the best that reach the run's own ratio.

    Raises:
        UnreachableError: none reaches it.
    """
    tried = sorted(
        (_loss(rows[trial]), index, trial)
        for index, trial in enumerate(wanted(run, recipe, rows))
        if trial in rows and "unreachable" not in rows[trial]
    )
    rate = run.rate or (tried[0][2].rate if tried else recipe.rates[0])
    sizes = run.sizes
    if sizes is None:
        reachable = methods.reachable(run.method, run.ratio, recipe)
        sizes = next((trial.sizes for *_, trial in tried if trial.sizes in reachable), reachable[0])
    return dataclasses.replace(run, rate=rate, sizes=sizes)


def _loss(row: Mapping[str, Any] | None) -> float:
    """Return a row's loss; infinite if it has none, because it diverged or was not reachable."""
    loss = None if row is None else row.get("loss")
    return math.inf if loss is None else loss

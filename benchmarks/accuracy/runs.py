"""One training run by its name: what is trained, how, and how it is known again among the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Settings of a single run that differ from its task's recipe or its method's conversion. The others are RoastConfig's.
RECIPE_CHANGES = ("decay", "cutout", "smoothing", "pool_rate", "distill", "temperature")
MODEL_CHANGES = ("spread", "row_scales", "width", "tied_spread", "warm")


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        task: key of `tasks.TASKS`.
        method: key of `methods.METHODS`.
        ratio: dense parameters ÷ stored parameters.
        seed: of initial values, data order, augmentation, mapping and masks; the same for every method.
        rate: the learning rate's peak, or None: what the trials of this method and ratio chose.
        epochs: passes over the data, or None: likewise.
        trial: whether it is judged on held-out training examples, to choose rate and epochs.
        changes: sorted `(setting, value)`.
    """

    task: str
    method: str
    ratio: float
    seed: int = 0
    rate: float | None = None
    epochs: int | None = None
    trial: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def cell(self) -> tuple[str, str, float]:
        return self.task, self.method, self.ratio

    def change(self, name: str, default: Any = None) -> Any:
        return dict(self.changes).get(name, default)

    def __str__(self) -> str:
        parts = [self.task, self.method, f"ratio {self.ratio:g}", f"seed {self.seed}"]
        parts += [f"rate {self.rate:g}"] if self.rate is not None else []
        parts += [f"{self.epochs} epochs"] if self.epochs is not None else []
        parts += [f"{name}={value}" for name, value in self.changes] + (["trial"] if self.trial else [])
        return ", ".join(parts)


def as_row(run: Run) -> dict[str, Any]:
    return {**dataclasses.asdict(run), "changes": dict(run.changes)}


def of_row(row: Mapping[str, Any]) -> Run:
    """Return the run whose row this is."""
    fields = {field.name: row[field.name] for field in dataclasses.fields(Run)}
    changes = ((name, tuple(value) if isinstance(value, list) else value) for name, value in row["changes"].items())
    return Run(**{**fields, "changes": tuple(sorted(changes))})


def asked_of_row(row: Mapping[str, Any]) -> Run:
    """Return what was asked for: the row's run, without the rate and the epochs that its trials chose."""
    run = of_row(row)
    if not row["tuned"]:
        return run
    return dataclasses.replace(run, rate=None, epochs=run.epochs if row["epochs_asked"] else None)

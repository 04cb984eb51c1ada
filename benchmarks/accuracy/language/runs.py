"""The recipe, and one training run by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.language.decoder import Shape
from benchmarks.accuracy.language.tokens import WORDS

DENSE = Shape(WORDS, 512, 8, (2048,) * 8)


@dataclass(frozen=True)
class Recipe:
    """How every method trains.

    Args:
        shape: the dense model's sizes.
        context: tokens that a model sees at once.
        batch: sequences in a step.
        steps: of a run.
        trial_steps: of the runs that choose rates and sizes.
        rates: the candidates for the learning rate's peak; the first is taken where nothing was tried.
        decay: AdamW's, of whatever has two dimensions or more.
        betas: AdamW's.
        clip: the largest norm of the gradient.
        judged: sequences at most of which a loss is the mean.
        warm_up: part of the steps in which the rate grows in a line; then it falls to zero along a cosine.
    """

    shape: Shape = DENSE
    context: int = 256
    batch: int = 64
    steps: int = 2_500
    trial_steps: int = 1_000
    rates: tuple[float, ...] = (4e-3, 8e-3, 2e-3)
    decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    judged: int = 1_000_000
    warm_up: float = 0.1

    @property
    def tokens(self) -> int:
        return self.batch * self.context


RECIPE = Recipe()
# For seconds on a CPU.
SMOKE = dataclasses.replace(
    RECIPE,
    shape=Shape(WORDS, 64, 4, (256,) * 4),
    context=32,
    batch=4,
    steps=6,
    trial_steps=3,
    rates=(4e-3, 8e-3),
    judged=40,
)


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        method: key of `methods.METHODS`.
        ratio: dense parameters ÷ stored parameters.
        seed: of initial values, data order and mapping; the same for every method.
        steps: how many.
        rate: the learning rate's peak, or None: what trials choose.
        sizes: which of the method's rules for sizes, or None: what trials choose. A method without rules has "".
        trial: whether it is judged on the validation reviews, to choose rate and sizes.
        changes: sorted `(setting, value)` of the conversion.
        width: of the dense model.
    """

    method: str
    ratio: float
    seed: int
    steps: int
    rate: float | None = None
    sizes: str | None = None
    trial: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    width: int = DENSE.width

    def __str__(self) -> str:
        parts = [self.method, f"ratio {self.ratio:g}", f"seed {self.seed}", f"{self.steps} steps"]
        parts += [f"rate {self.rate:g}"] if self.rate is not None else []
        parts += [self.sizes] if self.sizes else []
        parts += [f"width {self.width}"] if self.width not in (DENSE.width, SMOKE.shape.width) else []
        return ", ".join([*parts, *(f"{name}={value}" for name, value in self.changes), *["trial"] * self.trial])


def as_row(run: Run) -> dict[str, Any]:
    return {**dataclasses.asdict(run), "changes": dict(run.changes)}


def of_row(row: Mapping[str, Any]) -> Run:
    """Return the run whose row this is."""
    fields = {field.name: row[field.name] for field in dataclasses.fields(Run)}
    return Run(**{**fields, "changes": tuple(sorted(row["changes"].items()))})

"""What a recovery reports: how near student and teacher are at each stage, the loss curve, the time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from roastify.shown import ShownAsTable


@dataclass(frozen=True)
class Likeness:
    """How near a student is to its teacher, in eval mode, on the first batches of the data.

    Args:
        error: the mean over outputs of the squared difference, relative to the teacher's variance.
        top: the share of predictions whose largest logit is the teacher's; None if no output is logits.
    """

    error: float
    top: float | None


@dataclass(frozen=True)
class LossPoint:
    """The mean losses of the steps since the last point.

    Args:
        step: the number of steps done.
        loss: the weighted sum that training minimises.
        parts: `outputs`, `features` and `task`, before their weights.
        lr: the learning rate of the last step.
    """

    step: int
    loss: float
    parts: dict[str, float]
    lr: float


@dataclass(frozen=True, repr=False)
class RecoveryReport(ShownAsTable):
    """What a recovery did. It prints as the table of `roastify recover`.

    Args:
        steps: the steps of the optimizer.
        seconds: the time of training, with alignment and with earlier runs that were resumed, without evaluations.
        align_seconds: the part of `seconds` that alignment took.
        align_error: the error of the layers' outputs before and after alignment; None without alignment.
        before: the student's likeness before the recovery.
        aligned: the student's likeness after alignment; None without alignment.
        after: the student's likeness at the end.
        losses: the loss curve.
        evaluations: `(steps done, what evaluate returned)`.
        features: the modules whose outputs were matched.
        logits: the outputs that were matched as logits; other floating outputs were matched by squared error.
        resumed_at: the step at which the last run resumed; 0 if the recovery was not resumed.
    """

    steps: int
    seconds: float
    align_seconds: float
    align_error: tuple[float, float] | None
    before: Likeness
    aligned: Likeness | None
    after: Likeness
    losses: tuple[LossPoint, ...]
    evaluations: tuple[tuple[int, Any], ...]
    features: tuple[str, ...]
    logits: tuple[str, ...]
    resumed_at: int = 0

    def _headline(self) -> str:
        error = f"error {self.before.error:.3g} → {self.after.error:.3g}"
        return f"{self.steps:,} steps in {self.seconds:.1f} s, {error}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, if what `evaluate` returned is."""
        return dataclasses.asdict(self)

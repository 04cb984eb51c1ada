"""What a recovery reports: how near student and teacher are at each stage, the loss curve, the time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Likeness:
    """How near a student is to its teacher, in eval mode, on the first batches of the data.

    Args:
        error: of the outputs: squared differences over the teacher's squares around its mean, in the mean over outputs.
        top: the share of predictions whose largest logit is the teacher's; None where no output is logits.
    """

    error: float
    top: float | None


@dataclass(frozen=True)
class LossPoint:
    """The mean losses of the steps since the last point.

    Args:
        step: steps done.
        loss: the weighted sum that is trained on.
        parts: `outputs`, `features` and `task`, before their weights.
        lr: of the last step.
    """

    step: int
    loss: float
    parts: dict[str, float]
    lr: float


@dataclass(frozen=True)
class RecoveryReport:
    """What a recovery did.

    Args:
        steps: of the optimizer.
        seconds: that training took, alignment and earlier runs that this one resumed included, evaluations not.
        align_seconds: of these, alignment's.
        align_error: of the layers' outputs before and after alignment; None without it.
        before: likeness of the student as it came.
        aligned: after alignment; None without it.
        after: at the end.
        losses: the curve.
        evaluations: `(steps done, what evaluate returned)`.
        features: the modules whose outputs were matched.
        logits: the outputs that were matched as logits; the other floating outputs by their squares.
        resumed_at: the step at which the last run began; 0 for a run of one piece.
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

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, if what `evaluate` returned is."""
        return dataclasses.asdict(self)

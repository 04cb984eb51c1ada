"""How a recovery is asked for, and what it reports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roastify.errors import ConfigError, closest

SCHEDULES = ("cosine", "constant")
_AUTOCAST = (torch.bfloat16,)


@dataclass(frozen=True)
class RecoverOptions:
    """Settings of a recovery; `roastify.recover` describes them.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    steps: int = 1000
    align: int = 30
    align_batches: int = 8
    lr: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    optimizer: Any = None
    clip: float | None = 1.0
    accumulate: int = 1
    autocast: torch.dtype | None = None
    logits: tuple[str, ...] | None = None
    temperature: float = 2.0
    output_weight: float = 1.0
    features: tuple[str, ...] | None = None
    feature_weight: float = 1.0
    loss_fn: Callable[[Any, Any], torch.Tensor] | str | None = None
    task_weight: float = 1.0
    inputs: Callable[[Any], Any] | None = None
    evaluate: Callable[[torch.nn.Module], Any] | None = None
    evaluate_every: int = 0
    folder: Path | None = None
    save_every: int = 100
    resume: bool = False
    log_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("logits", "features"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                patterns = (patterns,)
            object.__setattr__(self, name, None if patterns is None else tuple(patterns))
        object.__setattr__(self, "folder", None if self.folder is None else Path(self.folder))
        least = {"steps": 0, "align": 0, "align_batches": 1, "accumulate": 1, "evaluate_every": 0, "save_every": 1}
        for name, smallest in {**least, "log_every": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ConfigError(f"{name} must be an integer of at least {smallest}; found {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be an integer; found {self.seed!r}")
        for name in ("lr", "temperature"):
            self._check_number(name, above=True)
        for name in ("output_weight", "feature_weight", "task_weight"):
            self._check_number(name)
        if self.clip is not None:
            self._check_number("clip", above=True)
        self._check_number("warmup")
        if self.warmup >= 1:
            raise ConfigError(f"warmup is a part of the steps and must be below 1; found {self.warmup!r}")
        if self.schedule not in SCHEDULES:
            hint = closest(str(self.schedule), SCHEDULES)
            raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}; found {self.schedule!r}{hint}")
        if self.autocast is not None and self.autocast not in _AUTOCAST:
            raise ConfigError(
                f"autocast must be torch.bfloat16 or None; found {self.autocast!r} (float16 needs a gradient scaler)"
            )
        if self.loss_fn is not None and not callable(self.loss_fn) and not isinstance(self.loss_fn, str):
            raise ConfigError(
                f"loss_fn must be a function of outputs and batch, or the name of an output such as 'loss'; found a "
                f"{type(self.loss_fn).__name__}"
            )
        for name in ("inputs", "evaluate"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigError(f"{name} must be a function; found a {type(getattr(self, name)).__name__}")
        if self.folder is None and self.resume:
            raise ConfigError("resume needs the folder that the checkpoints are in; pass folder=")
        if not self.output_weight and not self.feature_weight and self.loss_fn is None and self.steps:
            raise ConfigError("nothing to train on: output_weight and feature_weight are 0 and there is no loss_fn")

    def _check_number(self, name: str, above: bool = False) -> None:
        value = getattr(self, name)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or value < 0 or (above and value == 0):
            what = "above 0" if above else "of at least 0"
            raise ConfigError(f"{name} must be a number {what}; found {value!r}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, over its peak."""
        ramp = math.ceil(self.warmup * self.steps)
        if step < ramp:
            return (step + 1) / (ramp + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (self.steps - ramp)))

    def every(self) -> int:
        """Return after how many steps losses are reported."""
        return self.log_every or max(1, self.steps // 100)


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

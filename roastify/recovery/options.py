"""`RecoverOptions`: the settings of a recovery with defaults and meanings, for Python and the CLI."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from roastify.errors import ConfigError, closest

Schedule = Literal["cosine", "constant"]
_AUTOCAST = (torch.bfloat16,)


def _setting(default: Any, meaning: str, flag: str = "") -> Any:
    """Return a field with its meaning and, if the command line has it, its flag."""
    return field(default=default, metadata={"meaning": meaning, "flag": flag})


@dataclass(frozen=True)
class RecoverOptions:
    """Settings of a recovery.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    steps: int = _setting(1000, "steps of the optimizer", "--steps")
    _: KW_ONLY
    align: int = _setting(30, "steps of conjugate gradients before training; 0: train from the pool as it is")
    align_batches: int = _setting(8, "batches from which alignment takes the layers' inputs", "--align-batches")
    lr: float = _setting(1e-3, "peak learning rate of the default optimizer", "--lr")
    warmup: float = _setting(0.05, "share of the steps in which the learning rate rises", "--warmup")
    schedule: Schedule = _setting("cosine", "learning rate after the warmup: `cosine` falls to 0", "--schedule")
    optimizer: torch.optim.Optimizer | Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = _setting(
        None,
        "an optimizer of the student's parameters, or a function that builds one from those that require a gradient; "
        "its own learning rates are the peaks. Default: AdamW without weight decay",
    )
    clip: float | None = _setting(1.0, "largest norm of the gradient; `None` in Python: no clipping", "--clip")
    accumulate: int = _setting(1, "batches in a step", "--accumulate")
    autocast: torch.dtype | None = _setting(None, "`torch.bfloat16` for mixed precision")
    logits: str | Sequence[str] | None = _setting(
        None,
        "patterns of outputs that are logits, matched by KL divergence; default: outputs named `…logits`. If a model "
        "returns one tensor, it is called `output`. All other floating outputs are matched by squared error",
        "--logits",
    )
    temperature: float = _setting(2.0, "temperature of the logits", "--temperature")
    output_weight: float = _setting(1.0, "weight of the outputs' distance; 0: not used", "--output-weight")
    features: str | Sequence[str] | None = _setting(
        None,
        "patterns of modules whose outputs are matched; default: the modules around the shared layers",
        "--features",
    )
    feature_weight: float = _setting(1.0, "weight of the features' distance; 0: not used", "--feature-weight")
    loss_fn: Callable[[Any, Any], torch.Tensor] | str | None = _setting(
        None,
        "a function from the student's outputs and the batch to the task's loss, or the name of the output that is the "
        'loss, for example `"loss"` if a transformers model gets labels',
    )
    task_weight: float = _setting(1.0, "weight of the task's loss", "--task-weight")
    inputs: Callable[[Any], Any] | None = _setting(
        None,
        "a function from a batch to forward's arguments: a mapping holds keyword arguments, a sequence positional ones",
    )
    evaluate: Callable[[torch.nn.Module], Any] | None = _setting(
        None,
        "a function of the student in eval mode, whose result is reported: numbers and strings, in dicts and lists",
    )
    on_log: Callable[[dict[str, Any]], None] | None = _setting(
        None,
        "a function that gets the numbers of each point of the loss curve, and of each evaluation, as a dict: `step`, "
        "`loss` and its parts, `lr`, `seconds`, `evaluation`. Without it, and without a terminal, they are lines of "
        "JSON on standard error (see `log_every`)",
    )
    evaluate_every: int = _setting(0, "steps between evaluations; 0: only at the end", "--evaluate-every")
    folder: str | Path | None = _setting(None, "folder of the checkpoint")
    save_every: int = _setting(100, "steps between checkpoints", "--save-every")
    resume: bool = _setting(
        False,
        "continue from the folder's checkpoint, or begin if there is none. On a CPU the result has the same bits as an "
        "uninterrupted run",
        "--resume",
    )
    log_every: int = _setting(
        0,
        "steps between points of the loss curve, each of which is a line of JSON where there is no terminal; 0: a "
        "hundredth of all steps, and lines at least 5 seconds apart, the last point and evaluations always",
        "--log-every",
    )
    seed: int = _setting(0, "seed of all random numbers")

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
        if self.on_log is not None and not callable(self.on_log):
            raise ConfigError(f"on_log must be a function of a dict of numbers; found a {type(self.on_log).__name__}")
        for name in ("lr", "temperature"):
            self._check_number(name, above=True)
        for name in ("output_weight", "feature_weight", "task_weight"):
            self._check_number(name)
        if self.clip is not None:
            self._check_number("clip", above=True)
        self._check_number("warmup")
        if self.warmup >= 1:
            raise ConfigError(f"warmup is a share of the steps and must be below 1; found {self.warmup!r}")
        schedules = get_args(Schedule)
        if self.schedule not in schedules:
            hint = closest(str(self.schedule), schedules)
            raise ConfigError(f"schedule must be one of {', '.join(schedules)}; found {self.schedule!r}{hint}")
        if self.autocast is not None and self.autocast not in _AUTOCAST:
            raise ConfigError(
                f"autocast must be torch.bfloat16 or None; found {self.autocast!r} (float16 needs a gradient scaler)"
            )
        if self.loss_fn is not None and not callable(self.loss_fn) and not isinstance(self.loss_fn, str):
            raise ConfigError(
                f"loss_fn must be a function of outputs and batch, or the name of an output, for example 'loss'; found "
                f"a {type(self.loss_fn).__name__}"
            )
        for name in ("inputs", "evaluate"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigError(f"{name} must be a function; found a {type(getattr(self, name)).__name__}")
        if self.folder is None and self.resume:
            raise ConfigError("resume needs the folder that the checkpoints are in; pass folder=")
        if not self.output_weight and not self.feature_weight and self.loss_fn is None and self.steps:
            raise ConfigError(
                "nothing to train on: output_weight and feature_weight are 0 and there is no loss_fn; set one of them, "
                "or steps=0"
            )

    def _check_number(self, name: str, above: bool = False) -> None:
        value = getattr(self, name)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or value < 0 or (above and value == 0):
            what = "above 0" if above else "of at least 0"
            raise ConfigError(f"{name} must be a number {what}; found {value!r}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, relative to its peak."""
        ramp = math.ceil(self.warmup * self.steps)
        if step < ramp:
            return (step + 1) / (ramp + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (self.steps - ramp)))

    def every(self) -> int:
        """Return the number of steps between points of the loss curve."""
        return self.log_every or max(1, self.steps // 100)


def _described() -> str:
    """Return the class's docstring with a line for each setting."""
    lines = (f"    {each.name}: {each.metadata['meaning']}." for each in dataclasses.fields(RecoverOptions))
    return "\n".join([inspect.cleandoc(RecoverOptions.__doc__ or ""), "", "Args:", *lines])


RecoverOptions.__doc__ = _described()

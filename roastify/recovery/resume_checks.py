"""Whether the state in a checkpoint is one that the run which resumes it could have written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from roastify.isolation import RandomStream
from roastify.recovery.report import Likeness, LossPoint
from roastify.typed_values import typed

_KEYS = {
    "step", "seconds", "align_seconds", "align_error", "before", "aligned", "losses", "evaluations", "sums", "summed",
    "student", "optimizer", "stream", "feed", "data",
}  # fmt: skip


def check_state(
    state: Any, student: nn.Module, optimizer: torch.optim.Optimizer, stream: RandomStream, most_batches: int
) -> None:
    """Check a checkpoint's state before anything is changed by it.

    Args:
        state: the state.
        student: the run's student.
        optimizer: the run's optimizer.
        stream: a random stream of the run.
        most_batches: the most batches that the run draws.

    Raises:
        ValueError: a part is missing, or of another type or size.
    """
    _keys("the state", state, _KEYS)
    for name in ("step", "summed"):
        _count(name, state[name], most_batches)
    for name in ("seconds", "align_seconds"):
        _number(name, state[name])
    if state["align_error"] is not None:
        _like("align_error", state["align_error"], (0.0, 0.0))
    typed(Likeness, state["before"], "before")
    if state["aligned"] is not None:
        typed(Likeness, state["aligned"], "aligned")
    for index, point in enumerate(_sequence("losses", state["losses"])):
        typed(LossPoint, point, f"losses[{index}]")
    for index, each in enumerate(_sequence("evaluations", state["evaluations"])):
        if len(_sequence(f"evaluations[{index}]", each)) != 2:
            raise ValueError(f"evaluations[{index}] is no pair")
        _count(f"evaluations[{index}]", each[0], most_batches)
    if not isinstance(state["sums"], dict) or not {*state["sums"]} <= {"loss", "outputs", "features", "task"}:
        raise ValueError("sums are no sums of losses")
    for name, value in state["sums"].items():
        _like(f"sums.{name}", value, torch.zeros((), dtype=torch.float64))
    # An older roastify wrote no extra state; what a pool's says is compared when it is loaded.
    own = {name: value for name, value in student.state_dict().items() if not name.endswith("_extra_state")}
    extra = {name for name in student.state_dict() if name not in own}
    theirs = state["student"] if isinstance(state["student"], dict) else {}
    _like("student", {name: value for name, value in theirs.items() if name not in extra}, own)
    _check_optimizer(state["optimizer"], optimizer)
    _check_stream("stream", state["stream"], stream)
    feed = state["feed"]
    _keys("feed", feed, {"epoch", "taken", "ahead", "began", "first", "stream"})
    for name in ("epoch", "taken", "ahead"):
        _count(f"feed.{name}", feed[name], most_batches)
    _check_stream("feed.stream", feed["stream"], stream)
    for name in ("began", "first"):
        _keys(f"feed.{name}", feed[name], {"stream", "generators"})
        _check_stream(f"feed.{name}.stream", feed[name]["stream"], stream)
        for each in _sequence(f"feed.{name}.generators", feed[name]["generators"]):
            if not isinstance(each, Tensor):
                raise ValueError(f"feed.{name}.generators are no tensors")
            try:
                torch.Generator().set_state(each)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"feed.{name}.generators are no states of a generator") from error


def _check_optimizer(state: Any, optimizer: torch.optim.Optimizer) -> None:
    own = optimizer.state_dict()
    if not isinstance(state, dict) or not own.keys() <= state.keys():
        raise ValueError("optimizer is no state of an optimizer")
    _like("optimizer.param_groups", state["param_groups"], own["param_groups"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(state["state"], dict):
        raise ValueError("optimizer.state is no dict")
    for index, values in state["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(values, dict):
            raise ValueError("optimizer.state is not that of the run's parameters")
        for name, value in values.items():
            if name == "step":
                _number("optimizer's step", float(value) if isinstance(value, Tensor) and value.numel() == 1 else value)
            elif isinstance(value, Tensor) and value.dim() and value.shape != parameters[index].shape:
                raise ValueError(f"optimizer.state has {name} of another shape than the parameter")


def _check_stream(where: str, value: Any, stream: RandomStream) -> None:
    """Check a random stream's state, by setting it and then the stream's own again."""
    own = stream.state
    _like(where, value, own)
    try:
        stream.state = value
        with stream.active():
            pass
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{where} is no state of random generators") from error
    finally:
        stream.state = own


def _like(where: str, value: Any, expected: Any) -> None:
    """Check that a value has the structure of another, and tensors its shapes and dtypes."""
    if isinstance(expected, Mapping):
        _keys(where, value, set(expected))
        for key, each in expected.items():
            _like(f"{where}.{key}", value[key], each)
    elif isinstance(expected, list | tuple):
        if len(_sequence(where, value)) != len(expected):
            raise ValueError(f"{where} has {len(value)} items; expected {len(expected)}")
        for index, (item, each) in enumerate(zip(value, expected, strict=True)):
            _like(f"{where}[{index}]", item, each)
    elif isinstance(expected, Tensor | np.ndarray):
        if type(value) is not type(expected) and not (isinstance(value, Tensor) and isinstance(expected, Tensor)):
            raise ValueError(f"{where} is a {type(value).__name__}; expected a {type(expected).__name__}")
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise ValueError(f"{where} has shape {tuple(value.shape)} and dtype {value.dtype}, unlike this run's")
    elif expected is None or isinstance(expected, float):
        if value is not None:
            _number(where, value)
    elif type(value) is not type(expected) or (isinstance(expected, str) and value != expected):
        raise ValueError(f"{where} is a {type(value).__name__}, unlike this run's")


def _keys(where: str, value: Any, keys: set[Any]) -> None:
    if not isinstance(value, dict) or value.keys() != keys:
        raise ValueError(f"{where} does not hold what this run's does")


def _sequence(where: str, value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is a {type(value).__name__}; expected a list")
    return value


def _count(where: str, value: Any, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{where} is out of range")


def _number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise ValueError(f"{where} is no finite number")

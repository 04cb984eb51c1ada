"""One GPU: peak memory and step time, dense and converted in the same process, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import roastify
from benchmarks.models import free
from benchmarks.rows import Cases, Row, largest_fold
from benchmarks.training.step import Training, allocated, in_turn, memory, prepare_libraries
from benchmarks.training.tasks import COMPILED, EAGER, GRAPHED, MODES, REDUCED, Batch, Task, loss_of
from roastify.checks import clocks
from roastify.conversion.converted import pool_of
from roastify.conversion.rewrite import copy_weights
from roastify.errors import OutputMismatch

# How torch.compile is called; the mode that reduces overhead replays the compiled forward and backward as CUDA graphs.
COMPILATION = {COMPILED: "default", REDUCED: "reduce-overhead"}
WARM_UP_STEPS = 4
# Of the loss, in bfloat16.
TOLERANCE = 1e-2
# Parameters, gradients and AdamW's state must fall by this share of the ratio.
MEMORY_AIM = 0.95
STATE = ("parameters", "gradients", "optimizer")


def measure(rows: Cases, tasks: dict[str, Task], device: torch.device, steps: int) -> None:
    """Measure the tasks' cases that were asked for."""
    prepare_libraries(device)
    for mode in MODES if device.type == "cuda" else (EAGER, COMPILED):
        for name, task in tasks.items():
            cases = {ratio: f"{name}/{mode}/ratio={ratio}" for ratio in task.ratios}
            cases = {ratio: case for ratio, case in cases.items() if rows.wanted(case)}
            if cases:
                _measure_task(rows, name, task, mode, cases, device, steps)
            torch.compiler.reset()
            free()


def _measure_task(
    rows: Cases, name: str, task: Task, mode: str, cases: dict[int, str], device: torch.device, steps: int
) -> None:
    """Measure one model in one mode; its ratios share the dense side."""
    fields: Row = {"task": name, "mode": mode, "shape": task.shape, "time_aim": task.time_aims.get(mode)}
    made = clocks.machine(device)

    def failed(ratio: int, error: Exception) -> None:
        # A failure is a result too: memory that is not there, or a model that this transformers does not have.
        rows.add({"case": cases[ratio], **fields, "ratio": ratio, "failure": clocks.reason(error), "machine": made})

    begun = time.perf_counter()
    try:
        batch = task.data(device)
        dense = _Side(lambda: task.model(device), mode, batch, device)
        dense.prepare(mode)
    except Exception as error:
        for ratio in cases:
            failed(ratio, error)
        return
    sides: dict[int, _Side] = {}
    for ratio in cases:
        try:
            side = _Side(lambda ratio=ratio: _converted(task, ratio, device), mode, batch, device)
            side.error = _check(task, side.training.model, batch, device)
            side.prepare(mode)
            sides[ratio] = side
        except Exception as error:
            failed(ratio, error)
        free()
    if not sides:
        return
    times = in_turn(
        {"dense": dense.step, **{str(ratio): side.step for ratio, side in sides.items()}},
        device,
        steps,
    )
    dense_ms = times["dense"]["median_ms"]
    for ratio, side in sides.items():
        plan = pool_of(side.model).plan
        step_ratio = times[str(ratio)]["median_ms"] / dense_ms
        state_ratio = _state(dense.memory) / _state(side.memory)
        rows.add(
            {
                "case": cases[ratio],
                **fields,
                "ratio": ratio,
                "achieved_ratio": plan.achieved_ratio,
                "parameters": {"dense": _count(dense.model), "converted": _count(side.model)},
                "tile": list(plan.tile),
                "sign": plan.sign,
                "fold": largest_fold(plan),
                "dtype": "bfloat16 autocast",
                "loss_error": side.error,
                "prepared_s": {"dense": dense.seconds, "converted": side.seconds},
                "dense": {**times["dense"], "memory": dense.memory},
                "converted": {**times[str(ratio)], "memory": side.memory},
                "step_ratio": step_ratio,
                "state_ratio": state_ratio,
                "state_aim": MEMORY_AIM * ratio,
                "whole_s": time.perf_counter() - begun,
                "machine": made,
            },
            f"step {step_ratio:.3f} × dense ({dense_ms:.2f} ms), state ÷ {state_ratio:.2f}",
        )


class _Side:
    """A model that has taken its first steps, what a step held, and how long all of that took."""

    def __init__(self, build: Callable[[], nn.Module], mode: str, batch: Batch, device: torch.device) -> None:
        begun = time.perf_counter()
        free()
        before = allocated(device)
        self.model = build()
        free()
        called: Any = torch.compile(self.model, mode=COMPILATION[mode]) if mode in COMPILATION else self.model
        self.training = Training(called, [batch])
        self.training.losses(WARM_UP_STEPS)
        self.memory = memory(self.training, before)
        self.seconds = time.perf_counter() - begun
        self.error = 0.0
        self.step: Callable[[], object] = self.training.step

    def prepare(self, mode: str) -> None:
        """Get ready to be timed; memory is that of steps that are not captured, which keep nothing for a replay."""
        if mode == GRAPHED:
            begun = time.perf_counter()
            self.step = self.training.captured()
            self.seconds += time.perf_counter() - begun


def _converted(task: Task, ratio: int, device: torch.device) -> nn.Module:
    return roastify.convert(task.model(device), ratio, config=task.settings, inplace=True)


def _check(task: Task, converted: nn.Module, batch: Batch, device: torch.device) -> float:
    """Return the relative difference of the loss from the dense model's with the same weights, without dropout.

    Raises:
        OutputMismatch: it is more than rounding explains.
    """
    converted = getattr(converted, "_orig_mod", converted)
    twin = task.model(device)
    copy_weights(converted, twin)
    # What is not in the pool, and running statistics.
    kept = {name: value for name, value in converted.state_dict().items() if not name.endswith("roast_pool.weight")}
    twin.load_state_dict(kept, strict=False)
    found = []
    for model in (twin, converted):
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            found.append(float(loss_of(model, batch)))
        model.train()
    error = abs(found[1] - found[0]) / abs(found[0])
    if not error <= TOLERANCE:
        raise OutputMismatch(
            f"the converted model's loss is {found[1]:.5g} where the dense model with its weights has {found[0]:.5g}; "
            f"expected a difference of at most {TOLERANCE:g} of it, so nothing was timed"
        )
    return error


def _state(found: dict[str, int | None]) -> int:
    return sum(found[name] or 0 for name in STATE)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

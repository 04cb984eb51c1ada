"""One training run, from its initial values to its row."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import inputs, methods, nets
from benchmarks.accuracy.budget import UnreachableError
from benchmarks.accuracy.inputs import Epoch, Examples
from benchmarks.accuracy.runs import Run, as_row
from benchmarks.accuracy.step import Step
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.teacher import Teacher, dense_weights, teacher_of
from benchmarks.rows import machine

# Part of the steps in which the step size grows; then it falls to zero, both in a line.
WARM_UP = 0.2
# What a row says of where it was measured.
MACHINE = ("device", "python", "torch", "triton", "cuda", "numpy", "roastify", "date")
# Examples judged at a time.
_JUDGED = 2000

Autocast = Callable[[], contextlib.AbstractContextManager]


def schedule(peak: float, steps: int) -> Tensor:
    """Return the learning rate of every step."""
    position = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return (peak * torch.minimum(position / WARM_UP, (1 - position) / (1 - WARM_UP))).float()


def make_optimizer(model: nn.Module, task: Task, run: Run, device: str) -> tuple[torch.optim.Optimizer, list[float]]:
    """Return the task's optimizer and the factor of each group's learning rate; vectors do not decay."""
    on_gpu = torch.device(device).type == "cuda"
    pool = {id(parameter) for name, parameter in model.named_parameters() if name.endswith("roast_pool.weight")}
    decay = run.change("decay", task.decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        factor = run.change("pool_rate", 1.0) if id(parameter) in pool else 1.0
        groups.setdefault((factor, decay if parameter.dim() >= 2 else 0.0), []).append(parameter)
    named = [
        {"params": parameters, "weight_decay": weight_decay, "lr": torch.zeros((), device=device)}
        for (_, weight_decay), parameters in groups.items()
    ]
    fused = {"fused": True} if on_gpu else {}
    if task.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(named, momentum=0.9, nesterov=True, **fused)
    else:
        optimizer = torch.optim.AdamW(named, capturable=on_gpu, **fused)
    return optimizer, [factor for factor, _ in groups]


def accuracy(model: nn.Module, examples: Examples, autocast: Autocast) -> float:
    """Return the part of the examples that the model gets right, in eval mode; its mode is put back."""
    was_training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=examples.y.device)
    with torch.no_grad():
        for x, y in zip(examples.x.split(_JUDGED), examples.y.split(_JUDGED), strict=True):
            with autocast():
                logits = model(inputs.plain(x))
            right += (logits.argmax(-1) == y).sum()
    model.train(was_training)
    return int(right) / len(examples)


@dataclass
class Trained:
    """A trained model, and how it came about.

    Args:
        model: in train mode.
        stored: parameters that are stored.
        note: what they are.
        accuracy: after every epoch.
        loss: its mean over every epoch.
        captured: whether its steps were a CUDA graph.
        setup: seconds before the first step.
    """

    model: nn.Module
    stored: int
    note: str
    accuracy: list[float]
    loss: list[float]
    captured: bool
    setup: float


def autocast_on(device: str) -> Autocast:
    """Return what makes the context of every forward pass: bfloat16 on a GPU."""
    kind = torch.device(device).type
    return functools.partial(torch.autocast, kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)


def fit(
    run: Run,
    task: Task,
    folder: Path,
    device: str,
    graph: bool,
    teacher: Teacher | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Trained:
    """Build and train a run's model, beside labels on a teacher's outputs if there is one; see `train`.

    `start` is the state dict of the dense model that it is made of, if that does not begin at random.

    Raises:
        UnreachableError: its method cannot store so few parameters.
        CaptureError: the step cannot be captured.
    """
    begun = time.perf_counter()
    assert run.rate is not None and run.epochs is not None, "a run is trained when rate and epochs are chosen"
    examples, judged = inputs.load(task, folder, device, run.trial)
    autocast = autocast_on(device)

    def batch() -> tuple[Tensor, Tensor]:
        return inputs.plain(examples.x[: task.batch]), examples.y[: task.batch]

    built = methods.build(run, task, device, batch, start)
    model = nets.laid_out(built.model, task)
    model.train()
    optimizer, factors = make_optimizer(model, task, run, device)
    steps = len(examples) // task.batch
    step = Step(
        model,
        optimizer,
        factors,
        schedule(run.rate, run.epochs * steps).to(device),
        examples,
        Epoch.empty(len(examples), device),
        task.batch,
        run.change("cutout", 0),
        run.change("smoothing", 0.0),
        autocast,
        teacher,
    )
    if graph and torch.device(device).type == "cuda":
        step.capture()
    # Dropout draws from here on, the same for every method.
    torch.manual_seed(run.seed)
    setup = time.perf_counter() - begun
    accuracies, losses = [], []
    for epoch in range(run.epochs):
        step.epoch.draw(run.seed, epoch)
        step.begin_epoch()
        for _ in range(steps):
            step()
        losses.append(float(step.loss) / steps)
        accuracies.append(accuracy(model, judged, autocast))
    return Trained(model, built.stored, built.note, accuracies, losses, step.graph is not None, setup)


def train(run: Run, task: Task, folder: Path, device: str, graph: bool = True) -> dict[str, Any]:
    """Train one model; for one that learns or starts from the dense model that first, unless it is there.

    Args:
        run: with its learning rate and epochs.
        task: its task.
        folder: of the prepared arrays.
        device: `cpu` or `cuda`.
        graph: on a GPU, replay steps from a CUDA graph.

    Returns:
        the row: the run, what was stored, accuracy and loss of every epoch, and the teacher's accuracy if there is one;
        or why so few parameters cannot be stored.

    Raises:
        CaptureError: the step cannot be captured.
    """
    methods.check_changes(run)

    def dense(other: Run) -> nn.Module:
        return fit(other, task, folder, device, graph).model

    teacher = start = None
    if run.change("distill") is not None or run.change("warm"):
        weights = dense_weights(run, task, folder, device, dense)
        release(device)
        start = weights if run.change("warm") else None
        teacher = teacher_of(run, task, weights, device) if run.change("distill") is not None else None
    # Only now: training the dense model is no part of what further such runs take.
    begun = time.perf_counter()
    row = {**as_row(run), "allowed": methods.target(task, run.ratio), "machine": machine(device, *MACHINE)}
    try:
        trained = fit(run, task, folder, device, graph, teacher, start)
    except UnreachableError as error:
        return {**row, "unreachable": str(error), "seconds": time.perf_counter() - begun}
    row |= {
        "stored": trained.stored,
        "note": trained.note,
        "accuracy": [round(value, 5) for value in trained.accuracy],
        "loss": [round(value, 4) if math.isfinite(value) else None for value in trained.loss],
        "captured": trained.captured,
        "setup": round(trained.setup, 2),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    if teacher is not None:
        _, judged = inputs.load(task, folder, device, run.trial)
        row["teacher_accuracy"] = round(accuracy(teacher.model, judged, autocast_on(device)), 5)
    del trained, teacher
    release(device)
    return row


def release(device: str) -> None:
    """Give back the memory of a GPU that nothing holds any more."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()

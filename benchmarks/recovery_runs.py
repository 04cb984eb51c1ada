"""What the benchmark of recovery trains: the dense teacher, its recovered twin, and the same model from scratch."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import roastify
from benchmarks import signs_tasks
from benchmarks.signs_tasks import Task
from roastify.config import RoastConfig

DENSE, RECOVERED, SCRATCH = "dense", "recovered", "scratch"
# Peaks of the learning rate that both sides may choose from, by accuracy on examples that neither trains on.
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
_HELD_OUT = 0.1
_WARM_UP_STEPS = 8
_TIMED_STEPS = 24
_POINTS = 3


class Run(NamedTuple):
    """One training run; the dense model has ratio 1."""

    task: str
    ratio: float
    arm: str
    seed: int
    lr: float


@dataclasses.dataclass
class Bench:
    """A task on a device: its data, and how long a step of each kind takes.

    Args:
        name: of the task.
        task: its sizes and recipe.
        folder: of its arrays, and of the teachers.
        device: where everything runs.
        seconds: that each of the two sides is given.
    """

    name: str
    task: Task
    folder: Path
    device: str
    seconds: float
    step_seconds: dict[tuple[float, str], tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def autocast(self) -> Any:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.on_gpu)

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def part(self, split: str) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of `train`, `validation` (the last tenth of the training examples) or `test`."""
        stored = "test" if split == "test" else "train"
        x, y = (signs_tasks.on_device(self.name, f"{stored}_{what}", self.folder, self.device) for what in "xy")
        held = len(y) - int(_HELD_OUT * len(y))
        if split == "train":
            return x[:held], y[:held]
        return (x[held:], y[held:]) if split == "validation" else (x, y)

    def batches(self, seed: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
        """Return the function from an epoch to its batches."""
        run = signs_tasks.Run(self.name, 1.0, DENSE, seed)
        return lambda epoch: signs_tasks.training_batches(run, self.task, *self.part("train"), epoch)

    def accuracy(self, model: nn.Module, split: str = "test") -> float:
        run = signs_tasks.Run(self.name, 1.0, DENSE, 0)
        return signs_tasks.accuracy(model, run, *self.part(split), 2 * self.task.batch, self.autocast)

    def new_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return signs_tasks.new_model(self.name, self.task).to(self.device)

    def converted(self, model: nn.Module, ratio: float, init: str, seed: int) -> nn.Module:
        return roastify.convert(model, ratio, init=init, config=RoastConfig(seed=seed))


def train(bench: Bench, model: nn.Module, seed: int, lr: float, steps: int) -> tuple[float, list[list[float]]]:
    """Train on labels with AdamW and a one-cycle schedule; return seconds of training, and test accuracy by step."""
    model.train()
    # Dropout draws from here on.
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=bench.on_gpu)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    batches = bench.batches(seed)
    curve: list[list[float]] = []
    seconds, step, epoch, begun = 0.0, 0, 0, bench.now()
    while step < steps:
        for x, y in batches(epoch):
            with bench.autocast():
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % every(steps) == 0 or step == steps:
                seconds += bench.now() - begun
                curve.append([step, bench.accuracy(model)])
                begun = bench.now()
            if step == steps:
                break
        epoch += 1
    return seconds, curve


def every(steps: int) -> int:
    return max(1, -(-steps // _POINTS))


def teacher(bench: Bench, seed: int) -> tuple[nn.Module, dict[str, Any] | None]:
    """Return the seed's dense model, and its row if it was trained just now."""
    path = bench.folder / f"{bench.name}-{seed}.safetensors"
    model = bench.new_model(seed)
    if path.exists():
        model.load_state_dict(load_file(path, device=bench.device))
        return model.eval(), None
    steps = bench.task.epochs * (len(bench.part("train")[1]) // bench.task.batch)
    seconds, curve = train(bench, model, seed, bench.task.learning_rate, steps)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    run = Run(bench.name, 1.0, DENSE, seed, bench.task.learning_rate)
    return model.eval(), _row(bench, run, model, steps, seconds, curve)


def _row(
    bench: Bench, run: Run, model: nn.Module, steps: int, seconds: float, curve: list[list[float]]
) -> dict[str, Any]:
    return {
        **run._asdict(),
        "stored": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "seconds": seconds,
        "validation": bench.accuracy(model, "validation"),
        "curve": curve,
        "accuracy": curve[-1][1],
    }


def compete(bench: Bench, run: Run, dense: nn.Module) -> dict[str, Any]:
    """Give one side its seconds; its row of the result."""
    if (run.ratio, run.arm) not in bench.step_seconds:
        bench.step_seconds[run.ratio, run.arm] = measure(bench, run, dense)
    aside, step_seconds = bench.step_seconds[run.ratio, run.arm]
    steps = max(_POINTS, round((bench.seconds - aside) / step_seconds))
    if run.arm == SCRATCH:
        model = bench.converted(bench.new_model(run.seed), run.ratio, "match", run.seed)
        return _row(bench, run, model, steps, *train(bench, model, run.seed, run.lr, steps))
    model = bench.converted(dense, run.ratio, "project", run.seed)
    projected = bench.accuracy(model)
    report = _recover(bench, run, model, dense, steps, evaluate=bench.accuracy)
    curve = [list(point) for point in report.evaluations]
    return {
        **_row(bench, run, model, steps, report.seconds, curve),
        "align_seconds": report.align_seconds,
        "align_error": report.align_error,
        "projected": projected,
        "before": dataclasses.asdict(report.before),
        "after": dataclasses.asdict(report.after),
    }


def _recover(
    bench: Bench,
    run: Run,
    model: nn.Module,
    dense: nn.Module,
    steps: int,
    evaluate: Callable[[nn.Module], Any] | None = None,
) -> roastify.RecoveryReport:
    return roastify.recover(
        model,
        dense,
        bench.batches(run.seed),
        steps,
        lr=run.lr,
        logits="output",
        autocast=torch.bfloat16 if bench.on_gpu else None,
        evaluate=evaluate,
        evaluate_every=every(steps),
        # Reading the loss waits for the GPU.
        log_every=50,
        seed=run.seed,
    )


def measure(bench: Bench, run: Run, dense: nn.Module) -> tuple[float, float]:
    """Return the seconds of alignment and of a step: kernels are compiled first, then the clock runs."""
    init = "match" if run.arm == SCRATCH else "project"
    model = bench.converted(dense, run.ratio, init, run.seed)
    if run.arm == SCRATCH:
        once: Callable[[nn.Module, int], tuple[float, float]] = functools.partial(_scratch_seconds, bench, run)
    else:
        once = functools.partial(_recovery_seconds, bench, run, dense)
    once(copy.deepcopy(model), _WARM_UP_STEPS)
    return once(model, _TIMED_STEPS)


def _scratch_seconds(bench: Bench, run: Run, model: nn.Module, steps: int) -> tuple[float, float]:
    seconds, _ = train(bench, model, run.seed, run.lr, steps)
    return 0.0, seconds / steps


def _recovery_seconds(bench: Bench, run: Run, dense: nn.Module, model: nn.Module, steps: int) -> tuple[float, float]:
    report = _recover(bench, run, model, dense, steps)
    return report.align_seconds, (report.seconds - report.align_seconds) / steps

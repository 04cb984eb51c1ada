"""Where the GPU's time of a training step goes: its kernels by kind, of the dense and the converted model.

    python -m benchmarks.training.kernel_times
    python -m benchmarks.training.page

A step is the training benchmark's, replayed as a CUDA graph. How long it takes as a whole, without the profiler, is
what `python -m benchmarks.training` measures.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import roastify
from benchmarks.models import free
from benchmarks.rows import FOLDER, Cases, Row, largest_fold
from benchmarks.training.step import Training, prepare_libraries
from benchmarks.training.tasks import GRAPHED, SMOKE_TASKS, TASKS, Task
from roastify.checks import clocks
from roastify.conversion.converted import pool_of

RESULTS = FOLDER / "step_kernels.json"
STEPS = 3
REST = "the rest"
# By what is in a kernel's name, the first that fits: kernels of attention have the names of their products, too.
KINDS = {
    "pool and folds": r"^_\w+_kernel",
    "attention": r"flash|fmha|sdpa",
    "products": r"gemm|nvjet|cutlass|splitK|gemv|cublas",
    "optimizer": r"multi_tensor_apply",
}


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name. Ours are the only ones whose names are Python's."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), REST)


def kernel_times(step: Callable[[], object]) -> dict[str, float]:
    """Return the milliseconds that the GPU works for one step, by the kinds of its kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times = dict.fromkeys([*KINDS, REST], 0.0)
    for event in found.events() or ():
        if event.device_type == DeviceType.CUDA:
            times[kind_of(event.name)] += event.time_range.elapsed_us() / 1e3 / STEPS
    return times


def measure(task: Task, ratio: int, device: torch.device) -> Row:
    """Return where the time of the dense and the converted model's step goes, and the largest fold."""
    batch = task.data(device)
    dense = _times(Training(task.model(device), [batch]))
    free()
    model = roastify.convert(task.model(device), ratio, config=task.settings, inplace=True)
    return {"fold": largest_fold(pool_of(model).plan), "dense": dense, "converted": _times(Training(model, [batch]))}


def _times(training: Training) -> dict[str, float]:
    return kernel_times(training.captured())


@click.command()
@click.option("--only", default="", metavar="PATTERN", help="Regular expression of cases, as bert-base/ratio=10.")
@click.option("--smoke", is_flag=True, help="Narrow models instead: shows in seconds whether everything runs.")
@click.option("--minutes", default=8.0, show_default=True, help="Begin no case after so long; what is left is named.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The JSON file.")
def main(only: str, smoke: bool, minutes: float, output: Path | None) -> None:
    """Measure the tasks whose steps as CUDA graphs have an aim, at the lowest ratio of each."""
    if smoke and output is None:
        raise click.UsageError("--smoke measures nothing of interest; name another file for it with --output")
    if not torch.cuda.is_available():
        raise click.UsageError("kernels are a GPU's, and torch sees none here")
    device = torch.device("cuda")
    prepare_libraries(device)
    rows = Cases(output or RESULTS, only, minutes)
    for name, task in (SMOKE_TASKS if smoke else TASKS).items():
        ratio = min(task.ratios)
        case = f"{name}/ratio={ratio}"
        if GRAPHED in task.time_aims and rows.wanted(case):
            fields: Row = {"case": case, "task": name, "shape": task.shape, "ratio": ratio}
            fields |= {"time_aim": task.time_aims[GRAPHED], "machine": clocks.machine(device)}
            try:
                found = measure(task, ratio, device)
                sums = [sum(found[side].values()) for side in ("dense", "converted")]
                rows.add({**fields, **found}, f"kernels of {sums[0]:.2f} ms dense and {sums[1]:.2f} ms converted")
            except Exception as error:
                rows.add({**fields, "failure": clocks.reason(error)})
            free()
    rows.close()


if __name__ == "__main__":
    main()

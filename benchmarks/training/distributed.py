"""Several GPUs of one host, under torchrun: dense and converted, alone, with DDP and with FSDP2.

Every process has a batch of its own, as large as the one of a single GPU. The first losses are held to those of one
GPU that descends the mean loss of all the batches. A step runs eagerly, or as the replay of one CUDA graph, collectives
included: Python then launches nothing, and what is compared is the GPUs.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import roastify
from benchmarks.models import free
from benchmarks.rows import Cases, Row
from benchmarks.stats import quartiles
from benchmarks.training.collectives import CountBytes
from benchmarks.training.step import IN_A_ROW, Training, allocated, in_a_row, prepare_libraries
from benchmarks.training.tasks import EAGER, GRAPHED, Task
from roastify.checks import clocks
from roastify.errors import OutputMismatch

DENSE = "dense"
KINDS = ALONE, DDP, FSDP = "alone", "ddp", "fsdp"
# In this order: what is alone comes before what is compared with it, and the capture that may not succeed comes last.
PLACES = (
    (ALONE, GRAPHED),
    (DDP, GRAPHED),
    (ALONE, EAGER),
    (DDP, EAGER),
    (FSDP, EAGER),
    (FSDP, GRAPHED),
)
CHECKED_STEPS = 6
# PyTorch's notes on CUDA graphs ask for 11 steps: DDP times some of its first ones with events.
STEPS_BEFORE_CAPTURE = 11
# Of a loss: sums in another order, and FSDP2's bfloat16 copies of norms and biases.
TOLERANCE = 1e-2
TIMEOUT = datetime.timedelta(minutes=3)


class Processes:
    """The processes of this run: this one's place among them, its device, and the groups of the first n.

    Args:
        kind: `cuda` or `cpu`.
    """

    def __init__(self, kind: str) -> None:
        if "LOCAL_RANK" not in os.environ:
            raise click.UsageError(
                "no process of torchrun is here; a benchmark of several GPUs starts as in "
                "`torchrun --standalone --nproc-per-node 2 -m benchmarks.training --distributed`"
            )
        # Multicast over NVLink stays off: it is not available on every host that has the links.
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        # As PyTorch's notes on CUDA graphs ask: NCCL's watching thread must not end a capture.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        local = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", timeout=TIMEOUT, device_id=self.device)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # torchrun gives each process one thread; conversion has use for its share of the cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        # Waiting and deciding need no GPU.
        self._control = dist.new_group(backend="gloo")
        self.sizes = [1, *(size for power in range(1, 10) if (size := 1 << power) < self.world)]
        self.sizes += [self.world] if self.world > 1 else []
        self.groups = {size: dist.new_group(list(range(size))) for size in self.sizes[1:]}

    def agree(self, value: Any) -> Any:
        """Return the first process's value in all of them, once all are here."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in all of them."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values


@contextlib.contextmanager
def processes(kind: str) -> Iterator[Processes]:
    """Give the processes of this run, and end their groups."""
    found = Processes(kind)
    try:
        yield found
    finally:
        dist.destroy_process_group()


def measure(
    output: Path, only: str, minutes: float, tasks: dict[str, Task], kind: str, steps: int, missing: bool = False
) -> None:
    """Measure the cases that were asked for, on as many GPUs as torchrun has started processes for."""
    with processes(kind) as several:
        rows = Cases(output, only, minutes, missing=missing) if several.rank == 0 else None
        prepare_libraries(several.device)
        for name, task in tasks.items():
            _Measurement(several, rows, name, task, steps).run()
            free()
        if rows is not None:
            rows.close()


def joined(everyone: list[Row]) -> Row:
    """Return what all processes found as one: a failure of any, else the first one's row with the highest peak."""
    failed = [found["failure"] for found in everyone if "failure" in found]
    if failed:
        return {"failure": failed[0]}
    peaks = [found["peak"] for found in everyone]
    return {**everyone[0], "peak": None if peaks[0] is None else max(peaks)}


class _Measurement:
    """The cases of one model."""

    def __init__(self, several: Processes, rows: Cases | None, name: str, task: Task, steps: int) -> None:
        self.several, self.rows, self.name, self.task, self.steps = several, rows, name, task, steps
        self.models: dict[str, nn.Module] = {}

    def run(self) -> None:
        """Measure each side in each place, on ever more GPUs."""
        sides = [DENSE, *(f"ratio={ratio}" for ratio in self.task.ratios)]
        for kind, mode in PLACES:
            if mode == GRAPHED and self.several.device.type != "cuda":
                continue
            # FSDP2 on one GPU shards nothing, and DDP on one has nobody to talk to.
            for size in [1] if kind == ALONE else self.several.sizes[1:]:
                for side in sides:
                    case = self._name(kind, mode, size, side)
                    if self.several.agree(self.rows is not None and self.rows.wanted(case)):
                        self._case(case, kind, mode, size, side)
                        free()

    def _name(self, kind: str, mode: str, size: int, side: str) -> str:
        return f"distributed/{self.name}/{kind}/{mode}/gpus={size}/{side}"

    def _model(self, side: str) -> nn.Module:
        """Return a copy of a side's model as it is before training; made once, the same in every process."""
        if side not in self.models:
            model = self.task.model(self.several.device)
            if side != DENSE:
                model = roastify.convert(
                    model, int(side.removeprefix("ratio=")), config=self.task.settings, inplace=True
                )
            self.models[side] = model
            free()
        return copy.deepcopy(self.models[side])

    def _case(self, case: str, kind: str, mode: str, size: int, side: str) -> None:
        """Measure one case in the processes that it needs; the others wait."""
        found: Row | None = None
        if self.several.rank < size:
            try:
                # Before memory is read: the copies that all cases are made from are not theirs.
                self._model(side)
                free()
                with _stream(self.several.device, mode) as stream:
                    found = self._alone(side, stream) if kind == ALONE else self._together(kind, size, side, stream)
            except Exception as error:  # a failure is a result too; where only one fails, the others' timeout ends it
                found = {"failure": clocks.reason(error)}
        everyone = [other for other in self.several.gather(found) if other is not None]
        if self.rows is None:
            return
        row: Row = {"case": case, "task": self.name, "kind": kind, "mode": mode, "gpus": size, "side": side}
        row |= {"shape": self.task.shape, "dtype": "bfloat16 autocast"}
        made = {"machine": clocks.machine(self.several.device)}
        row |= joined(everyone)
        if "failure" in row:
            self.rows.add({**row, **made})
            return
        per_second = self.task.size * 1e3 / row["median_ms"]
        row |= {"throughput": size * per_second}
        said = f"{row['median_ms']:.2f} ms a step"
        if kind != ALONE:
            found, said = self._against_one(row, said, per_second, self.rows.find(self._name(ALONE, mode, 1, side)))
            row |= found
        self.rows.add({**row, **made}, said)

    def _against_one(self, row: Row, said: str, per_second: float, alone: Row | None) -> tuple[Row, str]:
        """Compare a case with the same side and mode on one GPU, if that has a row; say so."""
        found: Row = {"efficiency": None, "loss_error": None, "loss_tolerance": TOLERANCE}
        if alone is not None:
            found["efficiency"] = per_second / alone["throughput"]
            said += f", efficiency {found['efficiency']:.3f}"
            expected = alone["losses_on_joint_batch"].get(str(row["gpus"]))
            if expected:
                errors = [abs(a - b) / abs(b) for a, b in zip(row["losses"], expected, strict=True)]
                found |= {"expected_losses": expected, "loss_error": max(errors)}
                said += f", losses within {max(errors):.1e}"
        counted = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in row["bytes"].items())
        return found, f"{said}, {counted or 'collectives not seen'}"

    def _alone(self, side: str, stream: torch.cuda.Stream | None) -> Row:
        """Measure one GPU by itself; its losses on the joint batches are what several GPUs are held to."""
        device = self.several.device
        losses: dict[str, list[float]] = {}
        for size in self.several.sizes[1:]:
            joint = [self.task.data(device, seed=rank) for rank in range(size)]
            losses[str(size)] = Training(self._model(side), joint).losses(CHECKED_STEPS)
            free()
        batch = self.task.data(device)
        before = allocated(device)
        training = Training(self._model(side), [batch])
        training.losses(CHECKED_STEPS)
        return {"losses_on_joint_batch": losses, **self._timed(training, before, stream)}

    def _together(self, kind: str, size: int, side: str, stream: torch.cuda.Stream | None) -> Row:
        """Measure the first `size` GPUs together."""
        device, group = self.several.device, self.several.groups[size]
        batch = self.task.data(device, seed=self.several.rank)
        before = allocated(device)
        model = self._model(side)
        units = 1
        if kind == DDP:
            model = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
        else:
            units = _shard(model, self.task.blocks if side == DENSE else "", group, device)
        free()
        training = Training(model, [batch])
        losses = torch.stack([training.step() for _ in range(CHECKED_STEPS)]).to(device)
        dist.all_reduce(losses, group=group)
        found = {"losses": (losses / size).tolist(), "units": units}
        found |= self._timed(training, before, stream, group)
        if kind == DDP:
            _check_replicas(model, group)
        return found

    def _timed(self, training: Training, before: int, stream: torch.cuda.Stream | None, group: Any = None) -> Row:
        """Take one step for its peak of memory and its bytes, then time steps: replays of one, if there is a stream."""
        device = training.device
        if device.type == "cuda":
            clocks.wait(device)
            torch.cuda.reset_peak_memory_stats(device)
        with CountBytes() as counted:
            training.step()
        clocks.wait(device)
        peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        step: Callable[[], object] = training.step
        if stream is not None:
            step = training.captured(stream, STEPS_BEFORE_CAPTURE)
        times: list[float] = []
        for _ in range(-(-self.steps // (IN_A_ROW - 1))):
            if group is not None:
                dist.barrier(group)
            times += in_a_row(step, device)
        return {
            **quartiles(times, count="steps"),
            "peak": peak,
            "bytes": dict(counted.bytes),
            "calls": dict(counted.calls),
        }


@contextlib.contextmanager
def _stream(device: torch.device, mode: str) -> Iterator[torch.cuda.Stream | None]:
    """Give the stream on which everything of a captured step runs, DDP's start included; None for eager steps."""
    if mode != GRAPHED:
        yield None
        return
    clocks.wait(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield stream
    clocks.wait(device)


def _check_replicas(model: nn.Module, group: Any) -> None:
    """Check that the parameters have the same bits in every process.

    Raises:
        OutputMismatch: they differ, so gradients were not exchanged in every step.
    """
    sums = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    if not torch.equal(least, most):
        raise OutputMismatch(
            f"after the steps, {int((least != most).sum())} of {len(sums)} parameters differ between the processes; "
            f"expected the same bits, so gradients were not exchanged in every step"
        )


def _shard(model: nn.Module, blocks: str, group: Any, device: torch.device) -> int:
    """Shard a model with FSDP2, its blocks one by one if they are named; return how many units that makes.

    Blocks of a converted model hold little of their own. Its pool is the root's, and the root is one unit.
    """
    mesh = DeviceMesh.from_group(group, device.type)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = list(model.get_submodule(blocks).children()) if blocks else []
    for unit in (*found, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return len(found) + 1

"""A recommendation model on several GPUs: tables sharded by rows with all-to-all, and tables in a replicated pool.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.recommendation

Dense, the tables and their optimizer's state are more than one GPU should hold: every GPU holds a part of the rows, and
each step exchanges ids, rows and gradients. Converted, every GPU has the whole pool and DDP all-reduces its gradient.
Throughput and memory are measured, on random ids whose frequencies follow a power law; quality is not. Each row goes to
benchmarks/results/recommendation.json as soon as it is there; a case that fails is a row with its failure.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import roastify
from benchmarks.models import free
from benchmarks.rows import FOLDER, Cases, Row
from benchmarks.sharded_table import RowAdagrad, ShardedTable
from benchmarks.stats import quartiles
from benchmarks.training.collectives import CountBytes
from benchmarks.training.distributed import STEPS_BEFORE_CAPTURE, Processes, joined, processes
from benchmarks.training.step import IN_A_ROW, allocated, in_a_row
from roastify.checks import clocks
from roastify.conversion.converted import pool_of
from roastify.errors import OutputMismatch

RESULTS = FOLDER / "recommendation.json"
DENSE_FEATURES = 13
FIELDS = 26
LEARNING_RATE = 1e-3
# Of the tables' sizes, each this part of the one before, as a few tables hold most rows in practice.
SHRINKS = 0.7
BATCHES = 4
WARM_UP_STEPS = 4
CHECKED_IDS = 4096


@dataclass(frozen=True)
class Sizes:
    """How large the model is.

    Args:
        rows: of all tables together.
        width: of a row.
        bottom: widths of the layers for the dense features; `width` follows.
        top: widths of the layers after the interactions; 1 follows.
        ratio: to convert at.
        power: of the ids' frequencies: the k-th most frequent one has a share of 1 / k^power.
    """

    rows: int = 100_000_000
    width: int = 64
    bottom: tuple[int, ...] = (512, 256)
    top: tuple[int, ...] = (512, 256)
    ratio: float = 100.0
    power: float = 1.05

    def tables(self) -> list[int]:
        """Return the rows of each table."""
        weights = [SHRINKS**index for index in range(FIELDS)]
        found = [max(2, int(self.rows * weight / sum(weights))) for weight in weights]
        return [found[0] + self.rows - sum(found), *found[1:]]


@dataclass(frozen=True)
class Side:
    """What is measured: where the tables are, which optimizer they have, how a step runs."""

    tables: str
    optimizer: str
    mode: str
    unique: bool = False

    @property
    def name(self) -> str:
        ids = "" if self.tables == POOL else f"/{'unique ids' if self.unique else 'all ids'}"
        return f"{self.tables}/{self.optimizer}/{self.mode}{ids}"


POOL, SHARDED = "pool", "sharded"
ADAM, ROW_ADAGRAD = "Adam", "row-wise Adagrad"
EAGER, GRAPHED = "eager", "graphed"
SIDES = (
    Side(POOL, ADAM, GRAPHED),
    Side(POOL, ADAM, EAGER),
    # Its steps wait for the GPU to learn how much to exchange, so no graph can hold one.
    *(Side(SHARDED, optimizer, EAGER, unique) for optimizer in (ADAM, ROW_ADAGRAD) for unique in (True, False)),
)
Batch = tuple[Tensor, Tensor, Tensor]


def _layers(*widths: int) -> nn.Sequential:
    made: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise(widths):
        made += [nn.Linear(in_features, out_features), nn.ReLU()]
    return nn.Sequential(*made[:-1])


class Towers(nn.Module):
    """What a DLRM computes of dense features and looked-up rows: layers, products of all pairs, layers; a logit."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bottom = _layers(DENSE_FEATURES, *sizes.bottom, sizes.width)
        count = FIELDS + 1
        first, second = torch.triu_indices(count, count, offset=1)
        self.register_buffer("pairs", first * count + second, persistent=False)
        self.top = _layers(sizes.width + count * (count - 1) // 2, *sizes.top, 1)

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        x = self.bottom(features)
        fields = torch.cat([x[:, None], rows.to(x.dtype)], dim=1)
        products = (fields @ fields.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.top(torch.cat([x, products], dim=1)).squeeze(1)


class Recommender(nn.Module):
    """Logits of clicks. Its tables lie one after another in one, so that a step looks up all fields at once."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.table = nn.Embedding(sizes.rows, sizes.width)
        self.towers = Towers(sizes)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        return self.towers(features, self.table(ids))


class _Sharded:
    """The model with sharded tables: the towers alone are DDP's."""

    def __init__(self, sizes: Sizes, side: Side, several: Processes) -> None:
        wire = torch.bfloat16 if several.device.type == "cuda" else torch.float32
        self.table = ShardedTable(sizes.rows, sizes.width, side.unique, wire, several.device)
        torch.manual_seed(0)
        with torch.device(several.device):
            self.towers = DistributedDataParallel(Towers(sizes), gradient_as_bucket_view=True)
        of_table: Any = torch.optim.SparseAdam if side.optimizer == ADAM else RowAdagrad
        self.optimizers = [
            of_table(self.table.parameters(), lr=LEARNING_RATE),
            torch.optim.Adam(self.towers.parameters(), lr=LEARNING_RATE, fused=True),
        ]

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        return self.towers(features, self.table(ids))

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Compare what the exchange brings with rows that every process looks up for the first one."""
        ids = ids.flatten()[:CHECKED_IDS].clone()
        dist.broadcast(ids, 0)
        table = self.table
        own = ids % table.world == table.rank
        rows = table.weight[torch.where(own, ids // table.world, 0)] * own[:, None]
        dist.all_reduce(rows)
        _compare(table(ids), rows.to(table.wire).float())


class _Pool:
    """The converted model in DDP, as any other model."""

    def __init__(self, model: Recommender, several: Processes) -> None:
        self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        on_gpu = several.device.type == "cuda"
        self.optimizers = [
            torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True, capturable=on_gpu),
        ]

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        return self.model(features, ids)

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Compare looked-up rows with those that plain torch finds on the CPU."""
        model = self.model.module
        ids = ids.flatten()[:CHECKED_IDS]
        _compare(model.table(ids), copy.deepcopy(model).cpu().table(ids.cpu()).to(ids.device))


def _compare(found: Tensor, expected: Tensor) -> None:
    if not torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
        error = float((found - expected).abs().max())
        raise OutputMismatch(f"looked-up rows differ from the expected ones by up to {error:.3g}; nothing was timed")


def converted(sizes: Sizes, device: torch.device) -> tuple[Recommender, Row]:
    """Return the model on a pool, and what its plan says; the dense tables are built on the device, and given back."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Recommender(sizes)
    model = roastify.convert(model, sizes.ratio, include="table", inplace=True)
    plan = pool_of(model).plan
    free()
    return model, {"achieved_ratio": plan.achieved_ratio, "tile": list(plan.tile), "sign": plan.sign}


def batches(sizes: Sizes, count: int, device: torch.device, seed: int) -> list[Batch]:
    """Return random batches on the device.

    Args:
        sizes: of the model.
        count: samples in each.
        device: where they are made.
        seed: another one for every process.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tables = sizes.tables()
    rows = torch.tensor(tables, device=device)
    first = torch.tensor([0, *itertools.accumulate(tables)][:-1], device=device)
    # Frequent ids lie anywhere in a table: k-th most frequent → k · step modulo the table's rows.
    steps = torch.tensor([_coprime(size) for size in tables], device=device)
    found = []
    for _ in range(BATCHES):
        uniform = torch.rand(count, FIELDS, device=device, generator=generator, dtype=torch.float64)
        order = ((((rows + 1.0) ** (1 - sizes.power) - 1) * uniform + 1) ** (1 / (1 - sizes.power))).long() - 1
        ids = order.clamp_(min=0).minimum(rows - 1) * steps % rows + first
        features = torch.randn(count, DENSE_FEATURES, device=device, generator=generator)
        labels = torch.rand(count, device=device, generator=generator).round()
        found.append((features, ids, labels))
    return found


def _coprime(size: int) -> int:
    """Return a number near the golden part of a size that has no factor in common with it."""
    found = max(1, int(size * 0.618))
    while math.gcd(found, size) != 1:
        found += 1
    return found


class _Measurement:
    """The cases of one run."""

    def __init__(self, several: Processes, rows: Cases | None, sizes: Sizes, steps: int) -> None:
        self.several, self.rows, self.sizes, self.steps = several, rows, sizes, steps
        self.kept: tuple[Recommender, Row] | None = None

    def run(self, counts: tuple[int, ...]) -> None:
        """Measure every side with every number of samples a GPU."""
        for side in SIDES:
            if side.mode == GRAPHED and self.several.device.type != "cuda":
                continue
            for count in counts:
                case = f"gpus={self.several.world}/batch={count}/{side.name}"
                if self.several.agree(self.rows is not None and self.rows.wanted(case)):
                    self._case(case, side, count)
                    free()

    def _case(self, case: str, side: Side, count: int) -> None:
        device = self.several.device
        try:
            found = self._measured(side, count)
        except Exception as error:  # a failure is a result too: memory that is not there
            found = {"failure": clocks.reason(error)}
        everyone = self.several.gather(found)
        if self.rows is None:
            return
        row: Row = {"case": case, "gpus": self.several.world, "batch": count, "tables": side.tables}
        row |= {"optimizer": side.optimizer, "mode": side.mode, "unique": side.unique}
        row |= {
            "ratio": self.sizes.ratio,
            "rows": self.sizes.rows,
            "width": self.sizes.width,
            "fields": FIELDS,
            "power": self.sizes.power,
        }
        made = {"machine": clocks.machine(device)}
        row |= joined(everyone)
        if "failure" in row:
            self.rows.add({**row, **made})
            return
        row["samples_per_s"] = self.several.world * count * 1e3 / row["median_ms"]
        counted = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in row["bytes"].items())
        said = f"{row['median_ms']:.2f} ms a step, {row['samples_per_s'] / 1e6:.2f} M samples/s, {counted}"
        self.rows.add({**row, **made}, said + (f", {row['peak'] / 1e9:.2f} GB" if row["peak"] is not None else ""))

    def _measured(self, side: Side, count: int) -> Row:
        device = self.several.device
        if side.tables == POOL and self.kept is None:
            self.kept = converted(self.sizes, device)
        free()
        # The model that all cases of the pool copy is not theirs.
        before = allocated(device)
        data = batches(self.sizes, count, device, self.several.rank)
        stream = torch.cuda.Stream(device) if side.mode == GRAPHED else None
        clocks.wait(device)
        # DDP's nodes of autograd stay on the stream on which it starts, and a captured step has one stream.
        with torch.cuda.stream(stream):
            about: Row = {}
            if side.tables == POOL:
                assert self.kept is not None
                model, about = copy.deepcopy(self.kept[0]), self.kept[1]
                subject: _Pool | _Sharded = _Pool(model, self.several)
            else:
                subject = _Sharded(self.sizes, side, self.several)
            subject.check(data[0][1])
            found = _timed(subject, data, stream, device, self.steps)
        clocks.wait(device)
        if found["peak"] is not None:
            found["peak"] -= before
        return {**about, "dtype": "bfloat16 autocast", **found}


def _timed(
    subject: _Pool | _Sharded, data: list[Batch], stream: torch.cuda.Stream | None, device: torch.device, steps: int
) -> Row:
    """Take steps, one of them for its bytes and its peak of memory, and time the others."""
    # Every step reads the same tensors, as a captured one must; a step begins with the copy of its batch.
    inputs = tuple(tensor.clone() for tensor in data[0])
    following = itertools.cycle(data)
    losses: list[Tensor] = []

    def load() -> None:
        for to, value in zip(inputs, next(following), strict=True):
            to.copy_(value)

    def step() -> Tensor:
        features, ids, labels = inputs
        for optimizer in subject.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = subject.forward(features, ids)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
        loss.backward()
        for optimizer in subject.optimizers:
            optimizer.step()
        return loss.detach()

    for _ in range(STEPS_BEFORE_CAPTURE if stream is not None else WARM_UP_STEPS):
        load()
        losses.append(step())
    if device.type == "cuda":
        clocks.wait(device)
        torch.cuda.reset_peak_memory_stats(device)
    load()
    with CountBytes() as counted:
        losses.append(step())
    clocks.wait(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    run: Callable[[], object] = step
    if stream is not None:
        run = _captured(step, stream, subject.optimizers)

    def whole() -> None:
        load()
        run()

    times: list[float] = []
    for _ in range(-(-steps // (IN_A_ROW - 1))):
        dist.barrier()
        times += in_a_row(whole, device)
    return {
        **quartiles(times, count="steps"),
        "peak": peak,
        "bytes": dict(counted.bytes),
        "calls": dict(counted.calls),
        "losses": torch.stack(losses).tolist(),
    }


def _captured(step: Callable[[], Tensor], stream: Any, optimizers: list[Any]) -> Callable[[], object]:
    """Return a step as the replay of a CUDA graph."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread is watched: NCCL's own thread asks for events meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


@click.command()
@click.option("--only", default="", metavar="PATTERN", help="Regular expression of cases, as batch=8192/pool.")
@click.option("--rows", "total", default=Sizes.rows, show_default=True, help="Rows of all tables together.")
@click.option("--width", default=Sizes.width, show_default=True, help="Of a row.")
@click.option("--ratio", default=Sizes.ratio, show_default=True, help="To convert at.")
@click.option("--power", default=Sizes.power, show_default=True, help="Of the ids' frequencies, above 1.")
@click.option(
    "--batch", "counts", type=int, multiple=True, default=(8192, 65536), show_default=True, help="Samples a GPU."
)
@click.option(
    "--smoke", is_flag=True, help="Small tables and layers instead: shows in seconds whether everything runs."
)
@click.option("--steps", default=50, show_default=True, help="How many steps each side is timed for, at least.")
@click.option("--minutes", default=8.0, show_default=True, help="Begin no case after so long; what is left is named.")
@click.option("--missing", is_flag=True, help="Pass over cases that have a row already, other than a failure.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: GPUs if there are any.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The JSON file.")
def main(
    only: str,
    total: int,
    width: int,
    ratio: float,
    power: float,
    counts: tuple[int, ...],
    smoke: bool,
    steps: int,
    minutes: float,
    missing: bool,
    device: str | None,
    output: Path | None,
) -> None:
    """Measure a recommendation model on as many GPUs as torchrun has started processes for."""
    if smoke and output is None:
        raise click.UsageError("--smoke measures nothing of interest; name another file for it with --output")
    if power <= 1:
        raise click.UsageError(f"--power is {power:g}; expected more than 1")
    sizes = Sizes(total, width, ratio=ratio, power=power)
    if smoke:
        sizes, counts = Sizes(20_000, 16, (32,), (32,), 20.0, power), (64,)
    with processes(device or ("cuda" if torch.cuda.is_available() else "cpu")) as several:
        rows = Cases(output or RESULTS, only, minutes, missing=missing) if several.rank == 0 else None
        _Measurement(several, rows, sizes, steps).run(counts)
        free()
        if rows is not None:
            rows.close()


if __name__ == "__main__":
    main()

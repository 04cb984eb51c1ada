"""What the benchmark of signs trains: the tasks' data, their models, and one run from initial values to accuracies."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roastify
from benchmarks.data import encode, read_images, read_reviews, shuffled, vocabulary
from benchmarks.encoder import TextClassifier
from roastify.config import RoastConfig

SIGNS = ("none", "row", "tile", "element")
DENSE = "dense"
# What the measurement is about: the planner takes `element` for pools of fewer slots.
FEWEST_SLOTS = 64


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


def read_imdb(data: Path, task: Task) -> dict[str, np.ndarray]:
    """Return words as numbers by frequency in the training reviews, `int32 [n, length]`, and labels."""
    reviews = read_reviews(data)
    known = vocabulary(reviews["train"][0], task.vocabulary)
    arrays = {}
    for split, count in (("train", task.train), ("test", task.test)):
        texts, labels = reviews[split]
        chosen = shuffled(len(labels), count)
        arrays[f"{split}_x"] = np.stack([encode(texts[index], known, task.length) for index in chosen])
        arrays[f"{split}_y"] = labels[chosen]
    return arrays


def read_cifar10(data: Path, task: Task) -> dict[str, np.ndarray]:
    """Return images, `uint8 [n, 32, 32, 3]`, and labels."""
    arrays = {}
    for split, (images, labels) in read_images(data, {"train": task.train, "test": task.test}).items():
        arrays |= {f"{split}_x": images, f"{split}_y": labels}
    return arrays


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

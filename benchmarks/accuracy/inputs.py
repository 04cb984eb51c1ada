"""A task's data on the device, and the batches that are made there, augmentation included."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks import data as data_sets
from benchmarks.accuracy.tasks import Task
from benchmarks.rows import write

PAD = 4
_PARTS = ("train_x", "train_y", "test_x", "test_y")


@functools.lru_cache
def cache_folder(task: Task, data: Path, cache: Path) -> Path:
    """Return where a task's arrays are kept: they depend on the data and on how it is read."""
    name, what = data_sets.source(data, task.data).name, data_sets.digest(data, task.data)
    read = [name, what, task.train, task.test, task.length, task.words]
    return cache / f"{task.data}-{hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]}"


def prepare(task: Task, data: Path, cache: Path) -> None:
    """Decode a task's data into `.npy` files, unless they are there.

    Raises:
        click.ClickException: there is no data, or it cannot be read or does not fit the task.
    """
    folder = cache_folder(task, data, cache)
    if not (folder / "done").exists():
        _decode(task, data, folder)
    labels = np.concatenate([np.load(folder / f"{split}_y.npy") for split in ("train", "test")])
    classes = 10 if task.is_image else 2
    if (found := int(labels.max()) + 1) > classes:
        raise click.ClickException(f"{data} has {found} classes, and the task {task.title} {classes}")


def _decode(task: Task, data: Path, folder: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    if task.is_image:
        for split, pair in data_sets.read_images(data, {"train": task.train, "test": task.test}).items():
            arrays[f"{split}_x"], arrays[f"{split}_y"] = pair
    else:
        reviews = data_sets.read_reviews(data)
        known = data_sets.vocabulary(reviews["train"][0], task.words)
        for split, most in (("train", task.train), ("test", task.test)):
            texts, labels = reviews[split]
            chosen = data_sets.shuffled(len(labels), most)
            arrays[f"{split}_x"] = np.stack([data_sets.encode(texts[index], known, task.length) for index in chosen])
            arrays[f"{split}_y"] = labels[chosen]
    folder.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
        np.save(folder / f"{part}.npy", arrays[part])
    write(folder / "done", "")


@dataclass
class Examples:
    """Inputs and labels on the device. Images are padded by reflection, `uint8 [n, 40, 40, 3]`; words are `int32`."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def part(self, start: int, stop: int | None) -> Examples:
        return Examples(self.x[start:stop], self.y[start:stop])


@functools.lru_cache(maxsize=8)
def on_device(folder: Path, split: str, device: str) -> Examples:
    x, y = (torch.from_numpy(np.load(folder / f"{split}_{part}.npy")).to(device) for part in "xy")
    if x.dim() == 4:
        padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2).float(), (PAD,) * 4, mode="reflect")
        x = padded.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    return Examples(x, y)


def load(task: Task, folder: Path, device: str, trial: bool) -> tuple[Examples, Examples]:
    """Return what is trained on and what is judged on: the test set, or for a trial the last training examples.

    Raises:
        click.ClickException: there are too few for a trial.
    """
    train = on_device(folder, "train", device)
    if trial and len(train) <= task.held_out:
        raise click.ClickException(
            f"there are {len(train):,} training examples, and {task.held_out:,} are held out to choose step sizes by: "
            f"give more, or a step size (--rate)"
        )
    if trial:
        return train.part(0, -task.held_out), train.part(-task.held_out, None)
    return train, on_device(folder, "test", device)


@dataclass
class Epoch:
    """An epoch's order and augmentation, in fixed memory: `draw` fills it anew."""

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor
    hole_top: Tensor
    hole_left: Tensor

    @classmethod
    def empty(cls, count: int, device: str) -> Epoch:
        return cls(*(torch.zeros(count, dtype=torch.int64, device=device) for _ in range(6)))

    def draw(self, seed: int, epoch: int) -> None:
        """Draw from seed and epoch alone, on the CPU: every method sees the same."""
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        count = len(self.order)
        self.order.copy_(torch.randperm(count, generator=generator))
        self.top.copy_(torch.randint(2 * PAD + 1, (count,), generator=generator))
        self.left.copy_(torch.randint(2 * PAD + 1, (count,), generator=generator))
        self.flip.copy_(torch.randint(2, (count,), generator=generator))
        self.hole_top.copy_(torch.randint(data_sets.SIDE, (count,), generator=generator))
        self.hole_left.copy_(torch.randint(data_sets.SIDE, (count,), generator=generator))


def normalised(pixels: Tensor) -> Tensor:
    """Return `[n, 3, 32, 32]` around 0 with a spread near 1, channels last in memory, of pixels `[n, 32, 32, 3]`."""
    return (pixels.float() / 64 - 2).permute(0, 3, 1, 2)


def augmented(images: Tensor, chosen: Tensor, epoch: Epoch, places: Tensor, hole: int) -> Tensor:
    """Return the chosen images cropped, mirrored and perhaps with a square hole of grey, as the model takes them."""
    along = torch.arange(data_sets.SIDE, device=images.device)
    rows = epoch.top[places][:, None] + along
    mirrored = torch.where(epoch.flip[places][:, None] > 0, data_sets.SIDE - 1 - along, along)
    cols = epoch.left[places][:, None] + mirrored
    x = normalised(images[chosen[:, None, None], rows[:, :, None], cols[:, None, :]])
    if hole:
        in_rows = (along - epoch.hole_top[places][:, None] + hole // 2).remainder(data_sets.SIDE) < hole
        in_cols = (along - epoch.hole_left[places][:, None] + hole // 2).remainder(data_sets.SIDE) < hole
        x = x.masked_fill((in_rows[:, :, None] & in_cols[:, None, :])[:, None], 0.0)
    return x


def plain(examples: Tensor) -> Tensor:
    """Return examples as the model takes them, without augmentation."""
    if examples.dim() == 4:
        return normalised(examples[:, PAD:-PAD, PAD:-PAD])
    return examples

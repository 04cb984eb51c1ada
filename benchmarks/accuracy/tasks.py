"""The tasks: data, model and recipe of each. Every method trains by its task's recipe; only the step size is chosen."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        title: for the tables.
        data: `images` or `reviews`.
        net: which model (`nets.NETS`).
        batch: examples in a step.
        grid: the `(learning rate, epochs)` among which each method chooses; the first is taken where nothing was tried.
        optimizer: `sgd` (Nesterov, 0.9) or `adamw`.
        decay: weight decay of whatever has two dimensions or more.
        trial_epochs: epochs of the choosing runs, or 0: as many as the grid says.
        held_out: training examples on which the choosing runs are judged; the test set chooses nothing.
        train: training examples used at most.
        test: test examples used at most.
        length: tokens of a review.
        words: in the vocabulary.
        scale: of the model, for smoke tests.
    """

    title: str
    data: str
    net: str
    batch: int
    grid: tuple[tuple[float, int], ...]
    optimizer: str
    decay: float
    trial_epochs: int
    held_out: int
    train: int
    test: int
    length: int = 0
    words: int = 0
    scale: float = 1.0

    @property
    def is_image(self) -> bool:
        return self.data == "images"


def _cifar(title: str, net: str, epochs: int) -> Task:
    return Task(title, "images", net, 512, ((0.4, epochs), (1.0, epochs)), "sgd", 5e-4, 8, 5_000, 50_000, 10_000)


TASKS = {
    "resnet9": _cifar("ResNet-9 on CIFAR-10", "resnet9", 24),
    "resnet20": _cifar("ResNet-20 on CIFAR-10", "resnet20", 48),
    "vgg11": _cifar("VGG-11 on CIFAR-10", "vgg11", 24),
    "imdb": Task(
        "transformer on IMDB", "reviews", "encoder", 128, tuple(itertools.product((2e-3, 5e-4), (1, 2, 4, 8))), "adamw",
        1e-2, 0, 5_000, 25_000, 25_000, length=256, words=30_000,
    ),
}  # fmt: skip


def smoke(task: Task) -> Task:
    """Return the task with few examples, one epoch and a small model, for seconds on a CPU."""
    return dataclasses.replace(
        task,
        batch=16,
        grid=tuple((rate, 1) for rate in dict.fromkeys(rate for rate, _ in task.grid)),
        trial_epochs=0,
        held_out=16,
        train=64,
        test=32,
        length=min(task.length, 16),
        words=min(task.words, 500),
        scale=0.125 if task.is_image else 0.25,
    )


def scaled(task: Task, factor: float) -> Task:
    """Return the task with all its epochs multiplied by a factor; at least one is left."""

    def epochs(count: int) -> int:
        return max(1, round(count * factor))

    return dataclasses.replace(
        task,
        grid=tuple(dict.fromkeys((rate, epochs(count)) for rate, count in task.grid)),
        trial_epochs=task.trial_epochs and epochs(task.trial_epochs),
    )

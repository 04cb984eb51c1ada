"""Rivals without hashing: a smaller model of the same kind, and low-rank factors of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.accuracy import nets
from benchmarks.accuracy.budget import TOLERANCE, UnreachableError, largest
from benchmarks.accuracy.tasks import Task


def smaller_image_net(task: Task, target: int) -> nn.Module:
    """Return the same net with all widths multiplied by what the budget allows."""
    full = nets.image_widths(task)

    def count(widths: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return nets.size(nets.image_net(task, widths))

    return nets.image_net(task, largest(count, full, target))


class FewerWords(nn.Module):
    """A text model that knows the most frequent words only; all others are the unknown one."""

    def __init__(self, model: nn.Module, words: int) -> None:
        super().__init__()
        self.model, self.words = model, words

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(torch.where(tokens < self.words, tokens, 0))


def smaller_text_net(task: Task, target: int, width: int | None = None) -> nn.Module:
    """Return a narrower encoder with as many of the most frequent words as the budget allows.

    Args:
        task: the task.
        target: parameters.
        width: default: the least at which not the whole vocabulary fits, or √target ÷ 32 if that is more: about the
            best of those that were tried at ratios 30, 100 and 300.

    Raises:
        UnreachableError: no vocabulary is small enough.
    """

    def count(width: int, words: int) -> int:
        with torch.device("meta"):
            return nets.size(nets.text_net(task, width, words))

    full = nets.text_width(task)
    if width is None:
        width = max(_least(full, lambda width: count(width, task.words) > target), round(target**0.5 / 32))
    words = min(task.words, 2 + (target - count(width, 2)) // width)
    if words < 2 or count(width, words) < (1 - TOLERANCE) * target:
        raise UnreachableError(f"no vocabulary of an encoder {width} wide has {target:,} parameters")
    return FewerWords(nets.text_net(task, width, words), words)


def _least(most: int, holds: Callable[[int], bool]) -> int:
    """Return the least number from 1 to `most` for which a condition holds that then holds on; `most` if none."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of a rank as two factors that share the singular values (spectral initialisation).

    From the smaller Gram matrix: a whole decomposition of each weight takes longer than an epoch.
    """
    if weight.shape[0] > weight.shape[1]:
        left, right = factors(weight.t(), rank)
        return right.t(), left.t()
    values, vectors = torch.linalg.eigh((weight @ weight.t()).double())
    vectors, root = vectors[:, -rank:], values[-rank:].clamp(min=1e-24) ** 0.25
    return (vectors * root).to(weight.dtype), (vectors / root).t().to(weight.dtype) @ weight


class LowRank(nn.Module):
    """A layer's weight as the product of two thin ones, which are what is stored.

    A convolution becomes one to `rank` channels and one of 1×1, a linear layer becomes two, and a table is multiplied
    out when it is read.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        weight = layer.weight.detach()
        left, right = factors(weight.flatten(1), rank)
        # Cut off, the product has less spread than the weight that it stands for; the factors share the repair.
        repair = float((weight.norm() / (left @ right).norm().clamp(min=1e-12)).sqrt())
        self.left = nn.Parameter(left * repair)
        self.right = nn.Parameter((right * repair).view(rank, *weight.shape[1:]))
        self.bias = getattr(layer, "bias", None)
        self.kind = type(layer)
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding = layer.stride, layer.padding

    @property
    def weight(self) -> Tensor:
        """The product, for models that read a table themselves."""
        return self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is nn.Conv2d:
            inner = nn.functional.conv2d(x, self.right, None, self.stride, self.padding)
            return nn.functional.conv2d(inner, self.left[:, :, None, None], self.bias)
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)


def low_rank(model: nn.Module, target: int) -> nn.Module:
    """Return the model with one rank for all layers, as the budget allows, what is left going to single ones.

    In proportion to their full ranks, the first layers would have a rank of 1 at ratio 100, and nothing passes them.

    A layer whose factors would not be smaller stays as it is, and so does one with fewer than 1,024 weights.

    Raises:
        UnreachableError: rank 1 everywhere is too much.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding) and module.weight.numel() >= 1024
    }
    shapes = [(module.weight.shape[0], module.weight.flatten(1).shape[1]) for module in layers.values()]
    beside = nets.size(model) - sum(rows * cols for rows, cols in shapes)
    # Above this rank the factors are not smaller than the product: the layer as it is stands for the next rank.
    full = [(rows * cols - 1) // (rows + cols) + 1 for rows, cols in shapes]

    def cost(rank: int, shape: tuple[int, int], most: int) -> int:
        return shape[0] * shape[1] if rank == most else rank * sum(shape)

    def count(ranks: tuple[int, ...]) -> int:
        return beside + sum(map(cost, ranks, shapes, full))

    for (name, layer), rank, most in zip(layers.items(), largest(count, full, target, equal=True), full, strict=True):
        if rank < most:
            model.set_submodule(name, LowRank(layer, rank))
    return model

"""The dense models of images and text; their widths can be any, so that smaller ones fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.tasks import Task


def convolution(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


class Block(nn.Sequential):
    """Convolution, perhaps pooling, batch norm, ReLU; pooled first, which changes little and moves a quarter."""

    def __init__(self, channels: int, out: int, pool: bool = False) -> None:
        pooling = [nn.MaxPool2d(2)] if pool else []
        super().__init__(convolution(channels, out), *pooling, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """Two blocks around which the input goes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = Block(channels, channels), Block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class ResNet9(nn.Module):
    """The DAWNBench net: four widths, residuals in the second and the last, the largest of each channel to the head."""

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512), classes: int = 10) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.prepare = Block(3, first)
        self.one, self.one_residual = Block(first, second, pool=True), Residual(second)
        self.two = Block(second, third, pool=True)
        self.three, self.three_residual = Block(third, fourth, pool=True), Residual(fourth)
        self.head = nn.Linear(fourth, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.one_residual(self.one(self.prepare(images)))
        x = self.three_residual(self.three(self.two(x)))
        return self.head(x.amax((2, 3))) * 0.125


class BasicBlock(nn.Module):
    """ResNet's block for CIFAR; a narrower input is subsampled and padded with channels of zeros."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = convolution(channels, out, stride), convolution(out, out)
        self.norm_first, self.norm_second = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm_second(self.second(F.relu(self.norm_first(self.first(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        # Negative where a smaller net got narrower; then channels are dropped.
        return F.relu(inner + F.pad(x, (0, 0, 0, 0, 0, self.more)))


class ResNet20(nn.Module):
    """He et al.'s ResNet-20 for CIFAR: three widths, three blocks each, shortcuts without parameters."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        self.first, self.norm = convolution(3, widths[0]), nn.BatchNorm2d(widths[0])
        blocks, channels = [], widths[0]
        for stage, width in enumerate(widths):
            for index in range(3):
                blocks.append(BasicBlock(channels, width, 2 if stage and not index else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.first(images))))
        return self.head(x.mean((2, 3)))


class VGG11(nn.Module):
    """VGG-11 with batch norm for CIFAR: eight convolutions, five poolings, one linear layer."""

    POOLED = (True, True, False, True, False, True, False, True)

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 256, 512, 512, 512, 512), classes: int = 10) -> None:
        super().__init__()
        channels = [3, *widths]
        blocks = (Block(channels[index], width, self.POOLED[index]) for index, width in enumerate(widths))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).flatten(1))


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
        # 64 columns a head, or the next more that divide the width.
        heads = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        # Every position is used and most words are frequent: whole tables are read faster than their rows are summed.
        x = F.embedding(tokens, self.words.weight) + self.positions.weight
        x = self.dropout(self.norm_in(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm_out(x).mean(1))


@dataclass(frozen=True)
class Net:
    """An image model: how to build it, and its widths."""

    build: Callable[..., nn.Module]
    widths: tuple[int, ...]


NETS = {
    "resnet9": Net(ResNet9, (64, 128, 256, 512)),
    "resnet20": Net(ResNet20, (16, 32, 64)),
    "vgg11": Net(VGG11, (64, 128, 256, 256, 512, 512, 512, 512)),
}
TEXT_WIDTH, TEXT_DEPTH = 256, 2


def image_net(task: Task, widths: Sequence[int] | None = None) -> nn.Module:
    net = NETS[task.net]
    return net.build(widths or image_widths(task))


def image_widths(task: Task) -> tuple[int, ...]:
    return tuple(max(1, round(task.scale * width)) for width in NETS[task.net].widths)


def text_net(task: Task, width: int | None = None, words: int | None = None) -> nn.Module:
    return TextClassifier(words or task.words, task.length, width or text_width(task), TEXT_DEPTH)


def text_width(task: Task) -> int:
    return round(TEXT_WIDTH * task.scale)


def dense_net(task: Task) -> nn.Module:
    return image_net(task) if task.is_image else text_net(task)


def laid_out(model: nn.Module, task: Task) -> nn.Module:
    """Return the model with its tensors in the memory format that batches of its task have."""
    return model.to(memory_format=torch.channels_last) if task.is_image else model


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

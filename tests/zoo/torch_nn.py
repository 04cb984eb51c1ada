"""torch.nn's own modules that have parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.examine import Entry


def _floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape, generator=torch.Generator().manual_seed(3)),)


def _several(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(_floats(*shape)()[0] for shape in shapes)


def _tokens(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(90, shape, generator=torch.Generator().manual_seed(3)),)


class Normed(nn.Module):
    """A norm between two layers: alone it would have nothing but vectors."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(width, width), norm, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


_attention: dict[str, Any] = {"batch_first": True}
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "Linear": (lambda: nn.Linear(96, 80), _floats(2, 96)),
    "Bilinear": (lambda: nn.Bilinear(24, 20, 30), _several((2, 24), (2, 20))),
    "Embedding": (lambda: nn.Embedding(90, 64), _tokens(2, 5)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(90, 64), _tokens(2, 5)),
    "Conv1d": (lambda: nn.Conv1d(16, 40, 5), _floats(2, 16, 20)),
    "Conv2d": (lambda: nn.Conv2d(16, 40, 3, groups=2), _floats(2, 16, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(8, 24, 3), _floats(2, 8, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(16, 40, 5), _floats(2, 16, 20)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(16, 40, 3), _floats(2, 16, 9, 9)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 24, 3), _floats(2, 8, 5, 5, 5)),
    "RNN": (lambda: nn.RNN(40, 48), _floats(5, 2, 40)),
    "LSTM": (lambda: nn.LSTM(40, 48, 2, bidirectional=True), _floats(5, 2, 40)),
    "LSTM with projections": (lambda: nn.LSTM(40, 48, proj_size=24), _floats(5, 2, 40)),
    "GRU": (lambda: nn.GRU(40, 48), _floats(5, 2, 40)),
    "RNNCell": (lambda: nn.RNNCell(40, 48), _floats(2, 40)),
    "LSTMCell": (lambda: nn.LSTMCell(40, 48), _floats(2, 40)),
    "GRUCell": (lambda: nn.GRUCell(40, 48), _floats(2, 40)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(64, 4), _several((5, 2, 64), (6, 2, 64), (6, 2, 64))),
    "MultiheadAttention of three sizes": (
        lambda: nn.MultiheadAttention(64, 4, kdim=40, vdim=24, add_bias_kv=True),
        _several((5, 2, 64), (6, 2, 40), (6, 2, 24)),
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(64, 4, 96, **_attention), _floats(2, 5, 64)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, **_attention), 2),
        _floats(2, 5, 64),
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(64, 4, 96), _several((5, 2, 64), (6, 2, 64))),
    "Transformer": (lambda: nn.Transformer(64, 4, 1, 1, 96, **_attention), _several((2, 5, 64), (2, 6, 64))),
    "LayerNorm": (lambda: Normed(nn.LayerNorm(64), 64), _floats(4, 64)),
    "RMSNorm": (lambda: Normed(nn.RMSNorm(64), 64), _floats(4, 64)),
    "BatchNorm1d": (lambda: Normed(nn.BatchNorm1d(64), 64), _floats(4, 64)),
    "GroupNorm": (lambda: Normed(nn.GroupNorm(4, 64), 64), _floats(4, 64)),
    "PReLU": (lambda: Normed(nn.PReLU(64), 64), _floats(4, 64)),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(64, 90, [20, 50]),
        lambda: (_floats(4, 64)()[0], torch.tensor([3, 25, 60, 89])),
    ),
}


def entries() -> Iterator[Entry]:
    """Yield every module of the table."""
    for name, (build, inputs) in MODULES.items():
        yield Entry(f"nn.{name}", "torch.nn", build, inputs)

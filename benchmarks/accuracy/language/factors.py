"""Linear layers as products of two factors: low rank, and Monarch's two block-diagonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.accuracy.language.decoder import Decoder, Layer
from benchmarks.accuracy.language.sizes import Factors
from benchmarks.accuracy.rivals import LowRank

LINEAR = ("qkv", "out", "up", "down")


class Monarch(nn.Module):
    """A linear layer as two block-diagonal factors with a permutation after each (Dao et al., 2022).

    With `b` blocks, `x [b, n/b]` becomes `h[i] = x[i] · first[i]`, `[b, b, rank]`; its first two dimensions change
    places, and `y[j] = h[:, j] · second[j]`, `[b, m/b]`, is read column by column. It stores
    `rank · b · (inputs + outputs)` numbers, and multiplies as many times.

    Args:
        inputs: n, a multiple of `blocks`.
        outputs: m, likewise.
        blocks: b.
        rank: of the part of the matrix that goes from one block of inputs to one of outputs.
        std: the spread of the matrix's elements.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, rank: int, std: float) -> None:
        super().__init__()
        self.blocks, self.rank, self.outputs = blocks, rank, outputs
        self.first = nn.Parameter(torch.empty(blocks, inputs // blocks, blocks * rank))
        self.second = nn.Parameter(torch.empty(blocks, blocks * rank, outputs // blocks))
        # An element of the matrix is a sum of `rank` products.
        spread = (std / rank**0.5) ** 0.5
        nn.init.normal_(self.first, std=spread)
        nn.init.normal_(self.second, std=spread)

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        parts = x.reshape(-1, self.blocks, self.first.shape[1]).transpose(0, 1)
        inner = torch.bmm(parts, self.first).unflatten(-1, (self.blocks, self.rank))
        inner = inner.permute(2, 1, 0, 3).flatten(2)
        return torch.bmm(inner, self.second).permute(1, 2, 0).reshape(*lead, self.outputs)


def factor(model: Decoder, sizes: Factors) -> nn.Module:
    """Return the model with factors for its linear layers; one whose factors are not smaller stays as it is."""
    ranks = iter(sizes.ranks)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for name in LINEAR:
            linear, rank = getattr(layer, name), next(ranks)
            rows, cols = linear.weight.shape
            if rank * sizes.blocks * (rows + cols) >= rows * cols:
                continue
            if sizes.blocks == 1:
                setattr(layer, name, LowRank(linear, rank))
            else:
                setattr(layer, name, Monarch(cols, rows, sizes.blocks, rank, float(linear.weight.detach().std())))
    return model

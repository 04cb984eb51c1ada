"""The transformer encoder that the accuracy benchmarks train on reviews."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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

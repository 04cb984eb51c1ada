"""A decoder of torch's own operations alone, in which products take most of a step: what folding can save at most."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeanDecoder(nn.Module):
    """Llama's shape with fused norms and attention, and rotary positions computed once; it returns its loss.

    Args:
        words: of the vocabulary.
        width: of the residual stream.
        inner: of the gated network.
        layers: how many.
        heads: of attention, 64 or 128 columns each.
        kv_heads: heads of keys and values.
    """

    def __init__(self, words: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.layers = nn.ModuleList(LeanLayer(width, inner, heads, kv_heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)
        self.head_size = width // heads
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(input_ids)
        angles = 10_000.0 ** -(torch.arange(0, self.head_size, 2, device=x.device) / self.head_size)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * angles.repeat(2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class LeanLayer(nn.Module):
    """Attention and a gated network, each after a norm and beside a shortcut."""

    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        size = width // heads
        self.size = size
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, kv_heads * size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm_attention(x)
        projected = (project(h).unflatten(-1, (-1, self.size)) for project in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in projected)
        query, key = _turned(query, cos, sin), _turned(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        h = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((-other, one), -1), sin)

"""The language model: a causal transformer whose sizes can be any, with repeated layers and a factored word table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Standard deviation of the initial weights of a model 512 wide, but for the layers that write into the residual stream:
# theirs is divided by the root of their number, as in GPT-2 (Radford et al., 2019).
SPREAD, AT_WIDTH = 0.02, 512


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes.

    Args:
        words: of the vocabulary.
        width: of the residual stream, a multiple of 8.
        depth: how many layers the input passes.
        hidden: the inner size of every layer that has weights of its own; these are spread over the depth, each
            repeated in a row.
        rank: of the word table, `[words, rank] · [rank, width]`, or 0: whole.
    """

    words: int
    width: int
    depth: int
    hidden: tuple[int, ...]
    rank: int = 0

    def at_width(self, width: int) -> Shape:
        """Return the same shape at another width: hidden sizes grow in proportion."""
        return dataclasses.replace(
            self, width=width, hidden=tuple(hidden * width // self.width for hidden in self.hidden)
        )

    @property
    def heads(self) -> int:
        """Heads of about 64 columns, by their number that divides the width into multiples of 8."""
        fitting = [heads for heads in range(1, self.width // 8 + 1) if self.width % (8 * heads) == 0]
        return min(fitting, key=lambda heads: abs(heads - self.width / 64))

    @property
    def table(self) -> int:
        """Parameters of the word table."""
        return self.rank * (self.words + self.width) if self.rank else self.words * self.width

    @property
    def vectors(self) -> int:
        """Parameters of all norms."""
        return (2 * len(self.hidden) + 1) * self.width

    @property
    def size(self) -> int:
        """Parameters of the model."""
        matrices = sum(4 * self.width**2 + 2 * self.width * hidden for hidden in self.hidden)
        return self.table + self.vectors + matrices

    @property
    def order(self) -> list[int]:
        """Which of the layers that have weights of their own each layer is."""
        return [index * len(self.hidden) // self.depth for index in range(self.depth)]

    @property
    def table_products(self) -> int:
        """Multiply-adds of a token's vector and of all words' scores; looking up multiplies nothing."""
        return self.table + self.rank * self.width

    @property
    def products(self) -> int:
        """Multiply-adds of the matrix products of a forward pass, for a token; attention's own are left out."""
        layers = (self.hidden[index] for index in self.order)
        return self.table_products + sum(4 * self.width**2 + 2 * self.width * hidden for hidden in layers)

    def __str__(self) -> str:
        own = len(self.hidden)
        layers = f"{self.depth} layers" if own == self.depth else f"{own} layers for a depth of {self.depth}"
        low, high = min(self.hidden), max(self.hidden)
        hidden = str(low) if low == high else f"{low} to {high}"
        return (
            f"width {self.width}, {layers}, hidden {hidden}, table {f'of rank {self.rank}' if self.rank else 'whole'}"
        )


class FactoredTable(nn.Module):
    """A word table as the product of two thin ones: `left [words, rank] · right [rank, width]`."""

    def __init__(self, words: int, rank: int, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.empty(words, rank)), nn.Parameter(torch.empty(rank, width))

    def forward(self, tokens: Tensor) -> Tensor:
        # A whole table gives float32 vectors under autocast too, and torch's fused RMSNorm takes no bfloat16 with them.
        return (F.embedding(tokens, self.left) @ self.right).float()


class FactoredHead(nn.Module):
    """The scores of all words, by the same two factors as their vectors."""

    def __init__(self, table: FactoredTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.table.right), self.table.left)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries and keys turned by their positions (RoPE, Su et al., 2021).

    Args:
        x: `[batch, length, 2, heads, size]`.
        cos: `[length, 1, 1, size]`.
        sin: likewise.
    """
    one, other = x.chunk(2, -1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat((-other, one), -1), sin.to(x.dtype))


class Layer(nn.Module):
    """A pre-norm layer: causal attention with rotary positions, then a GELU network; no biases."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projected = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        # Split, not indexed: a split's gradient is one concatenation.
        turned, value = projected.split((2, 1), 2)
        query, key = rotated(turned, cos, sin).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value.squeeze(2)))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Decoder(nn.Module):
    """A language model: tokens `[batch, length]` to the logits of every next token, `[batch, length, words]`."""

    def __init__(self, shape: Shape, context: int) -> None:
        super().__init__()
        self.shape = shape
        if shape.rank:
            self.words: nn.Module = FactoredTable(shape.words, shape.rank, shape.width)
            self.head: nn.Module = FactoredHead(self.words)
        else:
            self.words = nn.Embedding(shape.words, shape.width)
            self.head = nn.Linear(shape.width, shape.words, bias=False)
            self.head.weight = self.words.weight
        self.layers = nn.ModuleList(Layer(shape.width, shape.heads, hidden) for hidden in shape.hidden)
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        size = shape.width // shape.heads
        turns = torch.arange(context)[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)
        turns = torch.cat((turns, turns), -1)[:, None, None]
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)
        self.draw()

    def draw(self) -> None:
        """Draw initial values."""
        std = SPREAD * (AT_WIDTH / self.shape.width) ** 0.5
        writing = {id(module) for layer in self.layers for module in (layer.out, layer.down)}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                times = (2 * self.shape.depth) ** -0.5 if id(module) in writing else 1.0
                nn.init.normal_(module.weight, std=times * std)
            elif isinstance(module, FactoredTable):
                # The product has the spread of the whole table.
                nn.init.normal_(module.left, std=std)
                nn.init.normal_(module.right, std=module.right.shape[0] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        length = tokens.shape[1]
        for index in self.shape.order:
            x = self.layers[index](x, self.cos[:length], self.sin[:length])
        return self.head(self.norm(x))

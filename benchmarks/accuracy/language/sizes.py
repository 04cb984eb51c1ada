"""Sizes of every rival that store as many parameters as are allowed, by what a trial may choose of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from benchmarks.accuracy.budget import TOLERANCE, UnreachableError
from benchmarks.accuracy.language.decoder import Shape

# Tensor cores want multiples of 8 in bfloat16. Wider models have wider steps, so that heads of about 64 columns divide
# their widths.
HIDDEN_STEP = 8
WIDTHS = (*range(8, 128, 8), *range(128, 256, 16), *range(256, 4097, 32))

# The hidden sizes that take what is left of a budget may be this many times the width; usual is 4.
USUAL, MOST = 4, 8


def fitted(full: Shape, target: int, depth: int, distinct: int, part: float) -> Shape:
    """Return the widest decoder, at most as wide as the full one, whose hidden sizes then take what is left.

    Args:
        full: the dense model's sizes.
        target: parameters.
        depth: how many layers the input passes.
        distinct: how many of them have weights of their own.
        part: the word table's rank ÷ width; 1: the table is whole.

    Raises:
        UnreachableError: no width and hidden size are within 1 % below the target.
    """

    def at(width: int, blocks: int) -> Shape:
        more, rest = divmod(blocks, distinct)
        hidden = tuple(HIDDEN_STEP * (more + (index < rest)) for index in range(distinct))
        rank = 0 if part == 1 else max(1, round(part * width))
        return Shape(full.words, width, depth, hidden, rank)

    usual = {width: distinct * USUAL * width // HIDDEN_STEP for width in WIDTHS if width <= full.width}
    fitting = [width for width, blocks in usual.items() if at(width, blocks).size <= target]
    if not fitting:
        raise UnreachableError(f"even {min(usual)} wide it has more than the {target:,} parameters that are allowed")
    width = fitting[-1]
    room = target - at(width, usual[width]).size
    blocks = usual[width] + room // (2 * width * HIDDEN_STEP)
    found = at(width, blocks)
    if found.size < (1 - TOLERANCE) * target or max(found.hidden) > MOST * width:
        raise UnreachableError(f"{target:,} parameters are more than a decoder of {distinct} layers {width} wide takes")
    return found


def _without_linear(full: Shape, target: int, share: float) -> Shape:
    """Return the dense model's sizes with a word table that takes at most a share of the budget."""
    if full.table <= share * target:
        return full
    rank = int(share * target / (full.words + full.width))
    if not rank:
        raise UnreachableError(f"a word table of rank 1 is more than {share:g} of {target:,} parameters")
    return dataclasses.replace(full, rank=rank)


def linear_shapes(shape: Shape) -> list[tuple[int, int]]:
    """Return `(outputs, inputs)` of every linear layer, in the order of the model's modules."""
    width = shape.width
    return [
        pair
        for hidden in shape.hidden
        for pair in ((3 * width, width), (width, width), (hidden, width), (width, hidden))
    ]


@dataclasses.dataclass(frozen=True)
class Factors:
    """Sizes of a decoder whose linear layers are products of two.

    Args:
        shape: of the decoder.
        ranks: of every linear layer in the order of `linear_shapes`: what `blocks` diagonal blocks have each.
        blocks: 1 for low rank.
    """

    shape: Shape
    ranks: tuple[int, ...]
    blocks: int = 1

    @property
    def size(self) -> int:
        return self.shape.table + self.shape.vectors + self._linear

    @property
    def products(self) -> int:
        """Multiply-adds, see `Shape.products`: every number of a factor multiplies once."""
        return self.shape.table_products + self._linear

    @property
    def _linear(self) -> int:
        pairs = zip(linear_shapes(self.shape), self.ranks, strict=True)
        return sum(factored(pair, rank, self.blocks) for pair, rank in pairs)

    def __str__(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        rank = str(low) if low == high else f"{low} to {high}"
        blocks = f"{self.blocks} blocks of rank {rank}" if self.blocks > 1 else f"rank {rank}"
        return f"{blocks}, table {f'of rank {self.shape.rank}' if self.shape.rank else 'whole'}"


def factored(pair: tuple[int, int], rank: int, blocks: int) -> int:
    """Return the parameters of two factors of a linear layer, or of the layer itself where they are not fewer."""
    return min(rank * blocks * sum(pair), pair[0] * pair[1])


def factors(full: Shape, target: int, share: float, most_blocks: int = 1) -> Factors:
    """Return the largest ranks that fit, about equal, what is left going to single layers and to the table's rank.

    Args:
        full: the dense model's sizes.
        target: parameters.
        share: of them, for the word table at most.
        most_blocks: 1 for low rank, or a power of two: the factors' diagonal blocks, fewer where even rank 1 is too
            much.

    Raises:
        UnreachableError: rank 1 everywhere is too much, or no ranks are within 1 % below the target.
    """
    shape = _without_linear(full, target, share)
    pairs = linear_shapes(shape)
    room = target - shape.table - shape.vectors
    blocks = most_blocks
    while blocks > 1 and blocks * sum(map(sum, pairs)) > room:
        blocks //= 2

    def count(ranks: Sequence[int]) -> int:
        return sum(factored(pair, rank, blocks) for pair, rank in zip(pairs, ranks, strict=True))

    least = count([1] * len(pairs))
    if least > room:
        raise UnreachableError(
            f"beside a word table of {shape.table:,} parameters rank 1 takes {least:,}, and {max(0, room):,} are left"
        )
    whole = min(shape.width, *(min(pair) for pair in pairs))
    ranks = [max(rank for rank in range(1, whole + 1) if count([rank] * len(pairs)) <= room)] * len(pairs)
    # The dearest first, each by one rank: all in one layer would serve the others nothing.
    for index in sorted(range(len(pairs)), key=lambda index: -sum(pairs[index])):
        more = [*ranks[:index], ranks[index] + 1, *ranks[index + 1 :]]
        ranks = more if count(more) <= room else ranks
    found = Factors(shape, tuple(ranks), blocks)
    if shape.rank:
        more = (target - found.size) // (shape.words + shape.width)
        found = dataclasses.replace(found, shape=dataclasses.replace(shape, rank=shape.rank + more))
    if found.size < (1 - TOLERANCE) * target:
        raise UnreachableError(f"{found.size:,} parameters are the most below {target:,}")
    return found


Sizes = Shape | Factors
Rule = Callable[[Shape, int], Sizes]


def smaller(depth: int, part: float) -> Rule:
    return functools.partial(fitted, depth=depth, distinct=depth, part=part)


def tied(distinct: int, part: float) -> Rule:
    def rule(full: Shape, target: int) -> Sizes:
        return fitted(full, target, full.depth, distinct, part)

    return rule


# What each rival's trials choose from, by name; the first is taken where nothing was tried. Names go into rows.
RULES: dict[str, dict[str, Rule]] = {
    "smaller": {
        f"{depth} layers{'' if part == 1 else f', table {part:g}'}": smaller(depth, part)
        for depth, part in ((8, 1.0), (4, 1.0), (8, 0.5), (4, 0.5), (2, 1.0), (12, 1.0))
    },
    "tied": {
        f"{distinct} of all layers{'' if part == 1 else f', table {part:g}'}": tied(distinct, part)
        for distinct, part in ((1, 0.25), (1, 1.0), (2, 0.25), (4, 0.25))
    },
    "lowrank": {f"table {share:g}": functools.partial(factors, share=share) for share in (0.25, 0.5, 0.125)},
    "monarch": {
        f"{blocks} blocks, table {share:g}": functools.partial(factors, share=share, most_blocks=blocks)
        for blocks, share in ((16, 0.25), (4, 0.25), (16, 0.5), (4, 0.5))
    },
}

"""A CPU's product of few rows: whole tiles are gathered from slots that are found once and kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from roastify.kernels.tile_hash import element_bits, sign_patterns, tile_factors, tile_offsets
from roastify.kernels.view import MappingKind, SignKind, TileView

# Rows of activations at most. Above, one product of a whole panel takes less than many of a tile's columns.
_MOST_ROWS = 16
# Elements of a weight at least. Of smaller ones a single panel is gathered, whose product is the dense layer's bit for
# bit.
_LEAST_ELEMENTS = 1 << 18
# Elements of the tiles that are gathered at once: they should stay in cache, but every turn costs 30 µs.
_ELEMENTS_AT_ONCE = 1 << 19
# Signs of elements are kept, at a bit each, of weights of at most so many elements: those of a weight of 4096², ten
# times as many bytes as its pool may have, are hashed anew.
_MOST_KEPT_SIGNS = 1 << 22


@dataclass
class _Strip:
    """Some rows of tiles, and what the mapping says about them; a column of tiles comes after another.

    Args:
        stop: the first row of tiles after them.
        slots: `[grid cols · rows of tiles]`.
        factors: `scale · sign` of tiles, `[grid cols, rows of tiles, 1]`, or of rows of tiles, `[rows of tiles, 1]`;
            None: it is 1 everywhere, or elements have signs.
        bits: signs of elements, eight at a time or fewer; None: there are none, or they are not kept.
    """

    stop: int
    slots: Tensor
    factors: Tensor | None
    bits: Tensor | None


# By the pool's chunk table, and in it by view, λ and dtype: 8 bytes a tile. Hashing them took longer than the product.
_kept = WeakTensorKeyDictionary()


def is_worth_it(x: Tensor, view: TileView) -> bool:
    """Whether to gather whole tiles: `x` has few rows, the weight is large, and shares slots with others.

    A weight in the first chunk, as every one at ratio 1, keeps the dense layer's order of sums.
    """
    return (
        0 < x.shape[0] <= _MOST_ROWS
        and view.num_tiles * view.slot_size >= _LEAST_ELEMENTS
        and view.first_tile + view.num_tiles > view.num_slots
        # Partial sums of a narrow dtype would be rounded.
        and x.dtype in (torch.float32, torch.float64)
        and view.mapping == MappingKind.PERMUTATION
        and not view.strips
        and view.slot_size >= 256
    )


def product(x: Tensor, pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ`, `[num_rows, cols] → [num_rows, rows]`."""
    height, width, across = view.tile_rows, view.tile_cols, view.grid_cols
    num_rows, pad = x.shape[0], across * width - view.cols
    columns = (F.pad(x, (0, pad)) if pad else x).view(num_rows, across, width).transpose(0, 1)
    region = pool.reshape(-1, height, width)
    patterns = sign_patterns(view, scale, x.dtype, x.device) if _has_element_signs(view) else None
    out = x.new_empty(num_rows, view.grid_rows * height)
    start = 0
    for strip in _strips(table, view, scale, x.dtype):
        tiles = region.index_select(0, strip.slots)
        if patterns is not None:
            bits = _bits(view, start, strip.stop, x.device) if strip.bits is None else strip.bits
            tiles.view(-1).mul_(F.embedding(bits.int(), patterns).view(-1))
        tiles = tiles.view(across, -1, width)
        if pad:
            # Of padding the pool may hold anything, which zeros of `x` would not silence.
            tiles[-1, :, width - pad :] = 0
        # [grid cols, num_rows, rows]: a product for each column of tiles. In this order equal rows of `x` give equal
        # sums to the last bit, as in a dense layer; with the tiles first, not always.
        by_column = torch.bmm(columns, tiles.transpose(1, 2))
        if strip.factors is not None and strip.factors.dim() == 3:
            by_column.view(across, num_rows, -1, height).mul_(strip.factors[:, None])
        part = by_column.sum(0)
        if strip.factors is not None and strip.factors.dim() == 2:
            part.view(num_rows, -1, height).mul_(strip.factors)
        out[:, start * height : strip.stop * height] = part
        start = strip.stop
    return out[:, : view.rows].contiguous()


def _has_element_signs(view: TileView) -> bool:
    return view.sign == SignKind.ELEMENT and not view.all_positive


def _strips(table: Tensor, view: TileView, scale: float, dtype: torch.dtype) -> list[_Strip]:
    found = _kept.get(table)
    if found is None:
        found = _kept[table] = {}
    key = view, scale, dtype
    if key not in found:
        step = max(1, _ELEMENTS_AT_ONCE // (view.grid_cols * view.slot_size))
        found[key] = [
            _strip(table, view, scale, dtype, start, min(start + step, view.grid_rows))
            for start in range(0, view.grid_rows, step)
        ]
    return found[key]


def _strip(table: Tensor, view: TileView, scale: float, dtype: torch.dtype, start: int, stop: int) -> _Strip:
    tiles = _tiles(view, start, stop, table.device)
    factors = bits = None
    if _has_element_signs(view):
        keep = view.num_tiles * view.slot_size <= _MOST_KEPT_SIGNS
        bits = _bits(view, start, stop, table.device) if keep else None
    elif (found := tile_factors(view, scale, tiles, dtype)) is not None:
        factors = found.expand(tiles.shape)[..., None].contiguous()
        # A sign of a row is one factor of its whole sum, unless some of its tiles are in the first chunk.
        if bool((factors == factors[0]).all()):
            factors = factors[0].clone()
    slots = tile_offsets(table, view, tiles) // view.slot_size
    return _Strip(stop, slots.flatten(), factors, bits)


def _tiles(view: TileView, start: int, stop: int, device: torch.device) -> Tensor:
    rows = torch.arange(start, stop, device=device) * view.grid_cols
    return view.first_tile + rows + torch.arange(view.grid_cols, device=device)[:, None]


def _bits(view: TileView, start: int, stop: int, device: torch.device) -> Tensor:
    tiles = _tiles(view, start, stop, device)[..., None]
    return element_bits(view, tiles, torch.arange(view.tile_rows, device=device)).flatten().to(torch.uint8)

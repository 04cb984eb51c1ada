"""The mapping in torch operations: in which slot each tile lies, and what sign it, its row or its elements have."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.kernels.view import (
    GOLDEN32,
    GOLDEN64,
    MASK32,
    MIX32_A,
    MIX32_B,
    MIX64_A,
    MIX64_B,
    SLOT_STREAM,
    MappingKind,
    SignKind,
    TileView,
    to_signed64,
)


def shift_right(word: Tensor, bits: int) -> Tensor:
    """Logical shift of a 64-bit word held in int64."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def hash64(key: int, counter: Tensor) -> Tensor:
    """Return 64 hashed bits of each counter, held in int64 (splitmix64)."""
    word = counter * to_signed64(GOLDEN64) + to_signed64(key + GOLDEN64)
    word = (word ^ shift_right(word, 30)) * to_signed64(MIX64_A)
    word = (word ^ shift_right(word, 27)) * to_signed64(MIX64_B)
    return word ^ shift_right(word, 31)


def hash32(word: Tensor) -> Tensor:
    """Return 32 hashed bits of each 32-bit word, held in int64 (MurmurHash3's finalizer)."""
    word = ((word ^ (word >> 16)) * MIX32_A) & MASK32
    word = ((word ^ (word >> 13)) * MIX32_B) & MASK32
    return word ^ (word >> 16)


def tile_offsets(table: Tensor, view: TileView, tiles: Tensor) -> Tensor:
    """Return the pool element at which each of `tiles` begins (int64, the shape of `tiles`)."""
    size = view.slot_size
    start = view.first_slot * size
    if view.mapping == MappingKind.PERMUTATION:
        chunk = tiles // view.num_slots
        # One gather of two columns is not worth it: the table has a few rows and stays in cache.
        rows = chunk + view.first_chunk
        slots = (table[:, 0][rows] * (tiles - chunk * view.num_slots) + table[:, 1][rows]) % view.num_slots
        return slots * size + start
    word = shift_right(hash64(view.key ^ to_signed64(SLOT_STREAM), tiles), 1)
    if view.mapping == MappingKind.HASHED:
        return word % view.num_slots * size + start
    return word % ((view.num_slots - 1) * size + 1) + start


def signed(scale: float, negative: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `-scale` where `negative`, else `scale`."""
    # A tensor of the right dtype, because two Python numbers would give float32 and round a float64 scale.
    positive = torch.full((), scale, dtype=dtype, device=negative.device)
    return torch.where(negative, -positive, positive)


def tile_factors(view: TileView, scale: float, tiles: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return `scale · sign` of each tile, or None if it is 1 everywhere; not for signs per element."""
    if view.all_positive:
        return None if scale == 1.0 else torch.full((), scale, dtype=dtype, device=tiles.device)
    source = view.row_tile(tiles) if view.sign == SignKind.ROW else tiles
    negative = hash64(view.key, source) < 0
    if view.unsigned_first_chunk:
        negative &= tiles >= view.num_slots
    return signed(scale, negative, dtype)


def element_factors(view: TileView, scale: float, tiles: Tensor, tile_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `scale · sign` of each element of segments: shaped as `tiles` broadcast with `tile_rows`, plus columns."""
    bits = element_bits(view, tiles, tile_rows)
    factors = F.embedding(bits, sign_patterns(view, scale, dtype, tiles.device))
    return factors.view(*bits.shape[:-1], view.tile_cols)


def bits_at_once(view: TileView) -> int:
    """Return how many signs of elements in a row are looked up at once.

    For a weight of 4096² this takes 25 ms; hashing and shifting for each element took 110 ms.
    """
    return min(math.gcd(view.tile_cols, 32), 8)


def element_bits(view: TileView, tiles: Tensor, tile_rows: Tensor) -> Tensor:
    """Return the signs of segments' elements as bits, `[*broadcast(tiles, tile_rows), tile_cols / bits_at_once]`."""
    device = tiles.device
    # `span` columns take their bits from one word; a tile's row may be shorter than a word.
    span, width = math.gcd(view.tile_cols, 32), bits_at_once(view)
    key = hash64(view.key, tiles)[..., None]
    element = tile_rows[..., None] * view.tile_cols + torch.arange(0, view.tile_cols, span, device=device)
    word = hash32(((key & MASK32) + (element >> 5) * GOLDEN32) & MASK32) ^ shift_right(key, 32)
    if view.unsigned_first_chunk:
        word = torch.where((tiles >= view.num_slots)[..., None], word, 0)
    shifts = (element & 31)[..., None] + torch.arange(0, span, width, device=device)
    return ((word[..., None] >> shifts) & ((1 << width) - 1)).flatten(-2)


def sign_patterns(view: TileView, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `scale · sign` of as many elements as are looked up at once, for every value of their bits."""
    width = bits_at_once(view)
    pattern = torch.arange(1 << width, device=device)[:, None] >> torch.arange(width, device=device)
    return signed(scale, (pattern & 1).bool(), dtype)

"""`roastify.pool.mapping` in Triton: where a tile begins in the pool, and which elements are negated.

This module imports Triton. Only the launchers' modules import it, and they are imported when the first CUDA tensor
arrives. If ``TRITON_INTERPRET=1`` is in the environment at that moment, the kernels run on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from roastify.kernels.view import (
    GOLDEN32,
    GOLDEN64,
    MIX32_A,
    MIX32_B,
    MIX64_A,
    MIX64_B,
    SLOT_STREAM,
    MappingKind,
    SignKind,
    TileView,
)

_GOLDEN64 = tl.constexpr(GOLDEN64)
_MIX64_A = tl.constexpr(MIX64_A)
_MIX64_B = tl.constexpr(MIX64_B)
_SLOT_STREAM = tl.constexpr(SLOT_STREAM)
_GOLDEN32 = tl.constexpr(GOLDEN32)
_MIX32_A = tl.constexpr(MIX32_A)
_MIX32_B = tl.constexpr(MIX32_B)
_PERMUTATION = tl.constexpr(int(MappingKind.PERMUTATION))
_HASHED = tl.constexpr(int(MappingKind.HASHED))
_NO_SIGN = tl.constexpr(int(SignKind.NONE))
_SIGN_TILE = tl.constexpr(int(SignKind.TILE))
_SIGN_ROW = tl.constexpr(int(SignKind.ROW))


@triton.jit
def mix64(key, counter):
    """Return a splitmix64 step on each of `counter`."""
    word = counter.to(tl.uint64) * _GOLDEN64 + (key.to(tl.uint64) + _GOLDEN64)
    word = (word ^ (word >> 30)) * _MIX64_A
    word = (word ^ (word >> 27)) * _MIX64_B
    return word ^ (word >> 31)


@triton.jit
def mix32(word):
    """Return MurmurHash3's finalizer on each 32-bit word."""
    word = (word ^ (word >> 16)) * _MIX32_A
    word = (word ^ (word >> 13)) * _MIX32_B
    return word ^ (word >> 16)


@triton.jit
def tile_start(p_table, tile, key, num_slots, first_slot, first_chunk, SIZE: tl.constexpr, MAPPING: tl.constexpr):
    """Return the pool element at which each of `tile` (int64) begins."""
    if MAPPING == _PERMUTATION:
        chunk = tile // num_slots
        p_chunk = p_table + (chunk + first_chunk) * 3
        a = tl.load(p_chunk)
        b = tl.load(p_chunk + 1)
        return (first_slot + (a * (tile - chunk * num_slots) + b) % num_slots) * SIZE
    else:
        word = (mix64(key.to(tl.uint64) ^ _SLOT_STREAM, tile) >> 1).to(tl.int64)
        if MAPPING == _HASHED:
            return (first_slot + word % num_slots) * SIZE
        else:
            # Triton passes small numbers as int32, and a pool may have more elements than an int32 can count.
            span = (tl.cast(num_slots, tl.int64) - 1) * SIZE + 1
            return tl.cast(first_slot, tl.int64) * SIZE + word % span


@triton.jit
def segment(p_table, tile, end, slots, first_chunk, INT: tl.constexpr):
    """Return the chunk, slot stride, first slot and end of the run of tiles from `tile` to `end` or its chunk's end.

    All are integers of type `INT`, which `address_type` chooses. Only the permutation mapping has chunks.
    """
    chunk = tile // slots
    p_chunk = p_table + (chunk + first_chunk) * 3
    a = tl.load(p_chunk).to(INT)
    b = tl.load(p_chunk + 1).to(INT)
    slot = (a * (tile - chunk * slots) + b) % slots
    return chunk, a, slot, tl.minimum(end, (chunk + 1) * slots)


@triton.jit
def row_tile(tile, first_tile, grid_cols):
    """Return the first tile of the row of tiles that each of `tile` is in; strips use `SIGN` tile instead."""
    return tile - (tile - first_tile) % grid_cols


@triton.jit
def is_negative_tile(tile, source, key, num_slots, MAPPING: tl.constexpr):
    """Whether each of `tile` is negated; the hash of the tile `source` decides. Both are integers of any width."""
    negative = (mix64(key, source) >> 63) != 0
    if MAPPING == _PERMUTATION:
        negative = negative & (tile >= num_slots)
    return negative


@triton.jit
def is_negative_element(tile, element, key, num_slots, MAPPING: tl.constexpr):
    """Whether each element (int32 position in its tile) is negated, with a sign per element; shapes broadcast."""
    word = mix64(key, tile)
    low = (word & 0xFFFFFFFF).to(tl.uint32)
    high = (word >> 32).to(tl.uint32)
    position = element.to(tl.uint32)
    bits = mix32(low + (position >> 5) * _GOLDEN32) ^ high
    negative = ((bits >> (position & 31)) & 1) != 0
    if MAPPING == _PERMUTATION:
        negative = negative & (tile >= num_slots)
    return negative


@triton.jit
def apply_sign(values, tile, element, key, num_slots, first_tile, grid_cols, MAPPING: tl.constexpr,
               SIGN: tl.constexpr):  # fmt: skip
    """Return `values` with their signs; `tile` (int64) and `element` broadcast to their shape."""
    if SIGN == _NO_SIGN:
        return values
    elif SIGN == _SIGN_TILE:
        return tl.where(is_negative_tile(tile, tile, key, num_slots, MAPPING), -values, values)
    elif SIGN == _SIGN_ROW:
        source = row_tile(tile, first_tile, grid_cols)
        return tl.where(is_negative_tile(tile, source, key, num_slots, MAPPING), -values, values)
    else:
        return tl.where(is_negative_element(tile, element, key, num_slots, MAPPING), -values, values)


def supported(pool: torch.Tensor) -> bool:
    """Whether the kernels support this dtype: a kernel's scalars are float32, which would round a float64 scale."""
    return pool.dtype in (torch.float32, torch.bfloat16, torch.float16)


def view_arguments(view: TileView) -> dict[str, Any]:
    """Return the numbers that every kernel takes, beside the chunk table, to find a tensor's tiles and signs."""
    return {
        "key": view.key,
        "num_slots": view.num_slots,
        "first_slot": view.first_slot,
        "first_chunk": view.first_chunk,
        "first_tile": view.first_tile,
        "rows": view.rows,
        "cols": view.cols,
        "grid_cols": view.grid_cols,
        "TILE_ROWS": view.tile_rows,
        "TILE_COLS": view.tile_cols,
        "MAPPING": view.mapping,
        "SIGN": int(effective_sign(view)),
    }


def product_arguments(view: TileView) -> dict[str, Any]:
    """Return the numbers that the kernels of products take: the view's, and where a group's input columns are."""
    return {**view_arguments(view), "group_rows": view.rows // view.groups, "input_cols": view.input_cols}


@functools.lru_cache(maxsize=1 << 12)
def effective_sign(view: TileView) -> SignKind:
    """Return the sign kind that a kernel applies: none if no tile is negative; row signs of strips are tile signs."""
    if view.all_positive:
        return SignKind.NONE
    return SignKind.TILE if view.strips and view.sign == SignKind.ROW else SignKind(view.sign)


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)

"""`reduce` on a GPU: each slot sums the gradients of its tiles, one a chunk, in order.

Atomics are not used, so every run gives the same bits. `reduce_`, which adds to an existing sum, has another kernel for
a tensor with fewer tiles than there are slots. It adds tile by tile, so that the cost grows with the tensor and not
with the pool. Within a chunk no two tiles have the same slot, and the chunks are launched one after another.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.gather import place_of
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch
from roastify.kernels.gpu.mapping import apply_sign, supported, tile_start, view_arguments
from roastify.kernels.gpu.tuning import cdiv, power_of_2
from roastify.kernels.view import MappingKind, TileView


@triton.jit
def sum_chunks(
    p_grad, p_table, slot, element, exists, chunk_begin, chunk_end, key, rows, cols, base, first_tile, num_tiles,
    grid_cols, num_slots, first_chunk, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BS: tl.constexpr,
    BE: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Return a gradient's signed sum over the tiles of each slot, one a chunk, in order: `[slots, elements]`."""
    total = tl.zeros([BS, BE], dtype=tl.float32)
    for chunk in range(chunk_begin, chunk_end):
        # Triton passes a number that fits an int32 as int32, and there may be more tiles than an int32 can count.
        p_chunk = p_table + (tl.cast(chunk, tl.int64) + first_chunk) * 3
        b = tl.load(p_chunk + 1)
        inverse = tl.load(p_chunk + 2)
        # Adding num_slots keeps the difference positive: a kernel's remainder of a negative number is negative.
        position = inverse * ((slot + num_slots - b) % num_slots) % num_slots
        tile = tl.cast(chunk, tl.int64) * num_slots + position
        place, inside = place_of(tile, element, base, rows, cols, first_tile, grid_cols, TILE_ROWS, TILE_COLS, STRIPS)
        reads = (tile >= first_tile) & (tile - first_tile < num_tiles)
        inside = inside & exists & reads[:, None]
        grad = tl.load(p_grad + place, mask=inside, other=0.0).to(tl.float32)
        total += apply_sign(grad, tile[:, None], element[None, :], key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
    return total


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _reduce_kernel(
    p_grad, p_table, p_out, scale, key, rows, cols, base, first_tile, num_tiles, grid_cols, num_slots, first_slot,
    first_chunk, chunk_begin, chunk_end, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BS: tl.constexpr,
    BE: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr, STRIPS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    PARTS: tl.constexpr = (SIZE + BE - 1) // BE
    program = tl.program_id(0).to(tl.int64)
    slot = program // PARTS * BS + tl.arange(0, BS)
    element = (program % PARTS * BE).to(tl.int32) + tl.arange(0, BE)
    exists = (slot < num_slots)[:, None] & (element < SIZE)[None, :]
    total = scale * sum_chunks(
        p_grad, p_table, slot, element, exists, chunk_begin, chunk_end, key, rows, cols, base, first_tile, num_tiles,
        grid_cols, num_slots, first_chunk, TILE_ROWS, TILE_COLS, BS, BE, MAPPING, SIGN, STRIPS,
    )  # fmt: skip
    p_slot = p_out + (first_slot + slot)[:, None] * SIZE + element[None, :]
    if ADD:
        total += tl.load(p_slot, mask=exists, other=0.0)
    tl.store(p_slot, total.to(p_out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _reduce_chunk_kernel(
    p_grad, p_table, p_out, scale, key, rows, cols, base, begin_tile, end_tile, first_tile, grid_cols, num_slots,
    first_slot, first_chunk, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
    MAPPING: tl.constexpr, SIGN: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    PARTS: tl.constexpr = (SIZE + BE - 1) // BE
    program = tl.program_id(0).to(tl.int64)
    tile = begin_tile + program // PARTS * BT + tl.arange(0, BT)
    element = (program % PARTS * BE).to(tl.int32) + tl.arange(0, BE)
    exists = tile < end_tile
    # Tiles past the last one read the table at the last one's place, which exists.
    known = tl.minimum(tile, end_tile - 1)
    start = tile_start(p_table, known, key, num_slots, first_slot, first_chunk, SIZE, MAPPING)
    place, inside = place_of(tile, element, base, rows, cols, first_tile, grid_cols, TILE_ROWS, TILE_COLS, STRIPS)
    inside = inside & exists[:, None] & (element < SIZE)[None, :]
    grad = tl.load(p_grad + place, mask=inside, other=0.0).to(tl.float32) * scale
    grad = apply_sign(grad, tile[:, None], element[None, :], key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
    p_slot = p_out + start[:, None] + element[None, :]
    total = tl.load(p_slot, mask=inside, other=0.0) + grad
    tl.store(p_slot, total.to(p_out.dtype.element_ty), mask=inside)


def reduce(grad_weight: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: list[int]) -> Tensor:
    """Return the pool's gradient; float64 and the comparison mappings use the reference."""
    if not _has_kernel(grad_weight, view):
        return reference.reduce(grad_weight, table, view, scale, pool_shape)
    whole = view.num_slots * view.slot_size == pool_shape[0] * pool_shape[1]
    # The kernel writes every slot of the tensor's region. The tensor reads no other slots, whose gradient is zero.
    make = torch.empty if whole else torch.zeros
    out = make(pool_shape, dtype=grad_weight.dtype, device=grad_weight.device)
    _add_by_slot(out, grad_weight.contiguous(), table, view, scale, add=False)
    return out


def reduce_(total: Tensor, grad_weight: Tensor, table: Tensor, view: TileView, scale: float) -> None:
    """Add the pool's gradient to `total`; float64 and the comparison mappings use the reference."""
    if not _has_kernel(grad_weight, view):
        reference.reduce_(total, grad_weight, table, view, scale)
    elif view.num_tiles < view.num_slots:
        _add_by_tile(total, grad_weight.contiguous(), table, view, scale)
    else:
        _add_by_slot(total, grad_weight.contiguous(), table, view, scale, add=True)


def _has_kernel(grad_weight: Tensor, view: TileView) -> bool:
    return supported(grad_weight) and view.mapping == MappingKind.PERMUTATION


def _add_by_slot(out: Tensor, grad_weight: Tensor, table: Tensor, view: TileView, scale: float, add: bool) -> None:
    """Write the sum over its tiles to every slot of the region; with `add`, add it to the value already there."""
    _slots_launch(view, add)(p_grad=grad_weight, p_table=table, p_out=out, scale=scale)


@functools.lru_cache(maxsize=1 << 12)
def _slots_launch(view: TileView, add: bool) -> Launch:
    block_elements = min(power_of_2(view.slot_size), tuning.REDUCE_ELEMENTS)
    block_slots = max(1, tuning.REDUCE_ELEMENTS // block_elements)
    programs = cdiv(view.num_slots, block_slots) * cdiv(view.slot_size, block_elements)
    chunk_begin, num_chunks = view.chunks
    return Launch(
        _reduce_kernel,
        (programs,),
        base=view.base,
        num_tiles=view.num_tiles,
        chunk_begin=chunk_begin,
        chunk_end=chunk_begin + num_chunks,
        BS=block_slots,
        BE=block_elements,
        STRIPS=view.strips,
        ADD=add,
        num_warps=tuning.REDUCE_WARPS,
        **view_arguments(view),
    )


def _add_by_tile(total: Tensor, grad_weight: Tensor, table: Tensor, view: TileView, scale: float) -> None:
    """Add each tile to its slot, a chunk at a time."""
    for launch in _chunk_launches(view):
        launch(p_grad=grad_weight, p_table=table, p_out=total, scale=scale)


@functools.lru_cache(maxsize=1 << 12)
def _chunk_launches(view: TileView) -> tuple[Launch, ...]:
    block_elements = min(power_of_2(view.slot_size), tuning.MOST_ELEMENTS)
    block_tiles = max(1, tuning.GATHER_ELEMENTS // block_elements)
    launches = []
    begin, end = view.first_tile, view.first_tile + view.num_tiles
    while begin < end:
        chunk_end = min(end, (begin // view.num_slots + 1) * view.num_slots)
        programs = cdiv(chunk_end - begin, block_tiles) * cdiv(view.slot_size, block_elements)
        launches.append(
            Launch(
                _reduce_chunk_kernel,
                (programs,),
                base=view.base,
                begin_tile=begin,
                end_tile=chunk_end,
                BE=block_elements,
                BT=block_tiles,
                STRIPS=view.strips,
                num_warps=tuning.GATHER_WARPS,
                **view_arguments(view),
            )
        )
        begin = chunk_end
    return tuple(launches)

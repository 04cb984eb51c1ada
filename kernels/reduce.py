"""`reduce` on a GPU: each slot sums its own tiles' gradients, one a chunk, in order. No atomics, so the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import reference, tuning
from roastify.kernels.gather import place_of
from roastify.kernels.hash import apply_sign, supported, view_arguments
from roastify.kernels.launch import PLAIN_ARGUMENTS
from roastify.kernels.view import MappingKind, TileView


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _reduce_kernel(
    p_grad, p_table, p_out, scale, key, rows, cols, base, first_tile, num_tiles, grid_cols, num_slots, first_slot,
    first_chunk, chunk_begin, chunk_end, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BS: tl.constexpr,
    BE: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    PARTS: tl.constexpr = (SIZE + BE - 1) // BE
    program = tl.program_id(0).to(tl.int64)
    slot = program // PARTS * BS + tl.arange(0, BS)
    element = (program % PARTS * BE).to(tl.int32) + tl.arange(0, BE)
    exists = (slot < num_slots)[:, None] & (element < SIZE)[None, :]
    total = tl.zeros([BS, BE], dtype=tl.float32)
    for chunk in range(chunk_begin, chunk_end):
        # What fits an int32 arrives as one, and tiles may be more than it counts.
        p_chunk = p_table + (tl.cast(chunk, tl.int64) + first_chunk) * 3
        b = tl.load(p_chunk + 1)
        inverse = tl.load(p_chunk + 2)
        # slot - b may be negative, and the remainder of a negative number is not the one wanted.
        position = inverse * ((slot + num_slots - b) % num_slots) % num_slots
        tile = tl.cast(chunk, tl.int64) * num_slots + position
        place, inside = place_of(tile, element, base, rows, cols, first_tile, grid_cols, TILE_ROWS, TILE_COLS, STRIPS)
        reads = (tile >= first_tile) & (tile - first_tile < num_tiles)
        inside = inside & exists & reads[:, None]
        grad = tl.load(p_grad + place, mask=inside, other=0.0).to(tl.float32)
        total += apply_sign(grad, tile[:, None], element[None, :], key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
    p_slot = p_out + (first_slot + slot)[:, None] * SIZE + element[None, :]
    tl.store(p_slot, (total * scale).to(p_out.dtype.element_ty), mask=exists)


def reduce(grad_weight: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: list[int]) -> Tensor:
    """Return the pool's gradient; float64 and the comparison mappings go through the reference."""
    if not supported(grad_weight) or view.mapping != MappingKind.PERMUTATION:
        return reference.reduce(grad_weight, table, view, scale, pool_shape)
    grad_weight = grad_weight.contiguous()
    whole = view.num_slots * view.slot_size == pool_shape[0] * pool_shape[1]
    # A region's kernel writes every slot of the region; the rest of the pool is not read by this tensor.
    make = torch.empty if whole else torch.zeros
    out = make(pool_shape, dtype=grad_weight.dtype, device=grad_weight.device)
    block_elements = min(triton.next_power_of_2(view.slot_size), tuning.REDUCE_ELEMENTS)
    block_slots = max(1, tuning.REDUCE_ELEMENTS // block_elements)
    programs = triton.cdiv(view.num_slots, block_slots) * triton.cdiv(view.slot_size, block_elements)
    _reduce_kernel[(programs,)](
        p_grad=grad_weight,
        p_out=out,
        scale=scale,
        base=view.base,
        num_tiles=view.num_tiles,
        chunk_begin=view.first_tile // view.num_slots,
        chunk_end=(view.first_tile + view.num_tiles - 1) // view.num_slots + 1,
        BS=block_slots,
        BE=block_elements,
        STRIPS=view.strips,
        num_warps=tuning.REDUCE_WARPS,
        **view_arguments(table, view),
    )
    return out

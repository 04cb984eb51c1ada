"""`gather` on a GPU: each program writes a block of tiles of the dense tensor."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch
from roastify.kernels.gpu.mapping import apply_sign, supported, tile_start, view_arguments
from roastify.kernels.gpu.tuning import cdiv, power_of_2
from roastify.kernels.view import TileView


@triton.jit
def place_of(tile, element, base, rows, cols, first_tile, grid_cols, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
             STRIPS: tl.constexpr):  # fmt: skip
    """Return where elements of tiles (int64) are in the row-major tensor, and whether inside: `[tiles, elements]`."""
    if STRIPS:
        place = tile[:, None] * (TILE_ROWS * TILE_COLS) + element[None, :] - base
        # Triton passes sizes that fit an int32 as int32; their product may not fit.
        return place, (place >= 0) & (place < tl.cast(rows, tl.int64) * cols)
    else:
        index = tile - first_tile
        row = (index // grid_cols * TILE_ROWS)[:, None] + (element // TILE_COLS)[None, :]
        col = (index % grid_cols * TILE_COLS)[:, None] + (element % TILE_COLS)[None, :]
        return row * cols + col, (row < rows) & (col < cols)


@triton.jit
def gather_tiles(
    p_pool, p_table, p_out, scale, i_tile, element, key, rows, cols, base, first_tile, num_tiles, grid_cols, num_slots,
    first_slot, first_chunk, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, MAPPING: tl.constexpr,
    SIGN: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Write elements (int32) of tiles (int64, counted from the tensor's first) to their places in the tensor."""
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    tile = first_tile + i_tile
    exists = i_tile < num_tiles
    # Tiles past the last one read the table at the last one's place, which exists.
    known = first_tile + tl.minimum(i_tile, num_tiles - 1)
    start = tile_start(p_table, known, key, num_slots, first_slot, first_chunk, SIZE, MAPPING)
    place, inside = place_of(tile, element, base, rows, cols, first_tile, grid_cols, TILE_ROWS, TILE_COLS, STRIPS)
    inside = inside & exists[:, None] & (element < SIZE)[None, :]
    values = tl.load(p_pool + start[:, None] + element[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    values = apply_sign(values, tile[:, None], element[None, :], key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
    tl.store(p_out + place, values.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _gather_kernel(
    p_pool, p_table, p_out, scale, key, rows, cols, base, first_tile, num_tiles, grid_cols, num_slots, first_slot,
    first_chunk, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
    MAPPING: tl.constexpr, SIGN: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (TILE_ROWS * TILE_COLS + BE - 1) // BE
    program = tl.program_id(0).to(tl.int64)
    i_tile = program // PARTS * BT + tl.arange(0, BT)
    element = (program % PARTS * BE).to(tl.int32) + tl.arange(0, BE)
    gather_tiles(p_pool, p_table, p_out, scale, i_tile, element, key, rows, cols, base, first_tile, num_tiles,
                 grid_cols, num_slots, first_slot, first_chunk, TILE_ROWS, TILE_COLS, MAPPING, SIGN,
                 STRIPS)  # fmt: skip


def gather(pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the dense tensor `[rows, cols]`; float64 uses the reference."""
    if not supported(pool):
        return reference.gather(pool, table, view, scale)
    pool = pool.contiguous()
    out = torch.empty(view.rows, view.cols, dtype=pool.dtype, device=pool.device)
    _launch(view)(p_pool=pool, p_table=table, p_out=out, scale=scale)
    return out


@functools.lru_cache(maxsize=1 << 12)
def _launch(view: TileView) -> Launch:
    # A slot may have any size; several programs divide a large one.
    block_elements = min(power_of_2(view.slot_size), tuning.MOST_ELEMENTS)
    block_tiles = max(1, tuning.GATHER_ELEMENTS // block_elements)
    programs = cdiv(view.num_tiles, block_tiles) * cdiv(view.slot_size, block_elements)
    return Launch(
        _gather_kernel,
        (programs,),
        base=view.base,
        num_tiles=view.num_tiles,
        BE=block_elements,
        BT=block_tiles,
        STRIPS=view.strips,
        num_warps=tuning.GATHER_WARPS,
        **view_arguments(view),
    )

"""`embedding` on a GPU: the rows asked for, and the pool's gradient from them; cost goes with the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import reference, tuning
from roastify.kernels.hash import apply_sign, supported, tile_start, view_arguments
from roastify.kernels.view import TileView


@triton.jit
def _embedding_kernel(
    p_index, p_pool, p_table, p_out, scale, key, num_tokens, rows, cols, first_tile, grid_cols, num_slots, first_slot,
    first_chunk, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, COLS_POW2: tl.constexpr, BL: tl.constexpr,
    MAPPING: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    i_col = tl.program_id(1)
    index = tl.load(p_index + token, mask=token < num_tokens, other=0).to(tl.int64)
    known = (index >= 0) & (index < rows)
    row = tl.where(known, index, 0)
    tile = first_tile + row // TILE_ROWS * grid_cols + i_col
    start = tile_start(p_table, tile, key, num_slots, first_slot, first_chunk, TILE_ROWS * TILE_COLS, MAPPING)
    c = tl.arange(0, COLS_POW2)
    element = (row % TILE_ROWS * TILE_COLS)[:, None] + c[None, :]
    col = i_col * TILE_COLS + c
    inside = (token < num_tokens)[:, None] & ((c < TILE_COLS) & (col < cols))[None, :]
    values = tl.load(p_pool + start[:, None] + element, mask=inside, other=0.0).to(tl.float32) * scale
    values = apply_sign(values, tile[:, None], element, key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
    # An index outside the table would quietly give another tensor's weights.
    values = tl.where(known[:, None], values, float("nan"))
    tl.store(p_out + token[:, None] * cols + col[None, :], values.to(p_out.dtype.element_ty), mask=inside)


def embedding(index: Tensor, pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the rows `[*index.shape, cols]`; an index outside the table gives NaN, since a GPU raises nothing.

    float64, and tables kept as strips, go through the reference.
    """
    if not supported(pool) or view.strips:
        return reference.embedding(index, pool, table, view, scale)
    pool, flat = pool.contiguous(), index.reshape(-1).contiguous()
    out = torch.empty(flat.numel(), view.cols, dtype=pool.dtype, device=pool.device)
    cols_pow2 = triton.next_power_of_2(view.tile_cols)
    block_tokens = max(1, tuning.EMBEDDING_ELEMENTS // cols_pow2)
    if flat.numel():
        _embedding_kernel[(triton.cdiv(flat.numel(), block_tokens), view.grid_cols)](
            p_index=flat,
            p_pool=pool,
            p_out=out,
            scale=scale,
            num_tokens=flat.numel(),
            COLS_POW2=cols_pow2,
            BL=block_tokens,
            num_warps=tuning.EMBEDDING_WARPS,
            **view_arguments(table, view),
        )
    return out.view(*index.shape, view.cols)


# Sorted by torch, then added in order: reproducible, and no work for rows that were not looked up.
embedding_reduce = reference.embedding_reduce

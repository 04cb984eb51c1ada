"""`embedding` on a GPU: looked-up rows, and the pool's gradient from them.

The cost grows with the number of tokens, not with the table. A row of a table consists of segments, each one row of a
tile. For the gradient, torch sorts the looked-up segments by their place in the pool; segments with the same place stay
in the order of tokens. Each run of segments with one place is then added in this order. Atomics are not used, so every
run gives the same bits. The host never waits for the GPU, so a CUDA graph can capture everything.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch
from roastify.kernels.gpu.mapping import apply_sign, supported, tile_start, view_arguments
from roastify.kernels.gpu.tuning import cdiv, power_of_2
from roastify.kernels.view import MappingKind, TileView


@triton.jit
def _locate(p_index, lookup, exists, rows, first_tile, grid_cols, TILE_ROWS: tl.constexpr):
    """Return each lookup's token, column of tiles, tile, row in the tile, and whether its index is in the table.

    Lookups are numbered token by token. An index outside the table counts as row 0 here; the caller handles it.
    """
    token = lookup // grid_cols
    i_col = lookup % grid_cols
    index = tl.load(p_index + token, mask=exists, other=0).to(tl.int64)
    known = (index >= 0) & (index < rows)
    row = tl.where(known, index, 0)
    tile = first_tile + (row // TILE_ROWS * grid_cols + i_col)
    return token, i_col, tile, row % TILE_ROWS, known


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _embedding_kernel(
    p_index, p_pool, p_table, p_out, scale, key, num_lookups, rows, cols, first_tile, grid_cols, num_slots, first_slot,
    first_chunk, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, COLS_POW2: tl.constexpr, BL: tl.constexpr,
    MAPPING: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    lookup = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    exists = lookup < num_lookups
    token, i_col, tile, tile_row, known = _locate(p_index, lookup, exists, rows, first_tile, grid_cols, TILE_ROWS)
    start = tile_start(p_table, tile, key, num_slots, first_slot, first_chunk, TILE_ROWS * TILE_COLS, MAPPING)
    c = tl.arange(0, COLS_POW2)
    element = (tile_row * TILE_COLS)[:, None] + c[None, :]
    col = (i_col * TILE_COLS)[:, None] + c[None, :]
    inside = exists[:, None] & (c < TILE_COLS)[None, :] & (col < cols)
    values = tl.load(p_pool + start[:, None] + element, mask=inside, other=0.0).to(tl.float32) * scale
    values = apply_sign(values, tile[:, None], element, key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
    # Without this, an index outside the table would silently give another tensor's weights.
    values = tl.where(known[:, None], values, float("nan"))
    tl.store(p_out + token[:, None] * cols + col, values.to(p_out.dtype.element_ty), mask=inside)


def embedding(index: Tensor, pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the rows `[*index.shape, cols]`; an index outside the table gives NaN, because a kernel cannot raise.

    float64 and tables stored as strips use the reference.
    """
    if not supported(pool) or view.strips:
        return reference.embedding(index, pool, table, view, scale)
    pool, flat = pool.contiguous(), index.reshape(-1).contiguous()
    out = torch.empty(flat.numel(), view.cols, dtype=pool.dtype, device=pool.device)
    if out.numel():
        _embedding_launch(view, flat.numel())(p_index=flat, p_pool=pool, p_table=table, p_out=out, scale=scale)
    return out.view(*index.shape, view.cols)


@functools.lru_cache(maxsize=1 << 12)
def _embedding_launch(view: TileView, num_tokens: int) -> Launch:
    num_lookups = num_tokens * view.grid_cols
    cols_pow2 = power_of_2(view.tile_cols)
    block_lookups = max(1, tuning.EMBEDDING_ELEMENTS // cols_pow2)
    return Launch(
        _embedding_kernel,
        (cdiv(num_lookups, block_lookups),),
        num_lookups=num_lookups,
        COLS_POW2=cols_pow2,
        BL=block_lookups,
        num_warps=tuning.EMBEDDING_WARPS,
        **view_arguments(view),
    )


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _place_kernel(
    p_index, p_table, p_place, key, num_lookups, nowhere, rows, cols, first_tile, grid_cols, num_slots, first_slot,
    first_chunk, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BL: tl.constexpr, MAPPING: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    lookup = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    exists = lookup < num_lookups
    _, _, tile, tile_row, known = _locate(p_index, lookup, exists, rows, first_tile, grid_cols, TILE_ROWS)
    slot = tile_start(p_table, tile, key, num_slots, first_slot, first_chunk, 1, MAPPING)
    place = tl.where(known, slot * TILE_ROWS + tile_row, nowhere)
    tl.store(p_place + lookup, place.to(p_place.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _run_kernel(
    p_index, p_place, p_order, p_grad, p_out, p_head, p_tail, scale, key, num_lookups, nowhere, steps, rows, cols,
    first_tile, grid_cols, num_slots, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, COLS_POW2: tl.constexpr,
    BC: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # The sorted lookups are cut into chunks of `steps`; each program processes `BC` chunks in parallel.
    chunk = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    begin = chunk * steps
    c = tl.arange(0, COLS_POW2)
    columns = (c < TILE_COLS)[None, :]
    before = tl.load(p_place + begin - 1, mask=(begin > 0) & (begin < num_lookups), other=-1).to(tl.int64)
    place = tl.load(p_place + begin, mask=begin < num_lookups, other=-1).to(tl.int64)
    # Whether the current run began in this chunk.
    begun = place != before
    total = tl.zeros([BC, COLS_POW2], dtype=tl.float32)
    for step in range(0, steps):
        at = begin + step
        exists = at < num_lookups
        lookup = tl.load(p_order + at, mask=exists, other=0)
        token, i_col, tile, tile_row, known = _locate(p_index, lookup, exists, rows, first_tile, grid_cols, TILE_ROWS)
        col = (i_col * TILE_COLS)[:, None] + c[None, :]
        inside = (exists & known)[:, None] & columns & (col < cols)
        grad = tl.load(p_grad + token[:, None] * cols + col, mask=inside, other=0.0).to(tl.float32)
        element = (tile_row * TILE_COLS)[:, None] + c[None, :]
        total += apply_sign(grad, tile[:, None], element, key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
        following = tl.load(p_place + at + 1, mask=at + 1 < num_lookups, other=-1).to(tl.int64)
        ends = following != place
        last = step == steps - 1
        whole = exists & begun & ends & (place != nowhere)
        p_whole = p_out + place[:, None] * TILE_COLS + c[None, :]
        result = total * scale
        if ADD:
            result += tl.load(p_whole, mask=whole[:, None] & columns, other=0.0)
        tl.store(p_whole, result.to(p_out.dtype.element_ty), mask=whole[:, None] & columns)
        # Runs that lie in several chunks: one at the head of this chunk, one at its tail.
        part = chunk[:, None] * TILE_COLS + c[None, :]
        tl.store(p_head + part, total, mask=(exists & (begun == 0) & (ends | last))[:, None] & columns)
        tl.store(p_tail + part, total, mask=(exists & begun & (ends == 0) & last)[:, None] & columns)
        total = tl.where(ends[:, None], 0.0, total)
        begun = begun | ends
        place = following


@triton.jit
def _join_kernel(
    p_place, p_head, p_tail, p_out, scale, num_lookups, nowhere, steps, TILE_COLS: tl.constexpr,
    COLS_POW2: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # The program of the chunk in which a run begins adds the run's parts from the following chunks.
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * steps
    end = begin + steps
    place = tl.load(p_place + end - 1, mask=end < num_lookups, other=-1).to(tl.int64)
    following = tl.load(p_place + end, mask=end < num_lookups, other=-2).to(tl.int64)
    before = tl.load(p_place + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    c = tl.arange(0, COLS_POW2)
    columns = c < TILE_COLS
    # No branch around the loop, because Triton 3.6 cannot compile a loop over a tensor inside a branch.
    cut = (following == place) & (before != place) & (place != nowhere)
    total = tl.load(p_tail + chunk * TILE_COLS + c, mask=columns & cut, other=0.0)
    goes_on = cut
    while goes_on:
        chunk += 1
        total += tl.load(p_head + chunk * TILE_COLS + c, mask=columns, other=0.0)
        end += steps
        last = tl.load(p_place + end - 1, mask=end < num_lookups, other=-1).to(tl.int64)
        following = tl.load(p_place + end, mask=(end < num_lookups) & (last == place), other=-2).to(tl.int64)
        goes_on = following == place
    result = total * scale
    if ADD:
        result += tl.load(p_out + place * TILE_COLS + c, mask=columns & cut, other=0.0)
    tl.store(p_out + place * TILE_COLS + c, result.to(p_out.dtype.element_ty), mask=columns & cut)


def embedding_reduce(
    grad: Tensor, index: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: list[int]
) -> Tensor:
    """Return the pool's gradient from looked-up rows; an index outside the table adds nothing.

    float64, tables stored as strips and mappings with unaligned tiles use the reference.
    """
    if not _has_kernel(grad, view):
        return reference.embedding_reduce(grad, index, table, view, scale, pool_shape)
    out = torch.zeros(pool_shape, dtype=grad.dtype, device=grad.device)
    _write_runs(out, grad, index, table, view, scale, add=False)
    return out


def embedding_reduce_(total: Tensor, grad: Tensor, index: Tensor, table: Tensor, view: TileView, scale: float) -> None:
    """Add what `embedding_reduce` returns to `total`; only the rows' pool elements are read and written."""
    if not _has_kernel(grad, view):
        reference.embedding_reduce_(total, grad, index, table, view, scale)
    else:
        _write_runs(total, grad, index, table, view, scale, add=True)


def _has_kernel(grad: Tensor, view: TileView) -> bool:
    return supported(grad) and not view.strips and view.mapping != MappingKind.UNALIGNED


def _write_runs(
    out: Tensor, grad: Tensor, index: Tensor, table: Tensor, view: TileView, scale: float, add: bool
) -> None:
    """Write the sum for each place that the rows read; with `add`, add it to the value that is already there."""
    grad, index = grad.reshape(-1, view.cols).contiguous(), index.reshape(-1).contiguous()
    if not index.numel():
        return
    runs = _runs(view, index.numel(), out.numel(), add, tuning.PLACE_LOOKUPS, tuning.RUN_ELEMENTS)
    place = torch.empty(runs.num_lookups, dtype=runs.place_dtype, device=grad.device)
    runs.place(p_index=index, p_table=table, p_place=place)
    place, order = torch.sort(place, stable=True)
    head = torch.empty(runs.num_chunks, view.tile_cols, dtype=torch.float32, device=grad.device)
    tail = torch.empty_like(head)
    runs.add(p_index=index, p_place=place, p_order=order, p_grad=grad, p_out=out, p_head=head, p_tail=tail, scale=scale)
    runs.join(p_place=place, p_head=head, p_tail=tail, p_out=out, scale=scale)


class _Runs(NamedTuple):
    """The launches that add the gradient of a number of tokens, and the sizes of their intermediate tensors."""

    place: Launch
    add: Launch
    join: Launch
    num_lookups: int
    place_dtype: torch.dtype
    num_chunks: int


@functools.lru_cache(maxsize=1 << 12)
def _runs(view: TileView, num_tokens: int, pool_numel: int, add: bool, place_lookups: int, run_elements: int) -> _Runs:
    num_lookups = num_tokens * view.grid_cols
    # The segments of the pool are numbered from 0, so this number is one more than the last.
    nowhere = pool_numel // view.tile_cols
    steps = _steps(num_tokens)
    num_chunks = cdiv(num_lookups, steps)
    cols_pow2 = power_of_2(view.tile_cols)
    block_chunks = max(1, run_elements // cols_pow2)
    arguments = view_arguments(view)
    place = Launch(
        _place_kernel,
        (cdiv(num_lookups, place_lookups),),
        num_lookups=num_lookups,
        nowhere=nowhere,
        BL=place_lookups,
        **arguments,
    )
    for unused in ("first_slot", "first_chunk"):
        del arguments[unused]
    run = Launch(
        _run_kernel,
        (cdiv(num_chunks, block_chunks),),
        num_lookups=num_lookups,
        nowhere=nowhere,
        steps=steps,
        COLS_POW2=cols_pow2,
        BC=block_chunks,
        ADD=add,
        num_warps=tuning.RUN_WARPS,
        **arguments,
    )
    join = Launch(
        _join_kernel,
        (num_chunks,),
        num_lookups=num_lookups,
        nowhere=nowhere,
        steps=steps,
        TILE_COLS=view.tile_cols,
        COLS_POW2=cols_pow2,
        ADD=add,
        num_warps=1,
    )
    # Half as many bits sort twice as fast.
    place_dtype = torch.int32 if nowhere < 1 << 31 else torch.int64
    return _Runs(place, run, join, num_lookups, place_dtype, num_chunks)


def _steps(num_tokens: int) -> int:
    """Return the number of lookups in a chunk.

    If all `n` tokens look up one row, a program adds √n lookups in sequence, and then another adds √n parts.
    """
    return max(tuning.RUN_STEPS, power_of_2(math.isqrt(num_tokens)))

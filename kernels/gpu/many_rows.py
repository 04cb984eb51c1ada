"""The product with many rows of activations on a Hopper GPU; the tensor-copy engine loads slots.

The pool is a matrix whose rows are the rows of its tiles, so a tile or half a tile is one box of the matrix. One
instruction brings a box to a multiprocessor's memory while the matrix unit works. No weight is gathered. With one sign
for each row of tiles, the loop over `k` applies no sign. Weights with finer signs use other kernels (`linear.way`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from roastify.kernels.backend import has_copy_engine
from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch, address_type, dependent_launch, precision
from roastify.kernels.gpu.mapping import effective_sign, interpreted, mix64, product_arguments, segment
from roastify.kernels.gpu.parts import add_parts, empty_parts
from roastify.kernels.gpu.tuning import cdiv
from roastify.kernels.view import MappingKind, SignKind, TileView

_SIGN_ROW = tl.constexpr(int(SignKind.ROW))


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _many_rows_kernel(
    d_x, d_pool, p_table, p_bias, p_out, scale, key, num_rows, rows, cols, group_rows, input_cols, first_tile,
    grid_cols, num_slots, first_slot, first_chunk, tiles_each, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr, DEPENDENT: tl.constexpr, WIDEN: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr,
    INT: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(num_rows, BM)
    i_m = tl.program_id(0) % num_m
    n_begin = tl.program_id(0) // num_m * BN
    i_split = tl.program_id(1)
    slots = num_slots.to(INT)
    row_begin = first_tile.to(INT) + (n_begin // TILE_ROWS).to(INT) * grid_cols
    tile = row_begin + i_split * tiles_each
    end = tl.minimum(tile + tiles_each, row_begin + grid_cols)
    col = n_begin // group_rows * cols + i_split * tiles_each * TILE_COLS
    total = tl.zeros([BM, BN], dtype=tl.float32)
    chunk, a, slot, segment_end = segment(p_table, tile, end, slots, first_chunk, INT)
    negative_row = False
    if SIGN == _SIGN_ROW:
        negative_row = (mix64(key, row_begin) >> 63) != 0
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    while tile < end:
        count = (segment_end - tile).to(tl.int32)
        # Places are counted in rows of the pool, because a box's coordinates are 32 bits wide.
        row = ((first_slot + slot) * TILE_ROWS + n_begin % TILE_ROWS).to(tl.int32)
        last = ((first_slot + slots) * TILE_ROWS).to(tl.int32)
        stride = (a * TILE_ROWS).to(tl.int32)
        region_rows = (slots * TILE_ROWS).to(tl.int32)
        for step in tl.range(0, count, num_stages=STAGES):
            x = d_x.load([i_m * BM, col + step * TILE_COLS])
            weight = d_pool.load([row, 0])
            if WIDEN:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(x, weight.T, total, input_precision=PRECISION)
            row += stride
            row = tl.where(row >= last, row - region_rows, row)
        if SIGN == _SIGN_ROW:
            # Chunk 0 has no sign: its sum is negated here, and once more with the whole sum at the end.
            total = tl.where(negative_row & (chunk == 0), -total, total)
        col += count * TILE_COLS
        tile = segment_end
        if tile < end:
            chunk, a, slot, segment_end = segment(p_table, tile, end, slots, first_chunk, INT)
    if DEPENDENT:
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    total *= tl.where(negative_row, -scale, scale)
    m = i_m * BM + tl.arange(0, BM)
    n = n_begin + tl.arange(0, BN)
    if BIAS:
        total += tl.load(p_bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    place = (i_split * num_rows + m).to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(p_out + place, total.to(p_out.dtype.element_ty), mask=(m < num_rows)[:, None] & (n < rows)[None, :])


def many_rows(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias` for contiguous rows."""
    num_rows = x.shape[0]
    settings = tuning.many_rows_settings(view, num_rows, x.element_size())
    launch, num_parts, block_n = _launch(
        view, num_rows, x.device, pool.numel(), bias is not None, precision(x.dtype), settings
    )
    out = empty_parts(x, view.rows, num_parts)
    launch(
        d_x=TensorDescriptor.from_tensor(x, [settings.block_m, view.tile_cols]),
        d_pool=TensorDescriptor.from_tensor(pool, [block_n, view.tile_cols]),
        p_table=table,
        p_bias=out if bias is None else bias,
        p_out=out,
        scale=scale,
    )
    return out if num_parts == 1 else add_parts(out, bias, x.dtype)


@functools.lru_cache(maxsize=1 << 12)
def _launch(
    view: TileView,
    num_rows: int,
    device: torch.device,
    pool_numel: int,
    biased: bool,
    precision: str,
    settings: tuning.ManyRows,
) -> tuple[Launch, int, int]:
    """Return the launch, the number of parts that `k` is divided into, and the rows of the weight in a program."""
    block_n = min(settings.block_n, view.tile_rows)
    tiles_each = min(settings.tiles, view.grid_cols)
    num_parts = cdiv(view.grid_cols, tiles_each)
    launch = Launch(
        _many_rows_kernel,
        (cdiv(num_rows, settings.block_m) * cdiv(view.rows, block_n), num_parts),
        num_rows=num_rows,
        tiles_each=tiles_each,
        BM=settings.block_m,
        BN=block_n,
        STAGES=settings.num_stages,
        BIAS=biased and num_parts == 1,
        PRECISION=precision,
        EARLY=settings.early,
        WIDEN=interpreted(),
        INT=address_type(pool_numel, view, num_rows),
        num_warps=settings.num_warps,
        **product_arguments(view),
        **dependent_launch(device),
    )
    return launch, num_parts, block_n


def fits(x: Tensor, pool: Tensor, view: TileView) -> bool:
    """Whether the kernel supports a product.

    It needs a Hopper GPU, boxes that the copy engine can address, whole tiles along `k`, no sign inside the loop, and
    for float32 the matrix unit's own precision. Padded columns would be multiplied by zero, but the pool may hold NaN
    there.
    """
    return (
        (interpreted() or has_copy_engine(x.device))
        and x.shape[0] > 0
        and _fits(view)
        # Before it wraps, a row number may exceed the last row by almost the pool's rows; it must fit 32 bits.
        and pool.shape[0] < 1 << 30
        and x.data_ptr() % 16 == 0
        and pool.data_ptr() % 16 == 0
        and (x.dtype != torch.float32 or precision(x.dtype) == "tf32")
    )


@functools.lru_cache(maxsize=1 << 12)
def _fits(view: TileView) -> bool:
    return (
        view.mapping == MappingKind.PERMUTATION
        and not view.strips
        and effective_sign(view) in (SignKind.NONE, SignKind.ROW)
        and view.cols % view.tile_cols == 0
        and view.tile_rows in (64, 128)
        and view.tile_cols in (32, 64)
    )

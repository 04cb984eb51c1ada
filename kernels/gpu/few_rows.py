"""The product with few rows of activations on a GPU: the weight is read from the pool in the cache.

The bytes that reach the multiprocessors limit the time. There are three kernels:

- `by_slot`, for few rows and a weight that uses every slot several times: each slot is read once for all its tiles;
- `one_row`, for one row and a small weight: it does without the matrix unit;
- `split`, for all other cases: it uses the matrix unit. A program takes some rows of the weight, and all or a part of
  `k`.

A second kernel adds partial sums in a fixed order. It needs no atomics and no cleared memory, and every run gives the
same bits.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.fold import factors
from roastify.kernels.gpu.launch import (
    PLAIN_ARGUMENTS,
    Launch,
    address_type,
    dependent_launch,
    precision,
    shared_memory,
)
from roastify.kernels.gpu.mapping import (
    apply_sign,
    interpreted,
    is_negative_tile,
    mix64,
    product_arguments,
    segment,
)
from roastify.kernels.gpu.parts import add_parts, empty_parts
from roastify.kernels.gpu.tuning import cdiv, power_of_2
from roastify.kernels.view import FoldView, MappingKind, SignKind, TileView

_SIGN_TILE = tl.constexpr(int(SignKind.TILE))
_SIGN_ELEMENT = tl.constexpr(int(SignKind.ELEMENT))
_SIGN_ROW = tl.constexpr(int(SignKind.ROW))


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _split_kernel(
    p_x, p_pool, p_table, p_bias, p_out, scale, key, num_rows, rows, cols, group_rows, input_cols, first_tile,
    grid_cols, num_slots, first_slot, first_chunk, tiles_each, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr, WHOLE_COLS: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr, WIDEN: tl.constexpr, MAPPING: tl.constexpr,
    SIGN: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    n_begin = tl.program_id(0) * BN
    i_split = tl.program_id(1)
    slots = num_slots.to(INT)
    row_begin = first_tile.to(INT) + (n_begin // TILE_ROWS).to(INT) * grid_cols
    tile = row_begin + i_split * tiles_each
    end = tl.minimum(tile + tiles_each, row_begin + grid_cols)
    # A step takes BT tiles: their weight rows are stacked, and so are the activations that they multiply. The product
    # of the two stacks has BT × BT blocks, and only those on the diagonal count. Fewer steps are worth the wasted
    # products, because each step costs a barrier and the matrix unit is not the limit.
    r = tl.arange(0, BT * BN)
    t_r = r // BN
    q = tl.arange(0, BT * BM)
    t_q = q // BM
    m_q = q % BM
    c = tl.arange(0, TILE_COLS)
    element = ((n_begin % TILE_ROWS + r % BN) * TILE_COLS)[:, None] + c[None, :]
    p_group = p_x + n_begin // group_rows * cols
    p_xq = p_group + m_q.to(INT)[:, None] * input_cols + (t_q * TILE_COLS)[:, None] + c[None, :]
    col = i_split * tiles_each * TILE_COLS
    total = tl.zeros([BT * BN, BT * BM], dtype=tl.float32)
    chunk, a, slot, segment_end = segment(p_table, tile, end, slots, first_chunk, INT)
    slot_r = (slot + a * t_r) % slots
    negative_row = False
    if SIGN == _SIGN_ROW:
        negative_row = (mix64(key, row_begin) >> 63) != 0
    if DEPENDENT:
        # The code above overlaps the previous kernel. Only from here on may this kernel read what that one wrote.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while tile < end:
        # Within a chunk the slot moves by a constant stride. A remainder in each step would cost 16 to 40 %.
        count = (segment_end - tile).to(tl.int32)
        stride = a * BT % slots
        for step in tl.range(0, count, BT, num_stages=STAGES):
            p_weight = p_pool + ((first_slot + slot_r) * SIZE)[:, None] + element
            inside_w = (t_r < count - step)[:, None]
            inside_x = (t_q < count - step)[:, None] & (m_q < num_rows)[:, None]
            if not WHOLE_COLS:
                inside_w = inside_w & (col + (step + t_r)[:, None] * TILE_COLS + c[None, :] < cols)
                inside_x = inside_x & (col + (step + t_q)[:, None] * TILE_COLS + c[None, :] < cols)
            if BT == 1 and WHOLE_COLS:
                weight = tl.load(p_weight)
            else:
                weight = tl.load(p_weight, mask=inside_w, other=0.0)
            x = tl.load(p_xq + col + step * TILE_COLS, mask=inside_x, other=0.0)
            if WIDEN:
                # Triton's interpreter would negate and multiply the integers that hold its bfloat16 numbers.
                weight, x = weight.to(tl.float32), x.to(tl.float32)
            if SIGN == _SIGN_TILE:
                product = tl.dot(weight, tl.trans(x), input_precision=PRECISION)
                tile_r = (tile + step + t_r).to(tl.int64)
                total += tl.where(is_negative_tile(tile_r, tile_r, key, num_slots, MAPPING)[:, None], -product, product)
            else:
                if SIGN == _SIGN_ELEMENT:
                    tile_r = (tile + step + t_r).to(tl.int64)[:, None]
                    weight = apply_sign(weight, tile_r, element, key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
                total = tl.dot(weight, tl.trans(x), total, input_precision=PRECISION)
            slot_r += stride
            slot_r = tl.where(slot_r >= slots, slot_r - slots, slot_r)
        if SIGN == _SIGN_ROW:
            # Chunk 0 has no sign: its sum is negated here, and once more with the whole sum at the end.
            total = tl.where(negative_row & (chunk == 0), -total, total)
        col += count * TILE_COLS
        tile = segment_end
        if tile < end:
            chunk, a, slot, segment_end = segment(p_table, tile, end, slots, first_chunk, INT)
            slot_r = (slot + a * t_r) % slots
    if BT == 1:
        out = total
    else:
        total = tl.where(t_r[:, None] == t_q[None, :], total, 0.0)
        out = tl.sum(tl.sum(tl.reshape(total, [BT, BN, BT, BM]), 2), 0)
    out *= tl.where(negative_row, -scale, scale)
    n = n_begin + tl.arange(0, BN)
    m = tl.arange(0, BM)
    if BIAS:
        out += tl.load(p_bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    place = (i_split * num_rows + m).to(tl.int64)[None, :] * rows + n[:, None]
    tl.store(p_out + place, out.to(p_out.dtype.element_ty), mask=(n < rows)[:, None] & (m < num_rows)[None, :])


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _one_row_kernel(
    p_x, p_pool, p_table, p_bias, p_out, scale, key, rows, cols, group_rows, input_cols, first_tile, grid_cols,
    num_slots, first_slot, first_chunk, fold_key, tiles_a_span, num_spans, first_scale, TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, FOLD: tl.constexpr, LEARNED: tl.constexpr,
    BIAS: tl.constexpr, DEPENDENT: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    n_begin = tl.program_id(0) * BN
    slots = num_slots.to(INT)
    row_begin = first_tile.to(INT) + (n_begin // TILE_ROWS).to(INT) * grid_cols
    tile = row_begin
    end = tile + grid_cols
    group = n_begin // group_rows
    p_group = p_x + group * cols
    n = n_begin % TILE_ROWS + tl.arange(0, BN)
    t = tl.arange(0, BT)
    c = tl.arange(0, TILE_COLS)
    element = (n[:, None] * TILE_COLS + c[None, :])[:, None, :]
    first_col = 0
    total = tl.zeros([BN, BT, TILE_COLS], dtype=tl.float32)
    chunk, a, slot, segment_end = segment(p_table, tile, end, slots, first_chunk, INT)
    slot_t = (slot + a * t) % slots
    negative_row = False
    if SIGN == _SIGN_ROW:
        negative_row = (mix64(key, row_begin) >> 63) != 0
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while tile < end:
        count = (segment_end - tile).to(tl.int32)
        stride = a * BT % slots
        for step in range(0, count, BT):
            col = (first_col + step + t)[:, None] * TILE_COLS + c[None, :]
            inside = (t < count - step)[:, None] & (col < cols)
            if FOLD == 1:
                x = tl.load(p_group + col, mask=inside, other=0.0).to(tl.float32)
            else:
                # The input is folded here: `cols` are buckets, and a tile lies in one span.
                span = (first_col + step + t) // tiles_a_span
                x = tl.zeros([BT, TILE_COLS], dtype=tl.float32)
                for i in tl.static_range(FOLD):
                    factor = factors(p_pool, fold_key, group, i, span, num_spans, first_scale, FOLD, LEARNED, 1)
                    x += factor[:, None] * tl.load(p_x + i * cols + col, mask=inside, other=0.0).to(tl.float32)
            p_tile = p_pool + ((first_slot + slot_t) * SIZE)[None, :, None]
            weight = tl.load(p_tile + element, mask=inside[None, :, :], other=0.0).to(tl.float32)
            if SIGN == _SIGN_TILE:
                tile_t = (tile + step + t).to(tl.int64)
                x = tl.where(is_negative_tile(tile_t, tile_t, key, num_slots, MAPPING)[:, None], -x, x)
            elif SIGN == _SIGN_ELEMENT:
                tile_t = (tile + step + t).to(tl.int64)[None, :, None]
                weight = apply_sign(weight, tile_t, element, key, num_slots, first_tile, grid_cols, MAPPING, SIGN)
            total += weight * x[None, :, :]
            slot_t += stride
            slot_t = tl.where(slot_t >= slots, slot_t - slots, slot_t)
        if SIGN == _SIGN_ROW:
            total = tl.where(negative_row & (chunk == 0), -total, total)
        first_col += count
        tile = segment_end
        if tile < end:
            chunk, a, slot, segment_end = segment(p_table, tile, end, slots, first_chunk, INT)
            slot_t = (slot + a * t) % slots
    out = tl.sum(tl.sum(total, 2), 1) * tl.where(negative_row, -scale, scale)
    out_col = n_begin + tl.arange(0, BN)
    if BIAS:
        out += tl.load(p_bias + out_col, mask=out_col < rows, other=0.0).to(tl.float32)
    tl.store(p_out + out_col, out.to(p_out.dtype.element_ty), mask=out_col < rows)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _by_slot_kernel(
    p_x, p_pool, p_table, p_parts, scale, key, num_rows, rows, cols, group_rows, input_cols, first_tile, num_tiles,
    grid_cols, num_slots, first_slot, first_chunk, chunk_begin, num_chunks, TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr, WIDEN: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    BLOCKS: tl.constexpr = TILE_ROWS // BR
    slots = num_slots.to(INT)
    slot = (tl.program_id(0) // BLOCKS).to(INT)
    r = tl.program_id(0) % BLOCKS * BR + tl.arange(0, BR)
    c = tl.arange(0, TILE_COLS)
    # A chunk has at most one tile in a slot, known in closed form. All chunks and rows are columns of one product.
    q = tl.arange(0, BC * BM)
    m_q = q % BM
    chunk = chunk_begin.to(INT) + q // BM
    exists = (q // BM < num_chunks) & (m_q < num_rows)
    p_chunk = p_table + (chunk + first_chunk) * 3
    b = tl.load(p_chunk + 1, mask=exists, other=0).to(INT)
    inverse = tl.load(p_chunk + 2, mask=exists, other=0).to(INT)
    distance = tl.where(slot >= b, slot - b, slot + slots - b)
    index = chunk * slots + inverse * distance % slots - first_tile
    exists = exists & (index >= 0) & (index < num_tiles)
    i_n = index // grid_cols
    i_k = index - i_n * grid_cols
    col = (i_k * TILE_COLS)[:, None] + c[None, :]
    n = (i_n * TILE_ROWS)[None, :] + r[:, None]
    place = ((i_k * num_rows + m_q) * rows)[None, :] + n
    negative = exists & False
    if SIGN == _SIGN_TILE:
        negative = is_negative_tile(first_tile + index, first_tile + index, key, num_slots, MAPPING)
    elif SIGN == _SIGN_ROW:
        negative = is_negative_tile(first_tile + index, first_tile + i_n * grid_cols, key, num_slots, MAPPING)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.load(p_pool + (first_slot + slot) * SIZE + (r * TILE_COLS)[:, None] + c[None, :])
    p_group = p_x + (i_n * TILE_ROWS // group_rows * cols + m_q.to(INT) * input_cols)[:, None]
    x = tl.load(p_group + col, mask=exists[:, None] & (col < cols), other=0.0)
    if WIDEN:
        weight, x = weight.to(tl.float32), x.to(tl.float32)
    # The sign is applied to the activations, because a thread holds one of their columns, but several of the product's.
    x = tl.where(negative[:, None], -x, x)
    product = tl.dot(weight, tl.trans(x), input_precision=PRECISION) * scale
    tl.store(p_parts + place, product, mask=exists[None, :] & (n < rows))


def by_slot(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias` for contiguous rows; every slot of the pool is read once for all its tiles."""
    launch, parts_shape = _by_slot(view, x.shape[0], x.device, pool.numel(), precision(x.dtype), tuning.BY_SLOT)
    parts = torch.empty(parts_shape, dtype=torch.float32, device=x.device)
    launch(p_x=x, p_pool=pool, p_table=table, p_parts=parts, scale=scale)
    return add_parts(parts, bias, x.dtype)


@functools.lru_cache(maxsize=1 << 12)
def _by_slot(
    view: TileView, num_rows: int, device: torch.device, pool_numel: int, precision: str, settings: tuning.BySlot
) -> tuple[Launch, tuple[int, int, int]]:
    """Return the launch, and the shape of the partial sums."""
    block_rows = min(settings.block_rows, view.tile_rows)
    parts_shape = (view.grid_cols, num_rows, view.rows)
    chunk_begin, num_chunks = view.chunks
    block_m = power_of_2(num_rows)
    launch = Launch(
        _by_slot_kernel,
        (view.num_slots * (view.tile_rows // block_rows),),
        num_rows=num_rows,
        num_tiles=view.num_tiles,
        chunk_begin=chunk_begin,
        num_chunks=num_chunks,
        BR=block_rows,
        # The matrix unit takes no fewer than 16 columns.
        BC=max(power_of_2(num_chunks), 16 // block_m),
        BM=block_m,
        PRECISION=precision,
        WIDEN=interpreted(),
        INT=address_type(pool_numel, view, max(num_rows, cdiv(math.prod(parts_shape), view.cols))),
        num_warps=settings.num_warps,
        **product_arguments(view),
        **dependent_launch(device),
    )
    return launch, parts_shape


def one_row(
    x: Tensor,
    pool: Tensor,
    bias: Tensor | None,
    table: Tensor,
    view: TileView,
    scale: float,
    fold: FoldView | None = None,
) -> Tensor:
    """Return `x · Wᵀ + bias` for one contiguous row, without the matrix unit; a program takes whole weight rows.

    With a `fold`, x is folded by every program as it reads x; see `folds_fit`.
    """
    launch = _one_row(view, x.device, pool.numel(), bias is not None, tuning.one_row_settings(view.rows), fold)
    out = torch.empty(1, view.rows, dtype=x.dtype, device=x.device)
    launch(p_x=x, p_pool=pool, p_table=table, p_bias=out if bias is None else bias, p_out=out, scale=scale)
    return out


@functools.lru_cache(maxsize=1 << 12)
def _one_row(
    view: TileView,
    device: torch.device,
    pool_numel: int,
    biased: bool,
    settings: tuning.OneRow,
    fold: FoldView | None,
) -> Launch:
    block_rows = min(settings.block_rows, view.tile_rows)
    return Launch(
        _one_row_kernel,
        (cdiv(view.rows, block_rows),),
        fold_key=0 if fold is None else fold.key,
        tiles_a_span=1 if fold is None else fold.span // view.tile_cols,
        num_spans=1 if fold is None else fold.num_spans,
        first_scale=0 if fold is None else max(fold.first_scale, 0),
        BN=block_rows,
        BT=settings.tiles,
        FOLD=1 if fold is None else fold.fold,
        LEARNED=fold is not None and fold.num_scales > 0,
        BIAS=biased,
        INT=address_type(pool_numel, view, 1),
        num_warps=settings.num_warps,
        **product_arguments(view),
        **dependent_launch(device),
    )


def folds_fit(view: TileView, fold: FoldView) -> bool:
    """Whether `one_row` can fold its input: a tile's columns must have one sign for each position in a bucket."""
    return fold.span % view.tile_cols == 0 and fold.unit == 1


def split(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias` for contiguous rows; several programs divide `k` if a row of tiles is long."""
    num_rows = x.shape[0]
    settings = tuning.split_settings(view, num_rows, x.element_size(), shared_memory(x.device))
    assert settings is not None, "linear.way checks first that settings exist"
    launch, num_parts = _split(view, num_rows, x.device, pool.numel(), bias is not None, precision(x.dtype), settings)
    out = empty_parts(x, view.rows, num_parts)
    launch(p_x=x, p_pool=pool, p_table=table, p_bias=out if bias is None else bias, p_out=out, scale=scale)
    return out if num_parts == 1 else add_parts(out, bias, x.dtype)


@functools.lru_cache(maxsize=1 << 12)
def _split(
    view: TileView,
    num_rows: int,
    device: torch.device,
    pool_numel: int,
    biased: bool,
    precision: str,
    settings: tuning.Split,
) -> tuple[Launch, int]:
    """Return the launch, and the number of parts that `k` is divided into."""
    block_rows = min(settings.block_rows, view.tile_rows)
    tiles_each = min(settings.tiles, view.grid_cols)
    num_parts = cdiv(view.grid_cols, tiles_each)
    launch = Launch(
        _split_kernel,
        (cdiv(view.rows, block_rows), num_parts),
        num_rows=num_rows,
        tiles_each=tiles_each,
        BM=max(16 // settings.stacked, power_of_2(num_rows)),
        BN=block_rows,
        BT=settings.stacked,
        STAGES=settings.num_stages,
        WHOLE_COLS=view.cols % view.tile_cols == 0,
        BIAS=biased and num_parts == 1,
        PRECISION=precision,
        WIDEN=interpreted(),
        INT=address_type(pool_numel, view, num_rows),
        num_warps=settings.num_warps,
        **product_arguments(view),
        **dependent_launch(device),
    )
    return launch, num_parts


def fits(x: Tensor, view: TileView) -> bool:
    """Whether these kernels support a product: its tiles fill the matrix unit, and its slots have constant strides."""
    return x.shape[0] > 0 and _fits(view)


@functools.lru_cache(maxsize=1 << 12)
def _fits(view: TileView) -> bool:
    return (
        view.mapping == MappingKind.PERMUTATION
        and not view.strips
        and all(16 <= size <= 128 and size & (size - 1) == 0 for size in (view.tile_rows, view.tile_cols))
    )

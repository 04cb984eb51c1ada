"""`linear`, its transpose and its pool gradient on a GPU.

Few rows of activations: one kernel multiplies tiles as it reads them from the pool, which stays in the GPU's cache.
Each program owns some rows of the weight and a part of `k`; parts are added in a fixed order by a second kernel, so
there are no atomics and nothing to clear. Many rows: the weight is gathered into a scratch tensor, a panel of tile rows
at a time where it is large, and multiplied by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import tuning
from roastify.kernels.gather import gather
from roastify.kernels.hash import interpreted, is_negative_element, is_negative_tile, supported, view_arguments
from roastify.kernels.reduce import reduce
from roastify.kernels.view import MappingKind, SignKind, TileView

_SIGN_TILE = tl.constexpr(int(SignKind.TILE))
_SIGN_ELEMENT = tl.constexpr(int(SignKind.ELEMENT))


@triton.jit
def _small_batch_kernel(
    p_x, p_pool, p_table, p_bias, p_out, scale, key, num_rows, rows, cols, first_tile, grid_cols, num_slots,
    first_slot, first_chunk, tiles_each, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, WHOLE_COLS: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDENT: tl.constexpr, WIDEN: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0)
    i_split = tl.program_id(1)
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    n_begin = i_n * BN
    row_tile = (first_tile + n_begin // TILE_ROWS * grid_cols).to(tl.int64)
    tile = row_tile + i_split * tiles_each
    end = tl.minimum(tile + tiles_each, row_tile + grid_cols)
    n = n_begin % TILE_ROWS + tl.arange(0, BN)
    c = tl.arange(0, TILE_COLS)
    m = tl.arange(0, BM)
    element = n[:, None] * TILE_COLS + c[None, :]
    k = i_split * tiles_each * TILE_COLS
    # The product is kept transposed, [weight rows, batch]: the long side of a tile is the long side of the unit.
    total = tl.zeros([BN, BM], dtype=tl.float32)
    chunk = tile // num_slots
    last_chunk = (end - 1) // num_slots
    p_chunk = p_table + (chunk + first_chunk) * 3
    a = tl.load(p_chunk)
    slot = (a * (tile - chunk * num_slots) + tl.load(p_chunk + 1)) % num_slots
    if DEPENDENT:
        # Everything above overlaps the kernel before this one; what that wrote may be read from here on.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while tile < end:
        # Within a chunk the slot moves by a constant: a remainder a step would cost 16 to 40 %.
        chunk_end = tl.minimum(end, (chunk + 1) * num_slots)
        steps = (chunk_end - tile).to(tl.int32)
        for step in tl.range(0, steps, num_stages=STAGES):
            col = k + step * TILE_COLS + c
            p_tile = p_pool + (first_slot + slot) * SIZE
            if WHOLE_COLS:
                weight = tl.load(p_tile + element)
                x = tl.load(p_x + m[:, None] * cols + col[None, :], mask=(m < num_rows)[:, None], other=0.0)
            else:
                weight = tl.load(p_tile + element, mask=(col < cols)[None, :], other=0.0)
                inside = (m < num_rows)[:, None] & (col < cols)[None, :]
                x = tl.load(p_x + m[:, None] * cols + col[None, :], mask=inside, other=0.0)
            if WIDEN:
                # Triton's interpreter would negate and multiply the integers that hold its bfloat16 numbers.
                weight, x = weight.to(tl.float32), x.to(tl.float32)
            if SIGN == _SIGN_ELEMENT:
                negative = is_negative_element(tile + step, element, key, num_slots, MAPPING)
                weight = tl.where(negative, -weight, weight)
            product = tl.dot(weight, tl.trans(x), input_precision=PRECISION)
            if SIGN == _SIGN_TILE:
                # On the product: a few numbers a thread instead of the many of the weight.
                product = tl.where(is_negative_tile(tile + step, key, num_slots, MAPPING), -product, product)
            total += product
            slot += a
            slot = tl.where(slot >= num_slots, slot - num_slots, slot)
        k += steps * TILE_COLS
        tile = chunk_end
        # The next chunk begins at its position 0, whose slot is b.
        chunk = tl.minimum(chunk + 1, last_chunk)
        p_chunk = p_table + (chunk + first_chunk) * 3
        a = tl.load(p_chunk)
        slot = tl.load(p_chunk + 1)
    total *= scale
    out_col = n_begin + tl.arange(0, BN)
    inside = (out_col < rows)[:, None] & (m < num_rows)[None, :]
    if BIAS:
        bias = tl.load(p_bias + out_col, mask=out_col < rows, other=0.0).to(tl.float32)
        total += bias[:, None]
    place = (i_split * num_rows + m)[None, :] * rows + out_col[:, None]
    tl.store(p_out + place, total.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    p_parts, p_bias, p_out, numel, rows, SPLIT: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * B + tl.arange(0, B)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([B], dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(p_parts + part * numel + i, mask=i < numel, other=0.0)
    if BIAS:
        total += tl.load(p_bias + i % rows, mask=i < numel, other=0.0).to(tl.float32)
    tl.store(p_out + i, total.to(p_out.dtype.element_ty), mask=i < numel)


@triton.jit
def _one_row_kernel(
    p_x, p_pool, p_table, p_bias, p_out, scale, key, rows, cols, first_tile, grid_cols, num_slots, first_slot,
    first_chunk, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    BIAS: tl.constexpr, DEPENDENT: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0)
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    n_begin = i_n * BN
    tile = (first_tile + n_begin // TILE_ROWS * grid_cols).to(tl.int64)
    end = tile + grid_cols
    n = n_begin % TILE_ROWS + tl.arange(0, BN)
    t = tl.arange(0, BT)
    c = tl.arange(0, TILE_COLS)
    element = (n[:, None] * TILE_COLS + c[None, :])[:, None, :]
    k = 0
    total = tl.zeros([BN, BT, TILE_COLS], dtype=tl.float32)
    chunk = tile // num_slots
    last_chunk = (end - 1) // num_slots
    p_chunk = p_table + (chunk + first_chunk) * 3
    a = tl.load(p_chunk)
    slot = (a * (tile - chunk * num_slots + t) + tl.load(p_chunk + 1)) % num_slots
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while tile < end:
        chunk_end = tl.minimum(end, (chunk + 1) * num_slots)
        stride = a * BT % num_slots
        count = (chunk_end - tile).to(tl.int32)
        for step in range(0, count, BT):
            exists = t < count - step
            col = (k + step + t)[:, None] * TILE_COLS + c[None, :]
            inside = exists[:, None] & (col < cols)
            x = tl.load(p_x + col, mask=inside, other=0.0).to(tl.float32)
            if SIGN == _SIGN_TILE:
                x = tl.where(is_negative_tile(tile + step + t, key, num_slots, MAPPING)[:, None], -x, x)
            p_tile = p_pool + (first_slot + slot)[None, :, None] * SIZE
            weight = tl.load(p_tile + element, mask=inside[None, :, :], other=0.0).to(tl.float32)
            if SIGN == _SIGN_ELEMENT:
                negative = is_negative_element((tile + step + t)[None, :, None], element, key, num_slots, MAPPING)
                weight = tl.where(negative, -weight, weight)
            total += weight * x[None, :, :]
            slot += stride
            slot = tl.where(slot >= num_slots, slot - num_slots, slot)
        k += count
        tile = chunk_end
        chunk = tl.minimum(chunk + 1, last_chunk)
        p_chunk = p_table + (chunk + first_chunk) * 3
        a = tl.load(p_chunk)
        slot = (a * t + tl.load(p_chunk + 1)) % num_slots
    out = tl.sum(tl.sum(total, 2), 1) * scale
    out_col = n_begin + tl.arange(0, BN)
    if BIAS:
        out += tl.load(p_bias + out_col, mask=out_col < rows, other=0.0).to(tl.float32)
    tl.store(p_out + out_col, out.to(p_out.dtype.element_ty), mask=out_col < rows)


def linear(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias`, `[..., cols] → [..., rows]`."""
    flat = x.reshape(-1, view.cols)
    if _fits_small_batch(flat, pool, view):
        out = small_batch(flat.contiguous(), pool.contiguous(), bias, table, view, scale)
    else:
        panels = list(_panels(view))
        if len(panels) == 1:
            out = F.linear(flat, gather(pool, table, view, scale), bias)
        else:
            out = x.new_empty(flat.shape[0], view.rows)
            for start, stop, panel in panels:
                part = None if bias is None else bias[start:stop]
                out[:, start:stop] = F.linear(flat, gather(pool, table, panel, scale), part)
    return out.view(*x.shape[:-1], view.rows)


def _fits_small_batch(x: Tensor, pool: Tensor, view: TileView) -> bool:
    """Whether the small-batch kernel takes this: few rows, tiles that fill a matrix unit, slots it can step through."""
    return (
        0 < x.shape[0] <= tuning.SMALL_BATCH_ROWS
        and supported(pool)
        and view.mapping == MappingKind.PERMUTATION
        and not view.strips
        and all(size >= 16 and size & (size - 1) == 0 for size in (view.tile_rows, view.tile_cols))
    )


def small_batch(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias` for contiguous rows, the weight read straight from the pool."""
    num_rows = x.shape[0]
    if num_rows == 1 and view.rows * view.cols < tuning.ONE_ROW_ELEMENTS:
        return one_row(x, pool, bias, table, view, scale)
    settings = tuning.small_batch(view.rows, view.cols, num_rows)
    block_rows = min(settings.block_rows, view.tile_rows)
    tiles_each = min(settings.tiles, view.grid_cols)
    split = triton.cdiv(view.grid_cols, tiles_each)
    out = torch.empty(num_rows, view.rows, dtype=x.dtype, device=x.device)
    parts = torch.empty(split, num_rows, view.rows, dtype=torch.float32, device=x.device) if split > 1 else out
    dependent = _dependent_launch(x)
    launch = {"launch_pdl": True} if dependent else {}
    _small_batch_kernel[(triton.cdiv(view.rows, block_rows), split)](
        p_x=x,
        p_pool=pool,
        p_bias=out if bias is None else bias,
        p_out=parts,
        scale=scale,
        num_rows=num_rows,
        tiles_each=tiles_each,
        BM=max(16, triton.next_power_of_2(num_rows)),
        BN=block_rows,
        STAGES=settings.num_stages,
        SPLIT=split,
        WHOLE_COLS=view.cols % view.tile_cols == 0,
        BIAS=bias is not None and split == 1,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        DEPENDENT=dependent,
        WIDEN=interpreted(),
        num_warps=settings.num_warps,
        **view_arguments(table, view),
        **launch,
    )
    if split > 1:
        _sum_kernel[(triton.cdiv(out.numel(), tuning.SUM_ELEMENTS),)](
            parts,
            out if bias is None else bias,
            out,
            out.numel(),
            view.rows,
            SPLIT=split,
            B=tuning.SUM_ELEMENTS,
            BIAS=bias is not None,
            DEPENDENT=dependent,
            num_warps=tuning.SUM_WARPS,
            **launch,
        )
    return out


def one_row(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias` for one row: no matrix unit, and every program owns whole rows of the weight."""
    settings = tuning.one_row(view.rows)
    block_rows = min(settings.block_rows, view.tile_rows)
    out = torch.empty(1, view.rows, dtype=x.dtype, device=x.device)
    dependent = _dependent_launch(x)
    _one_row_kernel[(triton.cdiv(view.rows, block_rows),)](
        p_x=x,
        p_pool=pool,
        p_bias=out if bias is None else bias,
        p_out=out,
        scale=scale,
        BN=block_rows,
        BT=settings.tiles,
        BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=settings.num_warps,
        **view_arguments(table, view),
        **({"launch_pdl": True} if dependent else {}),
    )
    return out


def _dependent_launch(x: Tensor) -> bool:
    """Whether a kernel may be launched before the one ahead of it ends (Hopper and later)."""
    return not interpreted() and torch.version.cuda is not None and torch.cuda.get_device_capability(x.device)[0] >= 9


def _panels(view: TileView) -> Iterator[tuple[int, int, TileView]]:
    """Yield `(first row, last row + 1, view of those rows)`: whole tile rows, within the scratch's size."""
    if view.strips:
        yield 0, view.rows, view
        return
    per_grid_row = view.tile_rows * view.cols
    step = max(1, tuning.SCRATCH_ELEMENTS // per_grid_row)
    for first in range(0, view.grid_rows, step):
        start, stop = first * view.tile_rows, min((first + step) * view.tile_rows, view.rows)
        base = view.base + first * view.grid_cols * view.slot_size
        yield start, stop, view._replace(rows=stop - start, base=base)


def linear_t(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · W + bias`, `[..., rows] → [..., cols]`, from gathered panels."""
    flat = x.reshape(-1, view.rows)
    out: Tensor | None = None
    for start, stop, panel in _panels(view):
        weight = gather(pool, table, panel, scale)
        if out is None and stop == view.rows:
            out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        elif out is None:
            # Panels are partial sums, so a narrow dtype accumulates in float32.
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            out = (flat[:, start:stop] @ weight).to(wide)
            out = out if bias is None else out + bias
        else:
            out += flat[:, start:stop] @ weight
    assert out is not None
    return out.to(x.dtype).view(*x.shape[:-1], view.cols)


def linear_reduce(
    grad: Tensor, x: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: list[int]
) -> Tensor:
    """Return `reduce(gradᵀ · x)`, a panel of the weight's gradient at a time."""
    grad, x = grad.reshape(-1, view.rows), x.reshape(-1, view.cols)
    total: Tensor | None = None
    for start, stop, panel in _panels(view):
        part = reduce(grad[:, start:stop].t() @ x, table, panel, scale, pool_shape)
        total = part if total is None else total + part
    assert total is not None
    return total

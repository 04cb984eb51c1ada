"""`linear`, its transpose and its pool gradient on a GPU, and which kernel computes each product.

With few rows of activations, kernels read the weight from the pool (`few_rows`). With more rows on a Hopper GPU, the
tensor-copy engine brings whole slots to the matrix unit (`many_rows`). In all other cases, and in the backward pass,
the weight is gathered into a scratch tensor and cuBLAS multiplies it. A large weight is gathered a panel of tile rows
at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.kernels.blocks import blocks_grad, blocks_product, blocks_product_t
from roastify.kernels.gpu import few_rows, many_rows, tuning
from roastify.kernels.gpu.fold import fold
from roastify.kernels.gpu.gather import gather
from roastify.kernels.gpu.launch import precision, shared_memory
from roastify.kernels.gpu.mapping import effective_sign, supported
from roastify.kernels.gpu.reduce import reduce, reduce_
from roastify.kernels.reference import summed_in
from roastify.kernels.row_padding import row_padding
from roastify.kernels.view import FoldView, SignKind, TileView


def linear(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias`, `[..., groups·cols] → [..., rows]`."""
    flat, pool = _as_rows(x, view.input_cols).contiguous(), pool.contiguous()
    bias = _as_vector(bias, view.rows)
    out = way(flat, pool, view)(flat, pool, bias, table, view, scale)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], view.rows)


def folded_linear(
    x: Tensor,
    pool: Tensor,
    bias: Tensor | None,
    table: Tensor,
    view: TileView,
    fold_view: FoldView,
    scale: float,
) -> Tensor:
    """Return `fold(x) · Wᵀ + bias`; for one row, one kernel folds and multiplies."""
    flat, pool = _as_rows(x, fold_view.cols), pool.contiguous()
    if flat.shape[0] == 1 and few_rows.folds_fit(view, fold_view) and x.dtype == pool.dtype:
        # The choice depends on shapes and the pool alone, which the folded input has too.
        if way(flat, pool, view) is few_rows.one_row:
            out = few_rows.one_row(flat.contiguous(), pool, _as_vector(bias, view.rows), table, view, scale, fold_view)
            return out.view(*x.shape[:-1], view.rows)
    return linear(fold(x, pool, fold_view, pool.dtype), pool, bias, table, view, scale)


def _as_rows(x: Tensor, size: int) -> Tensor:
    """Return `[..., size]` as `[num_rows, size]`; `reshape` would cost a microsecond even if nothing changes."""
    return x if x.dim() == 2 and x.shape[1] == size else x.reshape(-1, size)


def way(x: Tensor, pool: Tensor, view: TileView) -> Callable[..., Tensor]:
    """Return the function that computes `linear` for contiguous rows `[num_rows, cols]`."""
    if not supported(pool) or not few_rows.fits(x, view):
        return gathered
    num_rows = x.shape[0]
    if x.dtype == torch.float32 and precision(x.dtype) == "ieee":
        # The matrix unit does not have this precision. Without it, a kernel of our own pays only for one row. (4096²,
        # 16 rows: 91 µs in `split`, 84 gathered, 50 dense.)
        return few_rows.one_row if num_rows == 1 else gathered
    if tuning.reads_by_slot(view, num_rows) and effective_sign(view) != SignKind.ELEMENT:
        return few_rows.by_slot
    if num_rows == 1 and tuning.is_small_product(view):
        return few_rows.one_row
    if num_rows > tuning.FEW_ROWS and many_rows.fits(x, pool, view):
        return many_rows.many_rows if num_rows <= tuning.MANY_ROWS else gathered
    if num_rows > tuning.FEW_ROWS_ALONE:
        return gathered
    fits = tuning.split_settings(view, num_rows, x.element_size(), shared_memory(x.device)) is not None
    return few_rows.split if fits else gathered


def gathered(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias` from gathered panels, or for groups of rows from the whole matrix."""
    if view.groups > 1:
        if view.numel <= tuning.SCRATCH_ELEMENTS:
            return blocks_product(x, gather(pool, table, view, scale), bias, view.groups)
        columns, biases = x.chunk(view.groups, 1), _chunks(bias, view.groups)
        pairs = zip(columns, biases, view.blocks(), strict=True)
        return torch.cat([gathered(part, pool, own, table, block, scale) for part, own, block in pairs], 1)
    panels = _panels(view, tuning.SCRATCH_ELEMENTS)
    if len(panels) == 1:
        weight = gather(pool, table, view, scale)
        if not (pad := row_padding(view, x)):
            return F.linear(x, weight, bias)
        padded = F.linear(x, F.pad(weight, (0, 0, 0, pad)), None if bias is None else F.pad(bias, (0, pad)))
        return padded[:, : view.rows].contiguous()
    out = x.new_empty(x.shape[0], view.rows)
    for start, stop, panel in panels:
        part = None if bias is None else bias[start:stop]
        out[:, start:stop] = F.linear(x, gather(pool, table, panel, scale), part)
    return out


@functools.lru_cache(maxsize=1 << 12)
def _panels(view: TileView, scratch_elements: int) -> tuple[tuple[int, int, TileView], ...]:
    """Return `(first row, last row + 1, view of those rows)`s: whole tile rows, within the scratch's size."""
    if view.strips:
        return ((0, view.rows, view),)
    per_grid_row = view.tile_rows * view.cols
    step = max(1, scratch_elements // per_grid_row)
    panels = []
    for first in range(0, view.grid_rows, step):
        start, stop = first * view.tile_rows, min((first + step) * view.tile_rows, view.rows)
        base = view.base + first * view.grid_cols * view.slot_size
        panels.append((start, stop, view._replace(rows=stop - start, base=base)))
    return tuple(panels)


def linear_t(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · W + bias`, `[..., rows] → [..., groups·cols]`, from gathered panels."""
    flat = _as_rows(x, view.rows)
    if view.groups > 1:
        if view.numel <= tuning.SCRATCH_ELEMENTS:
            columns = blocks_product_t(flat, gather(pool, table, view, scale), view.groups)
        else:
            pairs = zip(flat.chunk(view.groups, 1), view.blocks(), strict=True)
            columns = torch.cat([linear_t(part, pool, None, table, block, scale) for part, block in pairs], 1)
        columns = columns if bias is None else columns.add_(bias)
        return columns.view(*x.shape[:-1], view.input_cols)
    out: Tensor | None = None
    for start, stop, panel in _panels(view, tuning.SCRATCH_ELEMENTS):
        weight = gather(pool, table, panel, scale)
        if out is None and stop == view.rows:
            if pad := row_padding(view, flat):
                flat, weight = F.pad(flat, (0, pad)), F.pad(weight, (0, 0, 0, pad))
            out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        elif out is None:
            # Panels are partial sums, so a narrow dtype accumulates in float32.
            out = (flat[:, start:stop] @ weight).to(summed_in(x.dtype))
            out = out if bias is None else out + bias
        else:
            out += flat[:, start:stop] @ weight
    assert out is not None
    out = out if out.dtype == x.dtype else out.to(x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], view.cols)


def _as_vector(bias: Tensor | None, size: int) -> Tensor | None:
    if bias is None:
        return None
    return (bias if bias.shape == (size,) else bias.expand(size)).contiguous()


def _chunks(bias: Tensor | None, groups: int) -> Sequence[Tensor | None]:
    return [None] * groups if bias is None else bias.chunk(groups)


def _grad_weight(grad: Tensor, x: Tensor, view: TileView) -> Tensor:
    if pad := row_padding(view, grad):
        grad = F.pad(grad, (0, pad))
    return (grad.t() @ x)[: view.rows]


def linear_reduce(
    grad: Tensor, x: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: list[int]
) -> Tensor:
    """Return `reduce(gradᵀ · x)`, a panel of the weight's gradient at a time."""
    grad, x = _as_rows(grad, view.rows), _as_rows(x, view.input_cols)
    if view.groups > 1 and view.numel <= tuning.SCRATCH_ELEMENTS:
        return reduce(blocks_grad(grad, x, view.groups), table, view, scale, pool_shape)
    if view.groups == 1 and len(_panels(view, tuning.SCRATCH_ELEMENTS)) == 1:
        return reduce(_grad_weight(grad, x, view), table, view, scale, pool_shape)
    # A narrow dtype accumulates in float32.
    total = torch.zeros(pool_shape, dtype=summed_in(x.dtype), device=x.device)
    linear_reduce_(total, grad, x, table, view, scale)
    return total.to(x.dtype)


def linear_reduce_(total: Tensor, grad: Tensor, x: Tensor, table: Tensor, view: TileView, scale: float) -> None:
    """Add `reduce(gradᵀ · x)` to `total`, a panel of the weight's gradient at a time."""
    grad, x = _as_rows(grad, view.rows), _as_rows(x, view.input_cols)
    if view.groups > 1:
        if view.numel <= tuning.SCRATCH_ELEMENTS:
            reduce_(total, blocks_grad(grad, x, view.groups), table, view, scale)
            return
        for part, columns, block in zip(
            grad.chunk(view.groups, 1), x.chunk(view.groups, 1), view.blocks(), strict=True
        ):
            linear_reduce_(total, part, columns, table, block, scale)
        return
    panels = _panels(view, tuning.SCRATCH_ELEMENTS)
    if len(panels) == 1:
        reduce_(total, _grad_weight(grad, x, view), table, view, scale)
        return
    for start, stop, panel in panels:
        reduce_(total, grad[:, start:stop].t() @ x, table, panel, scale)

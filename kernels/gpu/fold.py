"""`fold`, its adjoint and the gradient of its learned scales on a GPU.

A bucket's columns lie `width` apart, so every load and store takes neighbouring columns, and all hashes use what was
loaded once. The memory limits all three kernels. The learned scales' gradient is summed in two steps and a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch, dependent_launch
from roastify.kernels.gpu.mapping import interpreted, mix64, supported
from roastify.kernels.gpu.tuning import cdiv, power_of_2
from roastify.kernels.view import FoldView

# Of a matrix that the matrix unit multiplies.
_SMALLEST_SIDE = 16


@triton.jit
def _signs(key, g, i, span, num_spans):
    """Return ±1.0 of position `i` in the buckets of `span` for the hash `g`; `g` and `span` broadcast."""
    negative = (mix64(key, (i * num_spans + span).to(tl.int64)) >> 63).to(tl.int32)
    # The parity of the bits that the hash's number and `i` have in common; both are below 256.
    common = g & i
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    return 1.0 - 2.0 * ((common & 1) ^ negative).to(tl.float32)


@triton.jit
def factors(p_pool, key, g, i, span, num_spans, first_scale, FOLD: tl.constexpr, LEARNED: tl.constexpr,
            UNIT: tl.constexpr):  # fmt: skip
    """Return the factors of position `i` in the buckets of `span` for the hash `g`, in float32; both broadcast."""
    signs = _signs(key, g, i, span, num_spans)
    if LEARNED:
        # Spans past the last one belong to tiles past the last one, whose values are not used.
        place = first_scale + (g * FOLD + i) * num_spans + tl.minimum(span, num_spans - 1)
        signs = signs * (tl.load(p_pool + place).to(tl.float32) + UNIT)
    return signs


@triton.jit
def _place(span_cols, num_spans, width, blocks, BM: tl.constexpr, BC: tl.constexpr):
    """Return a program's rows, its span, its columns in the buckets' row, and which of these exist."""
    # On one axis, because the others end at 65,535.
    program = tl.program_id(0).to(tl.int64)
    row = program // (num_spans * blocks) * BM + tl.arange(0, BM)
    block = (program % (num_spans * blocks)).to(tl.int32)
    span = block // blocks
    inner = block % blocks * BC + tl.arange(0, BC)
    col = span * span_cols + inner
    return row, span, col, (inner < span_cols) & (col < width)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _fold_kernel(
    p_x, p_pool, p_out, key, num_rows, width, span_cols, num_spans, blocks, first_scale, FOLD: tl.constexpr,
    HASHES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, LEARNED: tl.constexpr, UNIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, span, col, exists = _place(span_cols, num_spans, width, blocks, BM, BC)
    inside = (row < num_rows)[:, None] & exists[None, :]
    p_row = p_x + (row * (FOLD * width))[:, None] + col[None, :]
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    g = tl.arange(0, HASHES)
    total = tl.zeros([HASHES, BM, BC], dtype=tl.float32)
    for i in tl.static_range(FOLD):
        x = tl.load(p_row + i * width, mask=inside, other=0.0).to(tl.float32)
        factor = factors(p_pool, key, g, i, span, num_spans, first_scale, FOLD, LEARNED, UNIT)
        total += factor[:, None, None] * x[None, :, :]
    place = (row * (HASHES * width))[None, :, None] + (g * width)[:, None, None] + col[None, None, :]
    tl.store(p_out + place, total.to(p_out.dtype.element_ty), mask=inside[None, :, :])


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _unfold_kernel(
    p_x, p_pool, p_out, key, num_rows, width, span_cols, num_spans, blocks, first_scale, FOLD: tl.constexpr,
    HASHES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, LEARNED: tl.constexpr, UNIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, span, col, exists = _place(span_cols, num_spans, width, blocks, BM, BC)
    inside = (row < num_rows)[:, None] & exists[None, :]
    g = tl.arange(0, HASHES)
    place = (row * (HASHES * width))[None, :, None] + (g * width)[:, None, None] + col[None, None, :]
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    z = tl.load(p_x + place, mask=inside[None, :, :], other=0.0).to(tl.float32)
    p_row = p_out + (row * (FOLD * width))[:, None] + col[None, :]
    for i in tl.static_range(FOLD):
        factor = factors(p_pool, key, g, i, span, num_spans, first_scale, FOLD, LEARNED, UNIT)
        x = tl.sum(factor[:, None, None] * z, 0)
        tl.store(p_row + i * width, x.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _scales_kernel(
    p_grad, p_x, p_parts, key, num_rows, width, span_cols, num_spans, blocks, steps, FOLD: tl.constexpr,
    HASHES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SIDE: tl.constexpr, WIDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    # The sums of products over rows and columns of a span are one small matrix product, which the matrix unit computes
    # while memory is read; sums within a program would take three times as long.
    span = tl.program_id(0) // blocks
    k = tl.arange(0, BM * BC)
    inner = tl.program_id(0) % blocks * BC + k % BC
    col = span * span_cols + inner
    exists = (inner < span_cols) & (col < width)
    g = tl.arange(0, SIDE)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    for step in range(0, steps):
        row = (tl.program_id(1) * steps + step).to(tl.int64) * BM + k // BC
        inside = exists & (row < num_rows)
        p_z = p_grad + (row * (HASHES * width) + col)[None, :] + (g * width)[:, None]
        p_row = p_x + (row * (FOLD * width) + col)[None, :] + (g * width)[:, None]
        grad = tl.load(p_z, mask=inside[None, :] & (g < HASHES)[:, None], other=0.0)
        x = tl.load(p_row, mask=inside[None, :] & (g < FOLD)[:, None], other=0.0)
        if x.dtype == grad.dtype and x.dtype != tl.float32 and not WIDEN:
            total = tl.dot(grad, tl.trans(x), total)
        else:
            total = tl.dot(grad.to(tl.float32), tl.trans(x.to(tl.float32)), total, input_precision="tf32x3")
    out = total * _signs(key, g[:, None], g[None, :], span, num_spans)
    place = (g[:, None] * FOLD + g[None, :]) * num_spans + span
    part = tl.program_id(1) * blocks + tl.program_id(0) % blocks
    there = (g < HASHES)[:, None] & (g < FOLD)[None, :]
    tl.store(p_parts + part * (HASHES * FOLD * num_spans) + place, out, mask=there)


def fold(x: Tensor, pool: Tensor | None, view: FoldView, dtype: torch.dtype) -> Tensor:
    """Return the folded inputs in a dtype, `[..., cols] → [..., hashes·width]`; float64 uses the reference."""
    if not supported(x) or dtype == torch.float64:
        return reference.fold(x, pool, view, dtype)
    return _run(_fold_kernel, x, pool, view, view.cols, view.folded_cols, dtype)


def unfold(z: Tensor, pool: Tensor | None, view: FoldView, dtype: torch.dtype) -> Tensor:
    """Return the adjoint of `fold` in a dtype, `[..., hashes·width] → [..., cols]`; float64 uses the reference."""
    if not supported(z) or dtype == torch.float64:
        return reference.unfold(z, pool, view, dtype)
    return _run(_unfold_kernel, z, pool, view, view.folded_cols, view.cols, dtype)


def fold_reduce(grad: Tensor, x: Tensor, view: FoldView, pool_shape: list[int]) -> Tensor:
    """Return the pool's gradient of `fold`, which is zero but for the learned scales."""
    total = torch.zeros(pool_shape, dtype=reference.summed_in(grad.dtype), device=x.device)
    fold_reduce_(total, grad, x, view)
    return total.to(grad.dtype)


def fold_reduce_(total: Tensor, grad: Tensor, x: Tensor, view: FoldView) -> None:
    """Add what `fold_reduce` returns to `total`; float64 uses the reference."""
    if not supported(x) or not supported(grad):
        reference.fold_reduce_(total, grad, x, view)
        return
    num_rows = x.numel() // view.cols
    if not view.num_scales or not num_rows:
        return
    launch, num_parts = _scales_launch(view, num_rows, x.device)
    parts = torch.empty(num_parts, view.num_scales, dtype=torch.float32, device=x.device)
    launch(p_grad=grad.contiguous(), p_x=x.contiguous(), p_parts=parts)
    learned = total.view(-1)[view.first_scale : view.first_scale + view.num_scales]
    learned += parts.sum(0)


def _run(
    kernel: triton.JITFunction,
    x: Tensor,
    pool: Tensor | None,
    view: FoldView,
    cols: int,
    out_cols: int,
    dtype: torch.dtype,
) -> Tensor:
    num_rows = x.numel() // cols
    out = torch.empty(*x.shape[:-1], out_cols, dtype=dtype, device=x.device)
    if num_rows:
        learned = out if pool is None else pool.contiguous()
        _launch(kernel, view, num_rows, x.device)(p_x=x.contiguous(), p_pool=learned, p_out=out)
    return out


@functools.lru_cache(maxsize=1 << 12)
def _launch(kernel: triton.JITFunction, view: FoldView, num_rows: int, device: torch.device) -> Launch:
    block_cols = min(power_of_2(view.span), tuning.FOLD_COLS)
    blocks = cdiv(view.span, block_cols)
    block_rows = min(power_of_2(num_rows), max(1, tuning.FOLD_ELEMENTS // (block_cols * view.hashes)))
    return Launch(
        kernel,
        (view.num_spans * blocks * cdiv(num_rows, block_rows),),
        key=view.key,
        num_rows=num_rows,
        first_scale=max(view.first_scale, 0),
        blocks=blocks,
        BM=block_rows,
        BC=block_cols,
        LEARNED=view.num_scales > 0,
        UNIT=view.unit,
        num_warps=tuning.FOLD_WARPS,
        **_sizes(view),
        **dependent_launch(device),
    )


@functools.lru_cache(maxsize=1 << 12)
def _scales_launch(view: FoldView, num_rows: int, device: torch.device) -> tuple[Launch, int]:
    block_cols = min(power_of_2(view.span), tuning.FOLD_COLS)
    blocks = cdiv(view.span, block_cols)
    block_rows = max(1, tuning.SCALES_ELEMENTS // block_cols)
    num_blocks = cdiv(num_rows, block_rows)
    num_parts = max(1, min(num_blocks, tuning.SCALES_PROGRAMS // (view.num_spans * blocks)))
    steps = cdiv(num_blocks, num_parts)
    num_parts = cdiv(num_blocks, steps)
    launch = Launch(
        _scales_kernel,
        (view.num_spans * blocks, num_parts),
        key=view.key,
        num_rows=num_rows,
        steps=steps,
        blocks=blocks,
        BM=block_rows,
        BC=block_cols,
        SIDE=max(_SMALLEST_SIDE, view.fold),
        # Triton's interpreter would multiply the integers that hold bfloat16 numbers.
        WIDEN=interpreted(),
        num_warps=tuning.FOLD_WARPS,
        **_sizes(view),
        **dependent_launch(device),
    )
    return launch, num_parts * blocks


def _sizes(view: FoldView) -> dict[str, int]:
    return {
        "width": view.width,
        "span_cols": view.span,
        "num_spans": view.num_spans,
        "FOLD": view.fold,
        "HASHES": view.hashes,
    }

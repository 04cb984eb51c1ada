"""`combine` and `combine_reduce` on a GPU: rows times a small basis, and the basis's gradient."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch
from roastify.kernels.gpu.mapping import interpreted, supported
from roastify.kernels.gpu.parts import add_parts
from roastify.kernels.gpu.tuning import cdiv, power_of_2

# The smallest side of a block that `tl.dot` accepts.
_LEAST = 16


@triton.jit
def load_rows(p_rows, row, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return rows of `SIZE` numbers, zero beyond the last row and number."""
    col = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (col < SIZE)[None, :]
    return tl.load(p_rows + row[:, None] * SIZE + col[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _combine_kernel(
    p_rows, p_basis, p_out, num_rows, COUNT: tl.constexpr, SIZE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = load_rows(p_rows, row, num_rows, COUNT, BC).to(tl.float32)
    basis = load_rows(p_basis, tl.arange(0, BC), COUNT, SIZE, BS).to(tl.float32)
    out = tl.dot(rows, basis, input_precision="ieee")
    col = tl.arange(0, BS)
    inside = (row < num_rows)[:, None] & (col < SIZE)[None, :]
    tl.store(p_out + row[:, None] * SIZE + col[None, :], out.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _combine_reduce_kernel(
    p_rows, p_grad, p_parts, grad_scale, num_rows, steps, COUNT: tl.constexpr, SIZE: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BC, BS], dtype=tl.float32)
    for step in range(0, steps):
        row = (program * steps + step) * BR + tl.arange(0, BR)
        rows = load_rows(p_rows, row, num_rows, COUNT, BC)
        grad = load_rows(p_grad, row, num_rows, SIZE, BS)
        if WIDEN:
            rows, grad = rows.to(tl.float32), grad.to(tl.float32)
        total += tl.dot(tl.trans(rows), grad, input_precision="ieee")
    count, col = tl.arange(0, BC), tl.arange(0, BS)
    inside = (count < COUNT)[:, None] & (col < SIZE)[None, :]
    tl.store(p_parts + (program * COUNT + count)[:, None] * SIZE + col[None, :], total * grad_scale, mask=inside)


def combine(coefficients: Tensor, basis: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Return `coefficients · basis` (`reference.combine`); float64 and large bases use the reference."""
    if coefficients.shape[1] != basis.shape[0] or not _fits(coefficients, *basis.shape):
        return reference.combine(coefficients, basis, grad_scale)
    coefficients, basis = coefficients.contiguous(), basis.contiguous()
    out = torch.empty(coefficients.shape[0], basis.shape[1], dtype=coefficients.dtype, device=coefficients.device)
    _launch(coefficients.shape[0], *basis.shape)(p_rows=coefficients, p_basis=basis, p_out=out)
    return out


def combine_reduce(coefficients: Tensor, grad: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Return `grad_scale · coefficientsᵀ · grad` in float32; float64 and large bases use the reference."""
    (rows, count), size = coefficients.shape, grad.shape[1]
    if grad.shape[0] != rows or not _fits(coefficients, count, size):
        return reference.combine_reduce(coefficients, grad, grad_scale)
    coefficients, grad = coefficients.contiguous(), grad.contiguous()
    programs, launch = _reduce_launch(rows, count, size, coefficients.dtype == grad.dtype)
    parts = torch.empty(programs, count, size, dtype=torch.float32, device=grad.device)
    launch(p_rows=coefficients, p_grad=grad, p_parts=parts, grad_scale=grad_scale)
    return parts[0] if programs == 1 else add_parts(parts, None, torch.float32)


def is_small_basis(count: int, size: int) -> bool:
    """Whether a basis is small enough for one program to hold."""
    return max(count, size) <= tuning.COMBINE_SIZE


def _fits(coefficients: Tensor, count: int, size: int) -> bool:
    return supported(coefficients) and coefficients.shape[0] > 0 and is_small_basis(count, size)


def blocks_of(count: int, size: int) -> dict[str, int]:
    """Return a program's constants for rows `[rows, count]` times a basis `[count, size]`."""
    block_count, block_size = max(_LEAST, power_of_2(count)), max(_LEAST, power_of_2(size))
    rows = tuning.COMBINE_ELEMENTS // max(block_count, block_size)
    return {"COUNT": count, "SIZE": size, "BR": rows, "BC": block_count, "BS": block_size}


@functools.lru_cache(maxsize=1 << 12)
def _launch(rows: int, count: int, size: int) -> Launch:
    blocks = blocks_of(count, size)
    programs = cdiv(rows, blocks["BR"])
    return Launch(_combine_kernel, (programs,), num_rows=rows, num_warps=tuning.COMBINE_WARPS, **blocks)


@functools.lru_cache(maxsize=1 << 12)
def _reduce_launch(rows: int, count: int, size: int, alike: bool) -> tuple[int, Launch]:
    blocks = blocks_of(count, size)
    steps = cdiv(rows, blocks["BR"] * tuning.COMBINE_PARTS)
    programs = cdiv(rows, blocks["BR"] * steps)
    launch = Launch(
        _combine_reduce_kernel,
        (programs,),
        num_rows=rows,
        steps=steps,
        # `tl.dot` takes one dtype, and Triton's interpreter would multiply the integers that hold bfloat16 numbers.
        WIDEN=interpreted() or not alike,
        num_warps=tuning.COMBINE_WARPS,
        **blocks,
    )
    return programs, launch

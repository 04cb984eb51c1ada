"""Sums, in a fixed order, of the partial results of a product's programs on a GPU."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch, dependent_launch
from roastify.kernels.gpu.tuning import cdiv, power_of_2


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _sum_kernel(
    p_parts, p_bias, p_out, numel, rows, SPLIT: tl.constexpr, BS: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    s = tl.arange(0, BS).to(tl.int64)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BS, B], dtype=tl.float32)
    for begin in tl.static_range(0, SPLIT, BS):
        inside = (begin + s < SPLIT)[:, None] & (i < numel)[None, :]
        total += tl.load(p_parts + (begin + s)[:, None] * numel + i[None, :], mask=inside, other=0.0)
    out = tl.sum(total, 0)
    if BIAS:
        out += tl.load(p_bias + i % rows, mask=i < numel, other=0.0).to(tl.float32)
    tl.store(p_out + i, out.to(p_out.dtype.element_ty), mask=i < numel)


def empty_parts(x: Tensor, rows: int, num_parts: int) -> Tensor:
    """Return a tensor for the programs of a product: its output, or float32 parts of it if they divide `k`."""
    if num_parts == 1:
        return torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    return torch.empty(num_parts, x.shape[0], rows, dtype=torch.float32, device=x.device)


def add_parts(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the sum of float32 `[parts, num_rows, rows]` over its first size, plus the bias, in a fixed order."""
    num_parts, num_rows, rows = parts.shape
    out = torch.empty(num_rows, rows, dtype=dtype, device=parts.device)
    launch = _launch(num_parts, num_rows, rows, bias is not None, parts.device, tuning.SUM_PARTS)
    launch(p_parts=parts, p_bias=out if bias is None else bias, p_out=out)
    return out


@functools.lru_cache(maxsize=1 << 12)
def _launch(num_parts: int, num_rows: int, rows: int, biased: bool, device: torch.device, most_parts: int) -> Launch:
    numel = num_rows * rows
    block_parts = min(power_of_2(num_parts), most_parts)
    block = max(tuning.SUM_ELEMENTS // block_parts, 32)
    return Launch(
        _sum_kernel,
        (cdiv(numel, block),),
        numel=numel,
        rows=rows,
        SPLIT=num_parts,
        BS=block_parts,
        B=block,
        BIAS=biased,
        num_warps=tuning.SUM_WARPS,
        **dependent_launch(device),
    )

"""Coefficients of several weights times each one's basis by one kernel, and the gradients of both by one each.

What `combine` and `combine_reduce` are to one weight. The weights' bases are alike in their sizes; what differs between
the weights lies in tables on the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import tuning
from roastify.kernels.combine import blocks_of, load_rows
from roastify.kernels.hash import interpreted
from roastify.kernels.launch import PLAIN_ARGUMENTS, Launch
from roastify.kernels.tuning import cdiv

# Numbers that kernels read of a weight: rows of coefficients, where its parts begin and how many there are, blocks of
# rows in a part, then where its elements begin.
_FIELDS = tl.constexpr(8)
_COEFFICIENTS, _COEFFICIENT_GRADS, _DENSE, _DENSE_GRADS = 4, 5, 6, 7


@triton.jit
def _load_basis(
    p_bases, i, COUNT: tl.constexpr, SIZE: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Return basis `i`, or its transpose, in float32, zero beyond its sizes."""
    count, col = tl.arange(0, BC)[:, None], tl.arange(0, BS)[None, :]
    inside = (count < COUNT) & (col < SIZE)
    if TRANSPOSED:
        place = col * COUNT + count
    else:
        place = count * SIZE + col
    return tl.load(p_bases + i * (COUNT * SIZE) + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _combine_kernel(
    p_rows, p_bases, p_out, p_weights, p_blocks, COUNT: tl.constexpr, SIZE: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    p_block = p_blocks + tl.program_id(0).to(tl.int64) * 2
    i = tl.load(p_block)
    p_weight = p_weights + i * _FIELDS
    num_rows = tl.load(p_weight)
    row = tl.load(p_block + 1) + tl.arange(0, BR).to(tl.int64)
    rows = load_rows(p_rows + tl.load(p_weight + FROM), row, num_rows, COUNT, BC).to(tl.float32)
    out = tl.dot(rows, _load_basis(p_bases, i, COUNT, SIZE, BC, BS, TRANSPOSED), input_precision="ieee")
    col = tl.arange(0, BS)
    inside = (row < num_rows)[:, None] & (col < SIZE)[None, :]
    p_begin = p_out + tl.load(p_weight + TO)
    tl.store(p_begin + row[:, None] * SIZE + col[None, :], out.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _reduce_kernel(
    p_rows, p_grads, p_parts, p_weights, p_parts_of, COUNT: tl.constexpr, SIZE: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr, FROM: tl.constexpr, GRADS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    i = tl.load(p_parts_of + program)
    p_weight = p_weights + i * _FIELDS
    num_rows, first_part, steps = tl.load(p_weight), tl.load(p_weight + 1), tl.load(p_weight + 3)
    p_rows += tl.load(p_weight + FROM)
    p_grads += tl.load(p_weight + GRADS)
    total = tl.zeros([BC, BS], dtype=tl.float32)
    for step in range(0, steps):
        row = ((program - first_part) * steps + step) * BR + tl.arange(0, BR)
        rows = load_rows(p_rows, row, num_rows, COUNT, BC)
        grad = load_rows(p_grads, row, num_rows, SIZE, BS)
        if WIDEN:
            rows, grad = rows.to(tl.float32), grad.to(tl.float32)
        total += tl.dot(tl.trans(rows), grad, input_precision="ieee")
    count, col = tl.arange(0, BC), tl.arange(0, BS)
    inside = (count < COUNT)[:, None] & (col < SIZE)[None, :]
    tl.store(p_parts + (program * COUNT + count)[:, None] * SIZE + col[None, :], total, mask=inside)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _sum_kernel(p_parts, p_scales, p_out, p_weights, NUMEL: tl.constexpr, BP: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    p_weight = p_weights + i * _FIELDS
    first, parts = tl.load(p_weight + 1), tl.load(p_weight + 2)
    element = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros([BP, B], dtype=tl.float32)
    for begin in range(0, parts, BP):
        part = begin + tl.arange(0, BP).to(tl.int64)
        inside = (part < parts)[:, None] & (element < NUMEL)[None, :]
        total += tl.load(p_parts + (first + part)[:, None] * NUMEL + element[None, :], mask=inside, other=0.0)
    out = tl.sum(total, 0) * tl.load(p_scales + i)
    tl.store(p_out + i * NUMEL + element, out, mask=element < NUMEL)


@dataclass
class _Tables:
    """What lies on a device: `_FIELDS` numbers of each weight, a block of rows for each program, each part's weight."""

    weights: Tensor
    blocks: Tensor
    parts_of: Tensor


class GroupCombine:
    """The kernels for weights whose bases are of one size.

    Args:
        rows: of each weight's coefficients, `[rows, count]`.
        count: of basis kernels.
        size: positions of a kernel.
        places: where each weight's elements begin among all of them: coefficients, their gradients, the dense weights
            and their gradients.
    """

    def __init__(self, rows: Sequence[int], count: int, size: int, places: Sequence[tuple[int, int, int, int]]) -> None:
        self.count, self.size = count, size
        forward, backward = blocks_of(count, size), blocks_of(size, count)
        most = forward["BR"]
        steps = [cdiv(num_rows, most * tuning.COMBINE_PARTS) for num_rows in rows]
        parts = [cdiv(num_rows, most * each) for num_rows, each in zip(rows, steps, strict=True)]
        firsts = [sum(parts[:index]) for index in range(len(parts))]
        self._numbers = [
            (num_rows, first, num_parts, each, *begins)
            for num_rows, first, num_parts, each, begins in zip(rows, firsts, parts, steps, places, strict=True)
        ]
        # Both directions hold as many rows at a time, since the larger of a basis's sizes decides.
        self._blocks = [(index, first) for index, end in enumerate(rows) for first in range(0, end, most)]
        self._parts_of = [index for index, num_parts in enumerate(parts) for _ in range(num_parts)]
        make = functools.partial(Launch, _combine_kernel, (len(self._blocks),), num_warps=tuning.COMBINE_WARPS)
        self._forward = make(**forward, FROM=_COEFFICIENTS, TO=_DENSE, TRANSPOSED=False)
        self._backward = make(**backward, FROM=_DENSE_GRADS, TO=_COEFFICIENT_GRADS, TRANSPOSED=True)
        # A product takes one dtype, and Triton's interpreter would multiply the integers that hold bfloat16 numbers.
        self._reduce = {
            alike: Launch(
                _reduce_kernel,
                (len(self._parts_of),),
                FROM=_COEFFICIENTS,
                GRADS=_DENSE_GRADS,
                WIDEN=interpreted() or not alike,
                num_warps=tuning.COMBINE_WARPS,
                **forward,
            )
            for alike in (True, False)
        }
        block = max(tuning.SUM_ELEMENTS // tuning.SUM_PARTS, 32)
        self._sum = Launch(
            _sum_kernel,
            (len(rows), cdiv(count * size, block)),
            NUMEL=count * size,
            BP=tuning.SUM_PARTS,
            B=block,
            num_warps=tuning.SUM_WARPS,
        )
        self._tables: dict[torch.device, _Tables] = {}
        # By what the gradients are multiplied by, which a pool may be told to leave.
        self._scales: dict[tuple[torch.device, tuple[float, ...]], Tensor] = {}

    def combine(self, coefficients: Tensor, bases: Sequence[Tensor], out: Tensor) -> None:
        """Write the dense weights, `coefficients · basis` of each, to `out`."""
        tables = self._on(out.device)
        self._forward(
            p_rows=coefficients, p_bases=torch.cat(list(bases)), p_out=out, p_weights=tables.weights,
            p_blocks=tables.blocks,
        )  # fmt: skip

    def coefficient_grads(self, grads: Tensor, bases: Sequence[Tensor], out: Tensor) -> None:
        """Write the gradients of the coefficients, `grad · basisᵀ` of each, to `out`."""
        tables = self._on(out.device)
        self._backward(
            p_rows=grads, p_bases=torch.cat(list(bases)), p_out=out, p_weights=tables.weights, p_blocks=tables.blocks
        )

    def basis_grads(self, coefficients: Tensor, grads: Tensor, scales: tuple[float, ...]) -> Tensor:
        """Return the bases' gradients, `scale · coefficientsᵀ · grad` of each, as float32 `[weights, count, size]`."""
        tables = self._on(grads.device)
        parts = torch.empty(len(self._parts_of), self.count, self.size, dtype=torch.float32, device=grads.device)
        self._reduce[coefficients.dtype == grads.dtype](
            p_rows=coefficients, p_grads=grads, p_parts=parts, p_weights=tables.weights, p_parts_of=tables.parts_of
        )
        out = torch.empty(len(self._numbers), self.count, self.size, dtype=torch.float32, device=grads.device)
        self._sum(p_parts=parts, p_scales=self._scales_on(grads.device, scales), p_out=out, p_weights=tables.weights)
        return out

    def prepare(self, device: torch.device, scales: tuple[float, ...]) -> None:
        """Bring to a device what the kernels read there."""
        self._on(device)
        self._scales_on(device, scales)

    def is_prepared(self, device: torch.device, scales: tuple[float, ...]) -> bool:
        """Whether nothing is missing on a device."""
        return device in self._tables and (device, scales) in self._scales

    def _on(self, device: torch.device) -> _Tables:
        tables = self._tables.get(device)
        if tables is None:
            tables = self._tables[device] = _Tables(
                torch.tensor(self._numbers, dtype=torch.int64, device=device),
                torch.tensor(self._blocks, dtype=torch.int64, device=device),
                torch.tensor(self._parts_of, dtype=torch.int32, device=device),
            )
        return tables

    def _scales_on(self, device: torch.device, scales: tuple[float, ...]) -> Tensor:
        key = device, scales
        if key not in self._scales:
            self._scales[key] = torch.tensor(scales, dtype=torch.float32, device=device)
        return self._scales[key]

"""`combine` for several weights by one kernel, and the gradients of their coefficients by one.

All bases have one size. The numbers that differ between the weights are in tables on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.combine import blocks_of, load_rows
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch

# How many numbers the kernels read for each weight: rows of coefficients, then four offsets of its elements.
_FIELDS = tl.constexpr(5)
_COEFFICIENTS, _COEFFICIENT_GRADS, _DENSE, _DENSE_GRADS = 1, 2, 3, 4


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _combine_group_kernel(
    p_rows, p_bases, p_out, p_weights, p_blocks, COUNT: tl.constexpr, SIZE: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    p_block = p_blocks + tl.program_id(0).to(tl.int64) * 2
    i = tl.load(p_block)
    p_weight = p_weights + i * _FIELDS
    num_rows = tl.load(p_weight)
    row = tl.load(p_block + 1) + tl.arange(0, BR).to(tl.int64)
    rows = load_rows(p_rows + tl.load(p_weight + FROM), row, num_rows, COUNT, BC).to(tl.float32)
    count, col = tl.arange(0, BC)[:, None], tl.arange(0, BS)[None, :]
    place = col * COUNT + count if TRANSPOSED else count * SIZE + col
    p_basis = p_bases + i * (COUNT * SIZE)
    basis = tl.load(p_basis + place, mask=(count < COUNT) & (col < SIZE), other=0.0).to(tl.float32)
    out = tl.dot(rows, basis, input_precision="ieee")
    p_begin = p_out + tl.load(p_weight + TO)
    inside = (row < num_rows)[:, None] & (col < SIZE)
    tl.store(p_begin + row[:, None] * SIZE + col, out.to(p_out.dtype.element_ty), mask=inside)


@dataclass
class _CombineTables:
    """The tables on a device: `_FIELDS` numbers for each weight, and a block of rows for each program."""

    weights: Tensor
    blocks: Tensor


class GroupCombine:
    """The kernels for weights whose bases have one size.

    Args:
        rows: the number of rows of each weight's coefficients, `[rows, count]`.
        count: the number of basis kernels.
        size: the positions of a kernel.
        places: each weight's offsets: in the coefficients, in their gradients, in the dense weights and in their
            gradients.
    """

    def __init__(self, rows: Sequence[int], count: int, size: int, places: Sequence[tuple[int, int, int, int]]) -> None:
        self._numbers = [(num_rows, *begins) for num_rows, begins in zip(rows, places, strict=True)]
        # The same in both directions: the larger of a basis's sizes decides how many rows a program holds.
        block = blocks_of(count, size)["BR"]
        self._blocks = [(index, first) for index, end in enumerate(rows) for first in range(0, end, block)]
        grid = (len(self._blocks),)
        self._forward = Launch(
            _combine_group_kernel,
            grid,
            FROM=_COEFFICIENTS,
            TO=_DENSE,
            TRANSPOSED=False,
            num_warps=tuning.COMBINE_WARPS,
            **blocks_of(count, size),
        )
        self._backward = Launch(
            _combine_group_kernel,
            grid,
            FROM=_DENSE_GRADS,
            TO=_COEFFICIENT_GRADS,
            TRANSPOSED=True,
            num_warps=tuning.COMBINE_WARPS,
            **blocks_of(size, count),
        )
        self._tables: dict[torch.device, _CombineTables] = {}

    def combine(self, coefficients: Tensor, bases: Tensor, out: Tensor) -> None:
        """Write each dense weight, `coefficients · basis`, to `out`; the bases are concatenated along their rows."""
        self._launch(self._forward, coefficients, bases, out)

    def coefficient_grads(self, grads: Tensor, bases: Tensor, out: Tensor) -> None:
        """Write the gradient of each weight's coefficients, `grad · basisᵀ`, to `out`."""
        self._launch(self._backward, grads, bases, out)

    def _launch(self, launch: Launch, rows: Tensor, bases: Tensor, out: Tensor) -> None:
        tables = self._tables[out.device]
        launch(p_rows=rows, p_bases=bases, p_out=out, p_weights=tables.weights, p_blocks=tables.blocks)

    def bring_to(self, device: torch.device) -> None:
        """Copy the tables that the kernels read to a device."""
        self._tables[device] = _CombineTables(
            torch.tensor(self._numbers, dtype=torch.int64, device=device),
            torch.tensor(self._blocks, dtype=torch.int64, device=device),
        )

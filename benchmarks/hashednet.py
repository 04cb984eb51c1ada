r"""The rival HashedNet (Chen et al., ICML 2015), which hashes every weight by itself, in Triton.

.. math:: W_{n,k} = sign(n, k) \cdot pool[hash(n, k)]

It is built to be hard to beat. The hash is two multiplications and a shift on 32 bits, of which one multiplication is
shared by a whole row or column of a block; the range is reduced by a multiplication's high half, not by a remainder;
blocks may span all rows of the batch, so that a weight is hashed once; and the benchmark takes the best of the block
settings listed here for each size. `gather` and `scatter` are the other way to run it: the weight materialised
element by element, and cuBLAS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels.gpu.mapping import interpreted

_MASK32 = (1 << 32) - 1
# The golden ratio's multiplier, and the first of MurmurHash3's finalizer.
GOLDEN = 0x9E3779B1
MIX = 0x85EBCA6B
_MIX = tl.constexpr(MIX)
_FLAT_ELEMENTS = 1024


class Blocks(NamedTuple):
    """Launch settings of a fused kernel.

    Args:
        batch: rows of the batch in a block.
        outer: columns of the output in a block; for the pool's gradient, the weight's rows.
        inner: length of a step along the sum; for the pool's gradient, the weight's columns in a block.
        num_warps: of a program.
        num_stages: of its pipeline.
        split: programs that share the sum, whose parts are added afterwards.
    """

    batch: int
    outer: int
    inner: int
    num_warps: int
    num_stages: int
    split: int = 1


# What the benchmark tries for the forward product and for the input's gradient, as far as a block is not much larger
# than the batch and does not hash every weight more than eight times.
PRODUCT_BLOCKS = [
    Blocks(16, 16, 128, 4, 3),
    Blocks(16, 32, 64, 4, 3),
    Blocks(16, 64, 64, 4, 3),
    Blocks(16, 64, 32, 4, 4),
    Blocks(16, 128, 32, 4, 3),
    Blocks(16, 32, 64, 4, 3, split=4),
    Blocks(16, 64, 64, 4, 3, split=4),
    Blocks(16, 64, 64, 8, 2, split=4),
    Blocks(16, 128, 64, 8, 2, split=4),
    Blocks(16, 64, 64, 4, 3, split=8),
    Blocks(64, 64, 32, 4, 3),
    Blocks(64, 128, 32, 4, 3),
    Blocks(128, 64, 32, 4, 3),
    Blocks(128, 64, 32, 4, 3, split=4),
    Blocks(128, 128, 32, 8, 3),
    Blocks(128, 256, 32, 8, 2),
    Blocks(256, 64, 32, 4, 3),
    Blocks(256, 64, 32, 8, 3),
    Blocks(256, 64, 32, 8, 3, split=4),
    Blocks(256, 128, 32, 8, 2),
    Blocks(512, 64, 32, 8, 2),
    Blocks(512, 64, 32, 16, 2),
    Blocks(512, 64, 32, 16, 2, split=4),
]
# For the pool's gradient: every element is hashed and added once, whatever the blocks.
GRADIENT_BLOCKS = [
    Blocks(16, 64, 32, 4, 2),
    Blocks(16, 64, 64, 4, 2),
    Blocks(16, 128, 64, 4, 2),
    Blocks(16, 128, 128, 8, 2),
    Blocks(32, 64, 64, 4, 3),
    Blocks(32, 128, 64, 4, 3),
    Blocks(32, 128, 64, 8, 3),
    Blocks(32, 128, 128, 8, 3),
    Blocks(64, 64, 64, 4, 2),
    Blocks(64, 128, 128, 8, 2),
]


class Hashed(NamedTuple):
    """A weight of `rows × cols`, hashed with a 32-bit `seed`; `sign` as in the paper, or none."""

    rows: int
    cols: int
    seed: int
    sign: bool = True


@triton.jit
def _pool_index(word, size):
    """Mix 32-bit words; return the pool elements they stand for, below `size`, and the mixed words."""
    word = word ^ (word >> 16)
    word = word * _MIX
    return tl.umulhi(word, size.to(tl.uint32)).to(tl.int32), word


@triton.jit
def _signed(values, word, SIGN: tl.constexpr):
    if SIGN:
        # The high bits are the index, and the lowest alone runs in step with its neighbours' (correlations up to 0.9).
        return tl.where(((word ^ (word >> 16)) & 1) != 0, -values, values)
    else:
        return values


@triton.jit(do_not_specialize=["size", "seed", "outer_step", "inner_step"])
def _product_kernel(
    p_x, p_pool, p_out, num_rows, outer, inner, size, seed, outer_step, inner_step, inner_each, BM: tl.constexpr,
    BO: tl.constexpr, BR: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    begin = i_split * inner_each
    r = begin + tl.arange(0, BR)
    word_o = o.to(tl.uint32) * outer_step.to(tl.uint32) + seed.to(tl.uint32)
    # Kept transposed, so that the hashed block is the matrix unit's first operand, which may come from registers.
    total = tl.zeros([BO, BM], dtype=tl.float32)
    for _ in range(0, tl.cdiv(tl.minimum(inner_each, inner - begin), BR)):
        inside = (m < num_rows)[:, None] & (r < inner)[None, :]
        x = tl.load(p_x + m[:, None] * inner + r[None, :], mask=inside, other=0.0)
        word = word_o[:, None] + (r.to(tl.uint32) * inner_step.to(tl.uint32))[None, :]
        # Needs no mask: every word stands for an element of the pool, and x is 0 past the end.
        index, word = _pool_index(word, size)
        weight = tl.load(p_pool + index).to(p_x.dtype.element_ty)
        if WIDEN:
            # Triton's interpreter would negate and multiply the integers that hold its bfloat16 numbers.
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        weight = _signed(weight, word, SIGN)
        total += tl.dot(weight, tl.trans(x), input_precision=PRECISION)
        r += BR
    place = (i_split * num_rows + m)[None, :] * outer + o[:, None]
    inside = (m < num_rows)[None, :] & (o < outer)[:, None]
    tl.store(p_out + place, total.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "seed", "row_step", "col_step"])
def _gradient_kernel(
    p_grad, p_x, p_out, num_rows, rows, cols, size, seed, row_step, col_step, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    m = tl.arange(0, BM)
    total = tl.zeros([BN, BK], dtype=tl.float32)
    for _ in range(0, tl.cdiv(num_rows, BM)):
        some = (m < num_rows)[:, None]
        grad = tl.load(p_grad + m[:, None] * rows + n[None, :], mask=some & (n < rows)[None, :], other=0.0)
        x = tl.load(p_x + m[:, None] * cols + k[None, :], mask=some & (k < cols)[None, :], other=0.0)
        if WIDEN:
            grad, x = grad.to(tl.float32), x.to(tl.float32)
        total += tl.dot(tl.trans(grad), x, input_precision=PRECISION)
        m += BM
    word_n = n.to(tl.uint32) * row_step.to(tl.uint32) + seed.to(tl.uint32)
    word = word_n[:, None] + (k.to(tl.uint32) * col_step.to(tl.uint32))[None, :]
    index, word = _pool_index(word, size)
    inside = (n < rows)[:, None] & (k < cols)[None, :]
    tl.atomic_add(p_out + index, _signed(total, word, SIGN), mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["size", "seed", "step"])
def _gather_kernel(p_pool, p_out, numel, size, seed, step, B: tl.constexpr, SIGN: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    index, word = _pool_index(i.to(tl.uint32) * step.to(tl.uint32) + seed.to(tl.uint32), size)
    weight = _signed(tl.load(p_pool + index).to(tl.float32), word, SIGN)
    tl.store(p_out + i, weight.to(p_out.dtype.element_ty), mask=i < numel)


@triton.jit(do_not_specialize=["size", "seed", "step"])
def _scatter_kernel(p_grad, p_out, numel, size, seed, step, B: tl.constexpr, SIGN: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    index, word = _pool_index(i.to(tl.uint32) * step.to(tl.uint32) + seed.to(tl.uint32), size)
    grad = tl.load(p_grad + i, mask=i < numel, other=0.0).to(tl.float32)
    tl.atomic_add(p_out + index, _signed(grad, word, SIGN), mask=i < numel, sem="relaxed")


def forward(x: Tensor, pool: Tensor, weight: Hashed, blocks: Blocks) -> Tensor:
    """Return `x · Wᵀ`, `[rows of the batch, cols] → [rows of the batch, rows]`."""
    return _product(x, pool, weight, blocks, weight.rows, weight.cols, weight.cols * GOLDEN, GOLDEN)


def grad_x(grad: Tensor, pool: Tensor, weight: Hashed, blocks: Blocks) -> Tensor:
    """Return `grad · W`: the forward product with the two strides of the hash exchanged."""
    return _product(grad, pool, weight, blocks, weight.cols, weight.rows, GOLDEN, weight.cols * GOLDEN)


def _product(
    x: Tensor, pool: Tensor, weight: Hashed, blocks: Blocks, outer: int, inner: int, outer_step: int, inner_step: int
) -> Tensor:
    num_rows = x.shape[0]
    steps = triton.cdiv(inner, blocks.inner)
    each = triton.cdiv(steps, blocks.split) * blocks.inner
    split = triton.cdiv(inner, each)
    out = torch.empty(num_rows, outer, dtype=x.dtype, device=x.device)
    parts = torch.empty(split, num_rows, outer, dtype=torch.float32, device=x.device) if split > 1 else out
    _product_kernel[(triton.cdiv(num_rows, blocks.batch), triton.cdiv(outer, blocks.outer), split)](
        x,
        pool,
        parts,
        num_rows,
        outer,
        inner,
        pool.numel(),
        _signed32(weight.seed),
        _signed32(outer_step),
        _signed32(inner_step),
        each,
        BM=blocks.batch,
        BO=blocks.outer,
        BR=blocks.inner,
        SIGN=weight.sign,
        PRECISION=_precision(),
        WIDEN=interpreted(),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return parts.sum(0).to(x.dtype) if split > 1 else out


def add_grad_pool(grad: Tensor, x: Tensor, out: Tensor, weight: Hashed, blocks: Blocks) -> None:
    """Add the pool's gradient to the float32 `out`, with atomics: in no fixed order."""
    _gradient_kernel[(triton.cdiv(weight.rows, blocks.outer), triton.cdiv(weight.cols, blocks.inner))](
        grad,
        x,
        out,
        x.shape[0],
        weight.rows,
        weight.cols,
        out.numel(),
        _signed32(weight.seed),
        _signed32(weight.cols * GOLDEN),
        _signed32(GOLDEN),
        BM=blocks.batch,
        BN=blocks.outer,
        BK=blocks.inner,
        SIGN=weight.sign,
        PRECISION=_precision(),
        WIDEN=interpreted(),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def gather(pool: Tensor, weight: Hashed) -> Tensor:
    """Return the dense weight."""
    out = torch.empty(weight.rows, weight.cols, dtype=pool.dtype, device=pool.device)
    _gather_kernel[(triton.cdiv(out.numel(), _FLAT_ELEMENTS),)](
        pool, out, out.numel(), pool.numel(), _signed32(weight.seed), _signed32(GOLDEN), _FLAT_ELEMENTS, weight.sign
    )
    return out


def scatter(grad_weight: Tensor, out: Tensor, weight: Hashed) -> None:
    """Add the gradient of a dense weight to the pool's, with atomics."""
    numel = grad_weight.numel()
    _scatter_kernel[(triton.cdiv(numel, _FLAT_ELEMENTS),)](
        grad_weight, out, numel, out.numel(), _signed32(weight.seed), _signed32(GOLDEN), _FLAT_ELEMENTS, weight.sign
    )


def reference_index(size: int, weight: Hashed, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pool element and the sign (±1, int64) of each weight, in plain torch."""
    place = torch.arange(weight.rows * weight.cols, device=device).view(weight.rows, weight.cols)
    word = (place * GOLDEN + weight.seed) & _MASK32
    word = ((word ^ (word >> 16)) * MIX) & _MASK32
    sign = 1 - 2 * ((word ^ (word >> 16)) & 1) if weight.sign else torch.ones_like(word)
    return (word * size) >> 32, sign


def reference_weight(pool: Tensor, weight: Hashed) -> Tensor:
    """Return the dense weight, in plain torch and differentiable."""
    index, sign = reference_index(pool.numel(), weight, pool.device)
    return pool.flatten()[index] * sign


def blocks_to_try(num_rows: int) -> list[Blocks]:
    """Return the product's settings that make sense for so many rows of the batch."""
    most = max(16, triton.next_power_of_2(num_rows))
    return [blocks for blocks in PRODUCT_BLOCKS if most <= 8 * blocks.batch and blocks.batch <= most]


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _signed32(word: int) -> int:
    """Return the 32-bit two's complement integer, so that a kernel's scalar always has 32 bits."""
    word &= _MASK32
    return word - (1 << 32) if word >> 31 else word

r"""Folding: a matrix that is read through a fold of its inputs, between its narrow form in the pool and its dense form.

With a fold of `f`, a weight `[N, K]` is, for the hash `g` of its row,

.. math:: W_{n,\,i \cdot width + p} = s_{g,i,p}\, A_{n,p}, \qquad width = K / f,

where the pool holds only `A` (`[N, width]`), and `s` is as in `FoldView`. So a product needs `f` times less arithmetic:
`x · Wᵀ = fold(x) · Aᵀ` (the idea of SS1: Desai et al., NeurIPS 2024, here under one global pool). The rows are
divided evenly among the hashes, in order.

A convolution's weight `[N, C, …]` is folded over its `C` input channels: all places of a channel share its bucket and
its signs, in the inputs as in the kernels. So `conv(x, W)` is a convolution of `fold(x)` with `A`, `[N, C / f, …]`, in
as many groups as there are hashes.

All hashes have the same buckets, and differ in signs that are orthogonal. So their folded inputs share no information,
all of them are made from one reading of the input, and `f` hashes together lose none of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.kernels import ops, reference
from roastify.kernels.torch_internals import is_jit_tracing
from roastify.kernels.view import FoldView

_MOST_OF_ROW = 1 << 31


def unfolded(matrix: Tensor, pool: Tensor | None, view: FoldView) -> Tensor:
    """Return the dense matrix `[N, K]` of a narrow matrix `[N, width]`.

    Args:
        matrix: the narrow matrix; of a convolution `[N, width · positions]`, which becomes `[N, K · positions]`.
        pool: the pool, of the same dtype, which holds the learned scales; None without any.
        view: the fold.
    """
    view = view.over(matrix.shape[1] // view.width)
    return ops.unfold(_in_blocks(matrix, view), pool, view)


def folded(matrix: Tensor, pool: Tensor | None, view: FoldView) -> Tensor:
    """Return the transpose of the linear function `unfolded`, applied to a dense matrix: `[N, K] → [N, width]`."""
    view = view.over(matrix.shape[1] // view.cols)
    by_hash = ops.fold(matrix, pool, view).view(view.hashes, -1, view.hashes, view.width)
    return torch.cat([by_hash[g, :, g] for g in range(view.hashes)])


def folded_squares(matrix: Tensor, pool: Tensor | None, view: FoldView) -> Tensor:
    """Return `folded` with the squares of its factors: what becomes of the squares of independent numbers."""
    view = view.over(matrix.shape[1] // view.cols)
    factors = reference.fold_factors(pool, view, matrix.dtype, matrix.device).square()
    blocks = zip(matrix.chunk(view.hashes), factors, strict=True)
    return torch.cat([(rows.reshape(-1, view.fold, view.width) * factor).sum(1) for rows, factor in blocks])


def folded_input(x: Tensor, pool: Tensor | None, view: FoldView, dims: int) -> Tensor:
    """Return a layer's folded input, `[…, hashes · width, *places]`, in the memory format of the input.

    Args:
        x: the input, `[…, view.cols, *places]`.
        pool: as in `ops.fold`.
        view: the fold.
        dims: how many dimensions the places have: those of a convolution, 0 for a product.
    """
    if not dims:
        return ops.fold(x, pool, view)
    channels = x.dim() - dims - 1
    if channels < 0 or x.shape[channels] != view.cols:
        raise RuntimeError(f"fold: the input must have {view.cols} channels; found the shape {tuple(x.shape)}")
    last = x.movedim(channels, -1)
    places = math.prod(x.shape[channels + 1 :])
    is_last = last.is_contiguous() and not x.is_contiguous()
    if is_last or not _fits_row(places * view.cols):
        folded = ops.fold(last, pool, view).movedim(-1, channels)
        # Code behind a convolution may rely on the layout.
        return folded if is_last else folded.contiguous()
    rows = x.reshape(*x.shape[:channels], places * view.cols)
    folded = ops.fold(rows, pool, view.over(places))
    return folded.view(*x.shape[:channels], view.folded_cols, *x.shape[channels + 1 :])


def _fits_row(elements: int) -> bool:
    """Whether a row of so many elements can be folded: the kernels count them in 32 bits, from the first one on.

    The places of a fold are constants of its operator, so a graph for images of any size cannot have them.
    """
    if torch.compiler.is_compiling():
        # Imported here, because this import loads sympy.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not has_static_value(elements):
            return False
    elif is_jit_tracing():
        return False
    return 0 < elements < _MOST_OF_ROW


def _in_blocks(matrix: Tensor, view: FoldView) -> Tensor:
    """Return `[N, hashes·width]`: each hash's rows in the columns of that hash, and zeros elsewhere."""
    if view.hashes == 1:
        return matrix
    parts = (
        F.pad(rows, (g * view.width, (view.hashes - 1 - g) * view.width))
        for g, rows in enumerate(matrix.chunk(view.hashes))
    )
    return torch.cat(list(parts))

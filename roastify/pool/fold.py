r"""Folding: a matrix that is read through a fold of its inputs, between its narrow form in the pool and its dense form.

With a fold of `f`, a weight `[N, K]` is, for the hash `g` of its row,

.. math:: W_{n,\,i \cdot width + p} = s_{g,i,p}\, A_{n,p}, \qquad width = K / f,

where the pool holds only `A` (`[N, width]`), and `s` is as in `FoldView`. So a product needs `f` times less arithmetic:
`x · Wᵀ = fold(x) · Aᵀ` (the idea of SS1: Desai et al., NeurIPS 2024, here under one global pool). The rows are
divided evenly among the hashes, in order.

All hashes have the same buckets, and differ in signs that are orthogonal. So their folded inputs share no information,
all of them are made from one reading of the input, and `f` hashes together lose none of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.kernels import ops, reference
from roastify.kernels.view import FoldView


def unfolded(matrix: Tensor, pool: Tensor | None, view: FoldView) -> Tensor:
    """Return the dense matrix `[N, K]` of a narrow matrix `[N, width]`.

    Args:
        matrix: the narrow matrix.
        pool: the pool, of the same dtype, which holds the learned scales; None without any.
        view: the fold.
    """
    return ops.unfold(_in_blocks(matrix, view), pool, view)


def folded(matrix: Tensor, pool: Tensor | None, view: FoldView) -> Tensor:
    """Return the transpose of the linear function `unfolded`, applied to a dense matrix: `[N, K] → [N, width]`."""
    by_hash = ops.fold(matrix, pool, view).view(view.hashes, -1, view.hashes, view.width)
    return torch.cat([by_hash[g, :, g] for g in range(view.hashes)])


def folded_squares(matrix: Tensor, pool: Tensor | None, view: FoldView) -> Tensor:
    """Return `folded` with the squares of its factors: what becomes of the squares of independent numbers."""
    factors = reference.fold_factors(pool, view, matrix.dtype, matrix.device).square()
    blocks = zip(matrix.chunk(view.hashes), factors, strict=True)
    return torch.cat([(rows.reshape(-1, view.fold, view.width) * factor).sum(1) for rows, factor in blocks])


def _in_blocks(matrix: Tensor, view: FoldView) -> Tensor:
    """Return `[N, hashes·width]`: each hash's rows in the columns of that hash, and zeros elsewhere."""
    if view.hashes == 1:
        return matrix
    parts = (
        F.pad(rows, (g * view.width, (view.hashes - 1 - g) * view.width))
        for g, rows in enumerate(matrix.chunk(view.hashes))
    )
    return torch.cat(list(parts))

"""Products with a block-diagonal matrix of stacked blocks: one batched product, written where it belongs.

`matrix` is `[rows, cols]`. Block `g` of it, `rows/groups` rows, multiplies the columns from `g·cols` on of an
input with `groups·cols` columns. Autograd must not record these functions: they write into tensors that they make.
"""

from __future__ import annotations

import torch
from torch import Tensor


def blocks_product(x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Return `x · Wᵀ + bias`, `[num_rows, groups·cols] → [num_rows, rows]`."""
    rows, cols = matrix.shape
    out = x.new_empty(x.shape[0], rows)
    by_group = out.view(-1, groups, rows // groups).transpose(0, 1)
    columns, blocks = x.reshape(-1, groups, cols).transpose(0, 1), matrix.view(groups, -1, cols).transpose(1, 2)
    if bias is None:
        torch.bmm(columns, blocks, out=by_group)
    else:
        out.copy_(bias)
        torch.baddbmm(by_group, columns, blocks, out=by_group)
    return out


def blocks_product_t(x: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Return `x · W`, `[num_rows, rows] → [num_rows, groups·cols]`."""
    rows, cols = matrix.shape
    out = x.new_empty(x.shape[0], groups * cols)
    parts = x.reshape(-1, groups, rows // groups).transpose(0, 1)
    torch.bmm(parts, matrix.view(groups, -1, cols), out=out.view(-1, groups, cols).transpose(0, 1))
    return out


def blocks_grad(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    """Return the stacked blocks' gradient `[rows, cols]`, from `[num_rows, rows]` and `[num_rows, groups·cols]`."""
    parts = grad.reshape(grad.shape[0], groups, -1).permute(1, 2, 0)
    columns = x.reshape(x.shape[0], groups, -1).transpose(0, 1)
    return torch.bmm(parts, columns).flatten(0, 1)

"""Products with a block-diagonal matrix of stacked blocks: one batched product, written where it belongs.

`matrix` is `[rows, cols]`. Block `g` of it, `rows/groups` rows, multiplies the columns from `g·cols` on of an
input with `groups·cols` columns. Autograd must not record these functions but the last: they write into tensors that
they make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roastify.kernels.torch_internals import in_func_transform, is_jit_tracing


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


class _BlocksNode(torch.autograd.Function):
    """The node behind `differentiable_product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        need_x, need_matrix, ctx.need_bias, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_matrix else None, matrix if need_x else None)
        ctx.groups = groups
        return blocks_product(x, matrix, bias, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, matrix = ctx.saved_tensors
        # A graph of the gradient needs operations that autograd records.
        recorded = torch.is_grad_enabled()
        of_x, of_matrix = (recorded_product_t, _recorded_grad) if recorded else (blocks_product_t, blocks_grad)
        return (
            None if matrix is None else of_x(grad, matrix, ctx.groups),
            None if x is None else of_matrix(grad, x, ctx.groups),
            grad.sum(0) if ctx.need_bias else None,
            None,
        )


def differentiable_product(x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Return `x · Wᵀ + bias`, `[..., groups·cols] → [..., rows]`, with derivatives."""
    flat = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or in_func_transform() or is_jit_tracing():
        out = recorded_product(flat, matrix, groups)
        out = out if bias is None else out + bias
    else:
        out = _BlocksNode.apply(flat, matrix, bias, groups)
    return out.view(*x.shape[:-1], matrix.shape[0])


def recorded_product(x: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Return `x · Wᵀ`, for autograd or a program to record."""
    columns = x.reshape(x.shape[0], groups, -1)
    return torch.einsum("mgk,gnk->mgn", columns, matrix.reshape(groups, -1, matrix.shape[1])).flatten(1)


def recorded_product_t(grad: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Return `grad · W`, for autograd or a program to record."""
    parts = grad.reshape(grad.shape[0], groups, -1)
    return torch.einsum("mgn,gnk->mgk", parts, matrix.reshape(groups, -1, matrix.shape[1])).flatten(1)


def _recorded_grad(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    parts, columns = (value.reshape(value.shape[0], groups, -1) for value in (grad, x))
    return torch.einsum("mgn,mgk->gnk", parts, columns).flatten(0, 1)

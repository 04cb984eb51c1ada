"""The operators' derivatives: each one's node of autograd, and the way of the pool's gradient to its buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from roastify.kernels.dispatch import call, nodes
from roastify.kernels.grad_buffer import grad_buffer_of, is_wanted
from roastify.kernels.schemas import library, with_view
from roastify.kernels.torch_internals import (
    any_requires_grad,
    below_autograd,
    in_forward_mode,
    in_func_transform,
    is_jvp_transform,
)


def pool_gradient(ctx: Any, position: int, name: str, *args: Any, pool_shape: Sequence[int]) -> Tensor | None:
    """Return the pool's gradient, or None where it was added to the buffer of the backward pass, or nobody asks.

    Args:
        ctx: of the operator that read the pool.
        position: of the pool among the operator's tensors.
        name: of the operator that makes the gradient.
        args: that operator's, all but the pool's shape.
        pool_shape: the pool's shape.
    """
    # Along the edge that the gradient would take.
    read = ctx.next_functions[position][0]
    # A compiler of backward passes does not know which nodes run; one that records them runs them.
    if (buffer := grad_buffer_of(read)) is not None and (buffer.recorded or not torch.compiler.is_compiling()):
        if not is_wanted(read):
            return None
        if (total := buffer.total()) is not None:
            call(name + "_", total, *args)
            return None
    return call(name, *args, list(pool_shape))


def _save_view(ctx: Any, table: Tensor, view: Sequence[int], scale: float, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(table, *tensors)
    ctx.view, ctx.scale = view, scale


def _sum_to_bias(grad: Tensor, wanted: bool) -> Tensor | None:
    return grad.reshape(-1, grad.shape[-1]).sum(0) if wanted else None


def _save_gather(ctx: Any, pool: Tensor, table: Tensor, view: Sequence[int], scale: float) -> None:
    _save_view(ctx, table, view, scale)
    ctx.pool_shape = pool.shape


def _backward_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    grad_pool = pool_gradient(ctx, 0, "reduce", grad, table, ctx.view, ctx.scale, pool_shape=ctx.pool_shape)
    return grad_pool, None, None, None


def _save_reduce(
    ctx: Any, grad_weight: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]
) -> None:
    _save_view(ctx, table, view, scale)


def _backward_reduce(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return call("gather", grad, table, ctx.view, ctx.scale), None, None, None, None


def _save_linear(
    ctx: Any, x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: Sequence[int], scale: float
) -> None:
    # As the dense product: what no gradient needs is not kept, and may change.
    need_x, need_pool = ctx.needs_input_grad[:2]
    _save_view(ctx, table, view, scale, x if need_pool else None, pool if need_x else None)
    ctx.pool_shape = pool.shape


def _linear_pool_gradient(ctx: Any, grad: Tensor, x: Tensor, table: Tensor) -> Tensor | None:
    return pool_gradient(ctx, 1, "linear_reduce", grad, x, table, ctx.view, ctx.scale, pool_shape=ctx.pool_shape)


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, x, pool = ctx.saved_tensors
    need_x, need_pool, need_bias = ctx.needs_input_grad[:3]
    return (
        call("linear_t", grad, pool, None, table, ctx.view, ctx.scale) if need_x else None,
        _linear_pool_gradient(ctx, grad, x, table) if need_pool else None,
        _sum_to_bias(grad, need_bias),
        None,
        None,
        None,
    )


def _backward_linear_t(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, x, pool = ctx.saved_tensors
    need_x, need_pool, need_bias = ctx.needs_input_grad[:3]
    return (
        call("linear", grad, pool, None, table, ctx.view, ctx.scale) if need_x else None,
        _linear_pool_gradient(ctx, x, grad, table) if need_pool else None,
        _sum_to_bias(grad, need_bias),
        None,
        None,
        None,
    )


def _save_linear_reduce(
    ctx: Any, grad: Tensor, x: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]
) -> None:
    need_grad, need_x = ctx.needs_input_grad[:2]
    _save_view(ctx, table, view, scale, grad if need_x else None, x if need_grad else None)


def _backward_linear_reduce(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, grad_output, x = ctx.saved_tensors
    need_grad_output, need_x = ctx.needs_input_grad[:2]
    return (
        call("linear", x, grad, None, table, ctx.view, ctx.scale) if need_grad_output else None,
        call("linear_t", grad_output, grad, None, table, ctx.view, ctx.scale) if need_x else None,
        None,
        None,
        None,
        None,
    )


def _save_embedding(ctx: Any, index: Tensor, pool: Tensor, table: Tensor, view: Sequence[int], scale: float) -> None:
    _save_view(ctx, table, view, scale, index)
    ctx.pool_shape = pool.shape


def _backward_embedding(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, index = ctx.saved_tensors
    args = grad, index, table, ctx.view, ctx.scale
    return None, pool_gradient(ctx, 1, "embedding_reduce", *args, pool_shape=ctx.pool_shape), None, None, None


def _save_embedding_reduce(
    ctx: Any, grad: Tensor, index: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]
) -> None:
    _save_view(ctx, table, view, scale, index)


def _backward_embedding_reduce(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, index = ctx.saved_tensors
    return call("embedding", index, grad, table, ctx.view, ctx.scale), None, None, None, None, None


def save_combine(ctx: Any, coefficients: Tensor, basis: Tensor, grad_scale: float) -> None:
    """Save what the derivatives of `combine` need in its node, or in one for several."""
    need_coefficients, need_basis = ctx.needs_input_grad[:2]
    ctx.save_for_backward(coefficients if need_basis else None, basis if need_coefficients else None)
    ctx.dtype, ctx.grad_scale = basis.dtype, grad_scale


def _backward_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, basis = ctx.saved_tensors
    return (
        None if basis is None else coefficient_grad(grad, basis, ctx.grad_scale),
        None if coefficients is None else basis_grad(coefficients, grad, ctx.grad_scale).to(ctx.dtype),
        None,
    )


def coefficient_grad(grad: Tensor, basis: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Return the coefficients' gradient behind `combine`, `grad · basisᵀ`; `grad_scale` counts in its derivatives."""
    return call("combine", grad, basis.t(), grad_scale)


def basis_grad(coefficients: Tensor, grad: Tensor, grad_scale: float) -> Tensor:
    """Return the basis's gradient behind `combine`, `grad_scale · coefficientsᵀ · grad`, in the dtype of sums."""
    return call("combine_reduce", coefficients, grad, grad_scale)


def _save_combine_reduce(ctx: Any, coefficients: Tensor, grad: Tensor, grad_scale: float) -> None:
    need_coefficients, need_grad = ctx.needs_input_grad[:2]
    ctx.grad_scale = grad_scale
    ctx.save_for_backward(coefficients if need_grad else None, grad if need_coefficients else None)


def _backward_combine_reduce(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, grad = ctx.saved_tensors
    outer = outer * ctx.grad_scale
    return (
        None if grad is None else call("combine", grad, outer.t(), 1.0),
        None if coefficients is None else call("combine", coefficients, outer, 1.0),
        None,
    )


def _node(name: str, save: Any, differentiate: Any) -> Any:
    """Return an operator's node of autograd, which `save` fills and `differentiate` reads.

    `torch.library.register_autograd` makes the same node, but its part on the host takes longer than all of ours.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            # Where no gradient arrives none leaves, as with torch's own operators: zeros in its place would give the
            # pool a gradient, and an optimizer would decay weights that nothing trains.
            ctx.set_materialize_grads(False)
            save(ctx, *args)
            # No gradients are recorded here, so that this may go past the dispatcher.
            return call(name, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            (grad,) = grads
            return (None,) * len(ctx.needs_input_grad) if grad is None else differentiate(ctx, grad)

    Node.__name__ = Node.__qualname__ = f"Roast{name.title().replace('_', '')}Backward"
    return Node


def _refuse_transforms(name: str, args: tuple[Any, ...]) -> None:
    """Raise where a derivative is asked for that no operator has: below, a tangent would be lost without a word."""
    if in_func_transform():
        recorded = torch.is_grad_enabled() and any_requires_grad(*args)
        asked = recorded or is_jvp_transform()
    else:
        asked = any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args)
    if asked:
        raise NotImplementedError(
            f"roastify::{name} has no derivatives in forward mode, nor in the transforms of torch.func (grad, jvp, …); "
            f"use torch.autograd.grad, or roastify.densify(model) for a model that they take"
        )


def _for_autograd(name: str) -> Any:
    """Return an operator's implementation for autograd's key."""

    def run(*args: Any) -> Tensor:
        if in_forward_mode() or in_func_transform():
            _refuse_transforms(name, args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return nodes[name].apply(*args)
        with below_autograd():
            return getattr(torch.ops.roastify, name).default(*args)

    return run


for _name, _save, _differentiate in (
    ("gather", _save_gather, _backward_gather),
    ("reduce", _save_reduce, _backward_reduce),
    ("linear", _save_linear, _backward_linear),
    ("linear_t", _save_linear, _backward_linear_t),
    ("linear_reduce", _save_linear_reduce, _backward_linear_reduce),
    ("embedding", _save_embedding, _backward_embedding),
    ("embedding_reduce", _save_embedding_reduce, _backward_embedding_reduce),
    ("combine", save_combine, _backward_combine),
    ("combine_reduce", _save_combine_reduce, _backward_combine_reduce),
):
    nodes[_name] = _node(_name, _save, _differentiate)
    library.impl(_name, with_view(_name, _for_autograd(_name)), "Autograd")

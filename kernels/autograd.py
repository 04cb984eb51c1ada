"""The operators' derivatives: an autograd node for each, which adds the pool's gradient to a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from roastify.kernels.dispatch import call, implementations, is_watched, nodes
from roastify.kernels.grad_buffer import grad_buffer_of, is_wanted
from roastify.kernels.row_padding import padded_gradient
from roastify.kernels.schemas import library, with_view
from roastify.kernels.torch_internals import (
    any_requires_grad,
    below_autograd,
    in_forward_mode,
    in_func_transform,
    is_jvp_transform,
)
from roastify.kernels.view import FoldView, TileView


def pool_gradient(ctx: Any, position: int, name: str, *args: Any, pool_shape: Sequence[int]) -> Tensor | None:
    """Return the pool's gradient; None if it was added to the backward pass's buffer, or if no one asks for it.

    Args:
        ctx: the autograd context of the operator that read the pool.
        position: the pool's position among the operator's tensors.
        name: the operator that computes the gradient.
        args: that operator's arguments, without the pool's shape.
        pool_shape: the pool's shape.
    """
    # The node that a returned gradient would go to.
    reader = ctx.next_functions[position][0]
    # A compiler that traces a backward pass cannot tell which nodes run. A recorded pass does run its nodes.
    if (buffer := grad_buffer_of(reader)) is not None and (buffer.recorded or not torch.compiler.is_compiling()):
        if not is_wanted(reader):
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


def _save_gather_group(ctx: Any, pool: Tensor, table: Tensor, group: str) -> None:
    ctx.save_for_backward(table)
    ctx.group, ctx.pool_shape = group, pool.shape


def _backward_gather_group(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return pool_gradient(ctx, 0, "reduce_group", grad, table, ctx.group, pool_shape=ctx.pool_shape), None, None


def _save_reduce_group(ctx: Any, grad_flat: Tensor, table: Tensor, group: str, pool_shape: Sequence[int]) -> None:
    ctx.save_for_backward(table)
    ctx.group = group


def _backward_reduce_group(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return call("gather_group", grad, table, ctx.group), None, None, None


def _save_linear(
    ctx: Any, x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: Sequence[int], scale: float
) -> None:
    # As in the dense product, a tensor that no gradient needs is not saved, so the caller may change it in place.
    need_x, need_pool = ctx.needs_input_grad[:2]
    _save_view(ctx, table, view, scale, x if need_pool else None, pool if need_x else None)
    ctx.pool_shape = pool.shape


def _linear_pool_gradient(ctx: Any, grad: Tensor, x: Tensor, table: Tensor, view: TileView) -> Tensor | None:
    return pool_gradient(ctx, 1, "linear_reduce", grad, x, table, view, ctx.scale, pool_shape=ctx.pool_shape)


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, x, pool = ctx.saved_tensors
    need_x, need_pool, need_bias = ctx.needs_input_grad[:3]
    wide, view = padded_gradient(grad, ctx.view)
    return (
        call("linear_t", wide, pool, None, table, view, ctx.scale) if need_x else None,
        _linear_pool_gradient(ctx, wide, x, table, view) if need_pool else None,
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
        _linear_pool_gradient(ctx, x, grad, table, ctx.view) if need_pool else None,
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


def _save_fold(ctx: Any, x: Tensor, pool: Tensor | None, view: FoldView, dtype: torch.dtype) -> None:
    # The pool is there only for its learned scales, and the input is saved only for their gradient.
    need_x, need_pool = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_pool else None, pool if need_x else None)
    ctx.view, ctx.pool_shape, ctx.dtype = view, None if pool is None else pool.shape, x.dtype


def _fold_pool_gradient(ctx: Any, grad: Tensor, x: Tensor) -> Tensor | None:
    return pool_gradient(ctx, 1, "fold_reduce", grad, x, ctx.view, pool_shape=ctx.pool_shape)


def _backward_fold(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, pool = ctx.saved_tensors
    need_x, need_pool = ctx.needs_input_grad[:2]
    return (
        call("unfold", grad, pool, ctx.view, ctx.dtype) if need_x else None,
        _fold_pool_gradient(ctx, grad, x) if need_pool else None,
        None,
        None,
    )


def _backward_unfold(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, pool = ctx.saved_tensors
    need_z, need_pool = ctx.needs_input_grad[:2]
    return (
        call("fold", grad, pool, ctx.view, ctx.dtype) if need_z else None,
        _fold_pool_gradient(ctx, z, grad) if need_pool else None,
        None,
        None,
    )


def _save_fold_reduce(ctx: Any, grad: Tensor, x: Tensor, view: FoldView, pool_shape: Sequence[int]) -> None:
    need_grad, need_x = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if need_x else None, x if need_grad else None)
    # The gradient is linear in the learned scales' places, without the one that is added to the scales.
    ctx.view, ctx.dtypes = view._replace(unit=0), (grad.dtype, x.dtype)


def _backward_fold_reduce(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    return (
        None if x is None else call("fold", x, outer, ctx.view, ctx.dtypes[0]),
        None if grad is None else call("unfold", grad, outer, ctx.view, ctx.dtypes[1]),
        None,
        None,
    )


def save_combine(ctx: Any, coefficients: Tensor, basis: Tensor, grad_scale: float) -> None:
    """Save the tensors that the derivatives of `combine` need, in its own node or in a `_CombinedNode`."""
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
    """Return the gradient of `combine`'s coefficients, `grad · basisᵀ`; `grad_scale` affects its derivatives alone."""
    return call("combine", grad, basis.t(), grad_scale)


def basis_grad(coefficients: Tensor, grad: Tensor, grad_scale: float) -> Tensor:
    """Return the gradient of `combine`'s basis, `grad_scale · coefficientsᵀ · grad`, in the accumulation dtype."""
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
    """Return an operator's autograd node: `save` stores its tensors, `differentiate` computes its gradients.

    `torch.library.register_autograd` creates the same node, but its host code takes longer than all of ours.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            # If no gradient arrives, none is returned, as in torch's own operators. Zeros would give the pool a
            # gradient, and an optimizer would then decay weights that nothing trains.
            ctx.set_materialize_grads(False)
            save(ctx, *args)
            # Autograd records nothing inside this function, so `call` may skip the dispatcher.
            return call(name, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            (grad,) = grads
            return (None,) * len(ctx.needs_input_grad) if grad is None else differentiate(ctx, grad)

    Node.__name__ = Node.__qualname__ = f"Roast{name.title().replace('_', '')}Backward"
    return Node


def _refuse_transforms(name: str, args: tuple[Any, ...]) -> None:
    """Raise if a derivative is asked for that no operator has; without this, a tangent would be lost in silence."""
    if in_func_transform():
        recorded = torch.is_grad_enabled() and any_requires_grad(*args)
        asked = recorded or is_jvp_transform()
    else:
        asked = any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args)
    if asked:
        raise NotImplementedError(
            f"roastify::{name} has no derivatives in forward mode, nor in the transforms of torch.func (grad, jvp, …); "
            f"use torch.autograd.grad, or roastify.densify(model) for a dense model, which supports them"
        )


def _for_autograd(name: str) -> Any:
    """Return an operator's implementation for the dispatcher's `Autograd` key."""

    def run(*args: Any) -> Tensor:
        if in_forward_mode() or in_func_transform():
            _refuse_transforms(name, args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return nodes[name].apply(*args)
        with below_autograd():
            # A compiled graph calls its operators here, and another way through the dispatcher costs the host more.
            if not is_watched(*args):
                return implementations[name](*args)
            return getattr(torch.ops.roastify, name).default(*args)

    return run


def _folded_linear(
    x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, fold: FoldView, scale: float
) -> Tensor:
    """Run `folded_linear`. It has no derivative: where one may be needed, the two operators that it joins run."""
    args = x, pool, bias, table, view, fold, scale
    if (torch.is_grad_enabled() and any_requires_grad(*args)) or in_forward_mode() or in_func_transform():
        learned = pool if fold.first_scale >= 0 else None
        folded = torch.ops.roastify.fold.default(x, learned, fold, pool.dtype)
        return torch.ops.roastify.linear.default(folded, pool, bias, table, view, scale)
    with below_autograd():
        return torch.ops.roastify.folded_linear.default(*args)


library.impl("folded_linear", with_view("folded_linear", _folded_linear), "Autograd")

for _name, _save, _differentiate in (
    ("gather", _save_gather, _backward_gather),
    ("reduce", _save_reduce, _backward_reduce),
    ("gather_group", _save_gather_group, _backward_gather_group),
    ("reduce_group", _save_reduce_group, _backward_reduce_group),
    ("linear", _save_linear, _backward_linear),
    ("linear_t", _save_linear, _backward_linear_t),
    ("linear_reduce", _save_linear_reduce, _backward_linear_reduce),
    ("embedding", _save_embedding, _backward_embedding),
    ("embedding_reduce", _save_embedding_reduce, _backward_embedding_reduce),
    ("fold", _save_fold, _backward_fold),
    ("unfold", _save_fold, _backward_unfold),
    ("fold_reduce", _save_fold_reduce, _backward_fold_reduce),
    ("combine", save_combine, _backward_combine),
    ("combine_reduce", _save_combine_reduce, _backward_combine_reduce),
):
    nodes[_name] = _node(_name, _save, _differentiate)
    library.impl(_name, with_view(_name, _for_autograd(_name)), "Autograd")

r"""The operators `torch.ops.roastify.*`: schemas, fakes, autograd and registration, all in this one place.

Each takes the pool, the chunk table, a `TileView` as ``int[]`` and the tensor's scale λ, and stands for the dense
operation on :math:`W = \lambda \cdot sign \cdot pool[slot]`. The family is closed under differentiation (the gradient
of every operator is another of them), so second derivatives work as well. `combine` and `combine_reduce` have no part
in the pool: they make kernels of coefficients and a basis.

The three that make a gradient of the pool have twins (`reduce_`, `linear_reduce_`, `embedding_reduce_`) that add it to
a tensor of the pool's shape, and touch no more of that than their tensor reads. A backward pass takes them wherever the
pool was read through a gate (`sink`).

The functions of this module check and cast their arguments, follow autocast where the dense operation would, and call
the operator.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from roastify.kernels import reference
from roastify.kernels.grad_buffer import is_batched, is_wanted, sink_of
from roastify.kernels.view import TileView

_VIEW = "Tensor table, int[] view, float scale"
_SCHEMAS = {
    "gather": f"(Tensor pool, {_VIEW}) -> Tensor",
    "reduce": f"(Tensor grad_weight, {_VIEW}, int[] pool_shape) -> Tensor",
    "linear": f"(Tensor x, Tensor pool, Tensor? bias, {_VIEW}) -> Tensor",
    "linear_t": f"(Tensor x, Tensor pool, Tensor? bias, {_VIEW}) -> Tensor",
    "linear_reduce": f"(Tensor grad, Tensor x, {_VIEW}, int[] pool_shape) -> Tensor",
    "embedding": f"(Tensor index, Tensor pool, {_VIEW}) -> Tensor",
    "embedding_reduce": f"(Tensor grad, Tensor index, {_VIEW}, int[] pool_shape) -> Tensor",
    "combine": "(Tensor coefficients, Tensor basis, float grad_scale) -> Tensor",
    "combine_reduce": "(Tensor coefficients, Tensor grad, float grad_scale) -> Tensor",
    "reduce_": f"(Tensor(a!) total, Tensor grad_weight, {_VIEW}) -> ()",
    "linear_reduce_": f"(Tensor(a!) total, Tensor grad, Tensor x, {_VIEW}) -> ()",
    "embedding_reduce_": f"(Tensor(a!) total, Tensor grad, Tensor index, {_VIEW}) -> ()",
}

# The modules with the operators' CUDA launchers. They import Triton, so they are imported when a CUDA tensor arrives.
_CUDA_HOMES = {
    "gather": "gather",
    "reduce": "reduce",
    "linear": "linear",
    "linear_t": "linear",
    "linear_reduce": "linear",
    "embedding": "embedding",
    "embedding_reduce": "embedding",
    "combine": "combine",
    "combine_reduce": "combine",
    "reduce_": "reduce",
    "linear_reduce_": "linear",
    "embedding_reduce_": "embedding",
}

_library = torch.library.Library("roastify", "DEF")
# The part of the dispatcher that tracks which tensors are views of which.
VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


@functools.cache
def _launcher(name: str) -> Any:
    return getattr(importlib.import_module(f"roastify.kernels.gpu.{_CUDA_HOMES[name]}"), name)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context for launching kernels: Triton does so on the current device, which need not be a tensor's."""
    device = tensor.get_device()
    return contextlib.nullcontext() if device == torch._C._cuda_getDevice() else torch.cuda.device(device)


def _implementation(name: str) -> Any:
    """Return what an operator does: on a GPU its launcher, found when it is first called; elsewhere the reference.

    Views are not tracked while it runs: else a result that was reshaped on its way out would count as a view made
    inside autograd's node, which torch forbids to change in place, and models do that to what a layer gives them.
    """
    elsewhere = getattr(reference, name)

    def call(*args: Any) -> Tensor | None:
        first = args[0]
        with torch._C._ExcludeDispatchKeyGuard(VIEW_TRACKING):
            if not first.is_cuda:
                return elsewhere(*args)
            launcher = _launcher(name)
            if first.get_device() == torch._C._cuda_getDevice():
                return launcher(*args)
            with on_device_of(first):
                return launcher(*args)

    return call


def _with_view(function: Any, view_position: int | None) -> Any:
    """Return `function` taking its `TileView`, if it has one, as the plain list of integers that the schema has."""
    if view_position is None:
        return function

    def call(*args: Any) -> Tensor | None:
        return function(*args[:view_position], TileView(*args[view_position]), *args[view_position + 1 :])

    return call


_implementations: dict[str, Any] = {}
_view_positions: dict[str, int | None] = {}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _implementations[_name] = _implementation(_name)
    _arguments = _schema.split("->")[0].split(",")
    _view_positions[_name] = _arguments.index(" int[] view") if " int[] view" in _arguments else None
    _library.impl(_name, _with_view(_implementations[_name], _view_positions[_name]), "CompositeExplicitAutograd")

_ops = torch.ops.roastify


@torch.library.register_fake("roastify::gather", lib=_library)
def _(pool: Tensor, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    tiles = TileView(*view)
    return pool.new_empty(tiles.rows, tiles.cols)


@torch.library.register_fake("roastify::reduce", lib=_library)
def _(grad_weight: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]) -> Tensor:
    return grad_weight.new_empty(pool_shape)


@torch.library.register_fake("roastify::linear", lib=_library)
def _(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], TileView(*view).rows)


@torch.library.register_fake("roastify::linear_t", lib=_library)
def _(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], TileView(*view).cols)


@torch.library.register_fake("roastify::linear_reduce", lib=_library)
def _(grad: Tensor, x: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]) -> Tensor:
    return x.new_empty(pool_shape)


@torch.library.register_fake("roastify::embedding", lib=_library)
def _(index: Tensor, pool: Tensor, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    return pool.new_empty(*index.shape, TileView(*view).cols)


@torch.library.register_fake("roastify::embedding_reduce", lib=_library)
def _(
    grad: Tensor, index: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]
) -> Tensor:
    return grad.new_empty(pool_shape)


@torch.library.register_fake("roastify::combine", lib=_library)
def _(coefficients: Tensor, basis: Tensor, grad_scale: float) -> Tensor:
    torch._check(coefficients.shape[1] == basis.shape[0], lambda: f"no product of {coefficients.shape}, {basis.shape}")
    return coefficients.new_empty(coefficients.shape[0], basis.shape[1])


@torch.library.register_fake("roastify::combine_reduce", lib=_library)
def _(coefficients: Tensor, grad: Tensor, grad_scale: float) -> Tensor:
    torch._check(coefficients.shape[0] == grad.shape[0], lambda: f"no sum over {coefficients.shape}, {grad.shape}")
    return grad.new_empty(coefficients.shape[1], grad.shape[1], dtype=reference.summed_in(coefficients.dtype))


def _adds_in_place(*args: Any) -> None:
    """The fake of operators that only write to their first argument."""


for _name in ("reduce_", "linear_reduce_", "embedding_reduce_"):
    torch.library.register_fake(f"roastify::{_name}", _adds_in_place, lib=_library)


# All that an operator's arguments are where nothing stands between them and its kernels.
_PLAIN = {Tensor, torch.nn.Parameter, type(None), TileView, float, int, list, torch.Size}
_nodes: dict[str, Any] = {}


def is_watched(*args: Any) -> bool:
    """Whether anybody would notice an operator on these arguments: a compiler, mode, transform or profiler."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, args))
        or not (args[0].is_cuda or args[0].is_cpu)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or is_batched()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()
    )


def _call(name: str, *args: Any) -> Any:
    """Call an operator, past the dispatcher if nobody would notice: an eager layer's time is what the host takes.

    (A layer's forward and backward take a third less of it.) Compilers, tracers, modes, transforms, subclasses and
    profilers see the operator.
    """
    if is_watched(*args):
        return getattr(_ops, name).default(*args)
    if torch.is_grad_enabled() and name in _nodes and torch._C._any_requires_grad(*args):
        return _nodes[name].apply(*args)
    return _implementations[name](*args)


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
    if (sink := sink_of(read)) is not None and (sink.recorded or not torch.compiler.is_compiling()):
        if not is_wanted(read):
            return None
        if (total := sink.total()) is not None:
            _call(name + "_", total, *args)
            return None
    return _call(name, *args, list(pool_shape))


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
    return _call("gather", grad, table, ctx.view, ctx.scale), None, None, None, None


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
        _call("linear_t", grad, pool, None, table, ctx.view, ctx.scale) if need_x else None,
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
        _call("linear", grad, pool, None, table, ctx.view, ctx.scale) if need_x else None,
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
        _call("linear", x, grad, None, table, ctx.view, ctx.scale) if need_grad_output else None,
        _call("linear_t", grad_output, grad, None, table, ctx.view, ctx.scale) if need_x else None,
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
    return _call("embedding", index, grad, table, ctx.view, ctx.scale), None, None, None, None, None


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
    return _call("combine", grad, basis.t(), grad_scale)


def basis_grad(coefficients: Tensor, grad: Tensor, grad_scale: float) -> Tensor:
    """Return the basis's gradient behind `combine`, `grad_scale · coefficientsᵀ · grad`, in the dtype of sums."""
    return _call("combine_reduce", coefficients, grad, grad_scale)


def _save_combine_reduce(ctx: Any, coefficients: Tensor, grad: Tensor, grad_scale: float) -> None:
    need_coefficients, need_grad = ctx.needs_input_grad[:2]
    ctx.grad_scale = grad_scale
    ctx.save_for_backward(coefficients if need_grad else None, grad if need_coefficients else None)


def _backward_combine_reduce(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, grad = ctx.saved_tensors
    outer = outer * ctx.grad_scale
    return (
        None if grad is None else _call("combine", grad, outer.t(), 1.0),
        None if coefficients is None else _call("combine", coefficients, outer, 1.0),
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
            return _call(name, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            (grad,) = grads
            return (None,) * len(ctx.needs_input_grad) if grad is None else differentiate(ctx, grad)

    Node.__name__ = Node.__qualname__ = f"Roast{name.title().replace('_', '')}Backward"
    return Node


def _refuse_transforms(name: str, args: tuple[Any, ...]) -> None:
    """Raise where a derivative is asked for that no operator has: below, a tangent would be lost without a word."""
    if torch._C._are_functorch_transforms_active():
        kind = torch._C._functorch.peek_interpreter_stack().key()
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        asked = recorded or kind == torch._C._functorch.TransformType.Jvp
    else:
        asked = any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args)
    if asked:
        raise NotImplementedError(
            f"roastify::{name} has no derivatives in forward mode, nor in the transforms of torch.func (grad, jvp, …); "
            f"use torch.autograd.grad, or roastify.densify(model) for a model that they take"
        )


def _for_autograd(name: str) -> Any:
    """Return an operator's implementation for autograd's key."""

    def call(*args: Any) -> Tensor:
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            _refuse_transforms(name, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _nodes[name].apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(_ops, name).default(*args)

    return call


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
    _nodes[_name] = _node(_name, _save, _differentiate)
    _library.impl(_name, _with_view(_for_autograd(_name), _view_positions[_name]), "Autograd")


def gather(pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    r"""Return the dense tensor :math:`W = \lambda \cdot sign \cdot pool[slot]`.

    Args:
        pool: the whole pool, `[slots · tile_rows, tile_cols]`, any floating dtype.
        table: the pool's chunk table, int64 `[chunks, 3]`.
        view: where the tensor lies.
        scale: λ.

    Returns:
        `[rows, cols]`, of the pool's dtype.
    """
    return _call("gather", pool, table, view, scale)


def reduce(grad_weight: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: Sequence[int]) -> Tensor:
    r"""Return the adjoint of `gather`: :math:`\sum \lambda \cdot sign \cdot grad` over the readers of each element.

    Args:
        grad_weight: `[rows, cols]`; sums accumulate in float32 (float64 for float64), in a fixed order.
        table: the pool's chunk table.
        view: where the tensor lies.
        scale: λ.
        pool_shape: the pool's shape.

    Returns:
        a tensor of `pool_shape` and of `grad_weight`'s dtype.
    """
    return _call("reduce", grad_weight, table, view, scale, list(pool_shape))


def linear(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias`, like `torch.nn.functional.linear`; under autocast, in autocast's dtype.

    Args:
        x: `[..., cols]`.
        pool: the whole pool.
        bias: `[rows]` or None.
        table: the pool's chunk table.
        view: where `W` lies.
        scale: λ.

    Returns:
        `[..., rows]`.

    Raises:
        RuntimeError: `x` has another last size than `cols`, or another dtype than the pool or the bias.
    """
    x, pool, bias = _like_autocast(x, pool, bias)
    _check_product("linear", x, view.cols, pool, bias)
    return _call("linear", x, pool, bias, table, view, scale)


def linear_t(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · W + bias`, `[..., rows] → [..., cols]`; arguments, dtypes and errors as in `linear`."""
    x, pool, bias = _like_autocast(x, pool, bias)
    _check_product("linear_t", x, view.rows, pool, bias)
    return _call("linear_t", x, pool, bias, table, view, scale)


def embedding(index: Tensor, pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the rows `W[index]`, like `torch.nn.functional.embedding`; only what those rows touch is read.

    Args:
        index: integers of any shape, each from 0 to `rows - 1`.
        pool: the whole pool.
        table: the pool's chunk table.
        view: where `W` lies.
        scale: λ.

    Returns:
        `[*index.shape, cols]`.

    Raises:
        IndexError: an index is outside the table.
        RuntimeError: `index` is not of an integer dtype.
    """
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"embedding indices must be int64 or int32, not {index.dtype}")
    return _call("embedding", index, pool, table, view, scale)


def combine(coefficients: Tensor, basis: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Return `coefficients · basis`, computed in float32 (float64 for float64), whatever autocast is set to.

    Args:
        coefficients: `[rows, count]`.
        basis: `[count, size]`, of any floating dtype.
        grad_scale: what the basis's gradient is multiplied by.

    Returns:
        `[rows, size]`, of the coefficients' dtype.
    """
    return _call("combine", coefficients, basis, float(grad_scale))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast would cast the arguments of a product with `x` to, or None if it would not."""
    # Autocast does not know the meta device, and says so with an error.
    if x.is_meta or x.dtype == torch.float64:
        return None
    kind = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _like_autocast(x: Tensor, pool: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to autocast's dtype where autocast would cast the dense product's arguments."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, pool, bias
    # A call of `to` costs the host more than to see that it would do nothing.
    x = x if x.dtype == dtype else x.to(dtype)
    pool = pool if pool.dtype == dtype else pool.to(dtype)
    return x, pool, bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _check_product(name: str, x: Tensor, size: int, pool: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] != size:
        raise RuntimeError(f"{name}: the input's last size must be {size}; found the shape {tuple(x.shape)}")
    if x.dtype != pool.dtype:
        raise RuntimeError(f"{name}: the input is {x.dtype} and the weights are {pool.dtype}; expected one dtype")
    if bias is not None and bias.dtype != x.dtype:
        raise RuntimeError(f"{name}: the input is {x.dtype} and the bias is {bias.dtype}; expected one dtype")

"""Dense weights that a training pass keeps: several are gathered through one node of autograd, which saves nothing.

Their layers multiply by torch's own operators, as dense layers do. That takes memory for the weights until the backward
pass, where `ops.linear` would gather each of them again. It takes less of the host's time, and a step with small layers
waits for the host.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from roastify.kernels import ops
from roastify.kernels.autograd import basis_grad, coefficient_grad, pool_gradient, save_combine
from roastify.kernels.dispatch import is_watched, on_device_of
from roastify.kernels.grad_buffer import grad_buffer_of, is_wanted
from roastify.kernels.torch_internals import at_end_of_backward, current_backward_pass, without_view_tracking
from roastify.kernels.view import WeightView, alike

if TYPE_CHECKING:
    from roastify.kernels.gpu.group import Group

# Elements of the dense weights of a group. The gradients of all of it are there before any of them goes.
_GROUP_ELEMENTS = 1 << 24


class WeightGroup:
    """Weights that a pass gathers together, and sums the gradients of together."""

    def __init__(self, weights: Sequence[WeightView]) -> None:
        self.weights = tuple(weights)
        self._kernels: Group | None = None

    def kernels(self, pool: Tensor) -> Group | None:
        """Return the kernels for the group, if there are any for this pool's device and dtype and they can run now."""
        if not pool.is_cuda or len(self.weights) == 1 or is_watched(pool):
            return None
        # It imports Triton.
        from roastify.kernels.gpu import group

        if not group.fits(pool, self.weights[0]):
            return None
        if self._kernels is None:
            self._kernels = group.Group(self.weights)
        return self._kernels if self._kernels.is_ready(pool.device) else None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their kernels' tables where they are used.
        return {"weights": self.weights, "_kernels": None}


def make_groups(weights: Iterable[WeightView]) -> dict[WeightView, WeightGroup]:
    """Return the group of each weight.

    Groups are fixed, whatever a pass reads: the order in which gradients are added decides their last bits, and those
    of a first pass must be those of any other. Weights of a group are alike in what decides whether they are kept.
    """
    chosen: dict[tuple[Any, ...], list[WeightView]] = {}
    found: list[list[WeightView]] = []
    for weight in weights:
        view = weight.view
        # A product keeps its weight by its size; convolutions, the ones in strips, do always.
        size = None if view.strips else (view.rows, view.cols)
        kind = alike(view), size, weight.transposed, weight.basis_shape
        group = chosen.get(kind)
        if group is None or sum(math.prod(other.shape) for other in (*group, weight)) > _GROUP_ELEMENTS:
            group = chosen[kind] = []
            found.append(group)
        group.append(weight)
    made = map(WeightGroup, found)
    return {weight: group for group in made for weight in group.weights}


class _DeferredGrads:
    """Gradients of dense weights that `_CombinedNode`s leave to the `_GatheredNode` behind them.

    That node makes the gradients of all coefficients by one kernel. Autograd runs it after every `_CombinedNode`,
    whether or not they returned something. In between an optimizer may step in a hook of a basis, so `bases` holds the
    bases as `combine_group` read them, one under the other.
    """

    bases: Tensor | None = None

    def __init__(self) -> None:
        # By the engine's number of the backward pass, which alone holds the value, as it does a `GradBuffer`'s sum.
        self.passes: weakref.WeakValueDictionary[int, _DeferredInPass] = weakref.WeakValueDictionary()

    def defer(self, node: Any, index: int, grad: Tensor) -> bool:
        """Leave a dense weight's gradient, `[kernels, positions]`, for a node, if it may be.

        It may where a gradient may be added to a sink (`GradBuffer.total`).
        """
        buffer = grad_buffer_of(node.next_functions[0][0])
        if buffer is None or buffer.total() is None:
            return False
        task = current_backward_pass()
        here = self.passes.get(task)
        if here is None:
            here = self.passes[task] = _DeferredInPass()
            at_end_of_backward(here.close)
        here.grads[index] = grad
        return True

    def take(self) -> dict[int, Tensor]:
        """Return the gradients left in this backward pass, by the weight's number, in their order."""
        here = self.passes.pop(current_backward_pass(), None)
        return {} if here is None else dict(sorted(here.grads.items()))


class _DeferredInPass:
    """The gradients of dense weights, `[kernels, positions]`, by the weight's number."""

    def __init__(self) -> None:
        self.grads: dict[int, Tensor] = {}

    def close(self) -> None:
        """Let go of them."""
        self.grads.clear()


class _GatheredNode(torch.autograd.Function):
    """The node behind dense weights, or behind the coefficients of weights that have bases.

    It keeps the chunk table as an attribute instead of saving it. Like the gate, it may therefore run in a checkpointed
    region that reads fewer or other weights when the region is run again.
    """

    @staticmethod
    def forward(ctx: Any, pool: Tensor, table: Tensor, group: WeightGroup, values: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.table, ctx.group, ctx.pool_shape = table, group, pool.shape
        ctx.deferred = None if group.weights[0].basis_index is None else _DeferredGrads()
        # As in `ops`: a result must not count as a view made in here.
        with without_view_tracking():
            if values is not None:
                return (values.view_as(values),)
            if (kernels := group.kernels(pool)) is not None:
                with on_device_of(pool):
                    return tuple(kernels.gather(pool, table))
        # Outside: an operator looks for tangents, which takes the tracking of views.
        matrices = [ops.gather(pool, table, weight.view, weight.scale) for weight in group.weights]
        with without_view_tracking():
            return tuple(
                (matrix.t() if weight.transposed else matrix).reshape(weight.gathered_shape)
                for matrix, weight in zip(matrices, group.weights, strict=True)
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if ctx.deferred is not None and not torch.compiler.is_compiling() and (deferred := ctx.deferred.take()):
            _reduce_deferred(ctx, deferred)
        if _reduced_together(ctx, grads):
            return None, None, None, None
        total: Tensor | None = None
        for weight, grad in zip(ctx.group.weights, grads, strict=True):
            if grad is None:
                continue
            view = weight.view
            matrix = grad.t() if weight.transposed else grad.reshape(view.rows, view.cols)
            part = pool_gradient(ctx, 0, "reduce", matrix, ctx.table, view, weight.scale, pool_shape=ctx.pool_shape)
            total = part if total is None else total if part is None else total + part
        return total, None, None, None


def _reduced_together(ctx: Any, grads: Sequence[Tensor | None], bases: Tensor | None = None) -> bool:
    """Add the gradients to the pass's buffer by one kernel, if there is such a kernel and most gradients are there.

    Some gradients never come: a weight of the group may have been kept for nothing, as a pooler's is that few rows go
    through.
    """
    if torch.compiler.is_compiling():
        return False
    present = [grad for grad in grads if grad is not None]
    read = ctx.next_functions[0][0]
    if 2 * len(present) <= len(grads) or len({grad.dtype for grad in present}) != 1 or not is_wanted(read):
        return False
    kernels = ctx.group.kernels(present[0])
    buffer = grad_buffer_of(read)
    if kernels is None or buffer is None or (total := buffer.total()) is None:
        return False
    with on_device_of(total):
        if len(present) < len(grads):
            zero = present[0].new_zeros(())
            pairs = zip(ctx.group.weights, grads, strict=True)
            shapes = ((weight.gathered_shape if bases is None else weight.shape, grad) for weight, grad in pairs)
            present = [zero.expand(shape) if grad is None else grad for shape, grad in shapes]
        kernels.reduce_(total, present, ctx.table, bases)
    return True


def _reduce_deferred(ctx: Any, deferred: dict[int, Tensor]) -> None:
    """Add deferred gradients to the pass's buffer, by one kernel if they are most of the group's."""
    bases = ctx.deferred.bases
    if _reduced_together(ctx, [deferred.get(index) for index in range(len(ctx.group.weights))], bases):
        return
    for index, grad in deferred.items():
        weight = ctx.group.weights[index]
        view, basis = weight.view, bases.tensor_split(len(ctx.group.weights))[index]
        matrix = coefficient_grad(grad, basis).view(view.rows, view.cols)
        part = pool_gradient(ctx, 0, "reduce", matrix, ctx.table, view, weight.scale, pool_shape=ctx.pool_shape)
        assert part is None, "there was a buffer to add to when the gradient was deferred"


class _CombinedNode(torch.autograd.Function):
    """The node behind a dense weight that was made of its basis together with others.

    It saves what the node of `ops.combine` saves, because a checkpoint may run that one again. Only the gradient of the
    coefficients is left to `_GatheredNode`, which makes those of all weights by one kernel.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, basis: Tensor, grad_scale: float, values: Tensor, index: int) -> Tensor:
        ctx.set_materialize_grads(False)
        save_combine(ctx, coefficients, basis, grad_scale)
        ctx.index = index
        with without_view_tracking():
            return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad is None:
            return None, None, None, None, None
        # Its coefficients require a gradient, or it would not have been gathered for a graph.
        coefficients, basis = ctx.saved_tensors
        rows = grad.reshape(-1, basis.shape[1])
        of_basis = None if coefficients is None else basis_grad(coefficients, rows, ctx.grad_scale).to(ctx.dtype)
        if not torch.compiler.is_compiling():
            node = ctx.next_functions[0][0]
            if not is_wanted(node) or node.deferred.defer(node, ctx.index, rows):
                return None, of_basis, None, None, None
        return coefficient_grad(rows, basis, ctx.grad_scale), of_basis, None, None, None


def combine_group(group: WeightGroup, coefficients: Sequence[Tensor], bases: Sequence[Tensor]) -> list[Tensor] | None:
    """Return a group's dense weights for `combined_weight`, made by one kernel; None where there is no such kernel.

    Args:
        group: which.
        coefficients: what `gather_group` returned.
        bases: each weight's.
    """
    kernels = group.kernels(coefficients[0])
    if kernels is None or not kernels.are_together(coefficients):
        return None
    with torch.no_grad(), on_device_of(coefficients[0]):
        stacked = torch.cat(list(bases))
        made = kernels.combine(coefficients, stacked)
    node: Any = coefficients[0].grad_fn
    if node is not None:
        node.deferred.bases = stacked
    return made


def combined_weight(coefficients: Tensor, basis: Tensor, grad_scale: float, values: Tensor, index: int) -> Tensor:
    """Return a weight that `combine_group` made, with the derivatives of `ops.combine(coefficients, basis, …)`.

    Args:
        coefficients: what `gather_group` returned of it.
        basis: its basis.
        grad_scale: what the basis's gradient is multiplied by.
        values: the weight.
        index: its number in the group.
    """
    return _CombinedNode.apply(coefficients, basis, grad_scale, values, index)


def gather_group(pool: Tensor, table: Tensor, group: WeightGroup) -> tuple[Tensor, ...]:
    """Return a group's dense weights, or the coefficients of those with bases, whose gradients go through one node.

    The node runs when the gradients of all of them are there.

    Args:
        pool: the pool as a pass reads it.
        table: its chunk table.
        group: which.
    """
    return _GatheredNode.apply(pool, table, group, None)


def gathered_again(pool: Tensor, table: Tensor, weight: WeightView, values: Tensor) -> Tensor:
    """Return a weight that was gathered before, through a node of its own.

    The gradients of its readers then meet in the pool's gradient, in float32, not in the weight's own dtype.
    """
    return _GatheredNode.apply(pool, table, WeightGroup([weight]), values.detach())[0]

"""Dense weights that a training pass keeps: several are gathered through one autograd node.

Their layers use torch's own operators, as dense layers do. The weights then stay in memory until the backward pass,
where `ops.linear` would gather each of them again. This takes less host time, which limits a step with small layers.
The node saves no tensors.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from roastify.kernels import ops
from roastify.kernels.autograd import basis_grad, coefficient_grad, pool_gradient, save_combine
from roastify.kernels.dispatch import is_watched, on_device_of
from roastify.kernels.grad_buffer import grad_buffer_of, is_wanted
from roastify.kernels.group_view import GroupView
from roastify.kernels.torch_internals import at_end_of_backward, current_backward_pass, without_view_tracking
from roastify.kernels.view import WeightView, alike

if TYPE_CHECKING:
    from roastify.kernels.gpu.group import Group

# The most elements of a group's dense weights. All their gradients are in memory before the first one is freed.
_GROUP_ELEMENTS = 1 << 24
# The most weights of a group in a compiled graph.
_MOST_IN_A_GRAPH = 64


class WeightGroup:
    """Weights that a pass gathers together, and whose gradients it sums together."""

    def __init__(self, weights: Sequence[WeightView]) -> None:
        self.weights = tuple(weights)
        self._kernels: Group | None = None

    def kernels(self, pool: Tensor) -> Group | None:
        """Return the group's kernels; None if none fits the pool's device and dtype, or if they cannot run now."""
        if not pool.is_cuda or len(self.weights) == 1 or is_watched(pool):
            return None
        # Imported here because it imports Triton.
        from roastify.kernels.gpu import group

        if not group.fits(pool, self.weights[0]):
            return None
        if self._kernels is None:
            self._kernels = group.Group(self.weights)
        return self._kernels if self._kernels.is_ready(pool.device) else None

    def __getstate__(self) -> dict[str, Any]:
        # A copy builds its kernels' tables on the device where it is used.
        return {"weights": self.weights, "_kernels": None}


def make_groups(weights: Iterable[WeightView]) -> dict[WeightView, WeightGroup]:
    """Return the group of each weight.

    Groups do not depend on the weights that a pass reads. The order in which gradients are added decides their last
    bits, and every pass must give the same bits. Weights of a group agree in all that decides whether a pass keeps
    them.
    """
    last_of_kind: dict[tuple[Any, ...], list[WeightView]] = {}
    groups: list[list[WeightView]] = []
    for weight in weights:
        view = weight.view
        # A product keeps its weight depending on the size. Convolutions, whose weights are strips, always keep it.
        size = None if view.strips else (view.rows, view.cols)
        kind = alike(view), size, weight.transposed, weight.basis_shape, weight.fold is None
        group = last_of_kind.get(kind)
        if group is None or sum(_numel(other) for other in (*group, weight)) > _GROUP_ELEMENTS:
            group = last_of_kind[kind] = []
            groups.append(group)
        group.append(weight)
    return {weight: group for group in map(WeightGroup, groups) for weight in group.weights}


def compiled_groups(groups: Iterable[WeightGroup]) -> Iterator[tuple[Sequence[WeightView], GroupView]]:
    """Yield the weights that a compiled graph gathers together, and their group as an operator takes it.

    They are a part of a `WeightGroup`, because a graph holds a group's text once for each of its weights.
    """
    for group in groups:
        for start in range(0, len(group.weights), _MOST_IN_A_GRAPH):
            weights = group.weights[start : start + _MOST_IN_A_GRAPH]
            if len(weights) > 1:
                yield weights, GroupView(tuple(each.view for each in weights), tuple(each.scale for each in weights))


def _numel(weight: WeightView) -> int:
    """Return the elements of the tensor that a layer multiplies with."""
    return math.prod(weight.read_shape)


class _DeferredGrads:
    """Gradients of dense weights that nodes leave to the one behind them all.

    A `_PartNode` leaves its gradient to the `_FlatNode`, and a `_CombinedNode` to the `_GatheredNode`, each of which
    computes the gradients of all by one kernel. Autograd runs the node behind after every node that leaves it one,
    whether or not that node returned a gradient. In between, an optimizer may step in a hook of a basis, so `bases`
    holds the bases as `combine_group` read them, concatenated along their rows.
    """

    bases: Tensor | None = None

    def __init__(self) -> None:
        # Keyed by the engine's number of the backward pass. Only the pass holds the value, as in `GradBuffer`.
        self._by_pass: weakref.WeakValueDictionary[int, _DeferredInPass] = weakref.WeakValueDictionary()

    def defer(self, node: Any, index: Any, grad: Tensor) -> bool:
        """Leave a gradient for the node behind, under an index that no other node has; return whether it was left.

        It is left only if a gradient may be added to the pool's gradient buffer (`GradBuffer.total`).
        """
        buffer = grad_buffer_of(node.next_functions[0][0])
        if buffer is None or buffer.total() is None:
            return False
        task = current_backward_pass()
        deferred = self._by_pass.get(task)
        if deferred is None:
            deferred = self._by_pass[task] = _DeferredInPass()
            at_end_of_backward(deferred.close)
        deferred.grads[index] = grad
        return True

    def take(self) -> dict[Any, Tensor]:
        """Return the gradients left in this backward pass by their indices, in ascending order."""
        deferred = self._by_pass.pop(current_backward_pass(), None)
        return {} if deferred is None else dict(sorted(deferred.grads.items()))


class _DeferredInPass:
    """The gradients left in one backward pass, by their indices."""

    def __init__(self) -> None:
        self.grads: dict[Any, Tensor] = {}

    def close(self) -> None:
        """Free the gradients."""
        self.grads.clear()


class _GatheredNode(torch.autograd.Function):
    """The node behind dense weights, or behind the coefficients of weights that have bases.

    The node keeps the chunk table as an attribute instead of saving it. Like the gate, the node may therefore run in a
    checkpointed region that reads fewer or other weights when the region is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, pool: Tensor, table: Tensor, group: WeightGroup, values: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.table, ctx.group, ctx.pool_shape = table, group, pool.shape
        ctx.deferred = None if group.weights[0].basis_index is None else _DeferredGrads()
        # As in `dispatch.implementation`: a result must not count as a view created inside this node.
        with without_view_tracking():
            if values is not None:
                return (values.view_as(values),)
            if (kernels := group.kernels(pool)) is not None:
                with on_device_of(pool):
                    return tuple(kernels.gather(pool, table))
        # With view tracking, because an operator needs it to look for tangents.
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
    """Add the gradients to the pass's buffer by one kernel; return whether that was done.

    It is not done if no kernel fits, if the pass has no buffer, if most gradients are missing, or if the pool has more
    slots than the weights have tiles: the kernel visits every slot, and the gradients are copied into one tensor first.
    A gradient is missing if the layer did not use its gathered weight. For example, a pooler with few rows of
    activations multiplies from the pool instead.
    """
    if torch.compiler.is_compiling():
        return False
    present = [grad for grad in grads if grad is not None]
    reader = ctx.next_functions[0][0]
    if 2 * len(present) <= len(grads) or len({grad.dtype for grad in present}) != 1 or not is_wanted(reader):
        return False
    kernels = ctx.group.kernels(present[0])
    if kernels is not None and kernels.share < 1:
        return False
    buffer = grad_buffer_of(reader)
    if kernels is None or buffer is None or (total := buffer.total()) is None:
        return False
    with on_device_of(total):
        if len(present) < len(grads):
            zero = present[0].new_zeros(())
            pairs = zip(ctx.group.weights, grads, strict=True)
            shapes = ((weight.gathered_shape if bases is None else weight.read_shape, grad) for weight, grad in pairs)
            present = [zero.expand(shape) if grad is None else grad for shape, grad in shapes]
        kernels.reduce_(total, present, ctx.table, bases)
    return True


def _reduce_deferred(ctx: Any, deferred: dict[int, Tensor]) -> None:
    """Add deferred gradients to the pass's buffer, by one kernel if most of the group's gradients are there."""
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
    """The node behind a dense weight that one kernel computed from its basis, together with other weights.

    It saves the tensors that the node of `ops.combine` saves, because a checkpoint may recompute the weight by that
    node. Only the coefficients' gradient is left to `_GatheredNode`, which computes those of all weights by one kernel.
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
        # The coefficients require a gradient; otherwise the weight would not have been gathered with a graph.
        coefficients, basis = ctx.saved_tensors
        rows = grad.reshape(-1, basis.shape[1])
        of_basis = None if coefficients is None else basis_grad(coefficients, rows, ctx.grad_scale).to(ctx.dtype)
        if not torch.compiler.is_compiling():
            node = ctx.next_functions[0][0]
            if not is_wanted(node) or node.deferred.defer(node, ctx.index, rows):
                return None, of_basis, None, None, None
        return coefficient_grad(rows, basis, ctx.grad_scale), of_basis, None, None, None


class _FlatNode(torch.autograd.Function):
    """The node behind the flat tensor of a group, in a graph that a compiler records."""

    @staticmethod
    def forward(ctx: Any, pool: Tensor, table: Tensor, group: GroupView) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.table, ctx.group, ctx.pool_shape = table, group, pool.shape
        ctx.deferred = _DeferredGrads()
        # How often each weight was read.
        ctx.readers = Counter()
        return ops.gather_group(pool, table, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        group, table = ctx.group, ctx.table
        deferred = ctx.deferred.take()
        if first := {number: part for (reader, number), part in deferred.items() if reader == 0}:
            grad = group.joined(first) if grad is None else grad + group.joined(first)
        total: Tensor | None = None
        if grad is not None:
            total = pool_gradient(ctx, 0, "reduce_group", grad, table, group.text, pool_shape=ctx.pool_shape)
        for (reader, number), part in deferred.items():
            if reader > 0:
                # Gradients of one weight's readers are summed in float32, as the pool's.
                place = group.views[number], group.scales[number]
                more = pool_gradient(ctx, 0, "reduce", part, table, *place, pool_shape=ctx.pool_shape)
                assert more is None, "there was a buffer to add to when the gradient was deferred"
        return total, None, None


class _PartNode(torch.autograd.Function):
    """The node behind one weight of a flat tensor. It leaves its gradient to the `_FlatNode`, which runs after all."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, group: GroupView, number: int, reader: int) -> Tensor:
        ctx.set_materialize_grads(False)
        # Keeps the flat tensor for the weights that are read later; the flat tensor does not know its parts.
        ctx.flat, ctx.group, ctx.number, ctx.reader = flat, group, number, reader
        with without_view_tracking():
            return group.part(flat, number)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grads
        node = ctx.next_functions[0][0]
        if grad is None or node.deferred.defer(node, (ctx.reader, ctx.number), grad):
            return None, None, None, None
        return ctx.group.joined({ctx.number: grad}), None, None, None


def gather_flat(pool: Tensor, table: Tensor, group: GroupView) -> Tensor:
    """Return `ops.gather_group` behind a node that takes the gradients of all its parts together.

    Args:
        pool: the pool that the forward pass reads.
        table: the pool's chunk table.
        group: the weights.
    """
    return _FlatNode.apply(pool, table, group)


def flat_part(flat: Tensor, group: GroupView, number: int) -> Tensor:
    """Return the matrix of one weight in what `gather_flat` returned, for one reader."""
    readers: Counter[int] = cast(Any, flat.grad_fn).readers
    readers[number] += 1
    return _PartNode.apply(flat, group, number, readers[number] - 1)


def combine_group(group: WeightGroup, coefficients: Sequence[Tensor], bases: Sequence[Tensor]) -> list[Tensor] | None:
    """Return a group's dense weights for `combined_weight`, computed by one kernel; None if no kernel fits.

    Args:
        group: the weights.
        coefficients: the tensors that `gather_together` returned.
        bases: each weight's basis.
    """
    kernels = group.kernels(coefficients[0])
    if kernels is None or not kernels.are_together(coefficients):
        return None
    with torch.no_grad(), on_device_of(coefficients[0]):
        stacked = torch.cat(list(bases))
        weights = kernels.combine(coefficients, stacked)
    node: Any = coefficients[0].grad_fn
    if node is not None:
        node.deferred.bases = stacked
    return weights


def combined_weight(coefficients: Tensor, basis: Tensor, grad_scale: float, values: Tensor, index: int) -> Tensor:
    """Return a weight that `combine_group` computed, with the derivatives of `ops.combine(coefficients, basis, …)`.

    Args:
        coefficients: the weight's coefficients, from `gather_together`.
        basis: the weight's basis.
        grad_scale: the factor of the basis's gradient.
        values: the weight, from `combine_group`.
        index: the weight's number in the group.
    """
    return _CombinedNode.apply(coefficients, basis, grad_scale, values, index)


def gather_together(pool: Tensor, table: Tensor, group: WeightGroup) -> tuple[Tensor, ...]:
    """Return a group's dense weights, or the coefficients of weights with bases, all behind one autograd node.

    The node runs when the gradients of all of them have arrived.

    Args:
        pool: the pool that the forward pass reads.
        table: the pool's chunk table.
        group: the weights.
    """
    return _GatheredNode.apply(pool, table, group, None)


def gathered_again(pool: Tensor, table: Tensor, weight: WeightView, values: Tensor) -> Tensor:
    """Return an already gathered weight behind an autograd node of its own.

    The gradients of the weight's readers are then summed in the pool's gradient in float32, not in the weight's dtype.
    """
    return _GatheredNode.apply(pool, table, WeightGroup([weight]), values.detach())[0]

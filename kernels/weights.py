"""Dense weights from the pool that a training pass keeps: several through one node of autograd, which saves nothing.

Their layers then multiply by torch's own operators, as dense layers do. That takes memory for the weights until the
backward pass, where `ops.linear` would gather each again; and it takes less of the host's time, which is what a step
with small layers waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from roastify.kernels import ops
from roastify.kernels.sink import is_wanted, sink_of
from roastify.kernels.view import Weight, alike

if TYPE_CHECKING:
    from roastify.kernels.group import Group

# Elements of the weights of a group. The gradients of all of it are there before any of them goes.
_GROUP_ELEMENTS = 1 << 24


class WeightGroup:
    """Weights that a pass gathers together, and sums the gradients of together."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = tuple(weights)
        self._kernels: Group | None = None

    def kernels(self, pool: Tensor) -> Group | None:
        """Return the kernels for the group, if there are any for this pool's device and dtype and they can run now."""
        if not pool.is_cuda or len(self.weights) == 1 or ops.is_watched(pool):
            return None
        # It imports Triton.
        from roastify.kernels import group

        if not group.fits(pool, self.weights[0].view):
            return None
        if self._kernels is None:
            self._kernels = group.Group(self.weights)
        return self._kernels if self._kernels.is_ready(pool.device) else None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their kernels' tables where they are used.
        return {"weights": self.weights, "_kernels": None}


def grouped(weights: Iterable[Weight]) -> dict[Weight, WeightGroup]:
    """Return the group of each weight.

    Groups are fixed, whatever a pass reads: the order in which gradients are added decides their last bits, and those
    of a first pass must be those of any other. Weights of a group are alike in what decides whether they are kept.
    """
    chosen: dict[tuple[Any, ...], list[Weight]] = {}
    found: list[list[Weight]] = []
    for weight in weights:
        view = weight.view
        # A product keeps its weight by its size; convolutions, the ones in strips, do always.
        size = None if view.strips else (view.rows, view.cols)
        kind = alike(view), size, weight.transposed
        group = chosen.get(kind)
        if group is None or sum(other.view.numel for other in group) + view.numel > _GROUP_ELEMENTS:
            group = chosen[kind] = []
            found.append(group)
        group.append(weight)
    made = map(WeightGroup, found)
    return {weight: group for group in made for weight in group.weights}


class _Dense(torch.autograd.Function):
    """The node behind dense weights.

    It keeps the table as an attribute: like the gate it may then run in a checkpointed region that reads fewer or other
    weights when it is run again.
    """

    @staticmethod
    def forward(ctx: Any, pool: Tensor, table: Tensor, group: WeightGroup, values: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.table, ctx.group, ctx.pool_shape = table, group, pool.shape
        # As in `ops`: a result must not count as a view made in here.
        with torch._C._ExcludeDispatchKeyGuard(ops.VIEW_TRACKING):
            if values is not None:
                return (values.view_as(values),)
            if (kernels := group.kernels(pool)) is not None:
                with ops.on_device_of(pool):
                    return tuple(kernels.gather(pool, table))
        # Outside: an operator looks for tangents, which takes the tracking of views.
        matrices = [ops.gather(pool, table, weight.view, weight.scale) for weight in group.weights]
        with torch._C._ExcludeDispatchKeyGuard(ops.VIEW_TRACKING):
            return tuple(
                (matrix.t() if weight.transposed else matrix).reshape(weight.shape)
                for matrix, weight in zip(matrices, group.weights, strict=True)
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if _reduced_together(ctx, grads):
            return None, None, None, None
        total: Tensor | None = None
        for weight, grad in zip(ctx.group.weights, grads, strict=True):
            if grad is None:
                continue
            view = weight.view
            matrix = grad.t() if weight.transposed else grad.reshape(view.rows, view.cols)
            part = ops.pool_gradient(ctx, 0, "reduce", matrix, ctx.table, view, weight.scale, pool_shape=ctx.pool_shape)
            total = part if total is None else total if part is None else total + part
        return total, None, None, None


def _reduced_together(ctx: Any, grads: Sequence[Tensor | None]) -> bool:
    """Add the gradients to the buffer of the backward pass by one kernel, if there is one and most of them are there.

    Some never are: a group's other weights may be kept for nothing, as that of a pooler that few rows go through.
    """
    if torch.compiler.is_compiling():
        return False
    present = [grad for grad in grads if grad is not None]
    read = ctx.next_functions[0][0]
    if 2 * len(present) <= len(grads) or len({grad.dtype for grad in present}) != 1 or not is_wanted(read):
        return False
    kernels = ctx.group.kernels(present[0])
    sink = sink_of(read)
    if kernels is None or sink is None or (total := sink.total()) is None:
        return False
    with ops.on_device_of(total):
        if len(present) < len(grads):
            zero = present[0].new_zeros(())
            pairs = zip(ctx.group.weights, grads, strict=True)
            present = [zero.expand(weight.shape) if grad is None else grad for weight, grad in pairs]
        kernels.reduce_(total, present, ctx.table)
    return True


def gather_weights(pool: Tensor, table: Tensor, group: WeightGroup) -> tuple[Tensor, ...]:
    """Return a group's dense weights, of the pool's dtype, whose gradients go to the pool through one node.

    The node runs when the gradients of all of them are there.

    Args:
        pool: the pool as a pass reads it.
        table: its chunk table.
        group: which.
    """
    return _Dense.apply(pool, table, group, None)


def again(pool: Tensor, table: Tensor, weight: Weight, values: Tensor) -> Tensor:
    """Return a dense weight that was gathered already, through a node of its own.

    So the gradients of its readers meet in the pool's, in float32, not in the weight's own dtype.
    """
    return _Dense.apply(pool, table, WeightGroup([weight]), values.detach())[0]

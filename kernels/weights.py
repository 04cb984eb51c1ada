"""Dense weights from the pool that a training pass keeps: several through one node of autograd, which saves nothing.

Their layers then multiply by torch's own operators, as dense layers do. That takes memory for the weights until the
backward pass, where `ops.linear` would gather each again; and it takes less of the host's time, which is what a step
with small layers waits for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Bases:
    """The bases of a group's weights, and what the backward pass makes their gradients of.

    It gathers the coefficients again from the pool, which is small, instead of holding them. Tensors are attributes of
    the node for the same reason as the gate's are (`passes`), so it is for the node to see whether they have changed.

    Args:
        values: each weight's basis.
        scales: what each one's gradient is multiplied by.
        pool: as the pass reads it.
    """

    values: tuple[Tensor, ...]
    scales: tuple[float, ...]
    pool: Tensor

    def versions(self) -> list[int]:
        """Return how often each basis, and then the pool, has been written to in sight of autograd."""
        return [tensor._version for tensor in (*self.values, self.pool)]

    def check(self, versions: list[int], used: Sequence[bool], wanted: Sequence[bool]) -> None:
        """Refuse to compute with other values than the forward pass did, as autograd refuses it of what it saved.

        Args:
            versions: of the forward pass.
            used: whether a weight's gradient is there, which goes through its basis.
            wanted: whether the gradient of its basis is, which takes coefficients from the pool.

        Raises:
            RuntimeError: what is needed was written to since.
        """
        needed = [*used, any(wanted)]
        now = self.versions()
        if any(need and before != after for need, before, after in zip(needed, versions, now, strict=True)):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                "basis of kernels, or the pool that their coefficients are in. Take the optimizer's step, and write to "
                "them, after the backward pass"
            )


class WeightGroup:
    """Weights that a pass gathers together, and sums the gradients of together."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = tuple(weights)
        self._kernels: Group | None = None

    def kernels(self, pool: Tensor, scales: tuple[float, ...] = ()) -> Group | None:
        """Return the kernels for the group, if there are any for this pool's device and dtype and they can run now."""
        if not pool.is_cuda or len(self.weights) == 1 or ops.is_watched(pool):
            return None
        # It imports Triton.
        from roastify.kernels import group

        if not group.fits(pool, self.weights[0]):
            return None
        if self._kernels is None:
            self._kernels = group.Group(self.weights)
        return self._kernels if self._kernels.is_ready(pool.device, scales) else None

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
        kind = alike(view), size, weight.transposed, weight.basis_shape
        group = chosen.get(kind)
        if group is None or sum(math.prod(other.shape) for other in (*group, weight)) > _GROUP_ELEMENTS:
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
    def forward(
        ctx: Any,
        pool: Tensor,
        table: Tensor,
        group: WeightGroup,
        values: Tensor | None,
        scales: tuple[float, ...],
        *bases: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.table, ctx.group, ctx.pool_shape = table, group, pool.shape
        ctx.bases = None
        if bases:
            ctx.bases = Bases(bases, scales, pool)
            ctx.versions = ctx.bases.versions()
        # As in `ops`: a result must not count as a view made in here.
        with torch._C._ExcludeDispatchKeyGuard(ops.VIEW_TRACKING):
            if values is not None:
                return (values.view_as(values),)
            if (kernels := group.kernels(pool, scales)) is not None:
                with ops.on_device_of(pool):
                    return tuple(kernels.gather(pool, table, bases))
        # Outside: an operator looks for tangents, which takes the tracking of views.
        matrices = [ops.gather(pool, table, weight.view, weight.scale) for weight in group.weights]
        if bases:
            matrices = [
                ops.combine(matrix.reshape(-1, basis.shape[0]), basis)
                for matrix, basis in zip(matrices, bases, strict=True)
            ]
        with torch._C._ExcludeDispatchKeyGuard(ops.VIEW_TRACKING):
            return tuple(
                (matrix.t() if weight.transposed else matrix).reshape(weight.shape)
                for matrix, weight in zip(matrices, group.weights, strict=True)
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        bases: Bases | None = ctx.bases
        used = [grad is not None for grad in grads]
        # Of each weight, whether its basis's gradient is wanted; nothing where there are no bases.
        wanted = [needed and there for needed, there in zip(ctx.needs_input_grad[_BASES:], used, strict=False)]
        if bases is not None:
            bases.check(ctx.versions, used, wanted)
        basis_grads: list[Tensor | None] = [None] * len(wanted)
        if _reduced_together(ctx, grads, wanted, basis_grads):
            return None, *_NO_OTHERS, *basis_grads
        total: Tensor | None = None
        for index, (weight, grad) in enumerate(zip(ctx.group.weights, grads, strict=True)):
            if grad is None:
                continue
            view = weight.view
            if bases is not None:
                grad, basis_grads[index] = _through_basis(ctx, bases, index, grad, wanted[index])
            matrix = grad.t() if weight.transposed else grad.reshape(view.rows, view.cols)
            part = ops.pool_gradient(ctx, 0, "reduce", matrix, ctx.table, view, weight.scale, pool_shape=ctx.pool_shape)
            total = part if total is None else total if part is None else total + part
        return total, *_NO_OTHERS, *basis_grads


# What a node has besides the pool, which comes first, and the bases, which come last.
_NO_OTHERS = (None,) * 4
_BASES = 1 + len(_NO_OTHERS)


def _through_basis(ctx: Any, bases: Bases, index: int, grad: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of a weight's coefficients, and of its basis if it is wanted."""
    basis, scale, weight = bases.values[index], bases.scales[index], ctx.group.weights[index]
    rows = grad.reshape(-1, basis.shape[1])
    of_coefficients = ops.coefficient_grad(rows, basis, scale)
    if not wanted:
        return of_coefficients, None
    coefficients = ops.gather(bases.pool, ctx.table, weight.view, weight.scale).reshape(-1, basis.shape[0])
    return of_coefficients, ops.basis_grad(coefficients, rows, scale).to(basis.dtype)


def _reduced_together(
    ctx: Any, grads: Sequence[Tensor | None], wanted: Sequence[bool], basis_grads: list[Tensor | None]
) -> bool:
    """Add the gradients to the buffer of the backward pass by one kernel, if there is one and most of them are there.

    Some never are: a group's other weights may be kept for nothing, as that of a pooler that few rows go through. Those
    of the bases, as far as they are wanted, go to `basis_grads`.
    """
    if torch.compiler.is_compiling():
        return False
    present = [grad for grad in grads if grad is not None]
    read = ctx.next_functions[0][0]
    if 2 * len(present) <= len(grads) or len({grad.dtype for grad in present}) != 1 or not is_wanted(read):
        return False
    bases: Bases | None = ctx.bases
    kernels = ctx.group.kernels(present[0], () if bases is None else bases.scales)
    sink = sink_of(read)
    if kernels is None or sink is None or (total := sink.total()) is None:
        return False
    with ops.on_device_of(total):
        if len(present) < len(grads):
            zero = present[0].new_zeros(())
            pairs = zip(ctx.group.weights, grads, strict=True)
            present = [zero.expand(weight.shape) if grad is None else grad for weight, grad in pairs]
        found = kernels.reduce_(total, present, ctx.table, bases, any(wanted))
    if bases is not None and found is not None:
        parts = zip(wanted, found.unbind(), bases.values, strict=True)
        basis_grads[:] = [part.to(basis.dtype) if needed else None for needed, part, basis in parts]
    return True


def gather_weights(
    pool: Tensor, table: Tensor, group: WeightGroup, bases: Sequence[tuple[Tensor, float]] = ()
) -> tuple[Tensor, ...]:
    """Return a group's dense weights, of the pool's dtype, whose gradients go to the pool through one node.

    The node runs when the gradients of all of them are there.

    Args:
        pool: the pool as a pass reads it.
        table: its chunk table.
        group: which.
        bases: each weight's basis, and what its gradient is multiplied by, if they have any.
    """
    return _Dense.apply(pool, table, group, None, *_taken_apart(bases))


def again(
    pool: Tensor, table: Tensor, weight: Weight, values: Tensor, bases: Sequence[tuple[Tensor, float]] = ()
) -> Tensor:
    """Return a dense weight that was gathered already, through a node of its own.

    So the gradients of its readers meet in the pool's, in float32, not in the weight's own dtype.
    """
    return _Dense.apply(pool, table, WeightGroup([weight]), values.detach(), *_taken_apart(bases))[0]


def _taken_apart(bases: Sequence[tuple[Tensor, float]]) -> tuple[Any, ...]:
    """Return the scales and then each basis: nodes find tensors only among their own arguments."""
    return (tuple(scale for _, scale in bases), *(basis for basis, _ in bases))

"""Dense weights from the pool that a training pass keeps: several through one node of autograd, which saves nothing.

Their layers then multiply by torch's own operators, as dense layers do. That takes memory for the weights until the
backward pass, where `ops.linear` would gather each again; and it takes less of the host's time, which is what a step
with small layers waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roastify.kernels import ops
from roastify.kernels.view import TileView


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as its layer wants it. Each is equal to itself alone: as a key it must cost the host nothing.

    Args:
        view: where it lies in the pool.
        scale: λ.
        shape: of the dense tensor.
        transposed: whether the matrix in the pool is its transpose.
    """

    view: TileView
    scale: float
    shape: torch.Size
    transposed: bool


class _Dense(torch.autograd.Function):
    """The node behind dense weights.

    It keeps the table as an attribute: like the gate it may then run in a checkpointed region that reads fewer or other
    weights when it is run again.
    """

    @staticmethod
    def forward(
        ctx: Any, pool: Tensor, table: Tensor, weights: Sequence[Weight], values: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.table, ctx.weights, ctx.pool_shape = table, weights, pool.shape
        # As in `ops`: a result must not count as a view made in here.
        with torch._C._ExcludeDispatchKeyGuard(ops.VIEW_TRACKING):
            if values is not None:
                return (values.view_as(values),)
            dense = []
            for weight in weights:
                matrix = ops.gather(pool, table, weight.view, weight.scale)
                dense.append((matrix.t() if weight.transposed else matrix).reshape(weight.shape))
            return tuple(dense)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        total: Tensor | None = None
        for weight, grad in zip(ctx.weights, grads, strict=True):
            if grad is None:
                continue
            view = weight.view
            matrix = grad.t() if weight.transposed else grad.reshape(view.rows, view.cols)
            part = ops.pool_gradient(ctx, 0, "reduce", matrix, ctx.table, view, weight.scale, pool_shape=ctx.pool_shape)
            total = part if total is None else total if part is None else total + part
        return total, None, None, None


def gather_weights(pool: Tensor, table: Tensor, weights: Sequence[Weight]) -> tuple[Tensor, ...]:
    """Return dense weights, of the pool's dtype, whose gradients go to the pool through one node.

    The node runs when the gradients of all of them are there.

    Args:
        pool: the pool as a pass reads it.
        table: its chunk table.
        weights: which.
    """
    return _Dense.apply(pool, table, weights, None)


def again(pool: Tensor, table: Tensor, weight: Weight, values: Tensor) -> Tensor:
    """Return a dense weight that was gathered already, through a node of its own.

    So the gradients of its readers meet in the pool's, in float32, not in the weight's own dtype.
    """
    return _Dense.apply(pool, table, (weight,), values.detach())[0]

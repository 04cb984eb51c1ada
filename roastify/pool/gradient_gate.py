"""The gradient gate: the autograd node that sums the pool's gradient, and the nodes that read it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from roastify.kernels.gathered_weights import WeightGroup
from roastify.kernels.grad_buffer import GradBuffer
from roastify.kernels.reference import summed_in
from roastify.kernels.view import WeightView
from roastify.pool.preconditioner import divide_, divided


class Pool(Protocol):
    """The attributes of a pool that a pass needs: the Parameter, the chunk table, 1/Γ and whether to divide by Γ."""

    weight: nn.Parameter
    table: Tensor
    precondition: bool
    per_slot: Tensor
    uneven_slots: Tensor
    uneven: Tensor

    def parameter(self) -> nn.Parameter:
        """Return `weight` without the cost of an attribute lookup on a module."""

    def group_of(self, weight: WeightView) -> WeightGroup:
        """Return the group of weights that a pass gathers together with this one."""

    def basis(self, index: int) -> tuple[Tensor, float]:
        """Return a layer's basis kernels, and the factor for their gradient."""

    def plain_basis(self, index: int) -> nn.Parameter | None:
        """Return the Parameter of a layer's basis kernels, or None if they are computed; compute nothing."""


class _GateNode(torch.autograd.Function):
    """The node between the readers and the pool's Parameter. Autograd runs its backward once, after every reader's.

    The node's output is a token: a tensor of the pool's shape that takes no memory and holds no value. Gradients arrive
    in two ways. Most layers add their gradient to the gradient buffer, which the gate empties. Autograd sums the other
    gradients in the token's dtype. That is float64 for a float64 pool, and float32 for every other pool.

    1/Γ is held in attributes instead of being saved for backward, because a node that saves nothing may do two things
    more. A checkpointed region may use it although it was created before the region began. It may run again after its
    graph was freed.
    """

    @staticmethod
    def forward(
        weight: Tensor,
        buffer: GradBuffer | None,
        per_slot: Tensor | None,
        uneven_slots: Tensor | None,
        uneven: Tensor | None,
    ) -> Tensor:
        return weight.new_empty((), dtype=summed_in(weight.dtype)).expand(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ctx.buffer, *ctx.inverse_gamma = inputs
        ctx.dtype = weight.dtype
        if ctx.buffer is not None:
            ctx.buffer.set_gate(ctx)
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        total = None if ctx.buffer is None else ctx.buffer.take()
        if total is not None:
            grad = total if grad is None else total.add_(grad)
        if grad is None:
            return None, None, None, None, None
        per_slot, uneven_slots, uneven = ctx.inverse_gamma
        if per_slot is not None:
            if total is not None:
                divide_(grad, per_slot, uneven_slots, uneven)
            else:
                grad = divided(grad, per_slot, uneven_slots, uneven)
        return grad.to(ctx.dtype), None, None, None, None


class _ReadNode(torch.autograd.Function):
    """The node through which layers read a copy of the pool. Its gradient goes to the gate's token.

    Operators find the gradient buffer as an attribute of this node (`grad_buffer_of`). The node also keeps its gate
    alive.
    """

    # No `setup_context`: with one, torch inspects the signature at each call, which costs more than everything else.
    @staticmethod
    def forward(ctx: Any, token: Tensor, copy: Tensor, gate: Gate | None) -> Tensor:
        ctx.dtype = token.dtype
        if gate is not None:
            ctx.gate, ctx.grad_buffer = gate, gate.buffer
            ctx.set_materialize_grads(False)
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        return None if grad is None else grad.to(ctx.dtype), None, None


class Gate:
    """A gate: the token, which keeps the gate's node alive, and the gradient buffer.

    The node may hold the buffer. It may not hold the token: the token is the node's own output, so that would be a
    reference cycle. A gate holds no values of the pool. Therefore all reads of the pool can share one gate, inside and
    outside of a forward pass, for as long as a graph holds the gate.
    """

    def __init__(self, pool: Pool, plain: bool) -> None:
        # A reference, so that no other tensor gets the Parameter's id or memory while this gate exists.
        self.weight = weight = pool.parameter()
        self.buffer = GradBuffer(weight.shape, summed_in(weight.dtype), weight.device) if plain else None
        gamma = (pool.per_slot, pool.uneven_slots, pool.uneven) if pool.precondition else (None, None, None)
        self.token: Tensor = _GateNode.apply(weight, self.buffer, *gamma)

    def read(self, copy: Tensor) -> Tensor:
        """Return a copy of the pool for layers to read. Its gradient goes to this gate."""
        return _ReadNode.apply(self.token, copy, None if self.buffer is None else self)

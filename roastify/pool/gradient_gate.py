"""The gradient gate: the one node of autograd through which the pool's gradient leaves, and the nodes that read it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from roastify.kernels.grad_buffer import GradBuffer
from roastify.kernels.kept_weights import WeightGroup
from roastify.kernels.reference import summed_in
from roastify.kernels.view import WeightView
from roastify.pool.preconditioner import divide_, divided


class Pool(Protocol):
    """What a pass needs of a pool: its Parameter and chunk table, 1/Γ and whether to divide by Γ."""

    weight: nn.Parameter
    table: Tensor
    precondition: bool
    per_slot: Tensor
    uneven_slots: Tensor
    uneven: Tensor

    def parameter(self) -> nn.Parameter:
        """Return `weight`, quickly."""

    def group_of(self, weight: WeightView) -> WeightGroup:
        """Return the weights that are gathered with this one."""

    def basis(self, index: int) -> tuple[Tensor, float]:
        """Return basis kernels, and what their gradient is to be multiplied by."""

    def plain_basis(self, index: int) -> nn.Parameter | None:
        """Return the Parameter that basis kernels are, or None if they are made of something, and do not make them."""


class _GateNode(torch.autograd.Function):
    """The node between the readers and the pool's Parameter: autograd runs its backward once, after every reader's.

    Its output is a token: a tensor of the pool's shape that takes no memory and holds no value. Gradients arrive in two
    ways. Most layers add theirs to the gradient buffer, which the gate empties. Autograd adds up the rest, in the
    token's dtype: float32 even where the pool is narrower (float64 for float64).

    Γ is kept as attributes, not saved for backward. A node that saves nothing may run in a checkpointed region even
    though the forward pass made it before, and it may run again after its graph was freed.
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
    """The node through which layers read a copy of the pool; its gradient goes to the gate's token.

    Operators find the gradient buffer on it (`grad_buffer_of`). It also keeps its gate in use.
    """

    # Without `setup_context`: with one, torch asks for the signature at each call, which costs more than the rest.
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
    """A gate's node, by its token, and its gradient buffer.

    The node may hold the buffer, but not the token, which is an output of its own. A gate holds no values of the pool.
    All reads therefore share one, in and outside of a forward pass, for as long as a graph holds it.
    """

    def __init__(self, pool: Pool, plain: bool) -> None:
        # Held: while this exists, no other tensor can take the Parameter's identity or memory.
        self.weight = weight = pool.weight
        self.buffer = GradBuffer(weight.shape, summed_in(weight.dtype), weight.device) if plain else None
        gamma = (pool.per_slot, pool.uneven_slots, pool.uneven) if pool.precondition else (None, None, None)
        self.token: Tensor = _GateNode.apply(weight, self.buffer, *gamma)

    def read(self, copy: Tensor) -> Tensor:
        """Return a copy of the pool as layers read it: its gradient goes to this gate."""
        return _ReadNode.apply(self.token, copy, None if self.buffer is None else self)

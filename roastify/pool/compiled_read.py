"""How a compiled model reads the pool: one gate a graph, one gradient buffer a backward pass.

`torch.compile` works in two stages. The first stage turns a model's Python into a graph of operators, where `read` is
one operator. The second stage runs that graph once, forward and backward, on tensors that record every operation. The
second stage runs the nodes and the buffer of `gradient_gate`. So the recorded backward pass has one buffer, and every
layer adds to that buffer in place.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from roastify.pool.gradient_gate import Gate, Pool


@dataclass
class _PoolArguments:
    """A pool, rebuilt from the arguments of the `read` operator."""

    weight: Tensor
    precondition: bool
    per_slot: Tensor | None
    uneven_slots: Tensor | None
    uneven: Tensor | None

    def parameter(self) -> Tensor:
        return self.weight


class _RecordedGate(Gate):
    """A gate that is created while a compiler records a graph."""

    def __init__(self, pool: _PoolArguments) -> None:
        super().__init__(cast(Pool, pool), plain=True)
        assert self.buffer is not None
        self.buffer.recorded = True
        # The gate is connected to the tensor's history at this moment. If autograd records an in-place change of the
        # tensor later, the tensor has another `grad_fn`, and needs another gate.
        self.origin = pool.weight.grad_fn


# The last gate of each recording tensor that stands for a pool. The references are weak: only graphs keep a gate alive.
_gates = WeakIdKeyDictionary()


def _recorded_gate_of(pool: _PoolArguments) -> Gate:
    if type(pool.weight) in (Tensor, nn.Parameter):
        # This is an ordinary tensor, so nothing is being recorded: a backend runs the graph as it is.
        return Gate(cast(Pool, pool), plain=False)
    last = _gates.get(pool.weight)
    gate: _RecordedGate | None = None if last is None else last()
    if gate is None or gate.origin is not pool.weight.grad_fn:
        gate = _RecordedGate(pool)
        _gates[pool.weight] = weakref.ref(gate)
    return gate


def _read(
    weight: Tensor, per_slot: Tensor | None, uneven_slots: Tensor | None, uneven: Tensor | None, dtype: torch.dtype
) -> Tensor:
    gate = _recorded_gate_of(_PoolArguments(weight, per_slot is not None, per_slot, uneven_slots, uneven))
    return gate.read(weight.detach().to(dtype))


_library = torch.library.Library("roastify", "FRAGMENT")
_library.define(
    "read(Tensor(a) weight, Tensor? per_slot, Tensor? uneven_slots, Tensor? uneven, ScalarType dtype) -> Tensor(a)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("read", _read, "CompositeImplicitAutograd")


def read(pool: Pool, dtype: torch.dtype) -> Tensor:
    """Return the pool's values in a dtype, as one operator of a graph; their gradient goes to the gate."""
    gamma = (pool.per_slot, pool.uneven_slots, pool.uneven) if pool.precondition else (None, None, None)
    return torch.ops.roastify.read.default(pool.parameter(), *gamma, dtype)

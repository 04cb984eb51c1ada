"""How a compiled model reads the pool: through one gate a graph, and with one buffer a backward pass.

`torch.compile` works in two stages. The first turns a model's Python into a graph of operators, and sees `read` as one
operator. The second runs that graph once with autograd, forward and backward, on tensors that record what is done to
them. It sees the nodes and the buffer of `gradient_gate`, so what it records is that layers add to one buffer in place.
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
class _Seen:
    """A pool as the operator sees it."""

    weight: Tensor
    precondition: bool
    per_slot: Tensor | None
    uneven_slots: Tensor | None
    uneven: Tensor | None


class _RecordedGate(Gate):
    """A gate that is passed while a compiler records."""

    def __init__(self, pool: _Seen) -> None:
        super().__init__(cast(Pool, pool), plain=True)
        assert self.buffer is not None
        self.buffer.recorded = True
        # The gate leads to the tensor as it was then. A tensor that was changed in place since, in sight of autograd,
        # needs another gate.
        self.origin = pool.weight.grad_fn


# The last gate of each recording tensor that stands for a pool; graphs alone hold it.
_gates = WeakIdKeyDictionary()


def _recorded_gate_of(pool: _Seen) -> Gate:
    if type(pool.weight) in (Tensor, nn.Parameter):
        # Nothing is recorded: a backend runs the graph as it is.
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
    gate = _recorded_gate_of(_Seen(weight, per_slot is not None, per_slot, uneven_slots, uneven))
    return gate.read(weight.detach().to(dtype))


_library = torch.library.Library("roastify", "FRAGMENT")
_library.define(
    "read(Tensor(a) weight, Tensor? per_slot, Tensor? uneven_slots, Tensor? uneven, ScalarType dtype) -> Tensor(a)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("read", _read, "CompositeImplicitAutograd")


def read(pool: Pool, dtype: torch.dtype) -> Tensor:
    """Return the pool's values in a dtype, with their gradient going to the gate, as one operator of a graph."""
    gamma = (pool.per_slot, pool.uneven_slots, pool.uneven) if pool.precondition else (None, None, None)
    return torch.ops.roastify.read.default(pool.weight, *gamma, dtype)

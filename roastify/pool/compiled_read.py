"""How a compiled model reads the pool: through one gate a graph, and with one buffer a backward pass, as eagerly.

`torch.compile` first takes a model's Python for a graph of operators; then it runs that graph once with autograd,
forward and backward, on tensors that record what is done to them. `read` is one operator to the first. To the second it
is the nodes and the sink of `passes`: what layers do in backward, adding to one buffer in place, is what is recorded.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from roastify.pool.forward_pass import Pool, _Door, _Read


@dataclass
class _Seen:
    """A pool as the operator sees it."""

    weight: Tensor
    precondition: bool
    per_slot: Tensor | None
    uneven_slots: Tensor | None
    uneven: Tensor | None


class _RecordedDoor(_Door):
    """A door whose gate and sink are passed while a compiler records."""

    def __init__(self, pool: _Seen) -> None:
        super().__init__(cast(Pool, pool), plain=True)
        assert self.sink is not None
        self.sink.recorded = True
        # The gate leads to the tensor as it was then: one that was since changed in place, in sight of autograd, has
        # another.
        self.origin = pool.weight.grad_fn


# The last door of each recording tensor that stands for a pool; graphs alone hold it.
_doors = WeakIdKeyDictionary()


def _door_of(pool: _Seen) -> _Door:
    if type(pool.weight) in (Tensor, nn.Parameter):
        # Nothing is recorded: a backend runs the graph as it is.
        return _Door(cast(Pool, pool), plain=False)
    last = _doors.get(pool.weight)
    door: _RecordedDoor | None = None if last is None else last()
    if door is None or door.origin is not pool.weight.grad_fn:
        door = _RecordedDoor(pool)
        _doors[pool.weight] = weakref.ref(door)
    return door


def _read(
    weight: Tensor, per_slot: Tensor | None, uneven_slots: Tensor | None, uneven: Tensor | None, dtype: torch.dtype
) -> Tensor:
    door = _door_of(_Seen(weight, per_slot is not None, per_slot, uneven_slots, uneven))
    return _Read.apply(door.token, weight.detach().to(dtype), door if door.sink is not None else None)


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

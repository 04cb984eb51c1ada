"""How a compiled model reads the pool: one gate a graph, one gradient buffer a backward pass.

`torch.compile` works in two stages. The first stage turns a model's Python into a graph of operators, where `read` is
one operator. The second stage runs that graph once, forward and backward, on tensors that record every operation. The
second stage runs the nodes and the buffer of `gradient_gate`. So the recorded backward pass has one buffer, and every
layer adds to that buffer in place.

Small weights that a graph keeps for its backward pass are gathered together, as in an eager pass, because each call of
an operator takes a compiled graph's host up to 100 µs. In the first stage `gathered` is an operator of each weight. In
the second stage the first weight of a group gathers the whole group, and the others take their parts of it. Only graphs
of a model's whole forward do so; in a graph of one block, most of a group would go unread.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from roastify.kernels import ops
from roastify.kernels.gathered_weights import flat_part, gather_flat
from roastify.kernels.group_view import group_of_text
from roastify.kernels.torch_internals import writes_recorded
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
        # What was gathered of each group, by what `_gathered` knows of the pool's values; the parts that layers read
        # keep it alive.
        self.flat: dict[tuple[Any, ...], weakref.ref[Tensor]] = {}


# Torch keeps compiled graphs on disk by their first stage, which does not show what `gathered` records in the second.
# So this number is a part of the first: raise it whenever the second stage records something else.
RECORDING = 1

# The last gate of each recording tensor that stands for a pool. The references are weak: only graphs keep a gate alive.
_gates: WeakIdKeyDictionary = WeakIdKeyDictionary()


# The recording tensors that stand for pools in graphs of whole forward passes.
_wholes: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _is_ordinary(weight: Tensor) -> bool:
    """Whether nothing is being recorded on a tensor: a backend runs the graph as it is."""
    return type(weight) in (Tensor, nn.Parameter)


def _recorded_gate_of(pool: _PoolArguments) -> Gate:
    if _is_ordinary(pool.weight):
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


def _gathered(
    weight: Tensor,
    per_slot: Tensor | None,
    uneven_slots: Tensor | None,
    uneven: Tensor | None,
    table: Tensor,
    text: str,
    number: int,
    dtype: torch.dtype,
    recording: int,
) -> Tensor:
    gate = _recorded_gate_of(_PoolArguments(weight, per_slot is not None, per_slot, uneven_slots, uneven))
    group = group_of_text(text)
    if not isinstance(gate, _RecordedGate) or weight not in _wholes:
        return ops.gather(gate.read(weight.detach().to(dtype)), table, group.views[number], group.scales[number])
    # A write to the pool between two layers is seen by the second.
    seen = text, dtype, weight._version, writes_recorded(weight)
    last = gate.flat.get(seen)
    flat = None if last is None else last()
    if flat is None:
        flat = gather_flat(gate.read(weight.detach().to(dtype)), table, group)
        gate.flat[seen] = weakref.ref(flat)
    return flat_part(flat, group, number)


def _begin_whole(weight: Tensor) -> None:
    if _is_ordinary(weight):
        return
    _wholes[weight] = True
    # As in an eager pass, nothing of an earlier one is used again: some writes through `.data` raise no version.
    last = _gates.get(weight)
    if last is not None and (gate := last()) is not None:
        gate.flat.clear()


_library = torch.library.Library("roastify", "FRAGMENT")
_library.define(
    "read(Tensor(a) weight, Tensor? per_slot, Tensor? uneven_slots, Tensor? uneven, ScalarType dtype) -> Tensor(a)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("read", _read, "CompositeImplicitAutograd")
_library.define(
    "gathered(Tensor weight, Tensor? per_slot, Tensor? uneven_slots, Tensor? uneven, Tensor table, str group, "
    "int number, ScalarType dtype, int recording) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("gathered", _gathered, "CompositeImplicitAutograd")
_library.define("begin_whole(Tensor weight) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("begin_whole", _begin_whole, "CompositeImplicitAutograd")


def read(pool: Pool, dtype: torch.dtype) -> Tensor:
    """Return the pool's values in a dtype, as one operator of a graph; their gradient goes to the gate."""
    return torch.ops.roastify.read.default(pool.parameter(), *_gamma(pool), dtype)


def gathered_matrix(pool: Pool, group: str, number: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix of a group's weight in a dtype, as one operator of a graph; its gradient goes to the gate.

    Args:
        pool: the pool.
        group: the group's `GroupView.text`.
        number: the weight's number in the group.
        dtype: of the result.
    """
    return torch.ops.roastify.gathered.default(
        pool.parameter(), *_gamma(pool), pool.table, group, number, dtype, RECORDING
    )


def begin_whole(pool: Pool) -> None:
    """Say that the graph that is being recorded holds a whole forward pass, so that `gathered` may gather groups."""
    torch.ops.roastify.begin_whole.default(pool.parameter())


def _gamma(pool: Pool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (pool.per_slot, pool.uneven_slots, pool.uneven) if pool.precondition else (None, None, None)

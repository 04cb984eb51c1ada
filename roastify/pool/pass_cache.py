"""What a forward pass makes of the pool once for all layers: copies in a compute dtype, dense weights, and its gate."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roastify.errors import RoastError
from roastify.kernels import ops
from roastify.kernels.kept_weights import WeightGroup, combine_group, combined_weight, gather_group, gathered_again
from roastify.kernels.torch_internals import (
    NO_PASS,
    SELECTIVE_CHECKPOINTS,
    at_end_of_backward,
    current_backward_pass,
    current_raw_stream,
    dispatch_mode_stack,
    in_func_transform,
    is_captured,
    num_dispatch_modes,
    without_dispatch_modes,
)
from roastify.kernels.view import WeightView
from roastify.pool.gradient_gate import Gate, Pool


class _Combined(NamedTuple):
    """A dense weight that was made of its basis together with others; `number` is its own among them."""

    values: Tensor
    number: int
    basis: Tensor
    version: int
    address: int

    def is_of(self, basis: Tensor) -> bool:
        """Whether a basis is the one that the weight was made of, unchanged."""
        return basis is self.basis and basis._version == self.version and basis.data_ptr() == self.address


class PoolCache:
    """What was made of the pool's present content: a copy for each compute dtype, dense weights, and the gate."""

    def __init__(self, pool: Pool, whole: bool = False) -> None:
        self.pool = pool
        # Whether a whole forward pass reads it: then every weight of a group that is gathered will be read.
        self.whole = whole
        # Held, not only looked at: while this exists, no other tensor can take the Parameter's identity or memory.
        self.weight = pool.weight
        self.values = pool.weight.detach()
        self.copies: dict[torch.dtype, Tensor] = {}
        # Copies as layers read them, in a graph. One node serves all of a pass: to make one for each layer costs the
        # host more than to find this one.
        self.reads: dict[torch.dtype, Tensor] = {}
        # Dense weights, or coefficients of those with bases. Graphs hold them, so that what a checkpoint lets go of is
        # freed. `unread` holds those that nothing has read yet, `combined` the weights that coefficients make.
        self.dense_values: dict[tuple[WeightView, torch.dtype], weakref.ref[Tensor]] = {}
        self.unread: dict[tuple[WeightView, torch.dtype], Tensor] = {}
        self.combined: dict[tuple[WeightView, torch.dtype], _Combined] = {}
        self.gate: Gate | None = None
        self.times_taken = 0

    @property
    def outdated(self) -> bool:
        """Whether the pool has got a gradient since: an optimizer may have stepped, and a fused one leaves no trace."""
        buffer = None if self.gate is None else self.gate.buffer
        return buffer is not None and buffer.times_taken != self.times_taken

    def copy(self, dtype: torch.dtype) -> Tensor:
        """Return the pool's values in a dtype, outside of any graph."""
        if dtype == self.values.dtype:
            return self.values
        if dtype not in self.copies:
            self.copies[dtype] = self.values.to(dtype)
        return self.copies[dtype]

    def read(self, dtype: torch.dtype, tracked: bool) -> Tensor:
        """Return the pool's values in a dtype; if `tracked`, with their gradient going to the gate."""
        if not tracked:
            return self.copy(dtype)
        if in_func_transform():
            raise RoastError(
                "a converted model met a transform of torch.func (grad, vmap, jvp, …), which its operators do not "
                "have; use torch.autograd.grad, or roastify.densify(model) for a model that transforms take"
            )
        read = self.reads.get(dtype)
        if read is None:
            if self.gate is None:
                self.gate = _gate_of(self.pool)
                self.times_taken = 0 if self.gate.buffer is None else self.gate.buffer.times_taken
            read = self.reads[dtype] = self.gate.read(self.copy(dtype))
        return read

    def dense(self, weight: WeightView, dtype: torch.dtype) -> Tensor:
        """Return a dense weight, in a graph; a whole forward pass makes its group with it."""
        gathered = self._gathered(weight, dtype)
        if weight.basis_index is None:
            return gathered
        basis, grad_scale = self.pool.basis(weight.basis_index)
        made = self.combined.pop((weight, dtype), None)
        if made is not None and made.is_of(basis):
            return combined_weight(gathered, basis, grad_scale, made.values, made.number)
        return ops.combine(gathered, basis, grad_scale).view(weight.shape)

    def _gathered(self, weight: WeightView, dtype: torch.dtype) -> Tensor:
        """Return what the pool holds of a weight, which may be its coefficients."""
        key = weight, dtype
        unread = self.unread.pop(key, None)
        if unread is not None:
            return unread
        pool = self.read(dtype, True)
        if (held := self.dense_values.get(key)) is not None and (values := held()) is not None:
            return gathered_again(pool, self.pool.table, weight, values)
        group = self._group_of(weight, dtype)
        found = gather_group(pool, self.pool.table, group)
        for other, tensor in zip(group.weights, found, strict=True):
            self.dense_values[other, dtype] = weakref.ref(tensor)
            self.unread[other, dtype] = tensor
        self._combine_group(group, found, dtype)
        return self.unread.pop(key)

    def _combine_group(self, group: WeightGroup, coefficients: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Make the dense weights of a group with bases, if it can be told of every basis when it changes."""
        bases = []
        for weight in group.weights:
            basis = None if weight.basis_index is None else self.pool.plain_basis(weight.basis_index)
            if basis is None or not _is_plain(basis) or basis.shape != weight.basis_shape:
                return
            bases.append(basis)
        made = combine_group(group, coefficients, bases)
        if made is None:
            return
        for number, (weight, basis, values) in enumerate(zip(group.weights, bases, made, strict=True)):
            self.combined[weight, dtype] = _Combined(values, number, basis, basis._version, basis.data_ptr())

    def _group_of(self, weight: WeightView, dtype: torch.dtype) -> WeightGroup:
        # Modes that count operators see each weight where its layer asks for it.
        if self.whole and not num_dispatch_modes():
            group = self.pool.group_of(weight)
            if not any((other, dtype) in self.dense_values for other in group.weights):
                return group
        return WeightGroup([weight])


class Pass:
    """One forward pass of a converted model, or what a backward pass computes again of one.

    Args:
        capturing: whether it is captured in a CUDA graph.
        whole: whether it is a whole forward pass.
    """

    def __init__(self, capturing: bool, whole: bool) -> None:
        self.capturing = capturing
        self.whole = whole
        self.caches: dict[tuple[Any, ...], PoolCache] = {}

    def close(self) -> None:
        """Let go of what was made."""
        self.caches.clear()


class _Passes(threading.local):
    """What this thread is in the middle of."""

    def __init__(self) -> None:
        # The forward passes, by the pool they read.
        self.running: dict[Pool, Pass] = {}
        # What backward passes compute again, by the engine's number of the task, which alone holds it, and the pool.
        self.recomputed: weakref.WeakValueDictionary[tuple[int, int], Pass] = weakref.WeakValueDictionary()
        # The last gate of each pool, with what was seen of the pool then. Graphs alone hold a gate.
        self.gates: weakref.WeakKeyDictionary[Pool, tuple[tuple[Any, ...], weakref.ref[Gate]]]
        self.gates = weakref.WeakKeyDictionary()


passes = _Passes()


def _is_plain(weight: Tensor) -> bool:
    """Whether a tensor is an ordinary one: torch tells when it changes, and copies of it serve every reader.

    Three kinds are not ordinary: subclasses (fake and distributed tensors), tensors in a `torch.func` transform, which
    are wrapped for its duration, and tensors made in inference mode, which count no versions.
    """
    return (
        type(weight) in (Tensor, nn.Parameter)
        and (weight.is_cuda or weight.is_cpu)
        and not weight.is_inference()
        and not in_func_transform()
    )


def _seen(weight: Tensor) -> tuple[Any, ...]:
    """Return by what a change of a plain tensor is seen, and where its copies may be used.

    A copy made on one stream is not ready on another, and one made in inference mode is of no use to autograd.
    """
    # The stream's number: the object that torch makes of a stream takes longer than all the rest.
    stream = current_raw_stream(weight.get_device()) if weight.is_cuda else None
    inference = torch.is_inference_mode_enabled()
    return id(weight), weight._version, weight.data_ptr(), weight.dtype, stream, inference


def _gate_of(pool: Pool) -> Gate:
    """Return the gate of a pool as it is now: the one that a graph of this thread has already, or a new one.

    A compiler makes its own gates, and so do transforms, whose tensors are wrapped for their duration.
    """
    if torch.compiler.is_compiling() or not _is_plain(pool.weight):
        return Gate(pool, plain=False)
    *content, _, _ = _seen(pool.weight)
    # On any stream: layers that add to one buffer wait for each other.
    seen = (*content, torch.is_inference_mode_enabled(), is_captured(pool.weight), pool.precondition)
    last = passes.gates.get(pool)
    gate = last[1]() if last is not None and last[0] == seen else None
    if gate is None:
        gate = Gate(pool, plain=True)
        passes.gates[pool] = seen, weakref.ref(gate)
    return gate


def _running(pool: Pool) -> Pass | None:
    """Return the forward pass of a pool that this thread is in, or computes again for a backward pass."""
    running = passes.running.get(pool)
    if running is not None or (task := current_backward_pass()) == NO_PASS:
        return running
    # Without this every checkpointed layer would make a copy, and all copies of a segment would be there at once.
    recomputed = passes.recomputed.get((task, id(pool)))
    if recomputed is None:
        recomputed = passes.recomputed[task, id(pool)] = Pass(is_captured(pool.weight), whole=False)
        at_end_of_backward(recomputed.close)
    return recomputed


def is_watched_by_modes() -> bool:
    """Whether modes see the operators of an eager pass."""
    return not torch.compiler.is_compiling() and num_dispatch_modes() > 0


def unseen(pool: Pool) -> contextlib.AbstractContextManager[Any]:
    """Return the context for what a pass makes once, hidden from checkpoints that choose what to save.

    Their regions must run the same operators when they are run again, but then another layer is the first to read the
    pool.
    """
    if not _is_plain(pool.weight):
        return contextlib.nullcontext()
    modes = dispatch_mode_stack()
    selective = any(isinstance(mode, SELECTIVE_CHECKPOINTS) for mode in modes)
    if not selective or any(mode.is_infra_mode() for mode in modes):
        return contextlib.nullcontext()
    return without_dispatch_modes()


def cache_of(pool: Pool) -> PoolCache:
    """Return what the running pass has made of a pool as it is now, which may be nothing yet."""
    # A compiler cannot trace a cache. Inductor merges the casts of a graph with gradients by itself, and makes those of
    # a graph without gradients in one kernel.
    running = None if torch.compiler.is_compiling() else _running(pool)
    if running is None or not _is_plain(weight := pool.parameter()):
        return PoolCache(pool)
    if is_captured(weight) != running.capturing:
        # A captured graph must make its own copy: it is replayed when this pass is long over.
        return PoolCache(pool)
    seen = _seen(weight)
    cache = running.caches.get(seen)
    if cache is None or cache.outdated:
        cache = running.caches[seen] = PoolCache(pool, running.whole)
    return cache

"""The cache of a forward pass: copies of the pool in a compute dtype, dense weights, and the gate."""

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
from roastify.kernels.gathered_weights import (
    WeightGroup,
    combine_group,
    combined_weight,
    gather_together,
    gathered_again,
)
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
    saved_tensors_hook,
    without_dispatch_modes,
)
from roastify.kernels.view import FoldView, WeightView
from roastify.pool.fold import folded_input
from roastify.pool.gradient_gate import Gate, Pool


class _Combined(NamedTuple):
    """A dense weight that was combined from its basis together with others; `number` is its index in that group."""

    values: Tensor
    number: int
    basis: Tensor
    version: int
    address: int

    def is_of(self, basis: Tensor) -> bool:
        """Whether the weight was combined from this basis, and the basis has not changed since."""
        return basis is self.basis and basis._version == self.version and basis.data_ptr() == self.address


class PoolCache:
    """The tensors computed from the pool's present values: a copy for each compute dtype, dense weights, the gate."""

    def __init__(self, pool: Pool, whole: bool = False) -> None:
        self.pool = pool
        # Whether a whole forward pass reads this cache. If so, every weight of a gathered group will be read.
        self.whole = whole
        # A reference, so that no other tensor gets the Parameter's id or memory while this cache exists.
        self.weight = pool.parameter()
        self.values = self.weight.detach()
        self.copies: dict[torch.dtype, Tensor] = {}
        # The same copies behind a `_ReadNode`, for layers to read in a graph. All layers of a pass share one node: a
        # node for each layer takes the host longer than this lookup.
        self.reads: dict[torch.dtype, Tensor] = {}
        # Dense weights; for a weight with a basis, its coefficients. The references are weak: only graphs keep the
        # tensors alive, so a tensor that a checkpoint drops is freed. `unread` keeps the tensors alive that no layer
        # has read yet. `combined` has the weights that were combined from coefficients and bases.
        self.dense_values: dict[tuple[WeightView, torch.dtype], weakref.ref[Tensor]] = {}
        self.unread: dict[tuple[WeightView, torch.dtype], Tensor] = {}
        self.combined: dict[tuple[WeightView, torch.dtype], _Combined] = {}
        # The last folded input, with what it was folded from and how.
        self.last_folded: tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor] | None = None
        self.gate: Gate | None = None
        self.times_taken = 0

    @property
    def outdated(self) -> bool:
        """Whether the pool has received a gradient since.

        After that an optimizer may have stepped, and a fused optimizer does not raise the Parameter's version.
        """
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
        """Return the pool's values in a dtype. If `tracked`, their gradient goes to the gate."""
        if not tracked:
            return self.copy(dtype)
        if in_func_transform():
            raise RoastError(
                "the operators of a converted model do not support torch.func's transforms (grad, vmap, jvp, …); use "
                "torch.autograd.grad, or apply the transform to roastify.densify(model)"
            )
        read = self.reads.get(dtype)
        if read is None:
            if self.gate is None:
                self.gate = _gate_of(self.pool)
                self.times_taken = 0 if self.gate.buffer is None else self.gate.buffer.times_taken
            read = self.reads[dtype] = self.gate.read(self.copy(dtype))
        return read

    def folded(self, x: Tensor, pool: Tensor | None, fold: FoldView, dtype: torch.dtype, dims: int) -> Tensor:
        """Return `folded_input(x, pool, fold, dims)`, in the dtype that the product or the convolution runs in.

        If the last input was the same and is unchanged, the result is the last one.

        A checkpoint's recomputation shares nothing. So results are not shared between a checkpoint and its outside, nor
        within it if a fold with learned scales saves tensors: both passes must save the same.
        """
        hook = saved_tensors_hook()
        if not self.whole or not _is_plain(x) or (pool is not None and hook is not None):
            return folded_input(x, pool, fold, dims)
        graph = torch.is_grad_enabled(), x.requires_grad, x.grad_fn, x.output_nr, hook
        memory = x._version, x.data_ptr(), x.dtype, x.shape, x.stride()
        seen = id(pool), fold, dims, dtype, graph, memory
        last = self.last_folded
        if last is not None and last[0]() is x and last[1] == seen:
            return last[2]
        folded = folded_input(x, pool, fold, dims)
        self.last_folded = weakref.ref(x), seen, folded
        return folded

    def dense(self, weight: WeightView, dtype: torch.dtype) -> Tensor:
        """Return a dense weight, in a graph. A whole forward pass gathers the weight's group with it."""
        gathered = self._gathered(weight, dtype)
        if weight.basis_index is None:
            return gathered
        basis, grad_scale = self.pool.basis(weight.basis_index)
        combined = self.combined.pop((weight, dtype), None)
        if combined is not None and combined.is_of(basis):
            return combined_weight(gathered, basis, grad_scale, combined.values, combined.number)
        return ops.combine(gathered, basis, grad_scale).view(weight.read_shape)

    def _gathered(self, weight: WeightView, dtype: torch.dtype) -> Tensor:
        """Return the tensor that the pool holds for a weight: the weight, or its coefficients if it has a basis."""
        key = weight, dtype
        unread = self.unread.pop(key, None)
        if unread is not None:
            return unread
        pool = self.read(dtype, True)
        if (reference := self.dense_values.get(key)) is not None and (values := reference()) is not None:
            return gathered_again(pool, self.pool.table, weight, values)
        group = self._group_of(weight, dtype)
        tensors = gather_together(pool, self.pool.table, group)
        for other, tensor in zip(group.weights, tensors, strict=True):
            self.dense_values[other, dtype] = weakref.ref(tensor)
            self.unread[other, dtype] = tensor
        self._combine_group(group, tensors, dtype)
        return self.unread.pop(key)

    def _combine_group(self, group: WeightGroup, coefficients: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Combine the dense weights of a group with bases, if torch can tell for every basis whether it changed."""
        bases = []
        for weight in group.weights:
            basis = None if weight.basis_index is None else self.pool.plain_basis(weight.basis_index)
            if basis is None or not _is_plain(basis) or basis.shape != weight.basis_shape:
                return
            bases.append(basis)
        combined = combine_group(group, coefficients, bases)
        if combined is None:
            return
        for number, (weight, basis, values) in enumerate(zip(group.weights, bases, combined, strict=True)):
            self.combined[weight, dtype] = _Combined(values, number, basis, basis._version, basis.data_ptr())

    def _group_of(self, weight: WeightView, dtype: torch.dtype) -> WeightGroup:
        # If a dispatch mode is active (such as one that counts operators), each layer gathers its own weight, so that
        # the mode sees the operator in that layer.
        if self.whole and not num_dispatch_modes():
            group = self.pool.group_of(weight)
            if not any((other, dtype) in self.dense_values for other in group.weights):
                return group
        return WeightGroup([weight])


class Pass:
    """One forward pass of a converted model, or the part of one that a backward pass recomputes.

    Args:
        capturing: whether the pass is captured in a CUDA graph.
        whole: whether it is a whole forward pass.
    """

    def __init__(self, capturing: bool, whole: bool) -> None:
        self.capturing = capturing
        self.whole = whole
        self.caches: dict[tuple[Any, ...], PoolCache] = {}

    def close(self) -> None:
        """Drop the caches."""
        self.caches.clear()


class _Passes(threading.local):
    """The passes that this thread is running."""

    def __init__(self) -> None:
        # The forward passes, by the pool that they read.
        self.running: dict[Pool, Pass] = {}
        # The recomputed parts of forward passes, by the number of autograd's graph task and the pool. Only the graph
        # task keeps one alive, by a callback.
        self.recomputed: weakref.WeakValueDictionary[tuple[int, int], Pass] = weakref.WeakValueDictionary()
        # The last gate of each pool, with the pool's state at that time. The references are weak: only graphs keep a
        # gate alive.
        self.gates: weakref.WeakKeyDictionary[Pool, tuple[tuple[Any, ...], weakref.ref[Gate]]]
        self.gates = weakref.WeakKeyDictionary()


passes = _Passes()


def _is_plain(weight: Tensor) -> bool:
    """Whether a tensor is ordinary: torch counts its versions, and every reader can use the same copy of it.

    Three kinds of tensors are not ordinary: subclasses, such as fake and distributed tensors; tensors inside a
    `torch.func` transform, which wraps them while it runs; and tensors created in inference mode, without a version.
    """
    return (
        type(weight) in (Tensor, nn.Parameter)
        and (weight.is_cuda or weight.is_cpu)
        and not weight.is_inference()
        and not in_func_transform()
    )


def _seen(weight: Tensor) -> tuple[Any, ...]:
    """Return a key of a plain tensor's state: the key changes when the tensor does, or when its copies cannot be used.

    A copy made on one stream may not be ready on another stream. Autograd cannot use a copy made in inference mode.
    """
    # The stream's raw number: to build torch's stream object takes longer than the rest of this function.
    stream = current_raw_stream(weight.get_device()) if weight.is_cuda else None
    inference = torch.is_inference_mode_enabled()
    return id(weight), weight._version, weight.data_ptr(), weight.dtype, stream, inference


def _gate_of(pool: Pool) -> Gate:
    """Return the gate for a pool's present state: the gate that a graph of this thread holds already, or a new one.

    A compiler gets a new gate each time. So does a transform, because it wraps tensors while it runs.
    """
    if torch.compiler.is_compiling() or not _is_plain(pool.parameter()):
        return Gate(pool, plain=False)
    *content, _, _ = _seen(pool.parameter())
    # Without the stream: layers on several streams may add to one buffer, since they wait for each other.
    seen = (*content, torch.is_inference_mode_enabled(), is_captured(pool.parameter()), pool.precondition)
    last = passes.gates.get(pool)
    gate = last[1]() if last is not None and last[0] == seen else None
    if gate is None:
        gate = Gate(pool, plain=True)
        passes.gates[pool] = seen, weakref.ref(gate)
    return gate


def _running(pool: Pool) -> Pass | None:
    """Return the pass that this thread is running: a forward pass, or the part of one that a backward recomputes."""
    running = passes.running.get(pool)
    if running is not None or (task := current_backward_pass()) == NO_PASS:
        return running
    # Without a shared pass, every checkpointed layer would make a copy of the pool, and all copies of a segment would
    # exist at once.
    recomputed = passes.recomputed.get((task, id(pool)))
    if recomputed is None:
        recomputed = passes.recomputed[task, id(pool)] = Pass(is_captured(pool.parameter()), whole=False)
        at_end_of_backward(recomputed.close)
    return recomputed


def is_watched_by_modes() -> bool:
    """Whether this pass is eager and a dispatch mode sees its operators."""
    return not torch.compiler.is_compiling() and num_dispatch_modes() > 0


def unseen(pool: Pool) -> contextlib.AbstractContextManager[Any]:
    """Return a context that hides the cache's operators from selective checkpoints.

    A selective checkpoint must see the same operators when its region is recomputed. The first layer that reads the
    pool runs the cache's operators, and in the recomputation another layer is the first.
    """
    if not _is_plain(pool.parameter()):
        return contextlib.nullcontext()
    modes = dispatch_mode_stack()
    selective = any(isinstance(mode, SELECTIVE_CHECKPOINTS) for mode in modes)
    if not selective or any(mode.is_infra_mode() for mode in modes):
        return contextlib.nullcontext()
    return without_dispatch_modes()


def cache_of(pool: Pool) -> PoolCache:
    """Return the running pass's cache for a pool's present state, or an empty cache if there is none."""
    # A compiler cannot trace a cache, and needs none: Inductor merges the casts of a graph with gradients, and computes
    # the casts of a graph without gradients in one kernel.
    running = None if torch.compiler.is_compiling() else _running(pool)
    if running is None or not _is_plain(weight := pool.parameter()):
        return PoolCache(pool)
    if is_captured(weight) != running.capturing:
        # A captured graph must make its own copy: the graph is replayed after this pass has ended.
        return PoolCache(pool)
    seen = _seen(weight)
    cache = running.caches.get(seen)
    if cache is None or cache.outdated:
        cache = running.caches[seen] = PoolCache(pool, running.whole)
    return cache

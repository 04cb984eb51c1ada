"""How layers read the pool: within a forward pass it is cast once, and its gradient has one way out, the gate."""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch as dispatch
from torch.utils import checkpoint

from roastify.errors import RoastError
from roastify.kernels import ops
from roastify.kernels.grad_buffer import Sink
from roastify.kernels.kept_weights import WeightGroup, again, combine_ahead, combined, gather_weights
from roastify.kernels.reference import summed_in
from roastify.kernels.view import Weight


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

    def group_of(self, weight: Weight) -> WeightGroup:
        """Return the weights that are gathered with this one."""

    def basis(self, index: int) -> tuple[Tensor, float]:
        """Return basis kernels, and what their gradient is to be multiplied by."""

    def plain_basis(self, index: int) -> nn.Parameter | None:
        """Return the Parameter that basis kernels are, or None if they are made of something, and do not make them."""


class _Gate(torch.autograd.Function):
    """The one door from the layers to the pool's Parameter: autograd runs its backward once, after every layer's.

    It hands out a token, a tensor of the pool's shape that takes no memory and holds no value, for gradients to arrive
    at. What layers add to the sink does not: the gate takes it from there. The rest autograd adds up, in the token's
    dtype, float32 even where the pool is narrower (float64 if it is that).

    Γ is kept as attributes, not saved for backward: a node that saves nothing may run in a region that is checkpointed
    when the forward pass has made it before, and may run again after its graph was freed.
    """

    @staticmethod
    def forward(
        weight: Tensor,
        sink: Sink | None,
        per_slot: Tensor | None,
        uneven_slots: Tensor | None,
        uneven: Tensor | None,
    ) -> Tensor:
        return weight.new_empty((), dtype=summed_in(weight.dtype)).expand(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ctx.sink, *ctx.inverse_gamma = inputs
        ctx.dtype = weight.dtype
        if ctx.sink is not None:
            ctx.sink.set_gate(ctx)
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        total = None if ctx.sink is None else ctx.sink.take()
        if total is not None:
            grad = total if grad is None else total.add_(grad)
        if grad is None:
            return None, None, None, None, None
        per_slot, uneven_slots, uneven = ctx.inverse_gamma
        if per_slot is not None:
            if total is not None:
                divide_(grad, per_slot, uneven_slots, uneven)
            else:
                grad = _divided(grad, per_slot, uneven_slots, uneven)
        return grad.to(ctx.dtype), None, None, None, None


def _divided(grad: Tensor, per_slot: Tensor, uneven_slots: Tensor, uneven: Tensor) -> Tensor:
    """Return a gradient divided by Γ."""
    by_slot = grad.reshape(per_slot.shape[0], -1)
    factors = per_slot[:, None].to(grad.dtype)
    if uneven_slots.numel():
        # Of all elements, by themselves: a compiler that meets several gates computes them once.
        factors = factors.expand_as(by_slot).index_copy(0, uneven_slots, uneven.to(grad.dtype))
    return (by_slot * factors).view_as(grad)


# Elements of the uneven slots that are divided at a time, so that no second tensor of the pool's size comes to be.
_UNEVEN_ELEMENTS = 1 << 22


def divide_(grad: Tensor, per_slot: Tensor, uneven_slots: Tensor, uneven: Tensor) -> None:
    """Divide a contiguous gradient by Γ in place."""
    by_slot = grad.view(per_slot.shape[0], -1)
    by_slot.mul_(per_slot.index_fill(0, uneven_slots, 1.0)[:, None])
    # Torch 2.11 cannot split nothing where it records.
    if uneven_slots.numel():
        step = max(1, _UNEVEN_ELEMENTS // by_slot.shape[1])
        for slots, factors in zip(uneven_slots.split(step), uneven.split(step), strict=True):
            by_slot.index_copy_(0, slots, by_slot.index_select(0, slots).mul_(factors))


class _Read(torch.autograd.Function):
    """What layers read: the values of a copy of the pool, whose gradient goes to the gate's token.

    Operators find the sink on its node, which also keeps the door that it went through in use.
    """

    # In one piece: with a `setup_context`, torch asks for the signature at each call, which costs more than the rest.
    @staticmethod
    def forward(ctx: Any, token: Tensor, copy: Tensor, door: _Door | None) -> Tensor:
        ctx.dtype = token.dtype
        if door is not None:
            ctx.door, ctx.sink = door, door.sink
            ctx.set_materialize_grads(False)
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        return None if grad is None else grad.to(ctx.dtype), None, None


class _Door:
    """A gate, its token and its sink, which the gate's node may hold: it must not hold the token, an output of its own.

    A gate holds no values, so that all reads may share one, in and outside of a pass, for as long as a graph has it.
    """

    def __init__(self, pool: Pool, plain: bool) -> None:
        # Held: while this exists, no other tensor can take the Parameter's identity or memory.
        self.weight = weight = pool.weight
        self.sink = Sink(weight.shape, summed_in(weight.dtype), weight.device) if plain else None
        gamma = (pool.per_slot, pool.uneven_slots, pool.uneven) if pool.precondition else (None, None, None)
        self.token: Tensor = _Gate.apply(weight, self.sink, *gamma)


class _Ahead(NamedTuple):
    """A dense weight that was made of its basis together with others: its number among them, and how the basis was."""

    values: Tensor
    number: int
    basis: Tensor
    version: int
    address: int

    def is_of(self, basis: Tensor) -> bool:
        """Whether a basis is the one that the weight was made of, unchanged."""
        return basis is self.basis and basis._version == self.version and basis.data_ptr() == self.address


class _Made:
    """What was made of the pool's present content: a copy for each compute dtype, and the door they were read by."""

    def __init__(self, pool: Pool, whole: bool = False) -> None:
        self.pool = pool
        # Whether a whole forward pass reads it, so that what is gathered ahead will be read.
        self.whole = whole
        # Held, not only looked at: while this exists, no other tensor can take the Parameter's identity or memory.
        self.weight = pool.weight
        self.values = pool.weight.detach()
        self.copies: dict[torch.dtype, Tensor] = {}
        # Copies as layers read them, in a graph. One for all of a pass: a node a layer costs the host more than it
        # takes to find this one.
        self.reads: dict[torch.dtype, Tensor] = {}
        # Dense weights or coefficients, which graphs hold (what a checkpoint lets go of must go), and those that
        # nothing has read yet; of coefficients also what they make.
        self.dense_values: dict[tuple[Weight, torch.dtype], weakref.ref[Tensor]] = {}
        self.fresh: dict[tuple[Weight, torch.dtype], Tensor] = {}
        self.ahead: dict[tuple[Weight, torch.dtype], _Ahead] = {}
        self.door: _Door | None = None
        self.runs = 0

    @property
    def over(self) -> bool:
        """Whether the pool has got a gradient since: who has one may step, and a fused optimizer leaves no trace."""
        return self.door is not None and self.door.sink is not None and self.door.sink.runs != self.runs

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
        if torch._C._are_functorch_transforms_active():
            raise RoastError(
                "a converted model met a transform of torch.func (grad, vmap, jvp, …), which its operators do not "
                "have; use torch.autograd.grad, or roastify.densify(model) for a model that transforms take"
            )
        read = self.reads.get(dtype)
        if read is None:
            if self.door is None:
                self.door = _door_of(self.pool)
                self.runs = 0 if self.door.sink is None else self.door.sink.runs
            door = self.door if self.door.sink is not None else None
            read = self.reads[dtype] = _Read.apply(self.door.token, self.copy(dtype), door)
        return read

    def dense(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return a dense weight, in a graph; in a whole forward pass its group is made with it."""
        gathered = self._gathered(weight, dtype)
        if weight.basis_index is None:
            return gathered
        basis, grad_scale = self.pool.basis(weight.basis_index)
        ahead = self.ahead.pop((weight, dtype), None)
        if ahead is not None and ahead.is_of(basis):
            return combined(gathered, basis, grad_scale, ahead.values, ahead.number)
        return ops.combine(gathered, basis, grad_scale).view(weight.shape)

    def _gathered(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return what the pool holds of a weight, which may be its coefficients."""
        key = weight, dtype
        fresh = self.fresh.pop(key, None)
        if fresh is not None:
            return fresh
        pool = self.read(dtype, True)
        if (held := self.dense_values.get(key)) is not None and (values := held()) is not None:
            return again(pool, self.pool.table, weight, values)
        group = self._group_of(weight, dtype)
        found = gather_weights(pool, self.pool.table, group)
        for other, tensor in zip(group.weights, found, strict=True):
            self.dense_values[other, dtype] = weakref.ref(tensor)
            self.fresh[other, dtype] = tensor
        self._combine_ahead(group, found, dtype)
        return self.fresh.pop(key)

    def _combine_ahead(self, group: WeightGroup, coefficients: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Make the dense weights of a group with bases, if they are such as it can be told of that they change."""
        bases = []
        for weight in group.weights:
            basis = None if weight.basis_index is None else self.pool.plain_basis(weight.basis_index)
            if basis is None or not _is_plain(basis) or basis.shape != weight.basis_shape:
                return
            bases.append(basis)
        made = combine_ahead(group, coefficients, bases)
        if made is None:
            return
        for number, (weight, basis, values) in enumerate(zip(group.weights, bases, made, strict=True)):
            self.ahead[weight, dtype] = _Ahead(values, number, basis, basis._version, basis.data_ptr())

    def _group_of(self, weight: Weight, dtype: torch.dtype) -> WeightGroup:
        # Modes that count operators see each where it is asked for.
        if self.whole and not torch._C._len_torch_dispatch_stack():
            group = self.pool.group_of(weight)
            if not any((other, dtype) in self.dense_values for other in group.weights):
                return group
        return WeightGroup([weight])


class _Pass:
    """One forward pass of a converted model, or what a backward pass computes again of one.

    Args:
        capturing: whether it is captured in a CUDA graph.
        whole: whether it is a whole forward pass.
    """

    def __init__(self, capturing: bool, whole: bool) -> None:
        self.capturing = capturing
        self.whole = whole
        self.made: dict[tuple[Any, ...], _Made] = {}

    def close(self) -> None:
        """Let go of what was made."""
        self.made.clear()


class _Passes(threading.local):
    """What this thread is in the middle of."""

    def __init__(self) -> None:
        # The forward passes, by the pool they read.
        self.running: dict[Pool, _Pass] = {}
        # What backward passes compute again, by the engine's number of the task, which alone holds them, and pool.
        self.again: weakref.WeakValueDictionary[tuple[int, int], _Pass] = weakref.WeakValueDictionary()
        # The last door of each pool, with what was seen of the pool then; graphs alone hold it.
        self.doors: weakref.WeakKeyDictionary[Pool, tuple[tuple[Any, ...], weakref.ref[_Door]]]
        self.doors = weakref.WeakKeyDictionary()


_passes = _Passes()


def _is_plain(weight: Tensor) -> bool:
    """Whether a tensor is an ordinary one, of which it is known when it changes and who may use what is made of it.

    Not so: subclasses (fake and distributed tensors), those in a `torch.func` transform, which are wrapped for its
    duration, and those made in inference mode, which count no versions.
    """
    return (
        type(weight) in (Tensor, nn.Parameter)
        and (weight.is_cuda or weight.is_cpu)
        and not weight.is_inference()
        and not torch._C._are_functorch_transforms_active()
    )


def _seen(weight: Tensor) -> tuple[Any, ...]:
    """Return what a change of a plain tensor shows in, and where its copies are good.

    A copy made on one stream is not ready on another, and one made in inference mode is of no use to autograd.
    """
    # Its number: the object that torch makes of it takes longer than all the rest.
    stream = torch._C._cuda_getCurrentRawStream(weight.get_device()) if weight.is_cuda else None
    inference = torch.is_inference_mode_enabled()
    return id(weight), weight._version, weight.data_ptr(), weight.dtype, stream, inference


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch._C._cuda_isCurrentStreamCapturing()


def _door_of(pool: Pool) -> _Door:
    """Return the door to a pool as it is now: the one that a graph of this thread goes through already, or a new one.

    A compiler makes its own of what it meets, and so do transforms, whose tensors are wrapped for their duration.
    """
    if torch.compiler.is_compiling() or not _is_plain(pool.weight):
        return _Door(pool, plain=False)
    *content, _, _ = _seen(pool.weight)
    # Of any stream: those that add to a sink wait for each other.
    seen = (*content, torch.is_inference_mode_enabled(), _is_capturing(pool.weight), pool.precondition)
    last = _passes.doors.get(pool)
    door = last[1]() if last is not None and last[0] == seen else None
    if door is None:
        door = _Door(pool, plain=True)
        _passes.doors[pool] = seen, weakref.ref(door)
    return door


def _running(pool: Pool) -> _Pass | None:
    """Return the pass that this thread is in, or is computing again for a backward pass, of a pool."""
    running = _passes.running.get(pool)
    if running is not None or (task := torch._C._current_graph_task_id()) == -1:
        return running
    # Checkpointed layers: each would make a copy, and all of a segment's copies would be there at once.
    again = _passes.again.get((task, id(pool)))
    if again is None:
        again = _passes.again[task, id(pool)] = _Pass(_is_capturing(pool.weight), whole=False)
        torch.autograd.Variable._execution_engine.queue_callback(again.close)
    return again


_SELECTIVE = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)


def is_watched_by_modes() -> bool:
    """Whether modes see the operators of an eager pass."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def unseen(pool: Pool) -> contextlib.AbstractContextManager[Any]:
    """Return the context for what a pass makes once: checkpoints that choose what to save do not see it there.

    Their regions must run the same operators again, but then other layers are the first to read the pool.
    """
    if not _is_plain(pool.weight):
        return contextlib.nullcontext()
    modes = dispatch._get_current_dispatch_mode_stack()
    if not any(isinstance(mode, _SELECTIVE) for mode in modes) or any(mode.is_infra_mode() for mode in modes):
        return contextlib.nullcontext()
    return dispatch._disable_current_modes()


def made_of(pool: Pool) -> _Made:
    """Return what the running pass has made of a pool as it is now, which may be nothing yet."""
    # What comes and goes is in a compiler's way. Inductor itself merges the casts of a graph with gradients, and
    # makes those of one without in one kernel.
    running = None if torch.compiler.is_compiling() else _running(pool)
    if running is None or not _is_plain(weight := pool.parameter()):
        return _Made(pool)
    if _is_capturing(weight) != running.capturing:
        # A captured graph must make its own copy: it is replayed when this pass is long over.
        return _Made(pool)
    seen = _seen(weight)
    made = running.made.get(seen)
    if made is None or made.over:
        made = running.made[seen] = _Made(pool, running.whole)
    return made


class RootForward:
    """The `forward` of a converted model: within it, the pool is cast once and has one gate.

    A copy of the pool is only right for as long as the pool is unchanged (and what is made of bases, for as long as
    these are), and nothing tells for certain that it is: fused optimizers and writes through `.data` count no version,
    and a replayed CUDA graph writes without Python. So no copy outlives the call in which it was made, and writes
    within it are seen but for one kind: one that leaves no trace, made by the model's own forward between two of its
    layers. (Torch's autocast assumes as much of its whole context.) Layers that are called outside (by themselves, by
    another thread, or again in backward by checkpointing) make copies of their own.

    It stands in the instance's `forward`, where a `finally` always ends what it began. Hooks do not run when the user
    interrupts, can be cleared one without the other, and keep torch from its fused transformer layers and from
    `torch.cuda.make_graphed_callables`.

    Args:
        model: the model.
        pool: its pool.
        inner: the forward that the instance had of its own, or None for the class's.
    """

    __name__ = "forward"

    def __init__(self, model: nn.Module, pool: Pool, inner: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.pool = pool
        self.inner = inner

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that runs, whose signature this one has."""
        if self.inner is not None:
            return self.inner
        return types.MethodType(type(self.model).forward, self.model)

    @property
    def __code__(self) -> types.CodeType:
        """The code of the forward that runs, which `torch.export` asks for."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward as one pass."""
        if torch.compiler.is_compiling():
            return self._run(*args, **kwargs)
        running, pool = _passes.running, self.pool
        outer = running.get(pool)
        running[pool] = _Pass(_is_capturing(pool.weight), whole=True)
        try:
            return self._run(*args, **kwargs)
        finally:
            if outer is None:
                del running[pool]
            else:
                running[pool] = outer

    def replicate(self) -> nn.Module:
        """Return the model's replica for `nn.DataParallel`, whose forward is its own: this one runs the original's.

        It stands in the instance's `_replicate_for_data_parallel`, which is what `DataParallel` calls. In a replica
        every layer casts for itself.
        """
        replica = type(self.model)._replicate_for_data_parallel(self.model)
        del replica.__dict__["forward"], replica.__dict__["_replicate_for_data_parallel"]
        if self.inner is not None:
            replica.__dict__["forward"] = self.inner
        return replica

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Not through `__wrapped__`: torch.compile traces this, but not the making of a bound method.
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

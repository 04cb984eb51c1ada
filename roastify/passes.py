"""One forward pass of a converted model: within it the pool is cast once, and its gradient has one way out."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Pool(Protocol):
    """What a pass needs of a pool: its Parameter, whether its gradient is divided by Γ, and 1/Γ."""

    weight: nn.Parameter
    precondition: bool
    per_slot: Tensor
    uneven_slots: Tensor
    uneven: Tensor


class _Gate(torch.autograd.Function):
    """The one door from a forward pass to the pool's Parameter: autograd runs its backward once, after every layer's.

    It hands out a token, a tensor of the pool's shape that takes no memory and holds no value, for gradients to arrive
    at: autograd adds them up in the token's dtype, float32 even where the pool is narrower (float64 if it is that).

    Γ is kept as attributes, not saved for backward: a node that saves nothing may run in a region that is checkpointed
    when the forward pass has made it before, and may run again after its graph was freed.
    """

    @staticmethod
    def forward(
        weight: Tensor,
        made: weakref.ref[_Made] | None,
        per_slot: Tensor | None,
        uneven_slots: Tensor | None,
        uneven: Tensor | None,
    ) -> Tensor:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return weight.new_empty((), dtype=wide).expand(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ctx.made, *ctx.inverse_gamma = inputs
        ctx.dtype = weight.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Who has a gradient may step; a fused optimizer would do so without a trace.
        if ctx.made is not None and (made := ctx.made()) is not None:
            made.over = True
        grad = grads[0]
        per_slot, uneven_slots, uneven = ctx.inverse_gamma
        if per_slot is not None:
            by_slot = grad.reshape(per_slot.shape[0], -1)
            factors = per_slot[:, None].to(grad.dtype)
            if uneven_slots.numel():
                # Of all elements, by themselves: a compiler that meets several gates computes them once.
                factors = factors.expand_as(by_slot).index_copy(0, uneven_slots, uneven.to(grad.dtype))
            grad = (by_slot * factors).view_as(grad)
        return grad.to(ctx.dtype), None, None, None, None


class _Read(torch.autograd.Function):
    """A layer's read: the values of a copy of the pool, whose gradient goes to the gate's token."""

    @staticmethod
    def forward(token: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.dtype), None


class _Made:
    """What was made of the pool's present content: the gate, and a copy for each compute dtype."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        # Held, not only looked at: while this exists, no other tensor can take the Parameter's identity or memory.
        self.weight = pool.weight
        self.values = pool.weight.detach()
        self.copies: dict[torch.dtype, Tensor] = {}
        self.token: Tensor | None = None
        self.over = False

    def copy(self, dtype: torch.dtype) -> Tensor:
        """Return the pool's values in a dtype, outside of any graph."""
        if dtype == self.values.dtype:
            return self.values
        if dtype not in self.copies:
            self.copies[dtype] = self.values.to(dtype)
        return self.copies[dtype]

    def gate(self) -> Tensor:
        """Return the gate's token."""
        if self.token is None:
            pool = self.pool
            gamma = (pool.per_slot, pool.uneven_slots, pool.uneven) if pool.precondition else (None, None, None)
            # Weak: the gate's node belongs to the token, and the two would keep each other alive.
            made = None if torch.compiler.is_compiling() else weakref.ref(self)
            self.token = _Gate.apply(self.weight, made, *gamma)
        return self.token

    def read(self, dtype: torch.dtype, tracked: bool) -> Tensor:
        """Return the pool's values in a dtype; if `tracked`, with their gradient going to the gate."""
        return _Read.apply(self.gate(), self.copy(dtype)) if tracked else self.copy(dtype)


class _Pass:
    """One forward pass of a converted model."""

    def __init__(self, capturing: bool) -> None:
        self.capturing = capturing
        self.made: dict[tuple[Any, ...], _Made] = {}


class _Passes(threading.local):
    """The forward passes that this thread is in, by the pool they read."""

    def __init__(self) -> None:
        self.running: dict[Pool, _Pass] = {}


_passes = _Passes()


def _is_plain(weight: Tensor) -> bool:
    """Whether a tensor is an ordinary one, of which it is known when it changes and who may use what is made of it.

    Not so: subclasses (fake and distributed tensors), those in a `torch.func` transform, which are wrapped for its
    duration, and those made in inference mode, which count no versions.
    """
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type in ("cpu", "cuda")
        and not weight.is_inference()
        and not torch._C._are_functorch_transforms_active()
    )


def _seen(weight: Tensor) -> tuple[Any, ...]:
    """Return what a change of a plain tensor shows in, and where its copies are good.

    A copy made on one stream is not ready on another, and one made in inference mode is of no use to autograd.
    """
    stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
    content = (id(weight), weight._version, weight.data_ptr(), weight.dtype)
    return *content, stream, torch.is_inference_mode_enabled()


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def made_of(pool: Pool) -> _Made:
    """Return what the running pass has made of a pool as it is now, which may be nothing yet."""
    # What comes and goes is in a compiler's way. Inductor itself merges the casts of a graph with gradients, and
    # makes those of one without in one kernel.
    running = None if torch.compiler.is_compiling() else _passes.running.get(pool)
    if running is None or not _is_plain(pool.weight):
        return _Made(pool)
    seen = _seen(pool.weight)
    if _is_capturing(pool.weight) != running.capturing:
        # A captured graph must make its own copy: it is replayed when this pass is long over.
        return _Made(pool)
    if seen not in running.made or running.made[seen].over:
        running.made[seen] = _Made(pool)
    return running.made[seen]


class RootForward:
    """The `forward` of a converted model: within it, the pool is cast once and has one gate.

    A copy of the pool is only right for as long as the pool is unchanged, and nothing tells for certain that it is:
    fused optimizers and writes through `.data` count no version, and a replayed CUDA graph writes without Python. So no
    copy outlives the call in which it was made, and writes within it are seen but for one kind: one that leaves no
    trace, made by the model's own forward between two of its layers. (Torch's autocast assumes as much of its whole
    context.) Layers that are called outside (by themselves, by another thread, or again in backward by checkpointing)
    make copies of their own.

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
        running[pool] = _Pass(_is_capturing(pool.weight))
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

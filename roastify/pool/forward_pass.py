"""The `forward` of a converted model: within it the pool is cast once and has one gate."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from roastify.kernels.torch_internals import is_captured
from roastify.pool.gradient_gate import Pool
from roastify.pool.pass_cache import Pass, passes


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
        running, pool = passes.running, self.pool
        outer = running.get(pool)
        running[pool] = Pass(is_captured(pool.weight), whole=True)
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

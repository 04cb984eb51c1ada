"""The `forward` of a converted model: within one call, the pool is cast once and has one gate."""

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
    """The `forward` of a converted model: within one call, the pool is cast once and has one gate.

    A cached copy of the pool is valid only while the pool is unchanged. A dense weight that was combined from a basis
    is valid only while the basis is unchanged too. Not every change can be detected: fused optimizers and writes
    through `.data` do not raise a tensor's version, and a replayed CUDA graph writes without Python. Therefore no
    cached copy outlives the call in which it was made. Within a call, one kind of write is missed: a write that raises
    no version, by the model's own forward, between two of its layers. (Torch's autocast makes the same assumption for
    its whole context.) Layers that run outside of the call make copies of their own: a layer that is called by itself,
    by another thread, or by checkpointing in a backward pass.

    This object replaces the instance's `forward` instead of using hooks, because a `finally` always runs. Hooks do not
    run after a keyboard interrupt. One hook can be removed without the other. Hooks also disable torch's fused
    transformer layers and `torch.cuda.make_graphed_callables`.

    Args:
        model: the model.
        pool: the model's pool.
        inner: the instance's own forward before the conversion, or None if the class's forward runs.
    """

    __name__ = "forward"

    def __init__(self, model: nn.Module, pool: Pool, inner: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.pool = pool
        self.inner = inner

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that runs. This object has its signature."""
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
        """Return the model's replica for `nn.DataParallel`, without this forward, which would run the original model.

        This method replaces the instance's `_replicate_for_data_parallel`, which `DataParallel` calls. In a replica
        every layer casts the pool for itself.
        """
        replica = type(self.model)._replicate_for_data_parallel(self.model)
        del replica.__dict__["forward"], replica.__dict__["_replicate_for_data_parallel"]
        if self.inner is not None:
            replica.__dict__["forward"] = self.inner
        return replica

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Not through `__wrapped__`: torch.compile traces this code, but cannot trace `types.MethodType`.
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

"""The `forward` of a converted model: within one call, the pool is cast once and has one gate."""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from roastify.errors import RoastError
from roastify.kernels.torch_internals import is_captured, is_cut_into_stages, is_exporting
from roastify.pool import compiled_read
from roastify.pool.members import MEMBER
from roastify.pool.pass_cache import Pass, passes
from roastify.pool.pool import RoastPool


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

    def __init__(self, model: nn.Module, pool: RoastPool, inner: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.pool = pool
        self.inner = inner
        self._trained = _Trained()
        pool.set_root(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trained": _Trained()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.pool.set_root(self.model)

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
        # A tool that unwraps models may bind this object to the model as if it were a function.
        if args and args[0] is self.model:
            args = args[1:]
        elif args and isinstance(args[0], nn.Module) and bound_to(args[0]) is self:
            # A copy of a bound method is bound to the copied model, but has the same function.
            return self._of_copy(args[0])(*args[1:], **kwargs)
        if torch.compiler.is_compiling():
            if not torch.compiler.is_dynamo_compiling() and is_cut_into_stages():
                raise RoastError(
                    "torch.distributed.pipelining.pipeline() was given a converted model: every stage would train a "
                    "pool of its own, and some stages several. Cut the dense model, convert each stage by itself "
                    "(roastify.convert(stage, ratio)), and pass it to PipelineStage"
                )
            if torch.compiler.is_dynamo_compiling() and not is_exporting() and torch.is_grad_enabled():
                compiled_read.begin_whole(self.pool)
            return self._run(*args, **kwargs)
        if torch.is_grad_enabled():
            self._trained.check(self.model, self.pool)
        running, pool = passes.running, self.pool
        outer = running.get(pool)
        running[pool] = Pass(is_captured(pool.parameter()), whole=True)
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

    def _of_copy(self, model: nn.Module) -> Callable[..., Any]:
        """Give a copy of the model a forward of its own."""
        pools = [each.pool for module in model.modules() for each in module.__dict__.get("_roast", {}).values()]
        inner = self.inner
        if isinstance(inner, types.MethodType) and inner.__self__ is self.model:
            inner = types.MethodType(inner.__func__, model)
        model.__dict__["forward"] = RootForward(model, pools[0], inner)
        return model.__dict__["forward"]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Not through `__wrapped__`: torch.compile traces this code, but cannot trace `types.MethodType`.
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


def bound_to(model: nn.Module) -> RootForward | None:
    """Return the forward of a converted model that is an instance's own, also if it was bound to it as a method."""
    forward = model.__dict__.get("forward")
    forward = getattr(forward, "__func__", forward)
    return forward if isinstance(forward, RootForward) else None


class _Trained:
    """Notices that only a part of a model is frozen while all of it reads one pool.

    A pool can only be frozen or trained as a whole: freezing one layer freezes the weights of all, and making one layer
    trainable again makes all weights trainable. What shows it are the biases and norms beside the pool's readers. Each
    pass compares their flags with those of the last pass, and looks closer if they changed.
    """

    def __init__(self) -> None:
        self.beside: list[weakref.ref[nn.Parameter]] = []
        self.seen: list[bool | None] | None = None

    def check(self, model: nn.Module, pool: RoastPool) -> None:
        """Warn if a model is frozen in part."""
        if self._flags(pool) == self.seen:
            return
        beside = list(_beside_readers(model))
        self.beside = [weakref.ref(parameter) for _, _, parameter in beside]
        self.seen = self._flags(pool)
        reason = _contradiction(pool, beside)
        if reason:
            trained = pool.parameter().requires_grad
            warnings.warn(
                f"{reason} The weights of all converted layers lie in one pool, which is "
                f"{'trained' if trained else 'frozen'}, and they with it. A pool cannot be frozen in one layer and "
                f"trained in another: leave what is to be trained (or frozen) apart dense when you convert "
                f"(exclude=…). If this is meant, say so: model.roast_pool.requires_grad_({trained})",
                stacklevel=3,
            )

    def _flags(self, pool: RoastPool) -> list[bool | None]:
        parameters = (reference() for reference in self.beside)
        own = [pool.parameter().requires_grad, *_flags_of_bases(pool)]
        return own + [None if parameter is None else parameter.requires_grad for parameter in parameters]


def _contradiction(pool: RoastPool, beside: list[tuple[type, str, nn.Parameter]]) -> str | None:
    """Return what says that a part of a model should be frozen and another trained, or None."""
    trained = pool.parameter().requires_grad
    if len(set(_flags_of_bases(pool))) > 1:
        return "Some converted convolutions are frozen and others are trained."
    first: dict[tuple[type, str], tuple[str, bool]] = {}
    for kind, name, parameter in beside:
        earlier, flag = first.setdefault((kind, name.rpartition(".")[2]), (name, parameter.requires_grad))
        if parameter.requires_grad is not flag:
            one, other = (name, earlier) if flag else (earlier, name)
            return f"{one} is frozen and {other} is trained."
    if pool.meant is trained:
        return None
    others = [(name, parameter.requires_grad) for _, name, parameter in beside if not name.endswith("bias")]
    if not trained and any(flag for _, flag in others):
        return f"{next(name for name, flag in others if flag)} is trained, beside converted layers that are frozen."
    if trained and others and not any(parameter.requires_grad for _, _, parameter in beside):
        return f"{others[0][0]} is frozen, beside converted layers that are trained."
    return None


def _flags_of_bases(pool: RoastPool) -> list[bool]:
    # Not `pool.bases()`: a parametrized basis would be computed.
    parameters = pool.__dict__["_parameters"].items()
    return [basis.requires_grad for name, basis in parameters if name != "weight" and basis is not None]


def _beside_readers(model: nn.Module) -> Iterator[tuple[type, str, nn.Parameter]]:
    """Yield class, name and value of the Parameters of readers and of norms that stand beside them."""
    for path, parent in model.named_modules():
        near = [parent, *(child for child in parent._modules.values() if child is not None)]
        if not any(_reads(other) for module in near for other in (module, *module._modules.values())):
            continue
        for name, module in parent._modules.items():
            if module is None or isinstance(module, RoastPool):
                continue
            own = {key: each for key, each in module._parameters.items() if not key.startswith(MEMBER)}
            if not _reads(module) and any(each is not None and each.dim() > 1 for each in own.values()):
                # A layer that is dense, as a head that is trained alone.
                continue
            for attribute, parameter in own.items():
                if parameter is not None:
                    yield type(module), ".".join(part for part in (path, name, attribute) if part), parameter


def _reads(module: nn.Module | None) -> bool:
    return module is not None and bool(module.__dict__.get("_roast"))

"""torch.fx's tracing in a process with other threads: they notice nothing of it, and an interrupt leaves no patch."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch.fx import _symbolic_trace as fx_trace

from roastify.isolation import put_back

# One trace at a time: a tracer patches the modules whose functions it records, and a second one would undo that while
# the first goes on.
_lock = threading.RLock()
# Torch 2.14 keeps a flag for each thread, under another name.
_FLAG = "_is_fx_tracing_flag"
_PATCHED = ("__call__", "__getattr__")


class _Here:
    """True in the thread that made it, false in all others."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


class _Muted:
    """A stream that drops what one thread writes."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._here = stream, _Here()

    def write(self, text: str) -> int:
        return len(text) if self._here else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Drop what this thread prints; the lines of other threads go where they went."""
    stream = sys.stdout
    mine = _Muted(stream)

    def unmute() -> None:
        # Unless somebody has set another one since.
        if sys.stdout is mine:
            sys.stdout = stream

    with put_back(unmute):
        sys.stdout = mine
        yield


def trace_alone(tracer: fx.Tracer, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
    """Return `tracer.trace(root, concrete_args)`.

    While torch.fx traces, it patches `nn.Module.__call__` and `nn.Module.__getattr__`, and sets a flag that makes
    compiled functions fail. Both hold for the whole process, so models that run in other threads fail. Here, both work
    in this thread alone, and the class is as before at the end, also if an interrupt comes while torch.fx restores it.
    """
    with _lock:
        here = _Here()
        flag, before = getattr(fx_trace, _FLAG, None), {name: getattr(nn.Module, name) for name in _PATCHED}
        with put_back(lambda: _restore(flag, before)):
            if flag is not None:
                setattr(fx_trace, _FLAG, here)
            return _with_patches_for(here, before, type(tracer).trace)(tracer, root, concrete_args)


def _with_patches_for(here: _Here, before: dict[str, Any], method: Any) -> Callable[..., fx.Graph]:
    """Return a tracer's method with a patcher whose patches of `nn.Module` work where `here` is true."""
    # Once a process has compiled, torch has wrapped the method in one that does not compile it.
    method = inspect.unwrap(method)
    # The method finds the patcher and the flag among its globals; a copy of them is its own.
    own = {**method.__globals__, "_new_patcher": functools.partial(_patcher_for, here, before)}
    return types.FunctionType(method.__code__, own, method.__name__, method.__defaults__, method.__closure__)


@contextlib.contextmanager
def _patcher_for(here: _Here, before: dict[str, Any]) -> Iterator[Any]:
    with fx_trace._new_patcher() as patcher:
        plain = patcher.patch_method

        def patch_method(cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True) -> None:
            if cls is nn.Module:
                new = _only(here, new, before[name])
            plain(cls, name, new, deduplicate)

        vars(patcher)["patch_method"] = patch_method
        yield patcher


def _only(here: _Here, new: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (new if here else original)(module, *args, **kwargs)

    return method


def _restore(flag: Any, before: dict[str, Any]) -> None:
    if flag is not None:
        setattr(fx_trace, _FLAG, flag)
    for name, original in before.items():
        if getattr(nn.Module, name) is not original:
            setattr(nn.Module, name, original)

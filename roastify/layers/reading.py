"""How an attribute that lies in the pool is read: as a tensor, or within a module's call as a lazy weight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from roastify.kernels.torch_internals import is_recording_proxies, saved_tensors_hook
from roastify.layers.lazy_weight import LazyWeight
from roastify.layers.read_weight import ReadWeight
from roastify.pool.pass_cache import cache_of

# Tracers that record reads instead of having them done; the last one counts. A read is of a module and an attribute.
tracers: list[Callable[[Any, str], Any]] = []


def read_attribute(module: Any, name: str) -> Tensor:
    """Return a shared attribute of a module on the pool as the dense, differentiable tensor."""
    if tracers:
        return tracers[-1](module, name)
    shared = module._roast[name]
    dense = shared.dense()
    # A tensor without values is of a class already, and what records operators (`make_fx`) knows no class of ours.
    if torch.compiler.is_compiling() or type(dense) is not Tensor or is_recording_proxies():
        return dense
    weight = dense.as_subclass(ReadWeight)
    weight.source = (module, name, shared)
    return weight


class ModuleCall:
    """One call of a module: the tensors that its code has read, and whether its code is given lazy weights.

    Both hold only while what is saved for backward is looked after as it was when the call began. What the module's
    code checkpoints is run again without the call around it, and must then read as it read before.
    """

    def __init__(self, lazy: bool) -> None:
        self.lazy = lazy
        self.hook = saved_tensors_hook()
        self.held: dict[tuple[str, bool], tuple[Any, Tensor]] = {}


class _Running(threading.local):
    """The calls of modules that this thread is in."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, ModuleCall] = {}


running = _Running()


def dense_property(name: str) -> property:
    """Return the property through which a shared attribute is read as a tensor."""
    return property(
        lambda module: read_in_call(module, name),
        doc="Materialised from the pool; gradients flow back to it, and writes are refused.",
    )


def lazy_property(name: str, of_parts: bool) -> property:
    """Return the property of a shared attribute that the module's own code reads by operations on the pool alone.

    Within a call of the module its code is given a `LazyWeight`; everyone else reads a tensor.
    """

    def read(module: Any) -> Any:
        shared = module._roast[name]
        if tracers or shared.view.strips:
            return read_in_call(module, name)
        if not torch.compiler.is_compiling():
            call = running.calls.get(module)
            if call is None or not call.lazy or call.hook is not saved_tensors_hook():
                return read_in_call(module, name)
        return LazyWeight(shared, lambda: read_in_call(module, name), of_parts=of_parts)

    return property(read, doc="Read from the pool by the operations of the module's code; elsewhere materialised.")


def read_in_call(module: Any, name: str) -> Tensor:
    """Return a shared attribute as a tensor: within a call of the module the same one while the pool is the same."""
    if tracers or torch.compiler.is_compiling():
        return read_attribute(module, name)
    call = running.calls.get(module)
    if call is None or call.hook is not saved_tensors_hook():
        return read_attribute(module, name)
    cache = cache_of(module._roast[name].pool)
    key = name, torch.is_grad_enabled()
    if key not in call.held or call.held[key][0] is not cache:
        call.held[key] = cache, read_attribute(module, name)
    return call.held[key][1]

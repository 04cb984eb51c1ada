"""How a shared attribute is read: as a tensor, or within a call of its module as a lazy weight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from roastify.kernels.torch_internals import (
    NO_PASS,
    current_backward_pass,
    is_recording_proxies,
    saved_tensors_hook,
)
from roastify.layers.lazy_weight import LazyWeight
from roastify.layers.read_weight import GuardedWeight, ReadWeight
from roastify.pool.pass_cache import cache_of, passes

# Tracers that record reads (a module and an attribute's name) instead of reading the pool. The last one is active.
tracers: list[Callable[[Any, str], Any]] = []


def read_attribute(module: Any, name: str) -> Tensor:
    """Return a shared attribute of a module on the pool as the dense, differentiable tensor."""
    if tracers:
        return tracers[-1](module, name)
    shared = module._roast[name]
    dense = shared.dense()
    # A fake tensor has a class of its own already. `make_fx`, which records operators, does not support `ReadWeight`.
    if torch.compiler.is_compiling() or type(dense) is not Tensor or is_recording_proxies():
        return dense
    weight = dense.as_subclass(ReadWeight if _in_forward(shared.pool) else GuardedWeight)
    weight.source = (module, name, shared)
    return weight


def _in_forward(pool: Any) -> bool:
    """Whether the model's own code reads: in a forward pass, in a module's call, or again in a backward pass."""
    return bool(running.calls) or pool in passes.running or current_backward_pass() != NO_PASS


class ModuleCall:
    """One call of a module: the tensors that its code has read, and whether its code gets lazy weights.

    Neither is used inside a region with another saved-tensors hook than the one at the start of the call, as in a
    checkpoint. A checkpointed region is recomputed without the module's call around it, so it must read the attributes
    the same way in both runs: as a new tensor each time.
    """

    def __init__(self, lazy: bool) -> None:
        self.lazy = lazy
        self.hook = saved_tensors_hook()
        self.tensors: dict[tuple[str, bool], tuple[Any, Tensor]] = {}


class _Running(threading.local):
    """The calls of modules that this thread is running."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, ModuleCall] = {}


running = _Running()


def dense_property(name: str) -> property:
    """Return the property through which a shared attribute is read as a tensor."""
    return property(
        lambda module: read_in_call(module, name),
        doc="Materialised from the pool. Gradients flow back to the pool, and writes are refused.",
    )


def lazy_property(name: str, of_parts: bool) -> property:
    """Return the property of a shared attribute that only operations in the module's own code use.

    Within a call of the module, its code gets a `LazyWeight`. All other code gets a tensor.
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

    return property(
        read, doc="Read from the pool by the operations in the module's code; materialised for all other code."
    )


def read_in_call(module: Any, name: str) -> Tensor:
    """Return a shared attribute as a tensor. Within one call of the module, every read returns the same tensor.

    If the pool changes during the call, the next read returns a new tensor.
    """
    if tracers or torch.compiler.is_compiling():
        return read_attribute(module, name)
    call = running.calls.get(module)
    if call is None or call.hook is not saved_tensors_hook():
        return read_attribute(module, name)
    cache = cache_of(module._roast[name].pool)
    key = name, torch.is_grad_enabled()
    if key not in call.tensors or call.tensors[key][0] is not cache:
        call.tensors[key] = cache, read_attribute(module, name)
    return call.tensors[key][1]

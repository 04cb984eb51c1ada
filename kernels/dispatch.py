"""How an operator is called: through the dispatcher where anybody would notice, past it where nobody would."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.torch_internals import (
    any_requires_grad,
    current_device_index,
    in_forward_mode,
    in_func_transform,
    is_jit_tracing,
    is_profiling,
    num_dispatch_modes,
    num_function_modes,
    takes_batched_gradients,
    without_view_tracking,
)
from roastify.kernels.view import TileView

# The modules of `gpu` with the operators' launchers. They import Triton, so they are imported when a CUDA tensor
# arrives.
_CUDA_HOMES = {
    "gather": "gather",
    "reduce": "reduce",
    "linear": "linear",
    "linear_t": "linear",
    "linear_reduce": "linear",
    "embedding": "embedding",
    "embedding_reduce": "embedding",
    "combine": "combine",
    "combine_reduce": "combine",
    "reduce_": "reduce",
    "linear_reduce_": "linear",
    "embedding_reduce_": "embedding",
}

_ops = torch.ops.roastify
# What each operator does, and its node of autograd: `schemas` and `autograd` enter them.
implementations: dict[str, Any] = {}
nodes: dict[str, Any] = {}


@functools.cache
def _launcher(name: str) -> Any:
    return getattr(importlib.import_module(f"roastify.kernels.gpu.{_CUDA_HOMES[name]}"), name)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context for launching kernels: Triton does so on the current device, which need not be a tensor's."""
    device = tensor.get_device()
    return contextlib.nullcontext() if device == current_device_index() else torch.cuda.device(device)


def implementation(name: str) -> Any:
    """Return what an operator does: on a GPU its launcher, found when it is first called; elsewhere the reference.

    Views are not tracked while it runs: else a result that was reshaped on its way out would count as a view made
    inside autograd's node, which torch forbids to change in place, and models do that to what a layer gives them.
    """
    elsewhere = getattr(reference, name)

    def run(*args: Any) -> Tensor | None:
        first = args[0]
        with without_view_tracking():
            if not first.is_cuda:
                return elsewhere(*args)
            launcher = _launcher(name)
            if first.get_device() == current_device_index():
                return launcher(*args)
            with on_device_of(first):
                return launcher(*args)

    return run


# All that an operator's arguments are where nothing stands between them and its kernels.
_PLAIN = {Tensor, torch.nn.Parameter, type(None), TileView, float, int, list, torch.Size}


def is_watched(*args: Any) -> bool:
    """Whether anybody would notice an operator on these arguments: a compiler, mode, transform or profiler."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, args))
        or not (args[0].is_cuda or args[0].is_cpu)
        or num_dispatch_modes() > 0
        or num_function_modes() > 0
        or in_func_transform()
        or takes_batched_gradients()
        or in_forward_mode()
        or is_jit_tracing()
        or is_profiling()
    )


def call(name: str, *args: Any) -> Any:
    """Call an operator, past the dispatcher if nobody would notice: an eager layer's time is what the host takes.

    (A layer's forward and backward take a third less of it.) Compilers, tracers, modes, transforms, subclasses and
    profilers see the operator.
    """
    if is_watched(*args):
        return getattr(_ops, name).default(*args)
    if torch.is_grad_enabled() and name in nodes and any_requires_grad(*args):
        return nodes[name].apply(*args)
    return implementations[name](*args)

"""How an operator is called, directly or through torch's dispatcher, and whether GPU or plain torch runs it."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from roastify.kernels import plain, reference
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
from roastify.kernels.view import FoldView, TileView

# The module of `gpu` that holds each operator's launcher. These modules import Triton, so each is imported when the
# first CUDA tensor arrives.
_CUDA_HOMES = {
    "gather": "gather",
    "reduce": "reduce",
    "gather_group": "group",
    "reduce_group": "group",
    "linear": "linear",
    "linear_t": "linear",
    "linear_reduce": "linear",
    "embedding": "embedding",
    "embedding_reduce": "embedding",
    "folded_linear": "linear",
    "fold": "fold",
    "unfold": "fold",
    "fold_reduce": "fold",
    "combine": "combine",
    "combine_reduce": "combine",
    "reduce_": "reduce",
    "reduce_group_": "group",
    "linear_reduce_": "linear",
    "embedding_reduce_": "embedding",
    "fold_reduce_": "fold",
}

_ops = torch.ops.roastify
# Each operator's implementation, entered by `schemas`, and its autograd node, entered by `autograd`.
implementations: dict[str, Any] = {}
nodes: dict[str, Any] = {}


@functools.cache
def _launcher(name: str) -> Any:
    return getattr(importlib.import_module(f"roastify.kernels.gpu.{_CUDA_HOMES[name]}"), name)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context that makes a tensor's device the current one, on which Triton launches kernels."""
    device = tensor.get_device()
    return contextlib.nullcontext() if device == current_device_index() else torch.cuda.device(device)


def implementation(name: str) -> Any:
    """Return an operator's implementation: on a GPU its launcher, found on the first call; elsewhere the reference.

    Views are not tracked while it runs. With tracking, a result that was reshaped before it is returned would count as
    a view created inside an autograd node. Torch forbids changing such a view in place, and models do change a layer's
    output in place.
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


# The types of an operator's arguments if no tensor subclass or tracer is involved.
_PLAIN = {Tensor, torch.nn.Parameter, type(None), TileView, FoldView, torch.dtype, float, int, str, list, torch.Size}


def is_watched(*args: Any) -> bool:
    """Whether a compiler, mode, transform, tensor subclass or profiler watches an operator on these arguments."""
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
    """Call an operator, without the dispatcher unless a tool watches the call.

    Host time limits an eager layer, and its forward and backward take a third less of it without the dispatcher.
    Compilers, tracers, modes, transforms, tensor subclasses and profilers still see the operator.
    """
    if is_watched(*args):
        if plain.is_recording():
            return plain.operator(name)(*args)
        return getattr(_ops, name).default(*args)
    if torch.is_grad_enabled() and name in nodes and any_requires_grad(*args):
        return nodes[name].apply(*args)
    return implementations[name](*args)

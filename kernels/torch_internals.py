"""The private functions of PyTorch that roastify calls; no other file names them.

What `nn.Module` and its layers keep under an underscore is another matter: the files that rewrite modules use it.

They were checked on torch 2.11, 2.13 and 2.14. PyTorch may change them without notice, so look here first when a new
version fails. A function that every layer calls in every step is bound to its name directly, because a wrapper would
cost the host more than the call itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.utils import _python_dispatch as dispatch_modes
from torch.utils import _pytree, checkpoint

# Nested containers as lists of their leaves. `torch.utils` has no public module for it.
pytree = _pytree


def _no_cuda(*args: Any) -> Any:
    raise RuntimeError("this build of PyTorch has no CUDA; the tensor cannot be on a GPU")


NO_PASS = -1
# The engine's number of the backward pass that this thread runs, or `NO_PASS`.
current_backward_pass: Callable[[], int] = torch._C._current_graph_task_id
# Whether the current backward pass runs a node.
will_run: Callable[[Any], bool] = torch._C._will_engine_execute_node


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Have the engine hold a function until the current backward pass ends or fails, and call it only if it ends."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


_VMAP_KEY = cast(torch._C.DispatchKey, torch._C._parse_dispatch_key("VmapMode"))


def takes_batched_gradients() -> bool:
    """Whether `torch.autograd.grad` computes a batch of gradients at once, by a vmap that is not `torch.func`'s."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_KEY)


in_func_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
num_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
num_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing
is_profiling: Callable[[], bool] = torch.autograd._profiler_enabled
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def is_jvp_transform() -> bool:
    """Whether the innermost transform of `torch.func` is one of forward mode."""
    return torch._C._functorch.peek_interpreter_stack().key() == torch._C._functorch.TransformType.Jvp


def is_recording_proxies() -> bool:
    """Whether `make_fx` records the operations on tensors."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_exporting() -> bool:
    """Whether `torch.export` traces; on torch 2.11, `torch.compiler.is_exporting` is True whenever dynamo traces."""
    return torch.compiler._is_exporting_flag


def writes_recorded(tensor: Tensor) -> int:
    """Return how many writes to a tensor a compiler has recorded; its version does not count those of `_foreach_…`."""
    functional = getattr(tensor, "elem", None)
    if functional is None or not torch._is_functional_tensor(functional):
        return 0
    return int(torch._functionalize_mutation_counter(functional))


def is_cut_into_stages() -> bool:
    """Whether `torch.export` traces for `torch.distributed.pipelining.pipeline`, which copies shared Parameters."""
    frame = sys._getframe() if is_exporting() else None
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.pipelining."):
            return True
        frame = frame.f_back
    return False


def dispatch_mode_stack() -> list[Any]:
    """Return the modes that see every operator, the outermost first."""
    return dispatch_modes._get_current_dispatch_mode_stack()


def without_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """Return the context in which no mode sees an operator."""
    return dispatch_modes._disable_current_modes()


# The modes of selective checkpoints, which choose the tensors that they save.
SELECTIVE_CHECKPOINTS = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)


def saved_tensors_hook() -> Any:
    """Return the hook that packs tensors saved for backward (a checkpoint sets one), or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


# In this context every tensor subclass is a plain tensor to operations.
without_subclasses = torch._C.DisableTorchFunctionSubclass
# A tensor subclass with this `__torch_function__` is a plain tensor to every operation.
disabled_torch_function: Any = torch._C._disabled_torch_function_impl


def is_householder(parametrization: Any) -> bool:
    """Whether a parametrization makes orthogonal weights of Householder reflectors, whose original must be exact."""
    orthogonal = isinstance(parametrization, parametrizations._Orthogonal)
    return orthogonal and parametrization.orthogonal_map == parametrizations._OrthMaps.householder


def is_spectral_norm(parametrization: Any) -> bool:
    """Whether a parametrization divides a weight by its spectral norm, which it estimates in buffers."""
    return isinstance(parametrization, parametrizations._SpectralNorm)


# The dispatch key whose kernels track which tensors are views of which.
_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
below_autograd = torch._C._AutoDispatchBelowAutograd


def without_view_tracking() -> contextlib.AbstractContextManager[Any]:
    """Return the context in which results do not count as views of anything."""
    return torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING)


# These return numbers: creating torch's device and stream objects takes longer than the query itself.
current_device_index: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _no_cuda)
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_cuda)
_is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", _no_cuda)


def is_captured(tensor: Tensor) -> bool:
    """Whether operations on a tensor are now captured in a CUDA graph."""
    return tensor.is_cuda and _is_capturing()


def compile_settings(**settings: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which dynamo, the front end of `torch.compile`, has these settings."""
    return torch._dynamo.config.patch(settings)


def is_compiled(module: Any) -> bool:
    """Whether a module is what `torch.compile` returns for a module; dynamo is not imported to find out."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def with_static_sizes(tensor: Any) -> Any:
    """Return a tensor whose sizes are constants to `torch.compile`, as `torch._dynamo.mark_static` makes them."""
    tensor._dynamo_static_indices = set(range(tensor.dim()))
    return tensor


def requires_grad_below(tensor: Any) -> bool:
    """Whether a tensor that a transform of torch.func wraps requires a gradient outside of the transform."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad

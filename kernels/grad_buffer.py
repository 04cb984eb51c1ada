"""Where a backward pass adds up the pool's gradient: one buffer a pass, instead of a pool-sized tensor a layer.

A layer reads the pool through a node of autograd that carries a `GradBuffer`. The layer's operator adds its gradient to
the buffer and returns none. The gate, which is the node behind all readers, takes the sum out: autograd runs the gate
after every reader, whether or not a reader returned a gradient.

Each backward pass (a graph task of autograd's engine) has a sum of its own. Passes that run within each other, in
several threads or through one graph again therefore never mix, and the sum of a pass that failed is gone with the pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roastify.kernels.torch_internals import (
    NO_PASS,
    at_end_of_backward,
    current_backward_pass,
    current_raw_stream,
    in_func_transform,
    takes_batched_gradients,
    will_run,
)


class _PassSum:
    """The sum of one backward pass. Only the engine's task holds it, by a callback: it lives as long as the pass."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, recorded: bool) -> None:
        self.total: Tensor | None = torch.zeros(shape, dtype=dtype, device=device)
        streamed = device.type == "cuda" and not recorded
        self.stream = torch.cuda.current_stream(device) if streamed else None
        self.raw_stream = None if self.stream is None else self.stream.cuda_stream

    def ready(self) -> Tensor:
        """Return the sum as it will be when the current stream comes to it."""
        assert self.total is not None
        # Layers run backward on the streams of their forward, and the engine orders only what it sees pass.
        if self.stream is not None and self.raw_stream != current_raw_stream(self.total.get_device()):
            current = torch.cuda.current_stream(self.total.device)
            current.wait_stream(self.stream)
            self.total.record_stream(current)
            self.stream, self.raw_stream = current, current.cuda_stream
        return self.total

    def close(self) -> None:
        """Let go of the sum."""
        self.total = None


class GradBuffer:
    """The sums of the pool's gradient, one for each backward pass through the readers of one gate.

    Args:
        shape: of the pool.
        dtype: in which gradients are summed.
        device: of the pool.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._like = tuple(shape), dtype, device
        # Weak: the gate's node holds this.
        self._gate: weakref.ref[Any] | None = None
        self._sums: weakref.WeakValueDictionary[int, _PassSum] = weakref.WeakValueDictionary()
        # Whether a compiler records the backward passes, on tensors that hold no values.
        self.recorded = False
        # How often a gradient has left for the pool.
        self.times_taken = 0

    def set_gate(self, node: Any) -> None:
        """Tell which node takes the sum out."""
        self._gate = weakref.ref(node)

    def total(self) -> Tensor | None:
        """Return this backward pass's sum, to add to; None if the gradient must be returned to autograd.

        It must be returned where a graph of the gradient is asked for, in a transform, and where the pass ends before
        the gate.
        """
        task = current_backward_pass()
        if task == NO_PASS or torch.is_grad_enabled() or in_func_transform() or takes_batched_gradients():
            return None
        held = self._sums.get(task)
        if held is None:
            gate = None if self._gate is None else self._gate()
            if gate is None or not will_run(gate):
                return None
            held = _PassSum(*self._like, self.recorded)
            self._sums[task] = held
            at_end_of_backward(held.close)
        return held.ready()

    def take(self) -> Tensor | None:
        """Return this backward pass's sum, for the caller to keep, or None if nothing was added."""
        self.times_taken += 1
        held = self._sums.pop(current_backward_pass(), None)
        if held is None:
            return None
        total = held.ready()
        held.close()
        return total


def grad_buffer_of(node: Any) -> GradBuffer | None:
    """Return the gradient buffer of a node of autograd, if the node is a reader of a pool."""
    return getattr(node, "grad_buffer", None)


def is_wanted(node: Any) -> bool:
    """Whether the backward pass under way runs a node: its gradient is asked for, or one behind it."""
    return current_backward_pass() == NO_PASS or will_run(node)

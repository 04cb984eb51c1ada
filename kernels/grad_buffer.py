"""The buffer in which a backward pass sums the pool's gradient, instead of one tensor for each layer.

A layer reads the pool through an autograd node that holds a `GradBuffer`. The layer's operator adds its gradient to the
buffer and returns None. The gate is the node behind all readers. Autograd runs the gate after every reader, whether or
not the reader returned a gradient, so the gate can take the complete sum.

Each backward pass (a graph task of autograd's engine) has its own sum. Nested passes, passes in several threads and
repeated passes through one graph therefore never mix. If a pass fails, its sum is freed with it.
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
    """The sum of one backward pass. Only a callback of the engine's task holds it, so it is freed with the pass."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, recorded: bool) -> None:
        self.total: Tensor | None = torch.zeros(shape, dtype=dtype, device=device)
        streamed = device.type == "cuda" and not recorded
        self.stream = torch.cuda.current_stream(device) if streamed else None
        self.raw_stream = None if self.stream is None else self.stream.cuda_stream

    def ready(self) -> Tensor:
        """Return the sum; the current stream waits for the stream that wrote to it last."""
        assert self.total is not None
        # A layer's backward runs on the stream of its forward. The engine orders streams only for the gradients that
        # nodes return, and this sum is not one of them.
        if self.stream is not None and self.raw_stream != current_raw_stream(self.total.get_device()):
            current = torch.cuda.current_stream(self.total.device)
            current.wait_stream(self.stream)
            self.total.record_stream(current)
            self.stream, self.raw_stream = current, current.cuda_stream
        return self.total

    def close(self) -> None:
        """Free the sum."""
        self.total = None


class GradBuffer:
    """The sums of the pool's gradient, one for each backward pass through the readers of one gate.

    Args:
        shape: the pool's shape.
        dtype: the dtype in which gradients are summed.
        device: the pool's device.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._like = tuple(shape), dtype, device
        # A weak reference, because the gate's node holds this object.
        self._gate: weakref.ref[Any] | None = None
        self._sums: weakref.WeakValueDictionary[int, _PassSum] = weakref.WeakValueDictionary()
        # Whether a compiler records the backward passes on tensors without values.
        self.recorded = False
        # How often the gate has asked for a sum.
        self.times_taken = 0

    def set_gate(self, node: Any) -> None:
        """Set the node that takes the sum."""
        self._gate = weakref.ref(node)

    def total(self) -> Tensor | None:
        """Return this backward pass's sum, to add to; None if the gradient must be returned to autograd.

        It must be returned if the caller asked for the gradient's graph, inside a transform, and if the pass does not
        run the gate.
        """
        task = current_backward_pass()
        if task == NO_PASS or torch.is_grad_enabled() or in_func_transform() or takes_batched_gradients():
            return None
        pass_sum = self._sums.get(task)
        if pass_sum is None:
            gate = None if self._gate is None else self._gate()
            if gate is None or not will_run(gate):
                return None
            pass_sum = _PassSum(*self._like, self.recorded)
            self._sums[task] = pass_sum
            at_end_of_backward(pass_sum.close)
        return pass_sum.ready()

    def take(self) -> Tensor | None:
        """Return this backward pass's sum, for the caller to keep; None if nothing was added."""
        self.times_taken += 1
        pass_sum = self._sums.pop(current_backward_pass(), None)
        if pass_sum is None:
            return None
        total = pass_sum.ready()
        pass_sum.close()
        return total


def grad_buffer_of(node: Any) -> GradBuffer | None:
    """Return an autograd node's gradient buffer; None if the node is not a reader of a pool."""
    return getattr(node, "grad_buffer", None)


def is_wanted(node: Any) -> bool:
    """Whether the current backward pass runs a node, because it needs the node's gradient or one behind it."""
    return current_backward_pass() == NO_PASS or will_run(node)

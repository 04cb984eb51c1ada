"""Where a backward pass adds the pool's gradient up: one buffer a pass, instead of a pool-sized tensor a layer.

A layer reads the pool through a node of autograd's that carries a `Sink`. The layer's operator then adds its gradient
to the sink's buffer and returns none; the node behind all readers, the gate, takes the buffer out. Autograd runs the
gate after every reader, whether or not any of them returned something.

A pass is one of autograd's graph tasks. Each has a buffer of its own, so that passes that run within each other, in
several threads or through one graph again never mix, and what a pass has that failed is gone with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

_VMAP = cast(torch._C.DispatchKey, torch._C._parse_dispatch_key("VmapMode"))


def is_batched() -> bool:
    """Whether `torch.autograd.grad` takes a batch of gradients at once, by a vmap that is not `torch.func`'s."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP)


class _Buffer:
    """The sum of one backward pass. Only the engine's task holds it, by the callback: it lives no longer than that."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, recorded: bool) -> None:
        self.total: Tensor | None = torch.zeros(shape, dtype=dtype, device=device)
        streamed = device.type == "cuda" and not recorded
        self.stream = torch.cuda.current_stream(device) if streamed else None
        self.raw_stream = None if self.stream is None else self.stream.cuda_stream

    def ready(self) -> Tensor:
        """Return the sum as it will be when the current stream comes to it."""
        assert self.total is not None
        # Layers run backward on the streams of their forward, and the engine orders only what it sees pass.
        if self.stream is not None and self.raw_stream != torch._C._cuda_getCurrentRawStream(self.total.get_device()):
            current = torch.cuda.current_stream(self.total.device)
            current.wait_stream(self.stream)
            self.total.record_stream(current)
            self.stream, self.raw_stream = current, current.cuda_stream
        return self.total

    def close(self) -> None:
        """Let go of the sum."""
        self.total = None


class Sink:
    """What stands at the end of the pool's readers in a graph.

    Args:
        shape: of the pool.
        dtype: in which gradients are summed.
        device: of the pool.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._like = tuple(shape), dtype, device
        # Weak: the gate's node holds the sink.
        self._gate: weakref.ref[Any] | None = None
        self._buffers: weakref.WeakValueDictionary[int, _Buffer] = weakref.WeakValueDictionary()
        # Whether its backward passes are recorded by a compiler, on tensors that hold no values.
        self.recorded = False
        # How often a gradient has left for the pool.
        self.runs = 0

    def set_gate(self, node: Any) -> None:
        """Tell which node takes the buffer out."""
        self._gate = weakref.ref(node)

    def total(self) -> Tensor | None:
        """Return this backward pass's buffer to add to; None if gradients must go the way of autograd.

        They must where a graph of them is asked for, in a transform, and where the pass ends before the gate.
        """
        task = torch._C._current_graph_task_id()
        if task == -1 or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or is_batched():
            return None
        buffer = self._buffers.get(task)
        if buffer is None:
            gate = None if self._gate is None else self._gate()
            if gate is None or not torch._C._will_engine_execute_node(gate):
                return None
            buffer = _Buffer(*self._like, self.recorded)
            self._buffers[task] = buffer
            torch.autograd.Variable._execution_engine.queue_callback(buffer.close)
        return buffer.ready()

    def take(self) -> Tensor | None:
        """Return this backward pass's sum, for the caller to keep, or None if nothing was added."""
        self.runs += 1
        buffer = self._buffers.pop(torch._C._current_graph_task_id(), None)
        if buffer is None:
            return None
        total = buffer.ready()
        buffer.close()
        return total


def sink_of(node: Any) -> Sink | None:
    """Return the sink that a node of autograd's leads to, if it is a reader's of a pool."""
    return getattr(node, "sink", None)


def is_wanted(node: Any) -> bool:
    """Whether the backward pass under way runs a node: its gradient is asked for, or one behind it."""
    return torch._C._current_graph_task_id() == -1 or torch._C._will_engine_execute_node(node)

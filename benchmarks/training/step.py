"""One step of training, what it holds in memory, and how long it takes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.stats import quartiles
from benchmarks.training.tasks import Batch, loss_of
from roastify.checks.clocks import wait

LEARNING_RATE = 1e-4
LARGEST_NORM = 1.0
# Steps that follow one another before the other side has its turn; the first of them is not timed.
IN_A_ROW = 6
STEPS_BEFORE_CAPTURE = 3


class Training:
    """A model in training: bfloat16 autocast, clipping, AdamW.

    Args:
        model: what is called: the model, or what wraps it.
        micro_batches: whose mean loss a step descends; one, but where a step stands for several GPUs' joint batch.
    """

    def __init__(self, model: nn.Module, micro_batches: Sequence[Batch]) -> None:
        self.model = model
        self.micro_batches = micro_batches
        self.device = next(iter(micro_batches[0].values())).device
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, capturable=on_gpu)

    def forward(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return loss_of(self.model, batch)

    def finish(self) -> None:
        """Do what follows the backward pass."""
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()

    def step(self) -> Tensor:
        """Take one step; return its loss, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in self.micro_batches:
            loss = self.forward(batch) / len(self.micro_batches)
            loss.backward()
            total += loss.detach()
        self.finish()
        return total

    def captured(
        self, stream: torch.cuda.Stream | None = None, steps_before: int = STEPS_BEFORE_CAPTURE
    ) -> Callable[[], object]:
        """Return a whole step as one CUDA graph's replay, after a few steps more on the graph's stream.

        Args:
            stream: what DDP was built on, because its nodes of autograd stay there; default: a new one.
            steps_before: how many steps that is.
        """
        stream = stream or torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(steps_before):
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        graph = torch.cuda.CUDAGraph()
        # Only this thread is watched: NCCL's own thread asks for events while the step is captured.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.step()
        return graph.replay

    def losses(self, steps: int) -> list[float]:
        """Take some steps; return the loss of each."""
        return torch.stack([self.step() for _ in range(steps)]).tolist()


def allocated(device: torch.device) -> int:
    """Return the bytes that tensors take on a GPU now; 0 on a CPU, where nothing counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def prepare_libraries(device: torch.device) -> None:
    """Let cuBLAS allocate its workspaces, which would else count as the memory of whatever runs first."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(256, 256, device=device, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()
    wait(device)


def state_bytes(training: Training) -> dict[str, int]:
    """Return the bytes of parameters, buffers, gradients and optimizer state after a step."""
    parameters = list(training.model.parameters())
    states = [value for state in training.optimizer.state.values() for value in state.values()]
    return {
        "parameters": _bytes(parameters),
        "buffers": _bytes(training.model.buffers()),
        "gradients": _bytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        "optimizer": _bytes(value for value in states if isinstance(value, Tensor)),
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def memory(training: Training, before: int) -> dict[str, int | None]:
    """Take one step; return what it held, in bytes.

    `activations` is what the forward pass leaves for the backward pass, and `rest` what the peak holds beside
    parameters, buffers, gradients and optimizer state; both are None on a CPU, whose allocator counts nothing.

    Args:
        training: which has taken steps already.
        before: bytes allocated before its model was built.
    """
    device = training.device
    found: dict[str, int | None] = {"activations": None, "peak": None, "rest": None}
    training.optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
    resting = allocated(device)
    loss = training.forward(training.micro_batches[0])
    after_forward = allocated(device)
    loss.backward()
    del loss
    training.finish()
    wait(device)
    held = state_bytes(training)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
        found = {"activations": after_forward - resting, "peak": peak, "rest": peak - sum(held.values())}
    return {**held, **found}


def in_turn(sides: Mapping[str, Callable[[], object]], device: torch.device, steps: int) -> dict[str, dict[str, float]]:
    """Time at least so many steps of each side, in turn, some in a row as in a training loop.

    A step is timed from its beginning to the beginning of the next, without waiting for the GPU in between: where the
    GPU waits for Python, so it does in training.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(-(-steps // (IN_A_ROW - 1))):
        for name, step in sides.items():
            times[name] += in_a_row(step, device)
    return {name: quartiles(values, count="steps") for name, values in times.items()}


def in_a_row(step: Callable[[], object], device: torch.device) -> list[float]:
    """Take some steps and return the milliseconds of all but the first."""
    wait(device)
    if device.type != "cuda":
        marks = []
        for _ in range(IN_A_ROW):
            step()
            marks.append(time.perf_counter() * 1e3)
        return [end - begin for begin, end in itertools.pairwise(marks)]
    events = []
    for _ in range(IN_A_ROW):
        step()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)
    wait(device)
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]

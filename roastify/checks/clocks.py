"""How calls are timed: in turn, from a CUDA graph or by the wall clock; and a record of the machine."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import roastify
from roastify.errors import BenchError

# After so many calls, compiled kernels, library handles and the allocator's blocks exist.
WARM_UP_CALLS = 3
_LEAST_RUNS = 5

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call.

    Args:
        median_ms: the median of all calls.
        q1_ms: the first quartile.
        q3_ms: the third quartile.
        runs: the number of calls.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    runs: int


def alternate(calls: dict[str, Call], clock: Callable[[Call], float], seconds: float) -> dict[str, Timing]:
    """Time the calls in turn for about `seconds` in all, and at least five times each.

    Before each timed call, the same call runs untimed. The caches then hold this model's data, as in real use, and not
    the other model's.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    runs = 0
    while runs < _LEAST_RUNS or time.perf_counter() < end:
        for name, call in calls.items():
            call()
            times[name].append(clock(call))
        runs += 1
    return {name: _timing(values) for name, values in times.items()}


def _timing(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high, len(times))


def wall_clock(device: torch.device) -> Callable[[Call], float]:
    """Return a function that times one call in milliseconds, from start to finish, with its launches."""

    def clock(call: Call) -> float:
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        return (time.perf_counter() - begun) * 1e3

    return clock


def event_clock(call: Call) -> float:
    """Return the milliseconds of one replay of a CUDA graph on the GPU, behind work that is already queued."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def wait(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Call, what: str) -> Call:
    """Capture a call in a CUDA graph on the current GPU; return a function that replays it and returns its outputs.

    Raises:
        BenchError: the call cannot be captured, and the message names `what`; there is no fallback.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    first = ""
    try:
        with torch.cuda.graph(graph):
            try:
                outputs = call()
            except Exception as error:  # ending the capture raises another error, which says less
                first = reason(error)
                raise
    except Exception as error:
        raise BenchError(
            f"{what} cannot be captured in a CUDA graph: {first or reason(error)}. A captured call may not wait for "
            f"the GPU or read from it; time it without graphs: --no-graph (in Python, graph=False)"
        ) from error

    return _Replay(graph, outputs, call)


@dataclass(frozen=True)
class _Replay:
    """A captured call: its graph, what it returns, and the call itself, whose tensors the graph reads and writes."""

    graph: torch.cuda.CUDAGraph
    outputs: Any
    call: Call

    def __call__(self) -> Any:
        self.graph.replay()
        return self.outputs


def peak_bytes_of(call: Call) -> int:
    """Return the most bytes that a call allocates on the current GPU beyond those allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def reason(error: BaseException) -> str:
    """Return an error's type and the first line of its message; CUDA's messages have many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def machine(device: torch.device) -> dict[str, Any]:
    """Return the circumstances of a measurement: device, versions and date."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "roastify": roastify.__version__}
    for package in ("triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {**found, "date": datetime.date.today().isoformat()}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

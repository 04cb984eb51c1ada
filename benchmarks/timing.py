"""How the GPU benchmarks measure time, and how fast this GPU's memory and units are at best.

A measurement replays graphs of many calls. A graph holds calls on different layers in a row, so that launches cost what
they cost in a model and a dense weight comes from memory as it does there. The sides of a comparison alternate, so that
all see the same clocks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl

from benchmarks.stats import quartiles

Call = Callable[[], object]
MOST_RUNS = 40
LEAST_RUNS = 5
# A slow side is replayed fewer times: this much time for all sides of a comparison.
SECONDS = 0.4
_WARM_UP = 2
_READ_ELEMENTS = 4096


class Replayable(Protocol):
    """What a CUDA graph can do, and a list of calls as well."""

    def replay(self) -> None: ...


class Eager:
    """Calls that are not captured, for operations that a graph cannot hold."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls

    def replay(self) -> None:
        for call in self.calls:
            call()


def graphed(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Return a graph of the calls; they run once before, so that kernels are compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_us(graphs: Mapping[str, Replayable], most: int, seconds: float = SECONDS) -> dict[str, list[float]]:
    """Replay the graphs in turn, up to `most` times, within about `seconds`; microseconds of each replay."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_WARM_UP):
        begun = time.perf_counter()
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
        once = time.perf_counter() - begun
    runs = min(most, max(min(most, LEAST_RUNS), int(seconds / once)))
    for _ in range(runs):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    return times


def measure(
    sides: Mapping[str, Sequence[Call]], most: int = MOST_RUNS, graph: bool = True
) -> dict[str, dict[str, float]]:
    """Time one call of each side: medians and quartiles, in microseconds, over the calls in a row."""
    graphs = {name: graphed(calls) if graph else Eager(calls) for name, calls in sides.items()}
    times = replay_us(graphs, most)
    return {name: quartiles([value / len(sides[name]) for value in values], "us") for name, values in times.items()}


@contextlib.contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Let float32 products use tf32 or not, as torch's own setting says, and put the setting back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@triton.jit
def _read_kernel(p_in, p_out, num_blocks, steps, B: tl.constexpr):
    program = tl.program_id(0)
    i = tl.arange(0, B)
    total = tl.zeros([B], dtype=tl.float32)
    for step in range(0, steps):
        block = (program + step * tl.num_programs(0)) % num_blocks
        # Past the first-level cache, which would serve a repeated read by itself.
        total += tl.load(p_in + block.to(tl.int64) * B + i, cache_modifier=".cg")
    tl.store(p_out + program, tl.sum(total, 0))


def read(data: torch.Tensor, out: torch.Tensor, passes: int) -> int:
    """Read the float32 `data` so many times, `out.numel()` programs sharing it; return the bytes read."""
    num_blocks = data.numel() // _READ_ELEMENTS
    steps = num_blocks * passes // out.numel()
    _read_kernel[(out.numel(),)](data, out, num_blocks, steps, B=_READ_ELEMENTS, num_warps=8)
    return steps * out.numel() * _READ_ELEMENTS * 4


def ceilings() -> dict[str, float]:
    """Measure what bounds a product on this GPU: GB/s from memory and from the cache, TFLOP/s of large products."""
    properties = torch.cuda.get_device_properties(0)
    found = {"l2_mb": properties.L2_cache_size / 1e6}
    large = torch.zeros(1 << 30, device="cuda")
    target = torch.empty_like(large)
    programs = torch.empty(properties.multi_processor_count * 8, device="cuda")
    small = torch.zeros(1 << 22, device="cuda")
    sizes = {
        "memory_copy": 2 * large.nbytes,
        "memory_read": read(large, programs, 1),
        "l2_read": read(small, programs, 256),
    }
    times = measure(
        {
            "memory_copy": [lambda: target.copy_(large)],
            "memory_read": [lambda: read(large, programs, 1)],
            "l2_read": [lambda: read(small, programs, 256)],
        },
        most=20,
    )
    for name, size in sizes.items():
        found[f"{name}_gb_s"] = size / times[name]["median_us"] / 1e3
    for name, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32), ("float32", torch.float32)):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        with matmul_precision(name == "tf32"):
            (product,) = measure({"product": [lambda a=a, b=b: a @ b]}, most=10).values()
        found[f"{name}_tflop_s"] = 2 * 8192**3 / product["median_us"] / 1e6
    torch.cuda.empty_cache()
    return found

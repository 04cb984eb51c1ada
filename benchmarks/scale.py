"""Scale benchmark: planning and converting large models, steps of many small layers, memory of large tables.

Each case runs in a process of its own, so that peaks of memory are its own. Raw rows go to
benchmarks/results/scale.json, and their table to docs/scale.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from torch import Tensor, nn

import roastify
from benchmarks.cpu import THREADS, alternate, memory
from benchmarks.documents import insert, table
from benchmarks.rows import FOLDER, Row, dump, machine, write
from benchmarks.stats import quartiles
from roastify import api

RESULTS = FOLDER / "scale.json"
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN = "<!-- scale: written by `python -m benchmarks.scale` -->"


class Layers(nn.Module):
    """Many small layers, one after another."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    """Experts as modules of their own, of which each input takes two."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index in self.router(x).topk(2).indices.flatten().tolist():
            out = out + self.experts[index](x)
        return out


class Table(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Embedding(4_000_000, 64, padding_idx=0).to(dtype)

    def forward(self, index: Tensor) -> Tensor:
        return self.table(index)


def llama(layers: int, width: int, inner: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=8,
        vocab_size=128_256,
    )
    return LlamaForCausalLM(config)


def mixture() -> nn.Module:
    """A trillion parameters, as Kimi K2 has them: 384 experts in each of 60 layers."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(n_routed_experts=384, num_hidden_layers=61, first_k_dense_replace=1, vocab_size=163_840)
    return DeepseekV3ForCausalLM(config)


def plan_time(build: Callable[[], nn.Module]) -> Row:
    """Plan a model on the meta device."""
    with torch.device("meta"):
        model = build()
    begun = time.perf_counter()
    plan = roastify.plan(model, 10)
    seconds = time.perf_counter() - begun
    modules = sum(1 for _ in model.modules())
    return {"parameters": plan.total_numel, "modules": modules, "tensors": len(plan.tensors), "seconds": seconds}


def convert_time(count: int, width: int) -> Row:
    """Convert many small layers."""
    model = Layers(count, width)
    begun = time.perf_counter()
    roastify.convert(model, 10)
    return {"layers": count, "width": width, "seconds": time.perf_counter() - begun}


def step_time(count: int, width: int, rows: int) -> Row:
    """Time steps of SGD, dense and on the pool, in turn."""
    dense = Layers(count, width)
    models = {"dense": dense, "pool": roastify.convert(dense, 10)}
    x = torch.randn(rows, width)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    calls = {}
    for name, model in models.items():
        optimizer = torch.optim.SGD(model.parameters(), 1e-6)
        calls[name] = lambda model=model, optimizer=optimizer: step(model, optimizer)
    found = {side: quartiles(values) for side, values in alternate(calls, 15.0).items()}
    ratio = found["pool"]["median_ms"] / found["dense"]["median_ms"]
    return {"layers": count, "width": width, "rows": rows, **found, "pool_over_dense": ratio}


def peak(work: Callable[[], object]) -> int:
    """Return how much resident memory grew while a function ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def table_memory(dtype: torch.dtype) -> Row:
    """Convert a table in place with `project`, and densify its artifact: the peaks, the dense table included."""
    models = [Table(dtype)]
    size = models[0].table.weight.nbytes
    converting = peak(lambda: roastify.convert(models[0], 50, inplace=True, init="project"))
    with tempfile.TemporaryDirectory() as place:
        roastify.save(models.pop(), Path(place) / "out")
        densifying = peak(lambda: api.densify_artifact(Path(place) / "out", Path(place) / "dense.safetensors"))
    return {"bytes": size, "convert_over_dense": 1 + converting / size, "densify_over_dense": densifying / size}


CASES: dict[str, tuple[Callable[[], Row], str | None]] = {
    "plan: 23,040 layers of 7,680 experts": (
        lambda: plan_time(lambda: nn.ModuleList(Routed(32, 128) for _ in range(60))),
        "≤ 20 s",
    ),
    "plan: Llama, 70 B": (lambda: plan_time(lambda: llama(80, 8192, 28_672)), None),
    "plan: Llama, 405 B": (lambda: plan_time(lambda: llama(126, 16_384, 53_248)), None),
    "plan: mixture of experts, 1 T": (lambda: plan_time(mixture), None),
    "convert: 20,000 layers, 64 wide": (lambda: convert_time(20_000, 64), "≤ 10 s"),
    "step: 2,000 layers, 32 wide, 16 rows": (lambda: step_time(2000, 32, 16), "≤ 3 × dense"),
    "step: 2,000 layers, 64 wide, 16 rows": (lambda: step_time(2000, 64, 16), "≤ 3 × dense"),
    "step: 2,000 layers, 128 wide, 16 rows": (lambda: step_time(2000, 128, 16), "≤ 3 × dense"),
    "memory: table of 256 M in float32": (lambda: table_memory(torch.float32), "≤ 1.3 and 1.2 × dense"),
    "memory: table of 256 M in bfloat16": (lambda: table_memory(torch.bfloat16), "≤ 1.3 and 1.2 × dense"),
}


def _found(row: Row) -> str:
    if "pool_over_dense" in row:
        return (
            f"{row['pool_over_dense']:.1f} × dense ({row['dense']['median_ms'] / row['layers'] * 1e3:.0f} µs a layer)"
        )
    if "bytes" in row:
        return f"converting {row['convert_over_dense']:.2f} × dense, densifying {row['densify_over_dense']:.2f} × dense"
    return f"{row['seconds']:.1f} s"


def markdown(result: Row) -> str:
    """Return the page's table of a raw result."""
    cells = [[row["case"], _found(row), row["limit"] or ""] for row in result["rows"]]
    cpu = result["machine"]
    lines = [
        *table(["case", "measured", "promised"], cells),
        "",
        f"{cpu['cpu']}, {cpu['threads']} threads, torch {cpu['torch']}, {cpu['date']}. A step is forward, backward and "
        f"SGD. Memory is the peak of what the process holds: converting in place includes the dense table, and "
        f"densifying is of an artifact.",
    ]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--case", "case", type=click.Choice(list(CASES)), help="Only this case, in this process; print its row.")
def main(case: str | None) -> None:
    """Measure on this machine's CPU; write the raw rows and the page's table."""
    if case is not None:
        torch.set_num_threads(THREADS)
        measure, limit = CASES[case]
        print(json.dumps({"case": case, **measure(), "limit": limit}))
        return
    console = Console()
    rows = []
    for name in CASES:
        command = [sys.executable, "-m", "benchmarks.scale", "--case", name]
        with console.status(name):
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        console.print(f"{name}: {_found(rows[-1])}")
    torch.set_num_threads(THREADS)
    result = {"machine": machine("cpu", "cpu", "threads", "python", "torch", "roastify", "date"), "rows": rows}
    dump(RESULTS, result)
    write(PAGE, insert(PAGE.read_text(encoding="utf-8"), BEGIN, markdown(result)))


if __name__ == "__main__":
    main()

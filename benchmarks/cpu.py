"""CPU benchmark: layers on the pool beside dense ones, and the conversion of BERT-base.

Each case is checked against the dense product before it is timed. Dense and pool calls alternate, so that both see the
same machine; medians and quartiles are reported. Raw rows go to benchmarks/results/cpu.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import roastify
from benchmarks.documents import insert, table
from benchmarks.rows import FOLDER, Row, dump, largest_fold, machine, write
from benchmarks.stats import quartiles
from roastify.conversion.converted import pool_of

RESULTS = FOLDER / "cpu.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "cpu.md"
BEGIN = "<!-- cpu: written by `make bench` -->"
THREADS = 2
# (out, in), how many such layers share a pool, ratio, rows, and what the time may be as a multiple of dense, where
# something was promised. A small layer alone has so few slots that every element needs a hashed sign.
LINEAR_CASES = [
    ((4096, 4096), 1, 10, 1, 1.5),
    ((4096, 4096), 1, 10, 16, None),
    ((4096, 4096), 1, 10, 128, None),
    ((4096, 4096), 1, 10, 1024, 0.6),
    ((768, 768), 48, 10, 1, 2),
    ((768, 768), 1, 10, 1, None),
    ((3072, 768), 12, 10, 128, None),
    ((4096, 4096), 1, 200, 1, 2),
    ((4096, 4096), 1, 200, 1024, None),
]
CONVERSION_LIMIT_S = 10.0
MEMORY_LIMIT = 2.2


def alternate(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Time the calls in turn for about `seconds` in all; milliseconds."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begun) * 1e3)
    return times


def bench_linear(
    shape: tuple[int, int], layers: int, ratio: float, rows: int, limit: float | None, seconds: float
) -> Row:
    """Measure linear layers of one shape, and the same on one pool; the time is that of a layer."""
    torch.manual_seed(0)
    dense = nn.ModuleList(nn.Linear(shape[1], shape[0]) for _ in range(layers))
    pooled = roastify.convert(dense, ratio)
    plan = pool_of(pooled).plan
    x = torch.randn(rows, shape[1])

    def call(model: nn.ModuleList) -> None:
        for layer in model:
            layer(x)

    with torch.no_grad():
        for layer in pooled:
            expected = F.linear(x, layer.weight.detach().clone(), layer.bias)
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        times = alternate({"dense": lambda: call(dense), "pool": lambda: call(pooled)}, seconds)
    found = {side: quartiles([value / layers for value in values]) for side, values in times.items()}
    return {
        "case": "linear",
        "shape": list(shape),
        "layers": layers,
        "ratio": ratio,
        "rows": rows,
        "tile": list(plan.tile),
        "sign": plan.sign,
        "fold": largest_fold(plan),
        **found,
        "pool_over_dense": found["pool"]["median_ms"] / found["dense"]["median_ms"],
        "limit": limit,
    }


def memory(field: str) -> int:
    """Return a memory figure of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def convert_bert() -> Row:
    """Convert BERT-base at ratio 50 in this process, and say how long it took and how much memory at the peak."""
    from transformers import BertConfig, BertForMaskedLM

    torch.set_num_threads(THREADS)
    model = BertForMaskedLM(BertConfig())
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    # Forget the peak of building the model; `ru_maxrss` would not do, since a child starts with its parent's.
    Path("/proc/self/clear_refs").write_text("5")
    resident = memory("VmRSS")
    begun = time.perf_counter()
    converted = roastify.convert(model, 50)
    seconds = time.perf_counter() - begun
    peak = memory("VmHWM")
    plan = converted.roast_pool.plan
    return {
        "case": "convert BERT-base",
        "ratio": 50,
        "seconds": seconds,
        "model_bytes": model_bytes,
        # What the process held beyond the interpreter and its libraries: the model itself and the conversion's peak.
        "peak_over_model": (peak - (resident - model_bytes)) / model_bytes,
        "parameters": plan.total_numel,
        "stored": plan.stored_numel,
        "limit_seconds": CONVERSION_LIMIT_S,
        "limit_memory": MEMORY_LIMIT,
    }


def markdown(result: Row) -> str:
    """Return the page's table of a raw result."""
    cells = [
        [
            f"Linear {row['shape'][0]}×{row['shape'][1]}" + (f", {row['layers']} of them" if row["layers"] > 1 else ""),
            f"{row['ratio']:g}",
            "–" if row["fold"] == 1 else str(row["fold"]),
            str(row["rows"]),
            *(f"{time:.2f}" for time in (row["dense"]["median_ms"], row["pool"]["median_ms"], row["pool_over_dense"])),
            "" if row["limit"] is None else f"≤ {row['limit']:g}",
        ]
        for row in result["rows"]
        if row["case"] == "linear"
    ]
    (bert,) = (row for row in result["rows"] if row["case"] == "convert BERT-base")
    cpu = result["machine"]
    lines = [
        *table(["layer", "ratio", "fold", "rows", "dense, ms", "pool, ms", "pool ÷ dense", "promised"], cells),
        "",
        f"Converting BERT-base at ratio 50 took {bert['seconds']:.1f} s (promised: {bert['limit_seconds']:g}), and",
        f"at its peak {bert['peak_over_model']:.2f}× the model's memory, the model itself included (promised: "
        f"{bert['limit_memory']:g}).",
        f"{cpu['cpu']}, {cpu['threads']} threads, torch {cpu['torch']}, {cpu['date']}; medians; quartiles are in the",
        "raw results.",
    ]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--seconds", default=4.0, help="How long each case is timed.")
@click.option("--convert-only", is_flag=True, help="Only convert BERT-base, in this process, and print its row.")
def main(seconds: float, convert_only: bool) -> None:
    """Measure on this machine's CPU; write the raw rows and the table of docs/cpu.md."""
    if convert_only:
        print(json.dumps(convert_bert()))
        return
    torch.set_num_threads(THREADS)
    console = Console()
    rows = []
    for shape, layers, ratio, num_rows, limit in LINEAR_CASES:
        with console.status(f"linear {shape[0]}×{shape[1]}, {num_rows} rows"):
            row = bench_linear(shape, layers, ratio, num_rows, limit, seconds)
        rows.append(row)
        verdict = "" if limit is None else f" (limit {limit:g})"
        console.print(
            f"{layers} × linear {shape[0]}×{shape[1]}, ratio {ratio:g}, {num_rows} rows: "
            f"{row['pool_over_dense']:.2f}× dense{verdict}"
        )
    # A process of its own, so that the peak is the conversion's.
    command = [sys.executable, "-m", "benchmarks.cpu", "--convert-only"]
    with console.status("converting BERT-base"):
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows.append(json.loads(output.splitlines()[-1]))
    result = {"machine": machine("cpu", "cpu", "threads", "python", "torch", "roastify", "date"), "rows": rows}
    dump(RESULTS, result)
    write(DOCUMENT, insert(DOCUMENT.read_text(encoding="utf-8"), BEGIN, markdown(result)))
    console.print(markdown(result))
    console.print(f"written to {RESULTS} and {DOCUMENT}")


if __name__ == "__main__":
    main()

"""GPU benchmark: linear layers on the pool beside cuBLAS on the dense weight.

Each case is checked against float64 first. Then 16 different layers run in a row in a CUDA graph, so that launches cost
what they cost in a model and a dense weight comes from memory as it does there; medians of replays. Dense and pool
graphs alternate. Raw rows go to benchmarks/results/kernels.json.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

import roastify
from roastify.kernels import linear, ops, reference, tuning
from roastify.mapping import TileMap

RESULTS = Path(__file__).parent / "results" / "kernels.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
LAYERS = 16
TILE = (128, 64)
# (out, in), the pool's megabytes in bfloat16, rows, and dense ÷ pool that is aimed at.
CASES = [
    ((4096, 4096), 11, {1: 2.0, 16: 2.0, 64: 1.4, 128: 0.95, 256: 0.95, 1024: 0.95, 2048: 0.93, 8192: 0.97}),
    ((4096, 4096), 54, {1: 1.5, 16: 1.5, 64: None}),
    ((768, 768), 5.7, {1: 1.8, 16: 1.8}),
    ((1024, 4096), 2.7, {1: 1.8, 16: 1.8}),
    ((4096, 1024), 2.7, {1: 1.8, 16: 1.8}),
]
SIGNS = ("tile", "element", "none")
NOTES = """
What runs, by shape and without anything to set:

- One row and a weight under 8 M elements: a kernel without the matrix unit; every program owns whole rows of the
  weight.
- Up to 128 rows: a kernel that multiplies tiles as it reads them from the pool. Programs share `k`, and a second kernel
  adds their parts in a fixed order: no atomics, the same bits on every run.
- More rows, and the backward pass: the weight is gathered into a scratch tensor and multiplied by cuBLAS; its gradient
  is reduced into the pool slot by slot, in a fixed order.
- float64, and the comparison mappings in `reduce`: plain torch.

A sign for each element is hashed for every weight that is read, which a matrix unit waits for; pools of few slots use
it for accuracy. From 64 rows on the pool is slower than cuBLAS: there the time goes into the gathered copy, or into a
kernel that does not yet load whole slots with the tensor-copy engine.
"""


def graphed(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
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


def replay_us(graphs: dict[str, torch.cuda.CUDAGraph], calls: int, replays: int = 40) -> dict[str, list[float]]:
    """Replay the graphs in turn; microseconds of one call in each."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in range(replays + 3):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 3:
                times[name].append(begin.elapsed_time(end) * 1e3 / calls)
    return times


def spread(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_us": median, "q1_us": low, "q3_us": high, "runs": len(times)}


class Layers:
    """Sixteen layers of one shape, dense and on one pool."""

    def __init__(self, shape: tuple[int, int], pool_mb: float, sign: str, dtype: torch.dtype) -> None:
        self.shape = shape
        size = TILE[0] * TILE[1]
        self.num_slots = int(pool_mb * 1e6 / 2 / size)
        tiles = -(-shape[0] // TILE[0]) * -(-shape[1] // TILE[1])
        tile_map = TileMap(tiles * LAYERS, self.num_slots, TILE, seed=0, sign=sign)
        self.table = torch.tensor(tile_map.chunk_table(), dtype=torch.int64, device="cuda")
        self.views = [tile_map.view(*shape, layer * tiles * size) for layer in range(LAYERS)]
        self.pool = torch.randn(self.num_slots * TILE[0], TILE[1], device="cuda", dtype=dtype)
        self.dense = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(LAYERS)]

    def dense_calls(self, x: Tensor) -> list[Callable[[], object]]:
        return [lambda weight=weight: F.linear(x, weight) for weight in self.dense]

    def pool_calls(self, x: Tensor) -> list[Callable[[], object]]:
        return [lambda view=view: ops.linear(x, self.pool, None, self.table, view, 0.7) for view in self.views]

    def error(self, x: Tensor) -> float:
        """Largest error of a pool product over the largest output, against float64."""
        view = self.views[LAYERS // 3]
        weight = reference.gather(self.pool.double(), self.table, view, 0.7)
        expected = x.double() @ weight.t()
        found = ops.linear(x, self.pool, None, self.table, view, 0.7)
        return float((found.double() - expected).abs().max() / expected.abs().max())


def measure(shape: tuple[int, int], pool_mb: float, rows: int, aim: float | None, sign: str) -> dict:
    layers = Layers(shape, pool_mb, sign, torch.bfloat16)
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    error = layers.error(x)
    assert error < 1e-2, f"{shape}, {rows} rows: error {error}"
    graphs = {"dense": graphed(layers.dense_calls(x)), "pool": graphed(layers.pool_calls(x))}
    times = replay_us(graphs, LAYERS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": list(shape),
        "dtype": "bfloat16",
        "pool_mb": pool_mb,
        "rows": rows,
        "sign": sign,
        "dense": spread(times["dense"]),
        "pool": spread(times["pool"]),
        "dense_over_pool": medians["dense"] / medians["pool"],
        "aim": aim,
        "error": error,
    }


def tune(shape: tuple[int, int], pool_mb: float, rows: int) -> list[tuple[float, tuning.SmallBatch]]:
    """Time every launch setting of the small-batch product; microseconds, best first."""
    layers = Layers(shape, pool_mb, "tile", torch.bfloat16)
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    found = []
    original = tuning.small_batch
    for block_rows, tiles, warps, stages in itertools.product((16, 32, 64, 128), (4, 8, 16, 32, 64), (4, 8), (3, 4)):
        grid_cols = shape[1] // TILE[1]
        programs = shape[0] // block_rows * -(-grid_cols // tiles)
        if tiles > grid_cols or not 40 <= programs <= 600:
            continue
        settings = tuning.SmallBatch(block_rows, tiles, warps, stages)
        linear.tuning.small_batch = lambda *size, settings=settings: settings
        assert layers.error(x) < 1e-2, settings
        times = replay_us({"pool": graphed(layers.pool_calls(x))}, LAYERS, replays=15)
        found.append((statistics.median(times["pool"]), settings))
    linear.tuning.small_batch = original
    return sorted(found)


def markdown(result: dict) -> str:
    """Return docs/performance.md of a raw result."""
    machine = result["machine"]
    lines = [
        "# Performance on a GPU",
        "",
        f"Written by `python -m benchmarks.kernels` from [the raw rows](../benchmarks/results/{RESULTS.name}): "
        f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, {machine['date']}. Linear layers in "
        f"bfloat16, {machine['layers_in_a_row']} different ones in a row in a CUDA graph, tiles of "
        f"{machine['tile'][0]}×{machine['tile'][1]}; medians, quartiles in the raw rows. Above 1 the pool is "
        f"faster than cuBLAS on the dense weight, below 1 slower.",
        "",
        "| layer | pool, MB | rows | sign | dense, µs | pool, µs | dense ÷ pool | aim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cell = "| {} | {:g} | {} | {} | {:.2f} | {:.2f} | {:.2f} | {} |"
    for row in result["rows"]:
        name = f"{row['shape'][0]}×{row['shape'][1]}"
        times = row["dense"]["median_us"], row["pool"]["median_us"], row["dense_over_pool"]
        aim = "" if row["aim"] is None else f"{row['aim']:g}"
        lines.append(cell.format(name, row["pool_mb"], row["rows"], row["sign"], *times, aim))
    return "\n".join([*lines, "", NOTES.strip(), ""])


@click.command()
@click.option("--search", is_flag=True, help="Time every launch setting of the small-batch product instead.")
def main(search: bool) -> None:
    """Measure on this machine's GPU."""
    console = Console(width=160)
    if search:
        for shape, pool_mb, by_rows in CASES:
            for rows in (rows for rows in by_rows if 1 < rows <= tuning.SMALL_BATCH_ROWS):
                best = tune(shape, pool_mb, rows)
                console.print(shape, pool_mb, rows, [(f"{time:.2f}", tuple(settings)) for time, settings in best[:5]])
        return
    table = Table("layer", "pool MB", "rows", "sign", "dense µs", "pool µs", "dense ÷ pool", "aim", box=None)
    rows_out = []
    for shape, pool_mb, by_rows in CASES:
        for rows, aim in by_rows.items():
            for sign in SIGNS if rows in (1, 16) else SIGNS[:1]:
                row = measure(shape, pool_mb, rows, aim, sign)
                rows_out.append(row)
                table.add_row(
                    f"{shape[0]}×{shape[1]}",
                    f"{pool_mb:g}",
                    str(rows),
                    sign,
                    f"{row['dense']['median_us']:.2f}",
                    f"{row['pool']['median_us']:.2f}",
                    f"{row['dense_over_pool']:.2f}",
                    "" if aim is None else f"{aim:g}",
                )
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "roastify": roastify.__version__,
        "date": datetime.date.today().isoformat(),
        "layers_in_a_row": LAYERS,
        "tile": list(TILE),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows_out}, indent=1) + "\n")
    console.print(table)
    DOCUMENT.write_text(markdown({"machine": machine, "rows": rows_out}))
    console.print(f"written to {RESULTS} and {DOCUMENT}")


if __name__ == "__main__":
    main()

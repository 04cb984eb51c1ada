"""Search for launch settings of the small-batch product, for kernels/tuning.py."""

from __future__ import annotations

import itertools
import statistics

import click
import torch
from rich.console import Console

from benchmarks import timing
from benchmarks.cases import LINEAR, in_bfloat16
from benchmarks.layers import TILE, Layers
from roastify.kernels import linear, tuning


def tune(shape: tuple[int, int], pool_mb: float, rows: int) -> list[tuple[float, tuning.SmallBatch]]:
    """Time every launch setting of the small-batch product; microseconds, best first."""
    layers = Layers(shape, in_bfloat16(pool_mb), torch.bfloat16)
    x, _ = layers.activations(rows)
    views = layers.views("tile")
    found = []
    original = tuning.small_batch
    for block_rows, tiles, warps, stages in itertools.product((16, 32, 64, 128), (4, 8, 16, 32, 64), (4, 8), (3, 4)):
        grid_cols = shape[1] // TILE[1]
        programs = shape[0] // block_rows * -(-grid_cols // tiles)
        if tiles > grid_cols or not 40 <= programs <= 600:
            continue
        settings = tuning.SmallBatch(block_rows, tiles, warps, stages)
        linear.tuning.small_batch = lambda *size, settings=settings: settings
        layers.forward_error(x, views[0])
        times = timing.replay_us({"pool": timing.graphed(layers.pool_forward(x, views))}, most=15)
        found.append((statistics.median(times["pool"]) / layers.count, settings))
    linear.tuning.small_batch = original
    return sorted(found)


@click.command()
def main() -> None:
    """Print the best settings for each shape and number of rows."""
    console = Console(width=160)
    for shape, pool_mb, by_rows in LINEAR:
        for rows in (rows for rows in by_rows if 1 < rows <= tuning.SMALL_BATCH_ROWS):
            best = tune(shape, pool_mb, rows)
            console.print(shape, pool_mb, rows, [(f"{time:.2f}", tuple(settings)) for time, settings in best[:5]])


if __name__ == "__main__":
    main()

"""Search for the launch settings of the products, for kernels/tuning.py.

Every setting of every kernel that may take a case is checked, timed as in the benchmark, and the best are printed
beside what the table holds now. Kernels are compiled by several processes first, which is most of the time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console

from benchmarks import timing
from benchmarks.cases import LINEAR, in_bfloat16
from benchmarks.layers import SCALE, SIGN, TILE, Layers, relative_error
from roastify.kernels import reference
from roastify.kernels.gpu import few_rows, linear, many_rows, tuning

Shape = tuple[int, int]
PROCESSES = 15
# Rows beside the benchmark's own.
MORE_ROWS = (2, 4, 8, 32)
SHOWN = 6


class Candidate(NamedTuple):
    """A kernel with settings: what `tuning` is made to answer, and the function that is timed."""

    function: Callable[..., torch.Tensor]
    name: str
    settings: Any

    def __str__(self) -> str:
        return f"{self.function.__name__} {tuple(self.settings)}"

    def call(self, *arguments: Any) -> torch.Tensor:
        """Compute the product with these settings."""
        before = getattr(tuning, self.name)
        setattr(tuning, self.name, self.settings if self.name.isupper() else lambda *shape: self.settings)
        try:
            return self.function(*arguments)
        finally:
            setattr(tuning, self.name, before)


def candidates(shape: Shape, num_slots: int, rows: int) -> Iterator[Candidate]:
    """Yield the settings worth trying for a weight, a pool and a number of rows."""
    grid_cols = shape[1] // TILE[1]
    if rows <= 8 and shape[0] * shape[1] >= 1.5 * num_slots * TILE[0] * TILE[1]:
        for block_rows, warps in itertools.product((16, 32, 64, 128), (2, 4, 8)):
            yield Candidate(few_rows.by_slot, "BY_SLOT", tuning.BySlot(block_rows, warps))
    if rows == 1:
        for block_rows, tiles, warps in itertools.product((4, 8, 16, 32), (4, 8, 16, 32), (2, 4, 8)):
            if 2048 <= block_rows * tiles * TILE[1] <= 16384 and tiles <= grid_cols:
                yield Candidate(few_rows.one_row, "one_row", tuning.OneRow(block_rows, tiles, warps))
    if rows <= 32:
        for block_rows, stacked, tiles, warps, stages in itertools.product(
            (8, 16, 32, 64, 128), (1, 2, 4, 8), (2, 4, 8, 16, 32, grid_cols), (4, 8), (2, 3, 4, 6)
        ):
            programs = shape[0] // block_rows * -(-grid_cols // tiles)
            height, width = stacked * block_rows, stacked * max(rows, 16 // stacked)
            # A step of 8 to 16 kB for each stage, programs for every multiprocessor, and accumulators that fit.
            if not (64 <= height <= 128 and width <= 64 and 60 <= programs <= 600 and tiles <= grid_cols):
                continue
            if warps == 8 and height * width < 4096:
                continue
            yield Candidate(few_rows.split, "split", tuning.Split(block_rows, tiles, stacked, warps, stages))
    if rows > 16:
        for block_m, block_n, parts, stages, early in itertools.product(
            (64, 128, 256), (64, 128), (1, 2, 3, 4, 8), (3, 4, 5, 6), (True, False)
        ):
            programs = -(-rows // block_m) * -(-shape[0] // block_n) * parts
            if block_m >= 2 * max(rows, 64) or parts > max(1, grid_cols // 4) or (parts > 1 and programs > 200):
                continue
            if programs < 40 or (block_m + block_n) * TILE[1] * 2 * stages > 220_000:
                continue
            warps = 8 if block_m * block_n > 128 * 128 else 4
            settings = tuning.ManyRows(block_m, block_n, -(-grid_cols // parts), warps, stages, early)
            yield Candidate(many_rows.many_rows, "many_rows", settings)


def compile_one(task: tuple[Shape, float, int, Candidate]) -> None:
    """Run a candidate once on one layer, which leaves its kernels in Triton's cache."""
    shape, megabytes, rows, candidate = task
    layers = Layers(shape, in_bfloat16(megabytes), torch.bfloat16, count=2)
    x, _ = layers.activations(rows)
    try:
        candidate.call(x, layers.pool, None, layers.table, layers.views(SIGN)[0], SCALE)
        torch.cuda.synchronize()
    except Exception as error:  # shown again, with its candidate, when it is timed
        print(f"{candidate}: {type(error).__name__}")


def search(shape: Shape, megabytes: float, rows: int) -> tuple[float, list[tuple[float, str]]]:
    """Time every candidate, and what the table holds; return the dense time and the candidates', best first."""
    layers = Layers(shape, in_bfloat16(megabytes), torch.bfloat16)
    x, _ = layers.activations(rows)
    views = layers.views(SIGN)
    view = views[len(views) // 3]
    expected = x.double() @ reference.gather(layers.pool.double(), layers.table, view, SCALE).t()
    now = linear.way(x, layers.pool, view)
    calls: dict[str, Callable[..., torch.Tensor]] = {f"the table's {now.__name__}": now}
    calls |= {str(candidate): candidate.call for candidate in candidates(shape, layers.num_slots, rows)}
    graphs: dict[str, timing.Replayable] = {"dense": timing.graphed(layers.dense_forward(x))}
    for name, call in calls.items():
        try:
            error = relative_error(call(x, layers.pool, None, layers.table, view, SCALE), expected)
            if not error < 1e-2:
                print(f"{shape} {rows} {name}: wrong, error {error:.2e}")
                continue
            graphs[name] = timing.graphed(
                [lambda view=view, call=call: call(x, layers.pool, None, layers.table, view, SCALE) for view in views]
            )
        except Exception as error:
            print(f"{shape} {rows} {name}: {type(error).__name__} {str(error)[:80]}")
    medians = {
        name: statistics.median(times) / layers.count
        for name, times in timing.replay_us(graphs, most=15, seconds=60).items()
    }
    dense = medians.pop("dense")
    return dense, sorted((time, name) for name, time in medians.items())


@click.command()
@click.option("--shape", "only", help="Only this one, as 4096x4096.")
@click.option("--rows", "only_rows", help="Only these numbers of rows, as 1,16.")
def main(only: str | None, only_rows: str | None) -> None:
    """Print the best settings for each shape and number of rows."""
    console = Console(width=160, highlight=False)
    cases = [
        (shape, megabytes, rows)
        for shape, megabytes, aims in LINEAR
        for rows in sorted({*aims, *MORE_ROWS})
        if (only in (None, f"{shape[0]}x{shape[1]}")) and (only_rows is None or str(rows) in only_rows.split(","))
    ]
    tasks = [
        (*case, candidate)
        for case in cases
        for candidate in candidates(case[0], int(in_bfloat16(case[1]) / (TILE[0] * TILE[1])), case[2])
    ]
    console.print(f"{len(tasks)} settings in {len(cases)} cases")
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for _ in pool.imap_unordered(compile_one, tasks, chunksize=4):
            pass
    for shape, megabytes, rows in cases:
        dense, found = search(shape, megabytes, rows)
        console.print(f"[bold]{shape[0]}×{shape[1]}, {megabytes} MB, {rows} rows[/bold]: dense {dense:.2f} µs")
        shown = found[:SHOWN] + [pair for pair in found[SHOWN:] if pair[1].startswith("the table's")]
        for time, name in shown:
            console.print(f"  {time:8.2f} {dense / time:5.2f}×  {name}")


if __name__ == "__main__":
    main()

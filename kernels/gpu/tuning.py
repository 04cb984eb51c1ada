"""The one table of launch settings. None of them is part of the mapping: they change speed, never weights.

Found by `python -m benchmarks.search` on an H200 (132 multiprocessors), bfloat16, tiles of 128×64. Settings depend on
shapes alone, so the same call gives the same bits on every run.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from roastify.kernels.view import TileView

# Elements and warps of a program.
GATHER_ELEMENTS, GATHER_WARPS = 4096, 8
# Of one tile, in one program: the default tiles' 128 × 64. With many more, registers run out.
MOST_ELEMENTS = 1 << 13
REDUCE_ELEMENTS, REDUCE_WARPS = 2048, 4
EMBEDDING_ELEMENTS, EMBEDDING_WARPS = 2048, 4
# Lookups of a program that finds their places; elements and warps of one that adds runs, and its fewest steps.
PLACE_LOOKUPS = 256
RUN_ELEMENTS, RUN_WARPS, RUN_STEPS = 1024, 4, 16
# Elements of the wider side and warps of a program that multiplies kernels by their basis, the most parts that its
# gradient is summed in, and the largest side that it takes.
COMBINE_ELEMENTS, COMBINE_WARPS, COMBINE_PARTS, COMBINE_SIZE = 2048, 4, 256, 64
# Partial sums: numbers that a program holds at a time, and the most parts among them.
SUM_ELEMENTS, SUM_PARTS, SUM_WARPS = 2048, 64, 4

# A gathered weight's most elements; larger ones are gathered and multiplied in panels of tile rows.
SCRATCH_ELEMENTS = 1 << 26

# Rows of activations up to which `few_rows` is taken where `many_rows` could run, and where it cannot. (4096², 128
# rows: 13.8 µs in the first, 27 gathered.)
FEW_ROWS, FEW_ROWS_ALONE = 32, 128
# Above this many rows the gathered copy costs less than what cuBLAS is faster by. (4096², 4096 rows: 215 µs and 222;
# 8192 rows: 440 and 420.)
MANY_ROWS = 4096
_MULTIPROCESSORS = 132


class Split(NamedTuple):
    """Settings of `few_rows.split`.

    Args:
        block_rows: rows of the weight (columns of the output) of a program, at most a tile's.
        tiles: tiles along `k` of a program; the rest of the row is other programs'.
        stacked: tiles of a step.
        num_warps: of a program.
        num_stages: of its pipeline.
    """

    block_rows: int
    tiles: int
    stacked: int
    num_warps: int
    num_stages: int


class OneRow(NamedTuple):
    """Settings of `few_rows.one_row`: rows of the weight of a program, tiles along `k` that it reads at a time."""

    block_rows: int
    tiles: int
    num_warps: int


class BySlot(NamedTuple):
    """Settings of `few_rows.by_slot`: rows of a slot of a program."""

    block_rows: int
    num_warps: int


class ManyRows(NamedTuple):
    """Settings of `many_rows`.

    Args:
        block_m: rows of activations of a program.
        block_n: rows of the weight of a program, at most a tile's.
        tiles: tiles along `k` of a program.
        num_warps: of a program.
        num_stages: of its pipeline.
        early: whether the next kernel may start when this one does, not when its loop is done.
    """

    block_m: int
    block_n: int
    tiles: int
    num_warps: int
    num_stages: int
    early: bool


BY_SLOT = BySlot(block_rows=64, num_warps=4)
# Columns of its product: activations of a row for each chunk.
_BY_SLOT_COLUMNS = 128
# Of a program's shared memory, for what is not its pipeline's: the matrix unit's results on their way out.
_BESIDE_STAGES_BYTES = 4096

# Shapes for which settings are remembered: a launch should not cost more than it saves.
_REMEMBERED = 1 << 12

_ANY = 1 << 62
# The first line that fits counts: up to so many elements of the weight, and rows of activations.
_SPLIT = (
    (1 << 20, 16, Split(block_rows=16, tiles=_ANY, stacked=4, num_warps=4, num_stages=3)),
    (1 << 23, 1, Split(block_rows=16, tiles=_ANY, stacked=4, num_warps=4, num_stages=3)),
    (1 << 23, _ANY, Split(block_rows=64, tiles=4, stacked=1, num_warps=4, num_stages=3)),
    (_ANY, 1, Split(block_rows=16, tiles=_ANY, stacked=4, num_warps=4, num_stages=4)),
    (_ANY, 8, Split(block_rows=32, tiles=_ANY, stacked=4, num_warps=4, num_stages=4)),
    (_ANY, _ANY, Split(block_rows=64, tiles=16, stacked=1, num_warps=4, num_stages=4)),
)
# A pool of more elements than this is not all in the cache, and longer loads in flight pay more.
_LARGE_POOL = 1 << 24
_SPLIT_LARGE_POOL = Split(block_rows=32, tiles=_ANY, stacked=2, num_warps=4, num_stages=6)
# From so many rows of the weight on, so that there are programs enough.
_ONE_ROW = (
    (4096, OneRow(block_rows=16, tiles=4, num_warps=4)),
    (2048, OneRow(block_rows=8, tiles=8, num_warps=4)),
    (0, OneRow(block_rows=4, tiles=16, num_warps=2)),
)
# With the time of a wave of programs beside the first's; `tiles` follows from the shape. (4096², 1024 rows in one wave
# of 256: 44.6 µs, in two of 128: 48.8; 256 rows in one of 64: 15.2.)
_MANY_ROWS = (
    (1.0, ManyRows(block_m=256, block_n=128, tiles=0, num_warps=8, num_stages=3, early=False)),
    (0.55, ManyRows(block_m=128, block_n=128, tiles=0, num_warps=4, num_stages=4, early=False)),
    (0.34, ManyRows(block_m=64, block_n=128, tiles=0, num_warps=4, num_stages=6, early=False)),
)
# Of a program's shared memory, for what its pipeline loads.
_STAGES_BYTES = 220_000
# Up to a block's rows the time is that of the loads, and the next kernel's start may overlap them.
_MANY_ROWS_OF_ONE_BLOCK = ManyRows(block_m=64, block_n=128, tiles=0, num_warps=4, num_stages=4, early=True)


# Triton has both of these, but outside of a kernel each call of them costs microseconds.
def power_of_2(count: int) -> int:
    """Return the least power of 2 that is not below a positive count."""
    return 1 << (count - 1).bit_length()


def cdiv(count: int, each: int) -> int:
    """Return how many parts of `each` hold `count`."""
    return -(-count // each)


def reads_by_slot(view: TileView, num_rows: int) -> bool:
    """Whether each slot should be read once for all its tiles.

    A layer has several of each; the activations that a slot meets fit a program; partial sums fit the scratch; and no
    column is padding, which would be multiplied by zero whatever the pool's memory there holds.
    """
    return num_rows <= 4 and _reads_by_slot(view, num_rows)


@functools.lru_cache(maxsize=_REMEMBERED)
def _reads_by_slot(view: TileView, num_rows: int) -> bool:
    return (
        view.num_tiles >= 2 * view.num_slots
        and power_of_2(view.chunks[1]) * power_of_2(num_rows) <= _BY_SLOT_COLUMNS
        and view.grid_cols * num_rows * view.rows <= SCRATCH_ELEMENTS
        and view.cols % view.tile_cols == 0
    )


def is_small_product(view: TileView) -> bool:
    """Whether one row is multiplied without the matrix unit (768²: 2.0 µs, with it 2.1; 4096²: 9.1 and 8.1)."""
    return view.numel < 1 << 23


@functools.lru_cache(maxsize=_REMEMBERED)
def split_settings(view: TileView, num_rows: int, itemsize: int, shared_bytes: int) -> Split | None:
    """Return the settings of `few_rows.split`, with no more stages than a program's shared memory holds; None: not one.

    Args:
        view: of the weight.
        num_rows: of activations.
        itemsize: bytes of a number.
        shared_bytes: that a program may take (`launch.shared_memory`).
    """
    if 8 < num_rows <= 32 and view.num_slots * view.slot_size > _LARGE_POOL and view.numel >= 1 << 23:
        found = _SPLIT_LARGE_POOL
    else:
        found = next(found for numel, rows, found in _SPLIT if view.numel < numel and num_rows <= rows)
    stacked_rows = min(found.block_rows, view.tile_rows) + max(power_of_2(num_rows), 16 // found.stacked)
    stage_bytes = found.stacked * stacked_rows * view.tile_cols * itemsize
    stages = min(found.num_stages, (shared_bytes - _BESIDE_STAGES_BYTES) // stage_bytes)
    return found._replace(num_stages=stages) if stages > 0 else None


def one_row_settings(rows: int) -> OneRow:
    """Return the settings of `few_rows.one_row` for a weight of so many rows."""
    return next(found for least, found in _ONE_ROW if rows >= least)


@functools.lru_cache(maxsize=_REMEMBERED)
def many_rows_settings(view: TileView, num_rows: int, itemsize: int) -> ManyRows:
    """Return the settings of `many_rows`: the blocks of fewest waves, `k` shared where a wave has room."""

    def programs(found: ManyRows) -> int:
        return -(-num_rows // found.block_m) * -(-view.rows // min(found.block_n, view.tile_rows))

    def time(entry: tuple[float, ManyRows]) -> float:
        wave, found = entry
        return wave * -(-programs(found) // _MULTIPROCESSORS)

    if num_rows <= _MANY_ROWS_OF_ONE_BLOCK.block_m:
        found = _MANY_ROWS_OF_ONE_BLOCK
    else:
        _, found = min(_MANY_ROWS, key=time)
    parts = max(1, min(_MULTIPROCESSORS // programs(found), view.grid_cols // 8))
    stage_bytes = (found.block_m + found.block_n) * view.tile_cols * itemsize
    stages = min(found.num_stages, _STAGES_BYTES // stage_bytes)
    return found._replace(tiles=-(-view.grid_cols // parts), num_stages=stages)

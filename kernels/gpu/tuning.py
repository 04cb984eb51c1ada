"""The one table of launch settings. None of them is part of the mapping: they change speed, never weights.

They were found by `python -m benchmarks.search` on an H200 (132 multiprocessors), for bfloat16 and tiles of 128×64. The
settings depend on shapes alone, so the same call gives the same bits on every run.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from roastify.kernels.view import TileView

# Elements and warps of a program of each kernel.
GATHER_ELEMENTS, GATHER_WARPS = 4096, 8
# The most elements of one tile in a program: those of a tile of 128×64. Many more need too many registers.
MOST_ELEMENTS = 1 << 13
REDUCE_ELEMENTS, REDUCE_WARPS = 2048, 4
EMBEDDING_ELEMENTS, EMBEDDING_WARPS = 2048, 4
# `embedding_reduce`: lookups of a program that computes places; then elements and warps of a program that adds runs,
# and its fewest steps.
PLACE_LOOKUPS = 256
RUN_ELEMENTS, RUN_WARPS, RUN_STEPS = 1024, 4, 16
# `combine`: elements along the wider side and warps of a program, the most parts in which the basis's gradient is
# summed, and the largest side of a basis.
COMBINE_ELEMENTS, COMBINE_WARPS, COMBINE_PARTS, COMBINE_SIZE = 2048, 4, 256, 64
# `fold` and its adjoints: columns and elements of a program, and its warps; for the scales' gradient, buckets of a
# program at a time, and about how many programs.
FOLD_COLS, FOLD_ELEMENTS, FOLD_WARPS = 64, 1024, 4
SCALES_ELEMENTS, SCALES_PROGRAMS = 256, 528
# Partial sums: elements that a program holds at a time, the most parts among them, and warps.
SUM_ELEMENTS, SUM_PARTS, SUM_WARPS = 2048, 64, 4

# The most elements of a gathered weight. Larger weights are gathered and multiplied in panels of tile rows.
SCRATCH_ELEMENTS = 1 << 26

# The most rows of activations for `few_rows`: where `many_rows` can run, and where it cannot. (4096², 128 rows: 13.8 µs
# in `few_rows`, 27 gathered.)
FEW_ROWS, FEW_ROWS_ALONE = 32, 128
# Above this many rows, cuBLAS saves more time than gathering costs. (4096², 4096 rows: 215 µs in `many_rows`, 222
# gathered; 8192 rows: 440 and 420.)
MANY_ROWS = 4096
_MULTIPROCESSORS = 132


class Split(NamedTuple):
    """Settings of `few_rows.split`.

    Args:
        block_rows: rows of the weight (columns of the output) in a program, at most a tile's.
        tiles: tiles along `k` in a program; other programs take the rest of the row.
        stacked: tiles in a step.
        num_warps: warps of a program.
        num_stages: stages of a program's pipeline.
    """

    block_rows: int
    tiles: int
    stacked: int
    num_warps: int
    num_stages: int


class OneRow(NamedTuple):
    """Settings of `few_rows.one_row`: rows of the weight in a program, and tiles along `k` that it reads at a time."""

    block_rows: int
    tiles: int
    num_warps: int


class BySlot(NamedTuple):
    """Settings of `few_rows.by_slot`: rows of a slot in a program."""

    block_rows: int
    num_warps: int


class ManyRows(NamedTuple):
    """Settings of `many_rows`.

    Args:
        block_m: rows of activations in a program.
        block_n: rows of the weight in a program, at most a tile's.
        tiles: tiles along `k` in a program.
        num_warps: warps of a program.
        num_stages: stages of a program's pipeline.
        early: whether the next kernel may start when this one starts. If not, it may start after this one's loop.
    """

    block_m: int
    block_n: int
    tiles: int
    num_warps: int
    num_stages: int
    early: bool


BY_SLOT = BySlot(block_rows=64, num_warps=4)
# The most columns of a `by_slot` product, which has one for each chunk and row of activations.
_BY_SLOT_COLUMNS = 128
# Shared memory of a program that its pipeline cannot use: the matrix unit's results are stored through it.
_BESIDE_STAGES_BYTES = 4096

# The number of shapes whose settings are cached, because choosing settings takes host time in every launch.
_REMEMBERED = 1 << 12

_ANY = 1 << 62
# Each line holds for weights with fewer elements than its first number, and at most so many rows of activations as its
# second. The first line that fits applies.
_SPLIT = (
    (1 << 20, 16, Split(block_rows=16, tiles=_ANY, stacked=4, num_warps=4, num_stages=3)),
    (1 << 23, 1, Split(block_rows=16, tiles=_ANY, stacked=4, num_warps=4, num_stages=3)),
    (1 << 23, _ANY, Split(block_rows=64, tiles=4, stacked=1, num_warps=4, num_stages=3)),
    (_ANY, 1, Split(block_rows=16, tiles=_ANY, stacked=4, num_warps=4, num_stages=4)),
    (_ANY, 8, Split(block_rows=32, tiles=_ANY, stacked=4, num_warps=4, num_stages=4)),
    (_ANY, _ANY, Split(block_rows=64, tiles=16, stacked=1, num_warps=4, num_stages=4)),
)
# A pool with more elements than this does not fit in the cache, so more loads in flight pay.
_LARGE_POOL = 1 << 24
_SPLIT_LARGE_POOL = Split(block_rows=32, tiles=_ANY, stacked=2, num_warps=4, num_stages=6)
# Each line holds for weights with at least so many rows. Smaller weights need smaller blocks to give enough programs.
_ONE_ROW = (
    (4096, OneRow(block_rows=16, tiles=4, num_warps=4)),
    (2048, OneRow(block_rows=8, tiles=8, num_warps=4)),
    (0, OneRow(block_rows=4, tiles=16, num_warps=2)),
)
# The first number is the time of a wave of programs, relative to the first line's. `tiles` follows from the shape.
# (4096²: 1024 rows take 44.6 µs in one wave of blocks of 256 rows, and 48.8 µs in two waves of 128; 256 rows take 15.2
# µs in one wave of 64.)
_MANY_ROWS = (
    (1.0, ManyRows(block_m=256, block_n=128, tiles=0, num_warps=8, num_stages=3, early=False)),
    (0.55, ManyRows(block_m=128, block_n=128, tiles=0, num_warps=4, num_stages=4, early=False)),
    (0.34, ManyRows(block_m=64, block_n=128, tiles=0, num_warps=4, num_stages=6, early=False)),
)
# Shared memory of a program for the loads of its pipeline.
_STAGES_BYTES = 220_000
# If one block holds all rows, loads take all of the time, and the start of the next kernel may overlap them.
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

    The weight must use each slot at least twice, the activations of a slot's tiles must fit a program, the partial sums
    must fit the scratch, and no column may be padding. Padding is multiplied by zero, but the pool may hold NaN there.
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
    """Return the settings of `few_rows.split`, with as many stages as shared memory holds; None if it holds none.

    Args:
        view: the view of the weight.
        num_rows: the rows of activations.
        itemsize: the bytes of a number.
        shared_bytes: the shared memory that a program may use (`launch.shared_memory`).
    """
    if 8 < num_rows <= 32 and view.num_slots * view.slot_size > _LARGE_POOL and view.numel >= 1 << 23:
        settings = _SPLIT_LARGE_POOL
    else:
        settings = next(line for numel, rows, line in _SPLIT if view.numel < numel and num_rows <= rows)
    stacked_rows = min(settings.block_rows, view.tile_rows) + max(power_of_2(num_rows), 16 // settings.stacked)
    stage_bytes = settings.stacked * stacked_rows * view.tile_cols * itemsize
    stages = min(settings.num_stages, (shared_bytes - _BESIDE_STAGES_BYTES) // stage_bytes)
    return settings._replace(num_stages=stages) if stages > 0 else None


def one_row_settings(rows: int) -> OneRow:
    """Return the settings of `few_rows.one_row` for a weight with this many rows."""
    return next(settings for least, settings in _ONE_ROW if rows >= least)


@functools.lru_cache(maxsize=_REMEMBERED)
def many_rows_settings(view: TileView, num_rows: int, itemsize: int) -> ManyRows:
    """Return the settings of `many_rows`: the blocks whose waves take least time, with `k` divided to fill a wave."""

    def programs(settings: ManyRows) -> int:
        return -(-num_rows // settings.block_m) * -(-view.rows // min(settings.block_n, view.tile_rows))

    def time(line: tuple[float, ManyRows]) -> float:
        wave, settings = line
        return wave * -(-programs(settings) // _MULTIPROCESSORS)

    if num_rows <= _MANY_ROWS_OF_ONE_BLOCK.block_m:
        settings = _MANY_ROWS_OF_ONE_BLOCK
    else:
        _, settings = min(_MANY_ROWS, key=time)
    parts = max(1, min(_MULTIPROCESSORS // programs(settings), view.grid_cols // 8))
    stage_bytes = (settings.block_m + settings.block_n) * view.tile_cols * itemsize
    stages = min(settings.num_stages, _STAGES_BYTES // stage_bytes)
    return settings._replace(tiles=-(-view.grid_cols // parts), num_stages=stages)

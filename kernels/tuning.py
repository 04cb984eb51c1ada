"""The one table of launch settings. None of them is part of the mapping: they change speed, never weights."""

from __future__ import annotations

from typing import NamedTuple

# Elements and warps of a program.
GATHER_ELEMENTS, GATHER_WARPS = 4096, 8
REDUCE_ELEMENTS, REDUCE_WARPS = 2048, 4
EMBEDDING_ELEMENTS, EMBEDDING_WARPS = 2048, 4
SUM_ELEMENTS, SUM_WARPS = 1024, 4

# Above this many rows of activations a weight is gathered and multiplied by cuBLAS. (4096², 128 rows: 19.5 µs in the
# small-batch kernel, 27 gathered; 256 rows: 31.6 and 30.)
SMALL_BATCH_ROWS = 128
# A gathered weight's most elements; larger ones are gathered and multiplied in panels of tile rows.
SCRATCH_ELEMENTS = 1 << 26


class SmallBatch(NamedTuple):
    """Settings of the small-batch product.

    Args:
        block_rows: rows of the weight (columns of the output) of a program, at most a tile's.
        tiles: tiles along `k` that a program multiplies; the rest of the row is other programs'.
        num_warps: of a program.
        num_stages: of its pipeline.
    """

    block_rows: int
    tiles: int
    num_warps: int
    num_stages: int


class OneRow(NamedTuple):
    """Settings of the product with one row.

    Args:
        block_rows: rows of the weight of a program.
        tiles: tiles along `k` that a program reads at a time.
        num_warps: of a program.
    """

    block_rows: int
    tiles: int
    num_warps: int


# Found by `python -m benchmarks.kernels --search` on an H200, bfloat16, 128×64 tiles. The first line that fits counts:
# up to so many elements of the weight, rows of the weight, and rows of activations.
_ANY = 1 << 62
_SMALL_BATCH = (
    (1 << 20, _ANY, _ANY, SmallBatch(block_rows=64, tiles=2, num_warps=4, num_stages=3)),
    (1 << 23, 1 << 11, _ANY, SmallBatch(block_rows=64, tiles=8, num_warps=4, num_stages=3)),
    (1 << 23, _ANY, _ANY, SmallBatch(block_rows=64, tiles=4, num_warps=4, num_stages=4)),
    (_ANY, _ANY, 16, SmallBatch(block_rows=64, tiles=16, num_warps=4, num_stages=4)),
    (_ANY, _ANY, 32, SmallBatch(block_rows=64, tiles=16, num_warps=4, num_stages=3)),
    (_ANY, _ANY, 64, SmallBatch(block_rows=64, tiles=32, num_warps=4, num_stages=4)),
    (_ANY, _ANY, _ANY, SmallBatch(block_rows=64, tiles=32, num_warps=8, num_stages=3)),
)
# One row and a weight smaller than this: no matrix unit, and the whole of `k` in one program. At 768² this takes 2.5 µs
# where splitting `k` takes 3.2; at 4096² 11.5 and 7.4.
ONE_ROW_ELEMENTS = 1 << 23
_ONE_ROW = (
    (1 << 11, OneRow(block_rows=4, tiles=16, num_warps=8)),
    (_ANY, OneRow(block_rows=8, tiles=4, num_warps=2)),
)


def small_batch(rows: int, cols: int, num_rows: int) -> SmallBatch:
    """Return the settings for a weight of `rows × cols` and `num_rows` rows of activations."""
    return next(
        found
        for numel, weight_rows, batch, found in _SMALL_BATCH
        if rows * cols < numel and rows <= weight_rows and num_rows <= batch
    )


def one_row(rows: int) -> OneRow:
    """Return the settings for a weight of `rows` rows and one row of activations."""
    return next(found for most, found in _ONE_ROW if rows <= most)

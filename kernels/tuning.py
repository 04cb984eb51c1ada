"""The one table of launch settings. None of them is part of the mapping: they change speed, never weights."""

from __future__ import annotations

from typing import NamedTuple

# Elements and warps of a program.
GATHER_ELEMENTS, GATHER_WARPS = 4096, 8
REDUCE_ELEMENTS, REDUCE_WARPS = 2048, 4
EMBEDDING_ELEMENTS, EMBEDDING_WARPS = 2048, 4
SUM_ELEMENTS, SUM_WARPS = 1024, 4

# Above this many rows of activations a weight is gathered and multiplied by cuBLAS.
SMALL_BATCH_ROWS = 64
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


# H200, bfloat16, 128×64 tiles, one and 16 rows; by the weight's elements, smallest class first.
_SMALL_BATCH = (
    (1 << 20, SmallBatch(block_rows=64, tiles=2, num_warps=4, num_stages=3)),
    (1 << 23, SmallBatch(block_rows=64, tiles=8, num_warps=4, num_stages=3)),
    (1 << 62, SmallBatch(block_rows=64, tiles=16, num_warps=4, num_stages=4)),
)


# One row and a weight smaller than this: no matrix unit, and the whole of `k` in one program. At 768² this took 2.5 µs
# where splitting `k` took 3.2; at 4096² 8.9 and 7.3.
ONE_ROW_ELEMENTS = 1 << 23
ONE_ROW = SmallBatch(block_rows=4, tiles=8, num_warps=8, num_stages=1)


def small_batch(rows: int, cols: int) -> SmallBatch:
    """Return the settings for a weight of `rows × cols`."""
    return next(settings for most, settings in _SMALL_BATCH if rows * cols < most)

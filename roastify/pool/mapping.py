r"""`TileMap`: tile number → (slot, sign), in exact integer arithmetic; and the keys of folds. Versions 1 and 2.

This file is the definition of the mapping. The mapping is model state: the formulas here may never change for a
version, and no tuned setting (block sizes, backend, batch) may enter them. `roastify.kernels.reference` holds the same
formulas on tensors. Version 2 adds folds (`FoldView`, `fold_key`) and changes nothing else: a plan without folds is of
version 1.

For a pool of ``P`` slots, tile ``t`` lies in chunk ``c = t div P`` at position ``i = t mod P``, and

.. math:: slot(t) = (a_c \cdot i + b_c) \bmod P, \qquad \gcd(a_c, P) = 1,

so that each chunk is a permutation of the slots: tiles of one chunk never collide, and the numbers of tiles that read
two slots differ by at most one. Chunk 0 is the identity with positive signs. So at ratio 1 the weights are the pool
(Desai and Shrivastava, "In defense of parameter sharing for model-compression", ICLR 2024, section 4.2).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

from roastify.kernels.view import (
    GOLDEN32,
    GOLDEN64,
    MASK32,
    MASK64,
    MIX32_A,
    MIX32_B,
    MIX64_A,
    MIX64_B,
    SLOT_STREAM,
    MappingKind,
    SignKind,
    TileView,
    to_signed64,
)

# The version of plans without folds, and of plans with folds, which is the newest.
UNFOLDED_VERSION, MAPPING_VERSION = 1, 2

MappingName = Literal["permutation", "cyclic", "roast", "hashednet"]
SignName = Literal["none", "row", "tile", "element"]
MAPPINGS: tuple[str, ...] = get_args(MappingName)
SIGNS: tuple[str, ...] = get_args(SignName)

# Streams of the seeded generator. Each purpose draws from a stream of its own.
_STREAM_SIGN = 1
_STREAM_MULTIPLIER = 2
_STREAM_OFFSET = 3
_STREAM_FOLD = 4
_STREAM_START = 5

# The product a·i must fit into int64: every backend computes it in that type.
_MAX_SLOTS = 1 << 31


def mix64(key: int, counter: int) -> int:
    """Return the `counter`-th 64-bit word of the stream `key`: a splitmix64 step, on exact integers."""
    word = (key + (counter + 1) * GOLDEN64) & MASK64
    word = ((word ^ (word >> 30)) * MIX64_A) & MASK64
    word = ((word ^ (word >> 27)) * MIX64_B) & MASK64
    return word ^ (word >> 31)


def mix32(word: int) -> int:
    """Return a 32-bit word in which every bit depends on every bit of `word` (MurmurHash3's finalizer)."""
    word = ((word ^ (word >> 16)) * MIX32_A) & MASK32
    word = ((word ^ (word >> 13)) * MIX32_B) & MASK32
    return word ^ (word >> 16)


def stream_key(seed: int, stream: int) -> int:
    """Return the 64-bit key of one purpose's stream; any Python integer is a seed, taken modulo 2**64."""
    return mix64(seed & MASK64, stream)


def fold_key(seed: int, index: int) -> int:
    """Return the key of the signs of a plan's `index`-th fold; the sign is -1 if the top bit of a word of it is 1.

    The word of position `i` in a bucket and span `c` is `mix64(key, i·num_spans + c)`; see `FoldView`.
    """
    return mix64(stream_key(seed, _STREAM_FOLD), index)


def start_key(seed: int, region: int, base: int) -> int:
    r"""Return the key of the start values of the tensor at address `base` of a region.

    Element `i` (row-major) of the dense tensor starts at :math:`((w_i + 1/2) / 2^{23} - 1) \cdot bound`, in float64,
    where `w_i` are the top 24 bits of `mix64(key, i)`.
    """
    return mix64(mix64(stream_key(seed, _STREAM_START), region), base)


@functools.lru_cache(maxsize=65536)
def chunk_coefficients(seed: int, num_slots: int, chunk: int, kind: str) -> tuple[int, int, int]:
    """Return `(a, b, a⁻¹)` of a chunk: `slot = (a·i + b) mod num_slots` and `i = a⁻¹·(slot - b) mod num_slots`.

    `kind="cyclic"` fixes `a = 1`: STABLE-RPS's rotation, in whole slots.
    """
    if chunk == 0:
        return 1 % num_slots, 0, 1 % num_slots
    offset = mix64(stream_key(seed, _STREAM_OFFSET), chunk) % num_slots
    if kind == "cyclic":
        return 1 % num_slots, offset, 1 % num_slots
    key = mix64(stream_key(seed, _STREAM_MULTIPLIER), chunk)
    attempt = 0
    while math.gcd(multiplier := mix64(key, attempt) % num_slots, num_slots) != 1:
        attempt += 1
    return multiplier, offset, pow(multiplier, -1, num_slots)


@dataclass(frozen=True)
class TileMap:
    """The mapping of `num_tiles` tiles into `num_slots` slots, from `first_slot` of the pool on.

    Args:
        num_tiles: tiles to place, numbered from 0.
        num_slots: slots of this map's region of the pool.
        tile: `(rows, cols)` of a tile; a slot is `rows·cols` contiguous elements.
        seed: any integer.
        kind: `permutation` (the default), or a mapping for comparison: `cyclic`, `roast` (unaligned tiles) or
            `hashednet` (tile 1×1).
        sign: `none`, `row`, `tile` or `element`.
        first_slot: slot of the pool at which the region begins; always 0 unless each tensor has a region of its own.
        first_chunk: row of the pool's chunk table at which this map's chunks begin.
    """

    num_tiles: int
    num_slots: int
    tile: tuple[int, int]
    seed: int = 0
    kind: str = "permutation"
    sign: str = "tile"
    first_slot: int = 0
    first_chunk: int = 0

    def __post_init__(self) -> None:
        if min(self.tile) < 1:
            raise ValueError(f"a tile must have at least one row and one column, not {self.tile}")
        if min(self.num_tiles, self.first_slot, self.first_chunk) < 0:
            raise ValueError(
                f"num_tiles, first_slot and first_chunk must not be negative; found {self.num_tiles}, "
                f"{self.first_slot}, {self.first_chunk}"
            )
        if not 1 <= self.num_slots <= _MAX_SLOTS:
            raise ValueError(f"num_slots must be from 1 to 2**31, not {self.num_slots}")
        if self.kind not in MAPPINGS:
            raise ValueError(f"mapping must be one of {', '.join(MAPPINGS)}, not {self.kind!r}")
        if self.sign not in SIGNS:
            raise ValueError(f"sign must be one of {', '.join(SIGNS)}, not {self.sign!r}")

    @property
    def slot_size(self) -> int:
        """Elements in a slot."""
        return self.tile[0] * self.tile[1]

    @property
    def num_chunks(self) -> int:
        """Chunks that the tiles fill (the last may be partly filled); 0 for mappings without chunks."""
        return -(-self.num_tiles // self.num_slots) if self.kind in ("permutation", "cyclic") else 0

    @property
    def key(self) -> int:
        """The 64-bit key from which the signs are drawn, and the slots of the hashed mappings."""
        return stream_key(self.seed, _STREAM_SIGN)

    def chunk_table(self) -> list[tuple[int, int, int]]:
        """Return `(a, b, a⁻¹)` of every chunk: the whole mapping, in 24 bytes for each unit of ratio."""
        return [chunk_coefficients(self.seed, self.num_slots, chunk, self.kind) for chunk in range(self.num_chunks)]

    def offset(self, tile: int) -> int:
        """Return the pool element at which `tile` begins."""
        size = self.slot_size
        start = self.first_slot * size
        if self.kind == "hashednet":
            return start + (mix64(self.key ^ SLOT_STREAM, tile) >> 1) % self.num_slots * size
        if self.kind == "roast":
            return start + (mix64(self.key ^ SLOT_STREAM, tile) >> 1) % ((self.num_slots - 1) * size + 1)
        chunk, position = divmod(tile, self.num_slots)
        a, b, _ = chunk_coefficients(self.seed, self.num_slots, chunk, self.kind)
        return start + (a * position + b) % self.num_slots * size

    def slot(self, tile: int) -> int:
        """Return the pool slot of `tile`.

        Raises:
            ValueError: the mapping's tiles are not aligned to slots.
        """
        if self.kind == "roast":
            raise ValueError("the tiles of mapping 'roast' are not aligned to slots; ask for offset(tile)")
        return self.offset(tile) // self.slot_size

    def sign_of(self, tile: int, element: int = 0, row_tile: int | None = None) -> int:
        """Return ±1 for the element at position `element` (row-major) of `tile`.

        Let `key(t)` be the 64-bit word of tile `t`. The sign is -1 if this bit is 1:

        - with `sign="tile"`, the top bit of `key(tile)`;
        - with `sign="row"`, the top bit of `key(row_tile)`, where `row_tile` is the first tile in the tensor's row of
          tiles (`TileView.row_tile`);
        - with `sign="element"`, bit `element mod 32` of `mix32(low(key) + (element div 32)·golden) xor high(key)`.

        Chunk 0 of a permutation has only +1.

        Raises:
            ValueError: the sign is per row and `row_tile` is missing. Only a tensor's view knows the tensor's rows.
        """
        if self.sign == "row" and row_tile is None:
            raise ValueError("with a sign for each row of tiles, sign_of needs row_tile; pass view.row_tile(tile)")
        if self.sign == "none" or (self.num_chunks and tile < self.num_slots):
            return 1
        key = mix64(self.key, tile if row_tile is None or self.sign != "row" else row_tile)
        if self.sign in ("tile", "row"):
            return -1 if key >> 63 else 1
        word = mix32(((key & MASK32) + (element >> 5) * GOLDEN32) & MASK32) ^ (key >> 32)
        return -1 if word >> (element & 31) & 1 else 1

    def view(self, rows: int, cols: int, base: int, strips: bool = False) -> TileView:
        """Return the view that operations take for a `rows × cols` tensor at address `base` of this map.

        Raises:
            ValueError: the tensor reaches past the map's tiles, or a tensor in tiles does not begin with a tile.
        """
        kind = {"hashednet": MappingKind.HASHED, "roast": MappingKind.UNALIGNED}.get(self.kind, MappingKind.PERMUTATION)
        view = TileView(
            rows=rows,
            cols=cols,
            base=base,
            tile_rows=self.tile[0],
            tile_cols=self.tile[1],
            num_slots=self.num_slots,
            first_slot=self.first_slot,
            first_chunk=self.first_chunk,
            mapping=int(kind),
            sign=int(SignKind[self.sign.upper()]),
            key=to_signed64(self.key),
            strips=int(strips),
        )
        if base < 0 or (not strips and base % self.slot_size):
            raise ValueError(f"a tensor of tiles must begin at a multiple of {self.slot_size} elements, not at {base}")
        if view.first_tile + view.num_tiles > self.num_tiles:
            raise ValueError(
                f"the tensor takes tiles {view.first_tile} to {view.first_tile + view.num_tiles - 1}, and the map has "
                f"{self.num_tiles}"
            )
        return view

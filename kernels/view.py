"""`TileView`: where one shared tensor lies in the pool, as the integers every operation takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1

# Constants of the version-1 hash (`roastify.pool.mapping`). The two multipliers and shifts of the 64-bit mixer are
# those of splitmix64, the 32-bit ones those of MurmurHash3's finalizer; both are public domain and tested to avalanche.
GOLDEN64 = 0x9E3779B97F4A7C15
MIX64_A = 0xBF58476D1CE4E5B9
MIX64_B = 0x94D049BB133111EB
GOLDEN32 = 0x9E3779B9
MIX32_A = 0x85EBCA6B
MIX32_B = 0xC2B2AE35
# Separates the stream that picks slots (comparison mappings) from the stream that picks signs.
SLOT_STREAM = 0xD6E8FEB86659FD93


class MappingKind(IntEnum):
    """How a tile finds its place in the pool."""

    PERMUTATION = 0
    """`slot = (a[c]·i + b[c]) mod P`, from the chunk table; also STABLE-RPS's rotation, whose `a` is 1."""
    HASHED = 1
    """`slot = hash(t) mod P`: HashedNet, whose tiles are single elements."""
    UNALIGNED = 2
    """First element at `hash(t) mod (P·S - S + 1)`: the tiles of the ROAST authors' code."""


class SignKind(IntEnum):
    """Which part of a tensor has a sign of its own."""

    NONE = 0
    TILE = 1
    ELEMENT = 2
    ROW = 3
    """A row of tiles: the sign is a factor of the whole sum over `k`, so a product's inner loop applies none."""


class TileView(NamedTuple):
    """One shared tensor as a matrix of `rows × cols`, tile-hashed into a pool of `num_slots` slots.

    A slot holds `S = tile_rows · tile_cols` contiguous elements. The tensor occupies the virtual addresses from `base`
    on. With `strips == 0` it is cut into tiles of `tile_rows × tile_cols`, numbered row-major, the last row and column
    of tiles padded, and `base` is a multiple of `S`. With `strips == 1` its elements in memory order are the addresses
    `base … base + rows·cols - 1`, without padding. Tile `t` holds the addresses `t·S … t·S + S - 1`.

    With `groups` above 1 the matrix is applied as a block-diagonal one: block `g` has the rows `g·rows/groups` and on,
    and multiplies the columns `g·cols … (g + 1)·cols - 1` of an input with `groups·cols` columns. Only products know
    groups; the dense tensor is `rows × cols` whatever their number.

    It is a tuple of integers so that an operator schema can take it as one ``int[]``.
    """

    rows: int
    cols: int
    base: int
    tile_rows: int
    tile_cols: int
    num_slots: int
    first_slot: int
    first_chunk: int
    mapping: int
    sign: int
    key: int
    strips: int
    groups: int = 1

    @property
    def input_cols(self) -> int:
        """Columns of a product's input."""
        return self.groups * self.cols

    def blocks(self) -> list[TileView]:
        """Return the views of the groups' rows, each a matrix of its own; a group begins with a row of tiles."""
        rows = self.rows // self.groups
        step = rows // self.tile_rows * self.grid_cols * self.slot_size
        return [self._replace(rows=rows, base=self.base + g * step, groups=1) for g in range(self.groups)]

    @property
    def slot_size(self) -> int:
        """Elements in a slot."""
        return self.tile_rows * self.tile_cols

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.rows * self.cols

    @property
    def grid_rows(self) -> int:
        """Rows of tiles, the last one perhaps padded."""
        return -(-self.rows // self.tile_rows)

    @property
    def grid_cols(self) -> int:
        """Columns of tiles, the last one perhaps padded."""
        return -(-self.cols // self.tile_cols)

    @property
    def first_tile(self) -> int:
        """Number of the tile that holds the first element."""
        return self.base // self.slot_size

    @property
    def num_tiles(self) -> int:
        """Tiles the tensor touches."""
        if not self.strips:
            return self.grid_rows * self.grid_cols
        return -(-(self.base + self.numel) // self.slot_size) - self.first_tile

    def row_tile(self, tile: Any) -> Any:
        """Return the first tile of the row of tiles that `tile` (an integer or a tensor of them) is in.

        A strip is a row of its own.
        """
        return tile if self.strips else tile - (tile - self.first_tile) % self.grid_cols

    @property
    def chunks(self) -> tuple[int, int]:
        """The first chunk that the tensor's tiles are in, and the number of chunks."""
        first = self.first_tile // self.num_slots
        return first, (self.first_tile + self.num_tiles - 1) // self.num_slots + 1 - first

    @property
    def all_positive(self) -> bool:
        """Whether no sign can be negative: none was asked for, or every tile is in chunk 0."""
        in_first_chunk = self.first_tile + self.num_tiles <= self.num_slots
        return self.sign == SignKind.NONE or (self.unsigned_first_chunk and in_first_chunk)

    @property
    def unsigned_first_chunk(self) -> bool:
        """Whether tiles of chunk 0 carry no sign (so that ratio 1 is the identity)."""
        return self.mapping == MappingKind.PERMUTATION


class FoldView(NamedTuple):
    r"""How inputs of `cols` columns are folded to `hashes · cols/fold`, before a product with a narrower matrix.

    Let `width = cols/fold`. Column `i·width + p` of an input falls into bucket `p`, for every hash. The hashes differ
    in their signs alone, which are orthogonal:

    .. math:: z_{g,p} = \sum_{i<f} s_{g,i,p}\, x_{i \cdot width + p}, \qquad
              s_{g,i,p} = (1 + e_{g,i,c})\, b_{i,c}\, (-1)^{popcount(g \,\&\, i)}, \qquad c = \lfloor p / span \rfloor.

    `b` is a hashed sign. `e` is learned: an element of the pool, the one at
    `first_scale + (g·fold + i)·num_spans + c`. With `first_scale = -1` there are none, and `e` is 0.

    It is a tuple of integers so that an operator schema can take it as one ``int[]``.

    Args:
        cols: columns of the input.
        fold: columns that share a bucket, a power of 2 that divides `cols`.
        hashes: 1 to `fold`, a power of 2.
        span: buckets in a row that share signs and learned scales.
        key: the 64-bit key of the signs.
        first_scale: the pool element of the first learned scale, or -1.
        unit: 1, or 0 to leave the one out of `1 + e`, which a second derivative needs.
    """

    cols: int
    fold: int
    hashes: int
    span: int
    key: int
    first_scale: int = -1
    unit: int = 1

    @property
    def width(self) -> int:
        """Buckets of a hash."""
        return self.cols // self.fold

    @property
    def folded_cols(self) -> int:
        """Columns of a folded input."""
        return self.hashes * self.width

    @property
    def num_spans(self) -> int:
        """Spans of a hash's buckets, the last one perhaps shorter."""
        return -(-self.width // self.span)

    def over(self, places: int) -> FoldView:
        """Return the fold of as many channels, each of which has so many places next to each other in memory.

        All places of a channel have its bucket, its signs and its learned scales.
        """
        return self._replace(cols=self.cols * places, span=self.span * places)

    @property
    def num_scales(self) -> int:
        """Learned scales of the fold: one for each hash, position in a bucket and span."""
        return self.hashes * self.fold * self.num_spans if self.first_scale >= 0 else 0


def alike(view: TileView) -> TileView:
    """Return the fields that must agree among tensors that one kernel reads together: all but sizes and places."""
    return view._replace(rows=0, cols=0, base=0)


@dataclass(eq=False)
class WeightView:
    """Where a weight lies in the pool, and the form in which its layer reads it.

    An object is equal only to itself, so that the host spends no time on comparing dictionary keys.

    Args:
        view: where the weight's matrix lies in the pool.
        scale: λ.
        shape: the shape of the dense tensor.
        transposed: whether the matrix in the pool is the tensor's transpose.
        basis_index: the number of the pool's basis that the weight's kernels are combinations of; the matrix then holds
            the coefficients. None: the matrix holds the tensor.
        fold: how the inputs of the weight's products or convolutions are folded; the matrix then is narrower than the
            weight.
    """

    view: TileView
    scale: float
    shape: tuple[int, ...]
    transposed: bool
    basis_index: int | None = None
    fold: FoldView | None = None
    read_shape: tuple[int, ...] = field(init=False)
    """Shape of what the layer's operation takes: the weight's own, or that of the narrow weight of a folded one."""
    gathered_shape: tuple[int, ...] = field(init=False)
    """Shape of the gathered tensor: `read_shape`, or that of its coefficients, `(kernels, basis kernels)`."""
    group: str | None = field(default=None, init=False)
    """The `GroupView.text` of the group with which a compiled pass gathers the weight; None: it is gathered alone."""
    number: int = field(default=0, init=False)
    """The weight's number in that group."""

    def __post_init__(self) -> None:
        shape = self.shape
        if self.fold is not None:
            inputs = 0 if self.transposed else 1
            shape = (*shape[:inputs], self.fold.width, *shape[inputs + 1 :])
        self.read_shape = shape
        if self.basis_index is not None:
            kernels = math.prod(shape[:2])
            shape = (kernels, self.view.numel // kernels)
        self.gathered_shape = shape

    @property
    def basis_shape(self) -> tuple[int, int] | None:
        """`(basis kernels, positions of a kernel)`, or None."""
        return None if self.basis_index is None else (self.gathered_shape[1], math.prod(self.shape[2:]))


def to_signed64(value: int) -> int:
    """Return the 64-bit two's complement integer with the bits of `value`: operator schemas hold signed integers."""
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value

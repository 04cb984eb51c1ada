r"""The operators in ATen's operations alone, for exported programs that run where roastify is not installed.

While `recording()` is open, whatever records a converted model's operators gets these. What the mapping says of a
weight's tiles is found at once and becomes constants of the program: 4 bytes for a tile's slot, and 4 for its λ · sign.
If elements have signs of their own, the tile has a key of 16 bytes instead, from which the program computes them. Whole
tiles are gathered, so that no larger index exists when the program runs. An operation takes about 1 kB of a program's
file, so constants are stored as they are used.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.kernels import blocks, reference
from roastify.kernels.reference import summed_in
from roastify.kernels.tile_hash import hash32, hash64, shift_right, tile_factors, tile_offsets
from roastify.kernels.torch_internals import without_dispatch_modes
from roastify.kernels.view import GOLDEN32, MASK32, FoldView, MappingKind, SignKind, TileView


class _Recording(threading.local):
    """Whether this thread records plain operators, and the constants of its programs."""

    def __init__(self) -> None:
        # Not an attribute of the class: dynamo of torch 2.11 would read that one, and so never the thread's.
        self.depth = 0
        self.constants: dict[Hashable, Any] = {}


_recording = _Recording()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Have whatever records operators in this thread get the plain ones."""
    _recording.depth += 1
    try:
        yield
    finally:
        _recording.depth -= 1
        if not _recording.depth:
            _recording.constants.clear()


def is_recording() -> bool:
    """Whether `recording` is open in this thread."""
    return _recording.depth > 0


def operator(name: str) -> Callable[..., Tensor]:
    """Return an operator as it is recorded.

    Raises:
        RuntimeError: the operator computes a gradient, or dynamo records, which cannot make constants.
    """
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "dynamo (torch.compile, or torch.export with strict=True) cannot record plain operators; call "
            "torch.export.export(model, inputs, strict=False), or export roastify.densify(model)"
        )
    found = _OPERATORS.get(name)
    if found is None:
        raise RuntimeError(
            f"a program of plain operators computes no gradients, and this model calls {name!r}; export its forward "
            f"alone, or export roastify.densify(model)"
        )
    return found


def index_itemsize(view: TileView) -> int:
    """Return the bytes that a program stores for each tile of a weight."""
    if view.all_positive:
        return 4
    return 21 if view.sign == SignKind.ELEMENT else 8


class _Signs(NamedTuple):
    """The constants of a weight's signs, `[grid rows, grid cols]`, or of a tensor in strips, `[tiles]`.

    Args:
        factors: λ · sign of tiles; None if no tile has a sign of its own.
        low: the low words of the keys of elements' signs, or None.
        high: their high words.
        is_signed: which tiles' elements have signs, or None: all have, or none.
    """

    factors: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    is_signed: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> _Signs:
        """Return the signs that a function makes of these."""
        return _Signs(*(None if tensor is None else change(tensor) for tensor in self))


class _Bits(NamedTuple):
    """Which bit of which word is the sign of an element of a tile; the same for all tiles.

    Args:
        counters: what is hashed for each word, together with a tile's key, `[tile rows, words]`.
        masks: the bit of each element in its word, `[tile rows, words, elements of a word]`.
    """

    counters: Tensor
    masks: Tensor


def _kept(key: Hashable, make: Callable[[], Any]) -> Any:
    """Return a constant, the same object each time, so that a program stores it once."""
    found = _recording.constants.get(key)
    if found is None:
        # Nothing records how a constant is made.
        with without_dispatch_modes():
            found = _recording.constants[key] = make()
    return found


def _tiles_of(table: Tensor, view: TileView, scale: float, dtype: torch.dtype) -> tuple[Tensor, _Signs]:
    """Return the slot of each of a weight's tiles, int32, and their signs."""
    return _kept((id(table), view, scale, dtype), lambda: _find_tiles(table, view, scale, summed_in(dtype)))


def _find_tiles(table: Tensor, view: TileView, scale: float, dtype: torch.dtype) -> tuple[Tensor, _Signs]:
    assert view.mapping != MappingKind.UNALIGNED, "a tile that begins anywhere has no slot"
    tiles = torch.arange(view.first_tile, view.first_tile + view.num_tiles, device=table.device)
    tiles = tiles if view.strips else tiles.view(view.grid_rows, view.grid_cols)
    slots = (tile_offsets(table, view, tiles) // view.slot_size).int()
    if view.all_positive:
        return slots, _Signs()
    if view.sign == SignKind.ELEMENT:
        is_signed = tiles >= view.num_slots if view.unsigned_first_chunk else None
        keys = hash64(view.key, tiles)
        return slots, _Signs(None, keys & MASK32, shift_right(keys, 32), is_signed)
    return slots, _Signs(tile_factors(view, scale, tiles, dtype))


def _bits_of(view: TileView, device: torch.device) -> _Bits:
    return _kept((view.tile_rows, view.tile_cols, device), lambda: _find_bits(view, device))


def _find_bits(view: TileView, device: torch.device) -> _Bits:
    element = torch.arange(view.slot_size, device=device).view(view.tile_rows, -1, math.gcd(view.tile_cols, 32))
    return _Bits((element[..., 0] >> 5) * GOLDEN32, 1 << (element & 31))


def _scaled(values: Tensor, view: TileView, scale: float, signs: _Signs, tile_row: Tensor | None = None) -> Tensor:
    """Return tiles, or a row of each of them, with their signs and λ; the last dimension is a row of a tile."""
    # A narrow dtype would round λ itself, and a small one to zero.
    wide = summed_in(values.dtype)
    scaled = values if values.dtype == wide else values.to(wide)
    if signs.factors is not None:
        scaled = scaled * signs.factors[..., None]
    else:
        if signs.low is not None:
            if torch.onnx.is_in_onnx_export():
                signs = signs._replace(low=signs.low + _nothing_of(values))
            scaled = torch.where(_is_negative(view, signs, tile_row), -scaled, scaled)
        scaled = scaled if scale == 1.0 else scaled * scale
    return scaled if values.dtype == wide else scaled.to(values.dtype)


def _nothing_of(values: Tensor) -> Tensor:
    """Return a zero that a program finds in values from the pool.

    ONNX's optimizer replaces what follows from small constants alone. It would store eight bytes for each element's
    sign, twice the bytes of the dense weight.
    """
    return values.flatten()[:1].long() * 0


def _is_negative(view: TileView, signs: _Signs, tile_row: Tensor | None) -> Tensor:
    """Return which elements have a negative sign; see `tile_hash.element_bits`."""
    assert signs.low is not None and signs.high is not None
    counters, masks = _bits_of(view, signs.low.device)
    if tile_row is not None:
        counters = F.embedding(tile_row, counters)
        masks = F.embedding(tile_row, masks.flatten(1)).unflatten(-1, masks.shape[1:])
    word = hash32((signs.low[..., None] + counters) & MASK32) ^ signs.high[..., None]
    if signs.is_signed is not None:
        word = torch.where(signs.is_signed[..., None], word, 0)
    return (word[..., None] & masks != 0).flatten(-2)


def gather(pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the dense tensor `[rows, cols]`."""
    slots, signs = _tiles_of(table, view, scale, pool.dtype)
    tiles = pool.reshape(-1, view.tile_rows, view.tile_cols).index_select(0, slots.flatten())
    tiles = tiles.view(*slots.shape, view.tile_rows, view.tile_cols)
    tiles = _scaled(tiles, view, scale, signs.each(lambda each: each[..., None]))
    if view.strips:
        start = view.base - view.first_tile * view.slot_size
        return tiles.flatten()[start : start + view.numel].view(view.rows, view.cols)
    matrix = tiles.permute(0, 2, 1, 3).reshape(-1, view.grid_cols * view.tile_cols)
    return matrix[: view.rows, : view.cols]


def linear(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias`."""
    weight = gather(pool, table, view, scale)
    if view.groups == 1:
        return F.linear(x, weight, bias)
    out = blocks.recorded_product(x.reshape(-1, x.shape[-1]), weight, view.groups)
    out = out.view(*x.shape[:-1], view.rows)
    return out if bias is None else out + bias


def linear_t(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · W + bias`."""
    weight = gather(pool, table, view, scale)
    if view.groups == 1:
        return F.linear(x, weight.t(), bias)
    out = blocks.recorded_product_t(x.reshape(-1, x.shape[-1]), weight, view.groups)
    out = out.view(*x.shape[:-1], view.input_cols)
    return out if bias is None else out + bias


def embedding(index: Tensor, pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the rows `W[index]`; only those rows' pool elements are read."""
    if view.strips:
        return F.embedding(index, gather(pool, table, view, scale))
    slots, signs = _tiles_of(table, view, scale, pool.dtype)
    grid_row, tile_row = index // view.tile_rows, (index % view.tile_rows)[..., None]
    segments = F.embedding(grid_row, slots) * view.tile_rows + tile_row
    values = F.embedding(segments, pool.reshape(-1, view.tile_cols))
    signs = signs.each(lambda each: F.embedding(grid_row, each))
    return _scaled(values, view, scale, signs, tile_row).flatten(-2)[..., : view.cols]


def _fold_factors(pool: Tensor | None, view: FoldView, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the factor of every column of an input, `[hashes, fold, width]`."""
    signs = _kept((device, view), lambda: reference.fold_signs(view, torch.float32, device).to(torch.int8))
    factors = signs.to(dtype)
    if pool is not None and view.num_scales:
        learned = pool.reshape(-1)[view.first_scale : view.first_scale + view.num_scales]
        factors = factors * (learned.to(dtype).view(factors.shape) + view.unit)
    return factors[..., None].expand(*factors.shape, view.span).flatten(-2)[..., : view.width]


def fold(x: Tensor, pool: Tensor | None, view: FoldView, dtype: torch.dtype) -> Tensor:
    """Return the folded inputs in a dtype, `[..., cols] → [..., hashes·width]`."""
    wide = summed_in(x.dtype)
    columns = x.reshape(*x.shape[:-1], 1, view.fold, view.width).to(wide)
    return (columns * _fold_factors(pool, view, wide, x.device)).sum(-2).flatten(-2).to(dtype)


def unfold(z: Tensor, pool: Tensor | None, view: FoldView, dtype: torch.dtype) -> Tensor:
    """Return the adjoint of `fold`, `[..., hashes·width] → [..., cols]`."""
    wide = summed_in(z.dtype)
    buckets = z.reshape(*z.shape[:-1], view.hashes, 1, view.width).to(wide)
    return (buckets * _fold_factors(pool, view, wide, z.device)).sum(-3).flatten(-2).to(dtype)


def folded_linear(
    x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, fold_view: FoldView, scale: float
) -> Tensor:
    """Return `linear(fold(x))`."""
    return linear(fold(x, pool, fold_view, pool.dtype), pool, bias, table, view, scale)


def combine(coefficients: Tensor, basis: Tensor, grad_scale: float) -> Tensor:
    """Return `coefficients · basis`, of the coefficients' dtype."""
    wide = summed_in(coefficients.dtype)
    return (coefficients.to(wide) @ basis.to(wide)).to(coefficients.dtype)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    each.__name__: each for each in (gather, linear, linear_t, embedding, fold, unfold, folded_linear, combine)
}

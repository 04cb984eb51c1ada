"""Every operation on the pool, and the pool itself, against an oracle that builds W one element at a time."""

from __future__ import annotations

import copy
import functools
import gc
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from roastify.kernels import by_tile, ops, reference
from roastify.kernels.group_view import GroupView
from roastify.kernels.view import TileView
from roastify.pool.mapping import TileMap
from roastify.pool.pool import RoastPool

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Relative to the largest expected value. bfloat16 rounds λ, the weight and each panel's product to 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """A tensor of `rows × cols` that begins at address `base` of its map, and the pool that it lies in."""

    name: str
    tile: tuple[int, int]
    rows: int
    cols: int
    num_slots: int
    kind: str = "permutation"
    sign: str = "tile"
    scale: float = 1.0
    base: int = 0
    strips: bool = False
    first_slot: int = 0
    first_chunk: int = 0
    seed: int = 1

    @functools.cached_property
    def tile_map(self) -> TileMap:
        size = self.tile[0] * self.tile[1]
        # More tiles than needed: their number does not change where a tile is.
        num_tiles = self.base // size + (self.rows + self.tile[0]) * (self.cols + self.tile[1]) // size + 2
        return TileMap(
            num_tiles, self.num_slots, self.tile, self.seed, self.kind, self.sign, self.first_slot, self.first_chunk
        )

    @functools.cached_property
    def view(self) -> TileView:
        return self.tile_map.view(self.rows, self.cols, self.base, self.strips)

    @functools.cached_property
    def table(self) -> Tensor:
        """The chunk table; the chunks of other regions come first, with numbers that would move every tile."""
        rows = [(1, 1 + chunk, 1) for chunk in range(self.first_chunk)] + self.tile_map.chunk_table()
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)

    @property
    def pool_shape(self) -> list[int]:
        # Two slots after the region belong to other regions.
        return [(self.first_slot + self.num_slots + 2) * self.tile[0], self.tile[1]]

    @property
    def arguments(self) -> tuple[Tensor, TileView, float]:
        return self.table, self.view, self.scale


@functools.cache
def dense_layout(tile_map: TileMap, rows: int, cols: int, base: int, strips: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the pool element and the sign of each weight, `[rows, cols]`, one weight at a time.

    The tensor occupies the addresses from `base` on, and tile `t` holds the addresses `t·S … t·S + S - 1`. As strips,
    element `n` in memory order has address `base + n`; otherwise tiles are numbered row-major, and an element's place
    in its tile is row-major.
    """
    tile_rows, tile_cols = tile_map.tile
    size = tile_rows * tile_cols
    tiles_across = (cols + tile_cols - 1) // tile_cols
    offset = functools.cache(tile_map.offset)
    elements = np.empty((rows, cols), dtype=np.int64)
    signs = np.empty((rows, cols), dtype=np.int64)
    for row in range(rows):
        for col in range(cols):
            if strips:
                address = base + row * cols + col
            else:
                number = row // tile_rows * tiles_across + col // tile_cols
                address = base + number * size + row % tile_rows * tile_cols + col % tile_cols
            tile, element = divmod(address, size)
            elements[row, col] = offset(tile) + element
            first_of_row = tile if strips else base // size + row // tile_rows * tiles_across
            signs[row, col] = tile_map.sign_of(tile, element, first_of_row)
    return elements, signs


class Oracle:
    """The dense operations of a case in float64: W from the pool, and a gradient of W back to the pool."""

    def __init__(self, case: Case) -> None:
        self.elements, self.signs = dense_layout(case.tile_map, case.rows, case.cols, case.base, case.strips)
        self.pool_shape = case.pool_shape
        self.factors = torch.from_numpy(self.signs).double() * case.scale

    def weight(self, pool: Tensor) -> Tensor:
        return self.factors * pool.detach().double().reshape(-1)[torch.from_numpy(self.elements)]

    def to_pool(self, grad_weight: Tensor) -> Tensor:
        total = np.zeros(self.pool_shape[0] * self.pool_shape[1])
        np.add.at(total, self.elements.ravel(), (grad_weight.detach().double() * self.factors).numpy().ravel())
        return torch.from_numpy(total).view(self.pool_shape)

    def read(self) -> Tensor:
        """A mask of the pool's shape: the pool elements that the tensor reads."""
        marks = torch.zeros(self.pool_shape[0] * self.pool_shape[1], dtype=torch.bool)
        marks[torch.from_numpy(self.elements).flatten()] = True
        return marks.view(self.pool_shape)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_pool(case: Case, dtype: torch.dtype, unread: float = float("nan")) -> Tensor:
    """Return a pool in which every element that the tensor must not read is NaN."""
    pool = randn(*case.pool_shape, dtype=dtype, seed=5)
    return torch.where(Oracle(case).read(), pool, torch.tensor(unread, dtype=dtype)).requires_grad_()


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    """Compare with an oracle's float64 result: shape, dtype, and every element to the dtype's tolerance."""
    assert actual.shape == expected.shape, name
    assert actual.dtype == dtype, name
    atol = TOLERANCE[dtype] * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double(), expected, rtol=0.0, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def gradients(output: Tensor, cotangent: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each named input."""
    return dict(zip(inputs, torch.autograd.grad(output, list(inputs.values()), cotangent), strict=True))


CASES = [
    # Every tile size; most of them with each mapping and each kind of sign, whole and padded.
    Case("8x8", (8, 8), 77, 123, 23),
    Case("8x8-exact-element", (8, 8), 40, 72, 7, sign="element", scale=0.37),
    Case("8x8-unsigned-cyclic", (8, 8), 77, 123, 23, "cyclic", "none", scale=-2.5),
    Case("8x8-hashed", (8, 8), 77, 40, 11, "hashednet", "tile", scale=0.1),
    Case("8x8-unaligned-element", (8, 8), 77, 123, 11, "roast", "element", scale=1.7),
    Case("16x16-element", (16, 16), 77, 123, 6, sign="element", scale=0.37),
    Case("16x16-row", (16, 16), 77, 123, 6, sign="row", base=3 * 256, scale=0.6),
    Case("8x8-unaligned-row", (8, 8), 77, 123, 11, "roast", "row"),
    Case("16x16-cyclic", (16, 16), 77, 123, 9, "cyclic", "tile", scale=3.0),
    Case("16x16-unaligned", (16, 16), 48, 123, 5, "roast", "tile"),
    Case("32x32-cyclic-element", (32, 32), 77, 123, 4, "cyclic", "element"),
    Case("32x32-unaligned-unsigned", (32, 32), 77, 123, 3, "roast", "none", scale=0.6),
    Case("64x64", (64, 64), 77, 123, 2, scale=1.3),
    Case("64x64-element", (64, 64), 77, 123, 1, sign="element"),
    Case("64x64-hashed-element", (64, 64), 130, 70, 2, "hashednet", "element", scale=0.9),
    Case("128x64", (128, 64), 77, 123, 1, sign="element", scale=0.05),
    Case("128x64-later", (128, 64), 130, 123, 3, base=2 * 8192, scale=2.0),
    # HashedNet's own tile, and tiles whose rows are no multiple of a word of signs.
    Case("1x1-hashednet", (1, 1), 23, 41, 97, "hashednet", "tile", scale=0.8),
    Case("1x1-permutation-element", (1, 1), 23, 41, 97, sign="element"),
    Case("3x5-element", (3, 5), 23, 41, 8, sign="element", scale=1.1),
    Case("4x24-element", (4, 24), 23, 50, 4, sign="element", seed=-9),
    # Ratio 1: no signs, no sharing.
    Case("identity", (8, 8), 77, 123, 160, sign="element"),
    Case("identity-scaled", (16, 16), 77, 123, 40, scale=0.25),
    # Small matrices: one element, one row, one column, one tile.
    Case("one-element", (8, 8), 1, 1, 3, base=5 * 64, scale=1.5),
    Case("one-row", (16, 16), 1, 123, 3, sign="element", base=2 * 256),
    Case("one-column", (16, 16), 77, 1, 3, base=4 * 256),
    Case("one-slot", (32, 32), 77, 123, 1),
    # In the middle of a pool with other tensors, and in a region of its own.
    Case("mid-chunk", (16, 16), 77, 123, 17, base=29 * 256, scale=0.7, seed=2**70),
    Case("across-first-border", (8, 8), 77, 123, 50, sign="element", base=20 * 64),
    Case("region", (16, 16), 77, 123, 7, base=3 * 256, first_slot=4, first_chunk=3, scale=1.2),
    Case("region-element", (8, 8), 77, 123, 31, sign="element", first_slot=9, first_chunk=2),
    Case("region-unaligned", (16, 16), 77, 123, 7, "roast", "tile", first_slot=4),
    Case("region-hashed", (16, 16), 77, 123, 7, "hashednet", "element", first_slot=4),
    # Strips of memory order.
    Case("strips", (8, 8), 77, 123, 23, base=64 * 5 + 17, strips=True, scale=0.7),
    Case("strips-element", (16, 16), 77, 123, 9, sign="element", base=301, strips=True),
    Case("strips-within-a-tile", (64, 64), 5, 7, 3, base=4096 * 4 + 100, strips=True, scale=-1.4),
    Case("strips-one-element", (8, 8), 1, 1, 3, base=64 * 7 - 1, strips=True, sign="element"),
    Case("strips-row", (8, 8), 77, 123, 23, base=64 * 5 + 17, strips=True, sign="row"),
    Case("strips-aligned", (16, 16), 32, 48, 2, base=512, strips=True, scale=1.1),
    Case("strips-unaligned-tiles", (8, 8), 40, 41, 9, "roast", "element", base=77, strips=True),
    Case("strips-hashed", (8, 8), 40, 41, 9, "hashednet", "tile", base=77, strips=True),
    Case("strips-cyclic-region", (16, 16), 30, 41, 3, "cyclic", base=700, strips=True, first_slot=3, first_chunk=1),
]

# Cases that are read slot by slot: few rows, signs for each tile, slots of at least 256 elements, twice as many tiles.
BY_SLOT_CASES = [
    Case("by-slot", (16, 16), 80, 128, 20),
    Case("by-slot-padded", (16, 16), 77, 123, 13, scale=0.7),
    Case("by-slot-mid-chunk", (16, 16), 77, 123, 7, base=5 * 256, scale=-1.2),
    Case("by-slot-far-chunk", (16, 16), 77, 123, 19, base=(19 * 3 + 18) * 256),
    Case("by-slot-unsigned-cyclic", (32, 8), 77, 123, 5, "cyclic", "none", scale=2.5),
    Case("by-slot-region", (16, 16), 77, 123, 13, base=40 * 256, first_slot=5, first_chunk=2, scale=0.3),
    Case("by-slot-one-slot", (64, 64), 77, 123, 1, base=3 * 4096),
    Case("by-slot-one-row", (16, 16), 1, 123, 3),
    Case("by-slot-one-column", (16, 16), 123, 1, 4, base=256),
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def test_the_oracle_reads_what_the_cases_say() -> None:
    """Each case must have the property that its name says; otherwise it tests nothing."""
    by_name = {case.name: case for case in CASES}
    oracle = Oracle(by_name["identity"])
    assert (oracle.signs == 1).all()
    assert sorted(oracle.elements.ravel()) == sorted(set(oracle.elements.ravel()))
    for case in CASES:
        signs = set(Oracle(case).signs.ravel())
        if case.sign != "none" and case.rows * case.cols > 2000 and not case.name.startswith("identity"):
            assert signs == {-1, 1}, case.name
    borders = Oracle(by_name["across-first-border"]).signs
    assert (borders.ravel()[:8] == 1).all()
    assert (borders[-8:] == -1).any()


# Every operation, forward and every gradient.


@each_dtype
@each_case
def test_gather(case: Case, dtype: torch.dtype) -> None:
    oracle, pool = Oracle(case), make_pool(case, dtype)
    weight = ops.gather(pool, *case.arguments)
    assert_near(weight, oracle.weight(pool), dtype, "weight")
    cotangent = randn(case.rows, case.cols, dtype=dtype, seed=1)
    grads = gradients(weight, cotangent, pool=pool)
    assert_near(grads["pool"], oracle.to_pool(cotangent), dtype, "pool")
    assert (grads["pool"][~oracle.read()] == 0).all()


@each_dtype
@each_case
def test_reduce(case: Case, dtype: torch.dtype) -> None:
    oracle = Oracle(case)
    grad_weight = randn(case.rows, case.cols, dtype=dtype).requires_grad_()
    total = ops.reduce(grad_weight, *case.arguments, case.pool_shape)
    assert_near(total, oracle.to_pool(grad_weight), dtype, "total")
    cotangent = randn(*case.pool_shape, dtype=dtype, seed=1)
    grads = gradients(total, cotangent, grad_weight=grad_weight)
    assert_near(grads["grad_weight"], oracle.weight(cotangent), dtype, "grad_weight")


def _check_linear(case: Case, x: Tensor, pool: Tensor, transposed: bool = False) -> None:
    """Compare `linear` (or `linear_t`) and its gradients for x, pool and bias with the dense products."""
    dtype, oracle = x.dtype, Oracle(case)
    operation = ops.linear_t if transposed else ops.linear
    weight = oracle.weight(pool).t() if transposed else oracle.weight(pool)
    bias = randn(weight.shape[0], dtype=dtype, seed=2).requires_grad_()
    flat = x.detach().double().reshape(-1, weight.shape[1])

    out = operation(x, pool, bias, *case.arguments)
    expected = (flat @ weight.t() + bias.detach().double()).view(*x.shape[:-1], weight.shape[0])
    assert_near(out, expected, dtype, "output")
    # Once more without a bias: a bias would hide an error in outputs that are small beside it.
    assert_near(operation(x, pool, None, *case.arguments), expected - bias.detach().double(), dtype, "without bias")

    cotangent = randn(*expected.shape, dtype=dtype, seed=3)
    flat_cotangent = cotangent.double().reshape(-1, weight.shape[0])
    grads = gradients(out, cotangent, x=x, pool=pool, bias=bias)
    grad_weight = flat_cotangent.t() @ flat
    assert_near(grads["x"], (flat_cotangent @ weight).view(x.shape), dtype, "x")
    assert_near(grads["pool"], oracle.to_pool(grad_weight.t() if transposed else grad_weight), dtype, "pool")
    assert_near(grads["bias"], flat_cotangent.sum(0), dtype, "bias")


@each_dtype
@each_case
def test_linear(case: Case, dtype: torch.dtype) -> None:
    x = randn(5, 4, case.cols, dtype=dtype).requires_grad_()
    assert not reference._worth_reading_by_slot(20, dtype, case.view)
    _check_linear(case, x, make_pool(case, dtype))


@each_dtype
@each_case
def test_linear_t(case: Case, dtype: torch.dtype) -> None:
    x = randn(5, 4, case.rows, dtype=dtype).requires_grad_()
    _check_linear(case, x, make_pool(case, dtype), transposed=True)


@each_dtype
@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("case", BY_SLOT_CASES, ids=lambda case: case.name)
def test_linear_by_slot(case: Case, num_rows: int, dtype: torch.dtype) -> None:
    x = randn(num_rows, case.cols, dtype=dtype).requires_grad_()
    assert reference._worth_reading_by_slot(num_rows, dtype, case.view) is (dtype != torch.float16)
    # Slots of other regions are never read. A slot that only padding reads is multiplied by zeros: it must be finite.
    oracle, pool = Oracle(case), make_pool(case, dtype, unread=1.0)
    region = torch.zeros(case.pool_shape, dtype=torch.bool)
    region[case.first_slot * case.tile[0] : (case.first_slot + case.num_slots) * case.tile[0]] = True
    assert not (oracle.read() & ~region).any()
    pool = torch.where(region, pool.detach(), torch.tensor(float("nan"), dtype=dtype)).requires_grad_()
    _check_linear(case, x, pool)


BY_TILE_CASES = [
    case
    for case in CASES
    if case.tile[0] * case.tile[1] >= 256 and case.kind in ("permutation", "cyclic") and not case.strips
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("elements_at_once", [1, 40_000])
@pytest.mark.parametrize("kept_signs", [0, 1 << 22])
@pytest.mark.parametrize("case", BY_TILE_CASES, ids=lambda case: case.name)
def test_linear_by_tile(
    case: Case,
    kept_signs: int,
    elements_at_once: int,
    num_rows: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In strips of one row of tiles and in larger ones, with signs that are kept and with signs hashed anew."""
    monkeypatch.setattr(by_tile, "_MOST_KEPT_SIGNS", kept_signs)
    monkeypatch.setattr(by_tile, "_ELEMENTS_AT_ONCE", elements_at_once)
    monkeypatch.setattr(by_tile, "_kept", type(by_tile._kept)())
    x = randn(num_rows, case.cols, dtype=dtype)
    monkeypatch.setattr(by_tile, "_LEAST_ELEMENTS", 0)
    assert by_tile.is_worth_it(x, case.view) is (case.view.chunks != (0, 1))
    # Whatever the weight does not read is NaN.
    pool = make_pool(case, dtype).detach()
    expected = x.double() @ Oracle(case).weight(pool).double().t()
    for _ in range(2):
        found = by_tile.product(x, pool, case.table, case.view, case.scale)
        assert_near(found, expected, dtype, "product")
    assert found.is_contiguous() and len(by_tile._kept) == 1


def test_what_is_kept_of_a_mapping_goes_with_its_table() -> None:
    case = Case("kept", (16, 16), 77, 123, 6, sign="row")
    x, pool = torch.ones(1, case.cols), make_pool(case, torch.float32).detach()
    before = len(by_tile._kept)
    table = case.table.clone()
    out = by_tile.product(x, pool, table, case.view, case.scale)
    assert len(by_tile._kept) == before + 1
    # Another pool's table with equal values is another table; another λ is another entry.
    assert torch.equal(by_tile.product(x, pool, case.table, case.view, case.scale), out)
    assert_near(
        by_tile.product(x, pool, table, case.view, 3.0 * case.scale), 3.0 * out.double(), torch.float32, "scale"
    )
    del table
    gc.collect()
    assert len(by_tile._kept) <= before + 1


@each_dtype
@each_case
def test_linear_reduce(case: Case, dtype: torch.dtype) -> None:
    oracle = Oracle(case)
    grad = randn(2, 3, case.rows, dtype=dtype, seed=1).requires_grad_()
    x = randn(2, 3, case.cols, dtype=dtype, seed=2).requires_grad_()
    total = torch.ops.roastify.linear_reduce(grad, x, *case.arguments, case.pool_shape)
    flat_grad, flat_x = grad.detach().double().view(6, -1), x.detach().double().view(6, -1)
    assert_near(total, oracle.to_pool(flat_grad.t() @ flat_x), dtype, "total")
    cotangent = randn(*case.pool_shape, dtype=dtype, seed=3)
    weight = oracle.weight(cotangent)
    grads = gradients(total, cotangent, grad=grad, x=x)
    assert_near(grads["grad"], (flat_x @ weight.t()).view(grad.shape), dtype, "grad")
    assert_near(grads["x"], (flat_grad @ weight).view(x.shape), dtype, "x")


def _indices(case: Case, dtype: torch.dtype) -> Tensor:
    """Return `[3, 7]` indices: repeated ones, the first row and the last."""
    generator = torch.Generator().manual_seed(case.rows)
    index = torch.randint(0, case.rows, (3, 7), generator=generator)
    index[0, :3], index[1, :2] = case.rows - 1, 0
    return index.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "index_dtype"),
    [*((dtype, torch.int64) for dtype in DTYPES), (torch.float32, torch.int32)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@each_case
def test_embedding(case: Case, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    oracle, pool, index = Oracle(case), make_pool(case, dtype), _indices(case, index_dtype)
    rows = ops.embedding(index, pool, *case.arguments)
    assert_near(rows, oracle.weight(pool)[index.long()], dtype, "rows")
    cotangent = randn(3, 7, case.cols, dtype=dtype, seed=1)
    grad_weight = torch.zeros(case.rows, case.cols, dtype=torch.float64)
    grad_weight.index_add_(0, index.long().flatten(), cotangent.double().view(21, -1))
    grads = gradients(rows, cotangent, pool=pool)
    assert_near(grads["pool"], oracle.to_pool(grad_weight), dtype, "pool")


@each_dtype
@each_case
def test_embedding_reduce(case: Case, dtype: torch.dtype) -> None:
    oracle, index = Oracle(case), _indices(case, torch.int64)
    grad = randn(3, 7, case.cols, dtype=dtype, seed=1).requires_grad_()
    total = torch.ops.roastify.embedding_reduce(grad, index, *case.arguments, case.pool_shape)
    grad_weight = torch.zeros(case.rows, case.cols, dtype=torch.float64)
    grad_weight.index_add_(0, index.flatten(), grad.detach().double().view(21, -1))
    assert_near(total, oracle.to_pool(grad_weight), dtype, "total")
    cotangent = randn(*case.pool_shape, dtype=dtype, seed=2)
    grads = gradients(total, cotangent, grad=grad)
    assert_near(grads["grad"], oracle.weight(cotangent)[index], dtype, "grad")


# Shapes and layouts of the arguments.

# The three algorithms of `linear`: panels, slot by slot, strips.
PANELS = Case("panels", (16, 16), 77, 123, 6, sign="element", scale=0.37)
BY_SLOT = Case("slots", (16, 16), 77, 123, 13, scale=0.7)
STRIPS = Case("strips", (16, 16), 77, 123, 13, base=301, strips=True, scale=0.7)
each_road = pytest.mark.parametrize("case", [PANELS, BY_SLOT, STRIPS], ids=lambda case: case.name)
each_direction = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "linear_t"])


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,), (2, 0), (2, 1, 40)], ids=str)
@each_direction
@each_road
def test_batch_shapes(case: Case, transposed: bool, batch: tuple[int, ...]) -> None:
    x = randn(*batch, case.rows if transposed else case.cols).requires_grad_()
    _check_linear(case, x, make_pool(case, torch.float32, unread=1.0), transposed)


def _spread(tensor: Tensor) -> Tensor:
    """Return the same values with gaps in memory, which hold NaN."""
    wide = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    where = (slice(None, None, 2),) * tensor.dim()
    wide[where] = tensor
    return wide[where]


def _turned(tensor: Tensor) -> Tensor:
    """Return the same values with the last two axes swapped in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("relay", [_spread, _turned])
@each_direction
@each_road
def test_strided_arguments_of_products(case: Case, transposed: bool, relay: Callable[[Tensor], Tensor]) -> None:
    x = relay(randn(3, 4, case.rows if transposed else case.cols)).requires_grad_()
    pool = relay(make_pool(case, torch.float32, unread=1.0).detach()).requires_grad_()
    assert not x.is_contiguous()
    assert not pool.is_contiguous()
    _check_linear(case, x, pool, transposed)


@pytest.mark.parametrize("relay", [_spread, _turned])
@each_road
def test_strided_arguments_of_the_other_operations(case: Case, relay: Callable[[Tensor], Tensor]) -> None:
    oracle, dtype = Oracle(case), torch.float32
    pool = relay(make_pool(case, dtype).detach())
    weight = oracle.weight(pool)
    assert_near(ops.gather(pool, *case.arguments), weight, dtype, "gather")
    grad_weight = relay(randn(case.rows, case.cols))
    assert_near(ops.reduce(grad_weight, *case.arguments, case.pool_shape), oracle.to_pool(grad_weight), dtype, "reduce")
    index = _indices(case, torch.int64).t()
    assert not index.is_contiguous()
    assert_near(ops.embedding(index, pool, *case.arguments), weight[index], dtype, "embedding")
    grad, x = relay(randn(2, 3, case.rows)), relay(randn(2, 3, case.cols))
    total = torch.ops.roastify.linear_reduce(grad, x, *case.arguments, case.pool_shape)
    dense = grad.double().reshape(6, -1).t() @ x.double().reshape(6, -1)
    assert_near(total, oracle.to_pool(dense), dtype, "linear_reduce")
    rows = relay(randn(7, 3, case.cols))
    total = torch.ops.roastify.embedding_reduce(rows, index, *case.arguments, case.pool_shape)
    dense = torch.zeros(case.rows, case.cols, dtype=torch.float64)
    dense.index_add_(0, index.flatten(), rows.double().reshape(21, -1))
    assert_near(total, oracle.to_pool(dense), dtype, "embedding_reduce")


@each_road
def test_expanded_cotangents(case: Case) -> None:
    """`sum().backward()` gives every backward a tensor whose elements share one address."""
    oracle, pool = Oracle(case), make_pool(case, torch.float32, unread=1.0)
    x = randn(4, case.cols).requires_grad_()
    bias = randn(case.rows).requires_grad_()
    ops.linear(x, pool, bias, *case.arguments).sum().backward()
    weight = oracle.weight(pool)
    assert_near(x.grad, weight.sum(0).expand(4, -1), torch.float32, "x")
    dense = x.detach().double().sum(0).expand(case.rows, -1)
    assert_near(pool.grad, oracle.to_pool(dense), torch.float32, "pool")
    assert_near(bias.grad, torch.full((case.rows,), 4.0, dtype=torch.float64), torch.float32, "bias")
    for operation in (
        lambda: ops.gather(pool, *case.arguments),
        lambda: ops.embedding(torch.arange(case.rows), pool, *case.arguments),
    ):
        (grad,) = torch.autograd.grad(operation().sum(), pool)
        assert_near(grad, oracle.to_pool(torch.ones(case.rows, case.cols)), torch.float32, "pool")


@each_road
def test_only_requested_gradients_are_computed(case: Case) -> None:
    x, pool, bias = randn(4, case.cols), make_pool(case, torch.float32, unread=1.0).detach(), randn(case.rows)
    for name in ("x", "pool", "bias"):
        inputs = {"x": x.clone(), "pool": pool.clone(), "bias": bias.clone()}
        inputs[name].requires_grad_()
        ops.linear(inputs["x"], inputs["pool"], inputs["bias"], *case.arguments).sum().backward()
        assert [other for other in inputs if inputs[other].grad is not None] == [name]


@each_road
def test_lookups_of_no_row_and_of_one_row(case: Case) -> None:
    oracle, pool = Oracle(case), make_pool(case, torch.float32)
    for shape in ((0,), (2, 0), (), (1,)):
        index = torch.full(shape, 2, dtype=torch.int64)
        rows = ops.embedding(index, pool, *case.arguments)
        assert_near(rows, oracle.weight(pool)[index], torch.float32, f"rows {shape}")
        (grad,) = torch.autograd.grad(rows.sum(), pool)
        dense = torch.zeros(case.rows, case.cols)
        dense[2] = index.numel()
        assert_near(grad, oracle.to_pool(dense), torch.float32, f"pool {shape}")


@pytest.mark.parametrize("sign", ["none", "row", "tile", "element"])
@pytest.mark.parametrize("bytes_in_panel", [1, 3 * 123 * 16 * 8])
def test_matrices_of_many_panels(monkeypatch: pytest.MonkeyPatch, sign: str, bytes_in_panel: int) -> None:
    """Panels of one tile row, and of several with fewer in the last. In the other tests a matrix fits in one panel."""
    monkeypatch.setattr(reference, "_PANEL_BYTES_FEW_ROWS", bytes_in_panel)
    monkeypatch.setattr(reference, "_PANEL_BYTES_MANY_ROWS", bytes_in_panel)
    case = Case("many", (16, 16), 77, 123, 15, sign=sign, base=256, scale=0.7)
    panels = list(reference._Panels(case.view, 8, bytes_in_panel, torch.device("cpu")))
    assert [stop for _, stop, _ in panels] == ([16, 32, 48, 64, 77] if bytes_in_panel == 1 else [32, 64, 77])
    for dtype in DTYPES:
        test_gather(case, dtype)
        test_reduce(case, dtype)
        test_linear_reduce(case, dtype)
        for num_rows in (20, 70):
            for transposed in (False, True):
                x = randn(num_rows, case.rows if transposed else case.cols, dtype=dtype).requires_grad_()
                _check_linear(case, x, make_pool(case, dtype), transposed)


def test_the_algorithms_of_linear_agree() -> None:
    """The number of rows chooses the algorithm; it must not change the result."""
    pool, x = make_pool(BY_SLOT, torch.float64, unread=1.0), randn(17, 123, dtype=torch.float64)
    together = ops.linear(x, pool, None, *BY_SLOT.arguments)
    apart = torch.cat(
        [ops.linear(x[:16], pool, None, *BY_SLOT.arguments), ops.linear(x[16], pool, None, *BY_SLOT.arguments)[None]]
    )
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-12 * float(together.detach().abs().max()))


# Derivatives, to second order.

SMALL = [
    Case("small", (2, 4), 5, 7, 3, scale=0.7),
    Case("small-element", (2, 4), 5, 7, 2, sign="element", base=8 * 2),
    Case("small-strips", (2, 4), 3, 5, 2, base=5, strips=True, scale=-1.3),
    Case("small-unaligned", (2, 4), 3, 5, 2, "roast", "element"),
]


def _differentiable(case: Case) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Return every differentiable operation as a function of the tensors it has gradients for."""
    pool, table, view, scale = randn(*case.pool_shape, dtype=torch.float64), *case.arguments
    operations = torch.ops.roastify
    grad, x = randn(2, case.rows, dtype=torch.float64), randn(2, case.cols, dtype=torch.float64)
    index = torch.tensor([2, 0, 2])
    rows = randn(3, case.cols, dtype=torch.float64)
    weight = randn(case.rows, case.cols, dtype=torch.float64)
    out_bias, in_bias = randn(case.rows, dtype=torch.float64), randn(case.cols, dtype=torch.float64)
    shape, group = case.pool_shape, group_of(case)
    flat = randn(group.offsets[-1], dtype=torch.float64)
    return {
        "gather_group": (lambda pool: operations.gather_group(pool, table, group.text), (pool,)),
        "reduce_group": (lambda flat: operations.reduce_group(flat, table, group.text, shape), (flat,)),
        "gather": (lambda pool: operations.gather(pool, table, view, scale), (pool,)),
        "reduce": (lambda weight: operations.reduce(weight, table, view, scale, shape), (weight,)),
        "linear": (lambda x, pool, bias: operations.linear(x, pool, bias, table, view, scale), (x, pool, out_bias)),
        "linear_t": (
            lambda x, pool, bias: operations.linear_t(x, pool, bias, table, view, scale),
            (grad, pool, in_bias),
        ),
        "linear_reduce": (lambda grad, x: operations.linear_reduce(grad, x, table, view, scale, shape), (grad, x)),
        "embedding": (lambda pool: operations.embedding(index, pool, table, view, scale), (pool,)),
        "embedding_reduce": (lambda rows: operations.embedding_reduce(rows, index, table, view, scale, shape), (rows,)),
        "combine": (lambda x, basis: operations.combine(x, basis, 1.0), (grad, weight)),
        "combine_reduce": (lambda x, grad: operations.combine_reduce(x, grad, 0.3), (grad, x)),
    }


OPERATIONS = (
    "gather", "reduce", "gather_group", "reduce_group", "linear", "linear_t", "linear_reduce", "embedding",
    "embedding_reduce", "combine", "combine_reduce",
)  # fmt: skip
each_operation = pytest.mark.parametrize("name", OPERATIONS)


@each_operation
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_numerical_derivatives(case: Case, name: str) -> None:
    operation, inputs = _differentiable(case)[name]
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    assert gradcheck(operation, inputs, fast_mode=False)
    assert gradgradcheck(operation, inputs, fast_mode=True)


def test_numerical_derivatives_by_slot() -> None:
    case = Case("small-by-slot", (16, 16), 20, 40, 2, base=256, scale=0.7)
    assert reference._worth_reading_by_slot(2, torch.float64, case.view)
    operation, inputs = _differentiable(case)["linear"]
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    assert gradcheck(operation, inputs, fast_mode=True)
    assert gradgradcheck(operation, inputs, fast_mode=True)


def test_the_factor_of_a_basis_gradient_scales_every_derivative_by_the_basis() -> None:
    """The derivatives are those of the basis `b.detach() + 0.3 · (b - b.detach())`."""
    coefficients = randn(20, 4, dtype=torch.float64).requires_grad_()
    basis = randn(4, 9, dtype=torch.float64, seed=1).requires_grad_()
    found = []
    for run in (
        lambda: ops.combine(coefficients, basis, 0.3),
        lambda: coefficients @ torch.lerp(basis.detach(), basis, 0.3),
    ):
        first = torch.autograd.grad(run().pow(3).sum(), [coefficients, basis], create_graph=True)
        second = [
            torch.autograd.grad(gradient.pow(2).sum(), [coefficients, basis], create_graph=True) for gradient in first
        ]
        third = torch.autograd.grad(sum(each.pow(2).sum() for pair in second for each in pair), [coefficients, basis])
        found.append([*first, *second[0], *second[1], *third])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * float(other.detach().abs().max()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_that_cannot_be_multiplied_are_refused(device: str) -> None:
    three, five = torch.zeros(10, 3, device=device), torch.zeros(5, 9, device=device)
    with pytest.raises(RuntimeError, match=r"product|cannot be multiplied"):
        ops.combine(three, five)
    with pytest.raises(RuntimeError, match=r"sum over|cannot be multiplied"):
        torch.ops.roastify.combine_reduce(three, five, 1.0)


# The operators as torch sees them.


def group_of(case: Case) -> GroupView:
    """Return a group of a case's tensor and another that has some of its rows and another λ."""
    return GroupView((case.view, case.view._replace(rows=(case.rows + 1) // 2)), (case.scale, 0.5 * case.scale))


def _operator_arguments(case: Case, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    table, view, scale = case.table, list(case.view), case.scale
    pool, shape = make_pool(case, dtype, unread=1.0), case.pool_shape
    grad = randn(2, 3, case.rows, dtype=dtype, seed=1).requires_grad_()
    x = randn(2, 3, case.cols, dtype=dtype, seed=2).requires_grad_()
    out_bias, in_bias = (randn(size, dtype=dtype).requires_grad_() for size in (case.rows, case.cols))
    index = torch.tensor([[2, 0, 2], [1, 4, 0]]) % case.rows
    group = group_of(case)
    return {
        "gather": (pool, table, view, scale),
        "reduce": (randn(case.rows, case.cols, dtype=dtype).requires_grad_(), table, view, scale, shape),
        "gather_group": (pool, table, group.text),
        "reduce_group": (randn(group.offsets[-1], dtype=dtype).requires_grad_(), table, group.text, shape),
        "linear": (x, pool, out_bias, table, view, scale),
        "linear_t": (grad, pool, in_bias, table, view, scale),
        "linear_reduce": (grad, x, table, view, scale, shape),
        "embedding": (index, pool, table, view, scale),
        "embedding_reduce": (x, index, table, view, scale, shape),
        "combine": (grad.detach().flatten(0, 1).requires_grad_(), randn(case.rows, 9).requires_grad_(), 0.3),
        "combine_reduce": (*(side.detach().flatten(0, 1).requires_grad_() for side in (grad, x)), 0.3),
    }


# Each of them adds the result of the operator whose name lacks the underscore.
ADDING = ("reduce_", "reduce_group_", "linear_reduce_", "embedding_reduce_")
each_adding = pytest.mark.parametrize("name", ADDING)


def _adding_arguments(case: Case, name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(
        value.detach() if isinstance(value, Tensor) else value
        for value in _operator_arguments(case, dtype)[name.removesuffix("_")][:-1]
    )


def test_every_operator_is_tested() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("roastify::")
    }
    # Compiled models read the pool through these; test_compile.py tests them, and test_fold.py the operators of folds.
    assert registered == {
        *OPERATIONS,
        *ADDING,
        "read",
        "gathered",
        "begin_whole",
        "fold",
        "folded_linear",
        "unfold",
        "fold_reduce",
        "fold_reduce_",
    }


@each_dtype
@each_adding
@each_case
def test_adding_to_a_sum(case: Case, name: str, dtype: torch.dtype) -> None:
    """Values are added in the sum's dtype, whatever the gradient's dtype, and only where the tensor reads."""
    arguments = _adding_arguments(case, name, dtype)
    wide = [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments]
    expected = getattr(torch.ops.roastify, name.removesuffix("_"))(*wide, case.pool_shape)
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    total = randn(*case.pool_shape, dtype=sum_dtype, seed=3)
    before = total.clone()
    assert getattr(torch.ops.roastify, name)(total, *arguments) is None
    # A product of narrow tensors is rounded to their dtype before it is summed.
    tolerance = dtype if name == "linear_reduce_" else sum_dtype
    assert_near((total.double() - before.double()).to(tolerance), expected, tolerance, name)
    assert expected.any() and torch.equal(total[~Oracle(case).read()], before[~Oracle(case).read()])


@each_adding
@each_road
def test_opcheck_of_adding(case: Case, name: str) -> None:
    operator = getattr(torch.ops.roastify, name).default
    total = randn(*case.pool_shape)
    torch.library.opcheck(operator, (total, *_adding_arguments(case, name, torch.float32)))


@each_operation
@each_road
def test_opcheck(case: Case, name: str) -> None:
    operator = getattr(torch.ops.roastify, name).default
    torch.library.opcheck(operator, _operator_arguments(case, torch.float32)[name])


@pytest.mark.parametrize("name", ["linear", "linear_t"])
def test_opcheck_without_bias_or_batch(name: str) -> None:
    x, pool, _, *rest = _operator_arguments(PANELS, torch.float32)[name]
    operator = getattr(torch.ops.roastify, name).default
    torch.library.opcheck(operator, (x.detach()[0, 0].requires_grad_(), pool, None, *rest))


@each_operation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_fakes_have_the_real_outputs(name: str, dtype: torch.dtype) -> None:
    operator = getattr(torch.ops.roastify, name).default
    for case in (PANELS, BY_SLOT, STRIPS):
        torch.library.opcheck(operator, _operator_arguments(case, dtype)[name], test_utils="test_faketensor")


# Repeatability.

# Large enough for torch to split each sum's work between two threads, with many readers of each element.
CROWDED = [
    Case("crowded", (16, 16), 300, 517, 5, scale=0.7),
    Case("crowded-element", (16, 16), 300, 517, 5, sign="element"),
    Case("crowded-unaligned", (16, 16), 300, 517, 5, "roast"),
    Case("crowded-hashed", (1, 1), 300, 517, 97, "hashednet"),
    Case("crowded-strips", (16, 16), 300, 517, 5, base=77, strips=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CROWDED, ids=lambda case: case.name)
@pytest.mark.usefixtures("shipped_algorithms")
def test_sums_are_the_same_bits_every_time(case: Case, dtype: torch.dtype) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    operations = torch.ops.roastify
    grad_weight = randn(case.rows, case.cols, dtype=dtype)
    grad, x = randn(64, case.rows, dtype=dtype), randn(64, case.cols, dtype=dtype)
    index = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    rows = randn(500, case.cols, dtype=dtype)
    sums: dict[str, Callable[[], Tensor]] = {
        "reduce": lambda: operations.reduce(grad_weight, *case.arguments, case.pool_shape),
        "linear_reduce": lambda: operations.linear_reduce(grad, x, *case.arguments, case.pool_shape),
        "embedding_reduce": lambda: operations.embedding_reduce(rows, index, *case.arguments, case.pool_shape),
        "reduce_": lambda: added(operations.reduce_, grad_weight),
        "linear_reduce_": lambda: added(operations.linear_reduce_, grad, x),
        "embedding_reduce_": lambda: added(operations.embedding_reduce_, rows, index),
    }

    def added(operation: Callable[..., None], *tensors: Tensor) -> Tensor:
        total = randn(*case.pool_shape)
        operation(total, *tensors, *case.arguments)
        return total

    for name, operation in sums.items():
        results = []
        for threads in (2, 1, 2, 2):
            torch.set_num_threads(threads)
            results.append(operation())
        assert all(torch.equal(result, results[0]) for result in results), name


# Dtypes, devices' conventions and errors.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("strips", [False, True])
def test_narrow_gradients_are_summed_in_float32(strips: bool, dtype: torch.dtype) -> None:
    """All tiles share one slot: 4096 in the first and 1 in 64 others; in a narrow dtype each 1 would vanish."""
    case = Case("narrow", (8, 8), 8, 8 * 65, 1, sign="none", strips=strips)
    grad_weight = torch.ones(case.rows, case.cols, dtype=dtype)
    if strips:
        grad_weight.view(-1)[:64] = 4096
    else:
        grad_weight[:, :8] = 4096
    operations, shape = torch.ops.roastify, case.pool_shape
    totals = {
        "reduce": operations.reduce(grad_weight, *case.arguments, shape),
        "linear_reduce": operations.linear_reduce(torch.eye(8, dtype=dtype), grad_weight, *case.arguments, shape),
        "embedding_reduce": operations.embedding_reduce(grad_weight, torch.arange(8), *case.arguments, shape),
    }
    for name, total in totals.items():
        assert total.dtype == dtype and (total[:8] == 4160).all(), name


def test_autocast_of_linear() -> None:
    for case in (PANELS, BY_SLOT, STRIPS):
        oracle, pool = Oracle(case), make_pool(case, torch.float32, unread=1.0)
        x, bias = randn(5, case.cols).requires_grad_(), randn(case.rows).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ops.linear(x, pool, bias, *case.arguments)
            back = ops.linear_t(out, pool, None, *case.arguments)
        assert back.dtype == torch.bfloat16
        weight = oracle.weight(pool)
        expected = x.detach().double() @ weight.t() + bias.detach().double()
        assert_near(out, expected, torch.bfloat16, "output")
        cotangent = randn(5, case.rows, dtype=torch.bfloat16)
        grads = gradients(out, cotangent, x=x, pool=pool, bias=bias)
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        expected_grads = {
            "x": cotangent.double() @ weight,
            "pool": oracle.to_pool(cotangent.double().t() @ x.detach().double()),
            "bias": cotangent.double().sum(0),
        }
        for name, grad in grads.items():
            assert_near(grad.bfloat16(), expected_grads[name], torch.bfloat16, name)


def test_autocast_leaves_float64_alone() -> None:
    """Torch does the same for the dense product."""
    pool = make_pool(PANELS, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.linear(randn(2, 123, dtype=torch.float64), pool, None, *PANELS.arguments)
        assert (
            torch.nn.functional.linear(randn(2, 3, dtype=torch.float64), randn(4, 3, dtype=torch.float64)).dtype
            == out.dtype
        )
    assert out.dtype == torch.float64


@each_road
@pytest.mark.parametrize("index", [77, -1, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_an_index_outside_the_table(case: Case, index: int, dtype: torch.dtype) -> None:
    pool = make_pool(case, torch.float32)
    ops.embedding(torch.tensor([0, 76], dtype=dtype), pool, *case.arguments)
    with pytest.raises(IndexError, match=rf"out of range: found .*{index}.*rows 0 to 76"):
        ops.embedding(torch.tensor([3, index], dtype=dtype), pool, *case.arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16], ids=str)
def test_indices_of_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"indices must be int64 or int32; found {dtype}"):
        ops.embedding(torch.ones(3).to(dtype), make_pool(PANELS, torch.float32), *PANELS.arguments)


@each_direction
@pytest.mark.parametrize("shape", [(4, 122), (123, 1), (1,), (), (4, 0)], ids=str)
def test_products_of_another_size(transposed: bool, shape: tuple[int, ...]) -> None:
    operation, size = (ops.linear_t, 77) if transposed else (ops.linear, 123)
    message = rf"{operation.__name__}: the input's last size must be {size}; found the shape {shape}"
    with pytest.raises(RuntimeError, match=message.replace("(", r"\(").replace(")", r"\)")):
        operation(torch.ones(shape), make_pool(PANELS, torch.float32), None, *PANELS.arguments)


@each_direction
def test_products_of_mixed_dtypes(transposed: bool) -> None:
    operation, size = (ops.linear_t, 77) if transposed else (ops.linear, 123)
    with pytest.raises(RuntimeError, match=r"the input is torch.bfloat16 and the weights are torch.float32; expected"):
        operation(torch.ones(2, size).bfloat16(), make_pool(PANELS, torch.float32), None, *PANELS.arguments)
    bias = torch.ones(123 if transposed else 77, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"the input is torch.float32 and the bias is torch.float64; expected one"):
        operation(torch.ones(2, size), make_pool(PANELS, torch.float32), bias, *PANELS.arguments)


# Imports and memory.


def _modules_after(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_does_not_import_triton() -> None:
    added = _modules_after("import roastify, roastify.kernels.ops") - _modules_after("import torch")
    assert "roastify.kernels.ops" in added
    assert not [name for name in added if name.partition(".")[0] == "triton"]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _LargestStorage(TorchDispatchMode):
    """Records the elements of the largest allocation of any torch operation, inside roastify's operators as well."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "roastify":
            # A mode is off while an operator runs, so its implementation is called here, with the mode on again.
            name = func.overloadpacket.__name__
            self.operators.append(name)
            place = [argument.name for argument in func._schema.arguments].index("view")
            with self:
                return getattr(reference, name)(*args[:place], TileView(*args[place]), *args[place + 1 :])
        out = func(*args, **(kwargs or {}))
        # Views, and results written into existing memory, allocate nothing.
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


LARGE = {
    "element": Case("element", (64, 64), 4096, 1024, 102, sign="element", scale=0.7),
    "low-ratio": Case("low-ratio", (64, 64), 4096, 1024, 700),
    "by-slot": Case("by-slot", (64, 64), 4096, 1024, 102, scale=0.7),
}


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_a_product_with_one_row_allocates_no_whole_weight(case: Case) -> None:
    """Its gradient does not either; the weight has twice the elements of the largest panel."""
    assert reference._worth_reading_by_slot(1, torch.float32, case.view) is (case.name == "by-slot")
    pool = torch.ones(case.pool_shape).requires_grad_()
    limit = max(case.rows * case.cols // 8, pool.numel())
    for operation, size in ((ops.linear, case.cols), (ops.linear_t, case.rows)):
        x = torch.ones(1, size, requires_grad=True)
        with _LargestStorage() as forward:
            out = operation(x, pool, None, *case.arguments)
        assert forward.operators == [operation.__name__]
        # The largest allocation exceeds the output, so the mode did see inside the operator.
        assert out.numel() < forward.numel <= limit, operation.__name__
        with _LargestStorage() as backward:
            torch.autograd.grad(out.sum(), (x, pool))
        assert "linear_reduce" in backward.operators
        assert backward.numel <= max(case.rows * case.cols // 2, pool.numel()), operation.__name__


def test_a_lookup_reads_only_its_rows() -> None:
    case = LARGE["element"]
    pool = torch.ones(case.pool_shape).requires_grad_()
    with _LargestStorage() as forward:
        rows = ops.embedding(torch.tensor([3, 4000, 3]), pool, *case.arguments)
    assert forward.numel == 3 * case.cols
    with _LargestStorage() as backward:
        torch.autograd.grad(rows.sum(), pool)
    assert backward.numel == pool.numel()


# The pool.

# Tensors that share one map, in order of address: padded tiles, strips that end and begin inside one tile, and tiles
# again; more tiles than slots; a different λ each.
SHARED = (
    Case("tiles", (8, 8), 21, 13, 7, scale=0.5),
    Case("strips", (8, 8), 5, 31, 7, scale=2.0, base=6 * 64, strips=True),
    Case("more-strips", (8, 8), 3, 50, 7, scale=1.25, base=6 * 64 + 155, strips=True),
    Case("more-tiles", (8, 8), 8, 20, 7, scale=0.8, base=12 * 64),
)


def _with(cases: Sequence[Case], **changes: Any) -> tuple[Case, ...]:
    return tuple(replace(case, **changes) for case in cases)


# Two regions, of three slots and of five.
REGIONS = (
    Case("first", (8, 8), 21, 13, 3, scale=0.5),
    Case("second", (8, 8), 30, 31, 5, scale=1.5, first_slot=3, first_chunk=2),
)
# Ratio 1: nothing is shared, though rows and columns are padded.
ALONE = (
    Case("alone", (8, 8), 21, 13, 15, scale=0.5),
    Case("alone-strips", (8, 8), 9, 61, 15, scale=2.0, base=6 * 64, strips=True),
)
ALONE_REGIONS = (
    Case("first", (8, 8), 21, 13, 6, scale=0.5),
    Case("second", (8, 8), 30, 31, 16, scale=2.0, first_slot=6, first_chunk=1),
)
GROUPS = {
    "tile": SHARED,
    "element": _with(SHARED, sign="element"),
    "cyclic": _with(SHARED, kind="cyclic"),
    "unaligned": _with(SHARED, kind="roast", sign="element"),
    "hashed": _with(SHARED, kind="hashednet"),
    "one-slot": _with(SHARED, num_slots=1, sign="element"),
    # There are more slots than tiles, but two strips lie in one tile.
    "touching": _with(SHARED, num_slots=40),
    "regions": REGIONS,
    # No other tensor overlaps this one, but it shares slots with itself.
    "one-tensor": (Case("one-tensor", (8, 8), 21, 13, 4, sign="element", scale=0.5),),
    "alone": ALONE,
    "alone-regions": ALONE_REGIONS,
}
each_group = pytest.mark.parametrize("cases", GROUPS.values(), ids=GROUPS.keys())


def _maps(cases: Sequence[Case]) -> list[TileMap]:
    """Return one mapping for each region of the pool, of exactly as many tiles as the tensors of that region touch."""
    maps: dict[tuple[int, int], TileMap] = {}
    for case in cases:
        num_tiles = case.view.first_tile + case.view.num_tiles
        maps[case.first_slot, case.first_chunk] = replace(case.tile_map, num_tiles=num_tiles)
    return list(maps.values())


def _build(cases: Sequence[Case], **options: Any) -> RoastPool:
    num_slots = max(case.first_slot + case.num_slots for case in cases)
    return RoastPool(num_slots, (8, 8), _maps(cases), [(case.view, case.scale) for case in cases], **options)


def _layouts(cases: Sequence[Case]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [dense_layout(case.tile_map, case.rows, case.cols, case.base, case.strips) for case in cases]


def _gamma(pool: RoastPool, cases: Sequence[Case]) -> np.ndarray:
    """Return Σ λ² over the weights that read each pool element, counted one weight at a time."""
    gamma = np.zeros(pool.weight.numel())
    for case, (elements, _) in zip(cases, _layouts(cases), strict=True):
        for element in elements.ravel():
            gamma[element] += case.scale**2
    return gamma


def _plain_gradient(pool: RoastPool, cases: Sequence[Case], cotangents: Sequence[Tensor]) -> np.ndarray:
    total = np.zeros(pool.weight.numel())
    for case, (elements, signs), cotangent in zip(cases, _layouts(cases), cotangents, strict=True):
        np.add.at(total, elements.ravel(), case.scale * (signs * cotangent.double().numpy()).ravel())
    return total


def _backward(pool: RoastPool, cases: Sequence[Case], cotangents: Sequence[Tensor]) -> Tensor:
    """Return the gradient that reaches the Parameter when each tensor is read through `read`."""
    pool.zero_grad()
    weight = pool.read()
    for case, cotangent in zip(cases, cotangents, strict=True):
        dense = ops.gather(weight, pool.table, case.view, case.scale)
        dense.backward(cotangent.to(dense.dtype), retain_graph=True)
    return pool.weight.grad


def _cotangents(cases: Sequence[Case]) -> list[Tensor]:
    return [randn(case.rows, case.cols, seed=place) for place, case in enumerate(cases)]


def _assert_preconditioned(pool: RoastPool, cases: Sequence[Case], rtol: float = 1e-5) -> None:
    cotangents = _cotangents(cases)
    gamma = _gamma(pool, cases)
    plain = _plain_gradient(pool, cases, cotangents)
    expected = np.divide(plain, gamma, out=np.zeros_like(plain), where=gamma > 0)
    actual = _backward(pool, cases, cotangents).double().numpy().ravel()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_every_group_has_the_property_that_it_is_for() -> None:
    for name, cases in GROUPS.items():
        pool = _build(cases)
        gamma = _gamma(pool, cases).reshape(pool.num_slots, -1)
        uneven = (np.where(gamma == 0, gamma.max(1, keepdims=True), gamma) != gamma.max(1, keepdims=True)).any()
        assert uneven != name.startswith("alone"), name
    first, second = SHARED[1].view, SHARED[2].view
    assert first.first_tile + first.num_tiles - 1 == second.first_tile


@each_group
def test_the_gradient_is_divided_by_gamma(cases: Sequence[Case]) -> None:
    pool = _build(cases)
    pool.initialise_random(1.0, 0)
    _assert_preconditioned(pool, cases)


@each_group
def test_the_gradient_without_preconditioner(cases: Sequence[Case]) -> None:
    pool = _build(cases, precondition=False)
    pool.initialise_random(1.0, 0)
    cotangents = _cotangents(cases)
    expected = torch.from_numpy(_plain_gradient(pool, cases, cotangents)).view_as(pool.weight)
    assert_near(_backward(pool, cases, cotangents), expected, torch.float32, "pool")


@each_group
def test_an_sgd_step_is_the_dense_step_projected(cases: Sequence[Case]) -> None:
    """The reason for Γ: the pool after a step is the least-squares fit of the dense weights after their step."""
    stepped, fitted = _build(cases, dtype=torch.float64), _build(cases, dtype=torch.float64)
    read = np.flatnonzero(_gamma(stepped, cases))
    stepped.initialise_random(1.0, 3)
    cotangents = _cotangents(cases)
    dense = [Oracle(case).weight(stepped.weight) for case in cases]
    _backward(stepped, cases, cotangents)
    with torch.no_grad():
        stepped.weight -= 0.1 * stepped.weight.grad
    targets = [weight - 0.1 * cotangent.double() for weight, cotangent in zip(dense, cotangents, strict=True)]
    fitted.initialise_projection([(case.view, case.scale, target)] for case, target in zip(cases, targets, strict=True))
    actual, expected = (pool.weight.detach().flatten()[read] for pool in (stepped, fitted))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@each_group
def test_a_zero_row_is_not_counted_by_gamma(cases: Sequence[Case]) -> None:
    """An embedding's padding row reads nothing, so Γ must not count it. Here it is the last row of every tensor."""
    pool = _build(cases, unread_rows=[(case.view, case.scale, case.rows - 1) for case in cases])
    pool.initialise_random(1.0, 0)
    gamma = np.zeros(pool.weight.numel())
    for case, (elements, _) in zip(cases, _layouts(cases), strict=True):
        for element in elements[:-1].ravel():
            gamma[element] += case.scale**2
    assert (gamma < _gamma(pool, cases)).any()
    cotangents = _cotangents(cases)
    for cotangent in cotangents:
        cotangent[-1] = 0.0
    plain = _plain_gradient(pool, cases, cotangents)
    expected = np.divide(plain, gamma, out=np.zeros_like(plain), where=gamma > 0)
    actual = _backward(pool, cases, cotangents).numpy().ravel()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_reading_the_pool() -> None:
    pool = _build(SHARED)
    pool.initialise_random(1.0, 0)
    assert torch.equal(pool.read(), pool.weight)
    with torch.no_grad():
        assert pool.read() is pool.weight
    assert _build(SHARED, trainable=False).read().requires_grad is False


@functools.cache
def _least_squares(cases: tuple[Case, ...], pool_numel: int) -> np.ndarray:
    """Return the pool that fits `_cotangents` best, 0 where nothing reads it."""
    places = np.concatenate([elements.ravel() for elements, _ in _layouts(cases)])
    factors = np.concatenate(
        [case.scale * signs.ravel() for case, (_, signs) in zip(cases, _layouts(cases), strict=True)]
    )
    read, columns = np.unique(places, return_inverse=True)
    # One row for each weight: λ·sign where it reads the pool.
    design = np.zeros((len(places), len(read)))
    design[np.arange(len(places)), columns] = factors
    values = torch.cat([target.flatten() for target in _cotangents(cases)]).double().numpy()
    fit = np.zeros(pool_numel)
    # Every element that is read is determined, so the normal equations have one solution.
    fit[read] = np.linalg.solve(design.T @ design, design.T @ values)
    return fit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_group
def test_projection_is_the_least_squares_fit(cases: Sequence[Case], dtype: torch.dtype) -> None:
    pool = _build(cases, dtype=dtype)
    fit = _least_squares(cases, pool.weight.numel())
    targets = _cotangents(cases)
    pool.initialise_projection([(case.view, case.scale, target)] for case, target in zip(cases, targets, strict=True))
    # Γ is held in float32 whatever the pool's dtype is.
    limit = {torch.float32: 5e-6, torch.float64: 2e-6, torch.bfloat16: 5e-3}[dtype] * np.abs(fit).max()
    assert pool.weight.dtype == dtype
    np.testing.assert_allclose(pool.weight.detach().double().numpy().ravel(), fit, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_without_sharing_gives_the_weights_back(dtype: torch.dtype) -> None:
    """Bit for bit, at λ = 1."""
    cases = _with(ALONE, scale=1.0)
    pool = _build(cases, dtype=dtype)
    targets = [target.to(dtype) for target in _cotangents(cases)]
    pool.initialise_projection([(case.view, 1.0, target)] for case, target in zip(cases, targets, strict=True))
    for case, target in zip(cases, targets, strict=True):
        assert torch.equal(ops.gather(pool.weight, pool.table, case.view, 1.0), target)


def test_random_values() -> None:
    pool = RoastPool(200, (8, 8), [TileMap(400, 200, (8, 8))], [])
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    pool.initialise_random(0.25, 7)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    first = pool.weight.detach().clone()
    # Numbers drawn elsewhere in between change nothing.
    torch.rand(3)
    pool.initialise_random(0.25, 7)
    assert torch.equal(pool.weight, first)
    pool.initialise_random(0.25, 8)
    assert not torch.equal(pool.weight, first)
    assert abs(float(first.mean())) < 4 * 0.25 / len(first.flatten()) ** 0.5
    assert abs(float(first.std()) - 0.25) < 0.01


@pytest.mark.parametrize("seed", [-1, -(2**70), 2**64, 10**40])
def test_random_values_of_any_seed(seed: int) -> None:
    pool = _build(SHARED)
    pool.initialise_random(1.0, seed)
    assert pool.weight.isfinite().all()


def test_random_values_are_the_same_in_every_dtype() -> None:
    wide, narrow = _build(SHARED), _build(SHARED, dtype=torch.bfloat16)
    wide.initialise_random(1.0, 3)
    narrow.initialise_random(1.0, 3)
    assert torch.equal(wide.weight.bfloat16(), narrow.weight)


MOVES: dict[str, Callable[[RoastPool], RoastPool]] = {
    "half-float": lambda pool: pool.half().float(),
    "bfloat16-float": lambda pool: pool.bfloat16().float(),
    "double": lambda pool: pool.double(),
    "to_empty": lambda pool: pool.to_empty(device="cpu"),
    "meta": lambda pool: pool.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "deepcopy-to_empty": lambda pool: copy.deepcopy(pool).to_empty(device="cpu"),
    "in-a-model": lambda pool: torch.nn.Sequential(pool).half().to("meta").to_empty(device="cpu").float()[0],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
@pytest.mark.parametrize("group", ["tile", "regions", "alone"])
def test_moves_and_casts_keep_the_table_and_gamma_right(group: str, move: Callable[[RoastPool], RoastPool]) -> None:
    """Γ exceeds float16's range and precision, so it must not be cast by `half`."""
    cases = GROUPS[group][:1] + _with(GROUPS[group][1:], scale=300.1)
    before = _build(cases)
    pool = move(_build(cases))
    for name in ("table", "per_slot", "uneven_slots", "uneven"):
        constant, moved = getattr(before, name), getattr(pool, name)
        widened = constant.is_floating_point() and pool.weight.dtype == torch.float64
        assert moved.dtype == (torch.float64 if widened else constant.dtype)
        assert torch.equal(moved.to(constant.dtype), constant), name
    assert list(pool.state_dict()) == ["weight", "_extra_state"] and not list(pool.buffers())
    pool.initialise_random(1.0, 0)
    _assert_preconditioned(pool, cases)


def test_the_gradient_of_a_float16_pool_is_divided_too() -> None:
    pool = _build(SHARED).half()
    pool.initialise_random(1.0, 0)
    assert _backward(pool, SHARED, _cotangents(SHARED)).dtype == torch.float16
    _assert_preconditioned(pool, SHARED, rtol=5e-3)


# A hint of torch 2.11, for runs of several cycles.
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
def test_dispatch_modes_profilers_and_tracers_see_the_operators() -> None:
    """A call skips the dispatcher only if nothing observes the operator."""
    case = CASES[0]
    pool, table = torch.randn(case.pool_shape, requires_grad=True), case.table
    view, x = case.view, torch.randn(3, case.view.cols)

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def step() -> Tensor:
        pool.grad = None
        ops.linear(x, pool, None, table, view, 0.5).square().sum().backward()
        return pool.grad.clone()

    alone = step()
    with Seen() as seen:
        watched = step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        measured = step()
    assert torch.equal(alone, watched) and torch.equal(alone, measured)
    wanted = {"roastify.linear.default", "roastify.linear_reduce.default"}
    assert wanted <= set(seen.names)
    assert {"roastify::linear", "roastify::linear_reduce"} <= {event.key for event in profiled.key_averages()}
    graph = make_fx(lambda x: ops.linear(x, pool.detach(), None, table, view, 0.5))(x)
    assert any(node.target is torch.ops.roastify.linear.default for node in graph.graph.nodes)

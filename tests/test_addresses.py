"""Addresses beyond 2³¹: tile numbers, elements of a tensor, elements of the pool, tokens times columns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from roastify.kernels import ops, reference
from roastify.kernels.view import TileView
from roastify.pool.mapping import TileMap, chunk_coefficients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from roastify.kernels.gpu import embedding, gather, reduce, tuning  # noqa: E402
from roastify.kernels.gpu.mapping import tile_start  # noqa: E402

# The interpreter computes with NumPy, whose integers warn where a hash wraps on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

SCALE = 0.7
FAR = (2**31 - 3, 2**31 + 5, 2**32 - 1, 2**40 + 7)


@dataclass(frozen=True)
class Far:
    """A small tensor whose tiles have large numbers, and a chunk table of only the chunks that it needs."""

    rows: int
    cols: int
    tile: tuple[int, int]
    num_slots: int
    mapping: str = "permutation"
    sign: str = "tile"
    offset: int = 0
    strips: bool = False

    def build(self, first_tile: int) -> tuple[TileMap, TileView, Tensor, list[int]]:
        size = self.tile[0] * self.tile[1]
        num_tiles = first_tile + (self.rows + self.tile[0]) * (self.cols + self.tile[1]) // size + 2
        tile_map = TileMap(num_tiles, self.num_slots, self.tile, 11, self.mapping, self.sign)
        view = tile_map.view(self.rows, self.cols, first_tile * size + self.offset, self.strips)
        return tile_map, *with_short_table(view, tile_map), [self.num_slots * self.tile[0], self.tile[1]]


def with_short_table(view: TileView, tile_map: TileMap) -> tuple[TileView, Tensor]:
    """Return a view whose first chunk in the table is the first that it reads: a whole table would take gigabytes."""
    if tile_map.kind not in ("permutation", "cyclic"):
        return view, torch.empty(0, 3, dtype=torch.int64, device=DEVICE)
    first = view.first_tile // view.num_slots
    last = (view.first_tile + view.num_tiles - 1) // view.num_slots
    rows = [chunk_coefficients(tile_map.seed, view.num_slots, chunk, tile_map.kind) for chunk in range(first, last + 1)]
    return view._replace(first_chunk=-first), torch.tensor(rows, dtype=torch.int64, device=DEVICE).view(-1, 3)


CASES = {
    "tiles": Far(37, 29, (8, 8), 7),
    "sign per element": Far(37, 29, (8, 16), 5, sign="element"),
    "rotation": Far(37, 29, (8, 8), 6, "cyclic"),
    "one slot": Far(20, 20, (16, 16), 1),
    "hashed": Far(21, 12, (1, 1), 97, "hashednet"),
    "unaligned": Far(21, 30, (8, 8), 11, "roast", "element"),
    "strips": Far(9, 77, (8, 8), 5, offset=13, strips=True),
}
KERNELS = {
    "triton": (gather.gather, reduce.reduce, embedding),
    "reference": (reference.gather, reference.reduce, reference),
}


def layout(tile_map: TileMap, view: TileView) -> tuple[np.ndarray, np.ndarray]:
    """Return the pool element and the sign of each weight, one weight at a time, on Python integers."""
    elements, signs = (np.empty((view.rows, view.cols), dtype=np.int64) for _ in range(2))
    for row in range(view.rows):
        for col in range(view.cols):
            if view.strips:
                tile, element = divmod(view.base + row * view.cols + col, view.slot_size)
            else:
                tile = view.first_tile + row // view.tile_rows * view.grid_cols + col // view.tile_cols
                element = row % view.tile_rows * view.tile_cols + col % view.tile_cols
            elements[row, col] = tile_map.offset(tile) + element
            signs[row, col] = tile_map.sign_of(tile, element)
    return elements, signs


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("first_tile", FAR)
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("name", CASES)
def test_tiles_of_large_numbers(name: str, kernels: Any, first_tile: int) -> None:
    """Tile numbers cross 2³¹ and 2³², and go far beyond."""
    tile_map, view, table, shape = CASES[name].build(first_tile)
    elements, signs = layout(tile_map, view)
    factors = torch.from_numpy(signs).to(DEVICE) * SCALE
    pool, grad = randn(*shape), randn(view.rows, view.cols, seed=1)
    weight = factors * pool.flatten()[torch.from_numpy(elements).to(DEVICE)]
    make, add, lookups = kernels
    torch.testing.assert_close(make(pool, table, view, SCALE), weight.float(), rtol=1e-5, atol=1e-6)

    def to_pool(gradient: Tensor) -> Tensor:
        total = np.zeros(shape[0] * shape[1])
        np.add.at(total, elements.ravel(), (gradient * factors).double().cpu().numpy().ravel())
        return torch.from_numpy(total).float().view(shape).to(DEVICE)

    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(add(grad, table, view, SCALE, shape), to_pool(grad), **close)
    index = torch.tensor([0, view.rows - 1, 3, 3], device=DEVICE)
    torch.testing.assert_close(
        lookups.embedding(index, pool, table, view, SCALE), weight[index].float(), rtol=1e-5, atol=1e-6
    )
    looked_up = torch.zeros_like(grad).index_add_(0, index, grad[:4])
    found = lookups.embedding_reduce(grad[:4], index, table, view, SCALE, shape)
    torch.testing.assert_close(found, to_pool(looked_up), **close)


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("mapping", ["permutation", "hashednet"])
def test_rows_of_large_numbers(mapping: str, kernels: Any) -> None:
    """A table of 2³³ rows, looked up near its end."""
    rows, cols, num_slots = 2**33, 3, 2**20 + 7
    tile_map = TileMap(rows * cols, num_slots, (1, 1), 3, mapping, "element")
    view = tile_map.view(rows, cols, 0, False)
    near = rows - 60
    table = torch.tensor(tile_map.chunk_table(), dtype=torch.int64, device=DEVICE).view(-1, 3)
    pool, shape = randn(num_slots, 1), [num_slots, 1]
    index = torch.tensor([near, rows - 1, near + 7, near, rows - 9], device=DEVICE)
    # The same rows, as a small tensor that begins in the middle of the large one.
    small = view._replace(rows=60, base=near * cols)
    elements, signs = layout(tile_map, small)
    weight = torch.from_numpy(signs).to(DEVICE) * SCALE * pool.flatten()[torch.from_numpy(elements).to(DEVICE)]
    lookups = kernels[2]
    found = lookups.embedding(index, pool, table, view, SCALE)
    torch.testing.assert_close(found, weight[index - near].float(), rtol=1e-5, atol=1e-6)
    grad = randn(5, cols, seed=1)
    expected = lookups.embedding_reduce(grad, index - near, table, small, SCALE, shape)
    assert expected.any()
    assert torch.equal(lookups.embedding_reduce(grad, index, table, view, SCALE, shape), expected)


@triton.jit
def _start_kernel(p_table, p_tile, p_out, key, num_slots, first_slot, first_chunk, SIZE: tl.constexpr,
                  MAPPING: tl.constexpr, B: tl.constexpr):  # fmt: skip
    tile = tl.load(p_tile + tl.arange(0, B))
    tl.store(p_out + tl.arange(0, B), tile_start(p_table, tile, key, num_slots, first_slot, first_chunk, SIZE, MAPPING))


@pytest.mark.parametrize(("num_slots", "first_slot"), [(2**31 - 1, 0), (7, 2**31 - 8), (2**20 + 7, 2**20), (1, 2**30)])
@pytest.mark.parametrize("mapping", ["permutation", "cyclic", "hashednet", "roast"])
def test_places_in_a_large_pool(mapping: str, num_slots: int, first_slot: int) -> None:
    """The kernel computes where tiles begin in a pool of 2⁴⁴ elements; the test needs no such pool."""
    tile_map = TileMap(2 * num_slots, num_slots, (128, 64), 5, mapping, "none", first_slot=first_slot)
    view = tile_map.view(128, 64, 0, False)
    tiles = [0, 1, num_slots - 1, num_slots, 2 * num_slots - 1, num_slots // 2, num_slots // 3, num_slots + 1]
    tiles = [min(tile, 2 * num_slots - 1) for tile in tiles]
    table = torch.tensor(tile_map.chunk_table() or [(0, 0, 0)], device=DEVICE)
    tile = torch.tensor(tiles, device=DEVICE)
    out = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    _start_kernel[(1,)](table, tile, out, view.key, num_slots, first_slot, 0, 8192, view.mapping, 8)
    expected = [tile_map.offset(number) for number in tiles]
    assert out.tolist() == expected and max(expected) > 2**31
    assert reference.tile_offsets(table, view, tile).tolist() == expected


@triton.jit
def _place_kernel(p_tile, p_place, p_inside, base, rows, cols, first_tile, grid_cols, TILE_ROWS: tl.constexpr,
                  TILE_COLS: tl.constexpr, STRIPS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    tile = tl.load(p_tile + tl.arange(0, B))
    element = tl.arange(0, TILE_ROWS * TILE_COLS)
    place, inside = gather.place_of(
        tile, element, base, rows, cols, first_tile, grid_cols, TILE_ROWS, TILE_COLS, STRIPS
    )
    where = tl.arange(0, B)[:, None] * (TILE_ROWS * TILE_COLS) + element[None, :]
    tl.store(p_place + where, place)
    tl.store(p_inside + where, inside.to(tl.int64))


@pytest.mark.parametrize("first_tile", [0, 2**31 + 9])
@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(70001, 60001), (2**31 + 5, 3), (5, 2**31 + 1)])
def test_places_in_a_large_tensor(rows: int, cols: int, strips: bool, first_tile: int) -> None:
    """The kernel computes where a tile's elements are in a large tensor; the test needs no such tensor."""
    tile_map = TileMap(2**62, 7, (4, 4), 5)
    view = tile_map.view(rows, cols, first_tile * 16 + (3 if strips else 0), strips)
    last = view.first_tile + view.num_tiles - 1
    tiles = [view.first_tile, last, last - 1, view.first_tile + view.num_tiles // 2]
    tile = torch.tensor(tiles, device=DEVICE)
    place, inside = (torch.zeros(4, 16, dtype=torch.int64, device=DEVICE) for _ in range(2))
    _place_kernel[(1,)](
        tile, place, inside, view.base, rows, cols, view.first_tile, view.grid_cols, 4, 4, view.strips, 4
    )
    for i, number in enumerate(tiles):
        for element in range(16):
            if strips:
                expected = number * 16 + element - view.base
                exists = 0 <= expected < rows * cols
            else:
                grid_row, grid_col = divmod(number - view.first_tile, view.grid_cols)
                row, col = grid_row * 4 + element // 4, grid_col * 4 + element % 4
                expected, exists = row * cols + col, row < rows and col < cols
            assert bool(inside[i, element]) == exists
            assert not exists or int(place[i, element]) == expected


@pytest.mark.parametrize("tile", [(128, 256), (100, 100), (2, 5000)], ids=str)
def test_slots_larger_than_a_program(tile: tuple[int, int]) -> None:
    """Several programs share a slot, in one dimension of the grid: the other dimensions hold at most 65535 programs."""
    assert tile[0] * tile[1] > tuning.MOST_ELEMENTS
    tile_map = TileMap(50, 3, tile, 5)
    view = tile_map.view(2 * tile[0] - 1, 2 * tile[1] - 3, tile[0] * tile[1], False)
    table = torch.tensor(tile_map.chunk_table(), device=DEVICE)
    pool, shape = randn(3 * tile[0], tile[1]), [3 * tile[0], tile[1]]
    weight = gather.gather(pool, table, view, SCALE)
    torch.testing.assert_close(weight, reference.gather(pool, table, view, SCALE), rtol=1e-5, atol=1e-6)
    found = reduce.reduce(weight, table, view, SCALE, shape)
    torch.testing.assert_close(found, reference.reduce(weight, table, view, SCALE, shape), rtol=1e-5, atol=1e-5)


# On a GPU, which has enough memory.


@dataclass(frozen=True)
class Large:
    """A tensor of more than 2³¹ elements in bfloat16, and its last tile rows as a tensor of their own."""

    rows: int
    cols: int
    tile: tuple[int, int]
    num_slots: int
    sign: str = "tile"
    strips: bool = False

    def build(self) -> tuple[TileView, TileView, Tensor, list[int]]:
        size = self.tile[0] * self.tile[1]
        tile_map = TileMap(
            2 * self.rows * self.cols // size + 10**6, self.num_slots, self.tile, 11, "permutation", self.sign
        )
        whole = tile_map.view(self.rows, self.cols, 0, self.strips)
        if self.strips:
            kept = 37
            end = whole._replace(rows=kept, base=(self.rows - kept) * self.cols)
        else:
            skipped = whole.grid_rows - 2
            end = whole._replace(
                rows=self.rows - skipped * whole.tile_rows, base=skipped * whole.grid_cols * whole.slot_size
            )
        table = torch.tensor(tile_map.chunk_table(), device=DEVICE).view(-1, 3)
        return whole, end, table, [self.num_slots * self.tile[0], self.tile[1]]


LARGE = {
    "tiles": Large(65537, 33001, (128, 64), 4000),
    "sign per element": Large(33001, 65537, (64, 64), 9000, sign="element"),
    "strips": Large(65537, 33001, (64, 64), 9000, strips=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_a_large_tensor_is_gathered_and_summed(name: str) -> None:
    whole, end, table, shape = LARGE[name].build()
    pool = randn(*shape).bfloat16()
    assert whole.numel > 2**31
    weight = ops.gather(pool, table, whole, SCALE)
    tail = reference.gather(pool, table, end, SCALE)
    torch.testing.assert_close(weight[-end.rows :], tail, rtol=1e-2, atol=1e-2)
    middle = whole.rows // 2
    assert weight[middle].isfinite().all() and weight[middle].any()
    # Only the last rows have a gradient that is not zero, so the sum is theirs.
    weight.zero_()
    weight[-end.rows :] = tail
    found = ops.reduce(weight, table, whole, SCALE, shape)
    expected = reference.reduce(tail.float(), table, end, SCALE, shape)
    assert expected.any()
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.gpu
def test_many_tokens_are_looked_up_and_summed() -> None:
    """Tokens × columns exceed 2³¹."""
    tile_map = TileMap(10**5, 300, (128, 64), 11)
    view = tile_map.view(5000, 1024, 0, False)
    table = torch.tensor(tile_map.chunk_table(), device=DEVICE)
    shape = [300 * 128, 64]
    pool = randn(*shape).bfloat16()
    index = torch.randint(0, 5000, (2**21 + 77,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = ops.embedding(index, pool, table, view, SCALE)
    assert rows.numel() > 2**31
    tail = reference.embedding(index[-100:], pool, table, view, SCALE)
    torch.testing.assert_close(rows[-100:], tail, rtol=1e-2, atol=1e-2)
    rows.zero_()
    rows[-100:] = tail
    found = torch.ops.roastify.embedding_reduce(rows, index, table, view, SCALE, shape)
    expected = reference.embedding_reduce(tail.float(), index[-100:], table, view, SCALE, shape)
    assert expected.any()
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("mapping", ["permutation", "roast"])
def test_the_far_end_of_a_large_pool(mapping: str) -> None:
    """The tensor's region lies behind 2³¹ elements of another region."""
    first_slot, num_slots, tile = 2**18 + 5, 50, (128, 64)
    tile_map = TileMap(10**4, num_slots, tile, 11, mapping, first_slot=first_slot)
    near = TileMap(10**4, num_slots, tile, 11, mapping)
    table = torch.tensor(tile_map.chunk_table() or [(0, 0, 0)], device=DEVICE)
    shape = [(first_slot + num_slots) * 128, 64]
    pool = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    assert pool.numel() > 2**31
    pool[-num_slots * 128 :] = randn(num_slots * 128, 64).bfloat16()
    small, small_shape = pool[-num_slots * 128 :].clone(), [num_slots * 128, 64]
    view, small_view = (m.view(1000, 500, 0, False) for m in (tile_map, near))
    weight = ops.gather(pool, table, view, SCALE)
    assert torch.equal(weight, ops.gather(small, table, small_view, SCALE))
    index = torch.arange(0, 1000, 7, device=DEVICE)
    assert torch.equal(ops.embedding(index, pool, table, view, SCALE), weight[index])
    sums: list[Callable[[TileView, list[int]], Tensor]] = [
        lambda view, shape: ops.reduce(weight, table, view, SCALE, shape),
        lambda view, shape: torch.ops.roastify.embedding_reduce(weight[index], index, table, view, SCALE, shape),
    ]
    for total in sums:
        found = total(view, shape)
        assert not found[: -num_slots * 128].any()
        torch.testing.assert_close(found[-num_slots * 128 :], total(small_view, small_shape))

"""The Triton kernels against the plain-torch reference: on a GPU, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import roastify
from roastify.conversion.converted import pool_of
from roastify.kernels import gathered_weights, ops, reference, row_padding
from roastify.kernels.group_view import GroupView, group_of_text
from roastify.kernels.view import TileView, WeightView
from roastify.pool.mapping import TileMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

triton = pytest.importorskip("triton")

from roastify.kernels.gpu import combine, embedding, few_rows, gather, group, linear, many_rows, reduce, tuning  # noqa: E402

# The interpreter computes with NumPy, whose integers warn where a hash wraps on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Case:
    rows: int
    cols: int
    tile: tuple[int, int]
    num_slots: int
    first_tile: int = 0
    offset: int = 0
    mapping: str = "permutation"
    sign: str = "tile"
    strips: bool = False
    region: bool = False

    def build(self) -> tuple[TileView, Tensor, tuple[int, int]]:
        size = self.tile[0] * self.tile[1]
        first_slot, first_chunk = (3, 2) if self.region else (0, 0)
        tile_map = TileMap(
            5000, self.num_slots, self.tile, 11, self.mapping, self.sign, first_slot=first_slot, first_chunk=first_chunk
        )
        rows = [(0, 0, 0)] * first_chunk + tile_map.chunk_table()
        table = torch.tensor(rows, dtype=torch.int64, device=DEVICE).view(-1, 3)
        view = tile_map.view(self.rows, self.cols, self.first_tile * size + self.offset, self.strips)
        slots = self.num_slots + (5 if self.region else 0)
        return view, table, (slots * self.tile[0], self.tile[1])


CASES = {
    "one chunk": Case(64, 64, (16, 16), 40),
    "many chunks, padded": Case(77, 123, (16, 16), 7, first_tile=5),
    "one slot": Case(50, 40, (16, 16), 1),
    "sign per element": Case(77, 123, (16, 32), 5, first_tile=2, sign="element"),
    "sign per row": Case(77, 123, (16, 16), 7, first_tile=5, sign="row"),
    "padding alone": Case(20, 40, (16, 32), 9, first_tile=7, sign="row"),
    "sign per row, one slot": Case(50, 40, (16, 16), 1, first_tile=2, sign="row"),
    "whole columns": Case(150, 192, (64, 32), 5, first_tile=3, sign="row"),
    "whole columns, many chunks": Case(300, 320, (128, 64), 2, first_tile=1, sign="row"),
    "whole columns, no sign": Case(128, 128, (64, 64), 3, sign="none"),
    "no sign": Case(33, 70, (32, 16), 9, sign="none"),
    "small tiles": Case(21, 30, (8, 8), 11, first_tile=3),
    "odd tiles": Case(21, 30, (5, 7), 6, sign="element"),
    "large tiles": Case(130, 200, (128, 64), 3, first_tile=1),
    "a region": Case(40, 50, (16, 16), 6, region=True),
    "strips": Case(9, 77, (8, 8), 5, first_tile=2, offset=13, strips=True),
    "strips, sign per row": Case(9, 77, (8, 8), 5, offset=13, strips=True, sign="row"),
    "strips, sign per element": Case(3, 50, (16, 16), 2, offset=7, strips=True, sign="element"),
    "rotation": Case(40, 50, (16, 16), 6, mapping="cyclic"),
    "unaligned tiles": Case(21, 30, (8, 8), 11, mapping="roast"),
    "element by element": Case(21, 30, (1, 1), 97, mapping="hashednet"),
    "elements of adapters": Case(8, 30, (1, 1), 90, first_tile=7),
}
DTYPES = list(TOLERANCE)
# The kernels see narrow dtypes alike: float16 repeats bfloat16.
EACH_DTYPE = [pytest.param(each, marks=[pytest.mark.long] * (each == torch.float16)) for each in DTYPES]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.shape
    atol = TOLERANCE[dtype] * max(1e-6, float(expected.abs().max())) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=atol)


def in_float64(function, *tensors: Tensor | None) -> Tensor:
    return function(*(None if tensor is None else tensor.double() for tensor in tensors))


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gather(name: str, dtype: torch.dtype) -> None:
    view, table, shape = CASES[name].build()
    pool = randn(*shape, dtype=dtype)
    expected = in_float64(lambda pool: reference.gather(pool, table, view, 0.7), pool)
    assert_near(gather.gather(pool, table, view, 0.7), expected, dtype)


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_reduce(name: str, dtype: torch.dtype) -> None:
    view, table, shape = CASES[name].build()
    grad = randn(view.rows, view.cols, dtype=dtype)
    expected = in_float64(lambda grad: reference.reduce(grad, table, view, 0.7, list(shape)), grad)
    found = reduce.reduce(grad, table, view, 0.7, list(shape))
    assert_near(found, expected, dtype)
    assert torch.equal(found, reduce.reduce(grad, table, view, 0.7, list(shape)))


# Cases with fewer tiles than slots: in one chunk, and in two chunks, the second of which begins in the tensor.
ADDED = CASES | {
    "fewer tiles than slots": Case(40, 30, (16, 16), 40, first_tile=5, sign="row"),
    "fewer tiles, in two chunks": Case(77, 123, (16, 16), 53, first_tile=30, sign="row"),
    "fewer tiles of a region, in two chunks": Case(40, 60, (16, 16), 14, first_tile=9, sign="element", region=True),
    "fewer strips, in two chunks": Case(9, 77, (8, 8), 17, first_tile=11, offset=13, strips=True),
    "fewer large tiles": Case(130, 200, (128, 128), 11, first_tile=8),
}


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("name", ADDED)
def test_reduce_to_a_sum(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    """Sums are in float32 whatever the gradient's dtype; elements that the tensor does not read stay unchanged."""
    view, table, shape = ADDED[name].build()
    by_tile = []
    monkeypatch.setattr(
        reduce, "_add_by_tile", lambda *args, run=reduce._add_by_tile: (by_tile.append(True), run(*args))
    )
    grad, before = randn(view.rows, view.cols, dtype=dtype), randn(*shape, seed=1)
    expected = in_float64(lambda grad: reference.reduce(grad, table, view, 0.7, list(shape)), grad) + before.double()
    results = []
    for _ in range(2):
        total = before.clone()
        reduce.reduce_(total, grad, table, view, 0.7)
        results.append(total)
    assert_near(total, expected, torch.float32)
    assert torch.equal(*results)
    marks = torch.ones(view.rows, view.cols, device=DEVICE, dtype=torch.float64)
    unread = reference.reduce(marks, table, view._replace(sign=0), 1.0, list(shape)) == 0
    assert torch.equal(total[unread], before[unread])
    assert bool(by_tile) == (view.num_tiles < view.num_slots and view.mapping == 0)


@pytest.mark.parametrize("scratch", [1 << 26, 16 * 123])
@pytest.mark.parametrize("name", ["many chunks, padded", "fewer tiles, in two chunks", "strips"])
def test_linear_reduce_to_a_sum(monkeypatch: pytest.MonkeyPatch, name: str, scratch: int) -> None:
    monkeypatch.setattr(tuning, "SCRATCH_ELEMENTS", scratch)
    view, table, shape = ADDED[name].build()
    grad, x, before = randn(2, 3, view.rows), randn(2, 3, view.cols, seed=1), randn(*shape, seed=2)
    expected = in_float64(lambda grad, x: reference.linear_reduce(grad, x, table, view, 0.7, list(shape)), grad, x)
    assert_near(linear.linear_reduce(grad, x, table, view, 0.7, list(shape)), expected, torch.float32)
    total = before.clone()
    linear.linear_reduce_(total, grad, x, table, view, 0.7)
    assert_near(total, expected + before.double(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_are_summed_in_float32(dtype: torch.dtype) -> None:
    """All tiles share one slot: 4096 in the first and 1 in 64 others; in a narrow dtype each 1 would vanish."""
    view, table, shape = Case(16, 16 * 65, (16, 16), 1, sign="none").build()
    grad = torch.ones(view.rows, view.cols, dtype=dtype, device=DEVICE)
    grad[:, :16] = 4096
    assert (reduce.reduce(grad, table, view, 1.0, list(shape)) == 4160).all()


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_embedding(name: str, dtype: torch.dtype) -> None:
    view, table, shape = CASES[name].build()
    pool = randn(*shape, dtype=dtype)
    for index_dtype in (torch.int64, torch.int32):
        index = torch.randint(0, view.rows, (3, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE, index_dtype)
        expected = in_float64(lambda pool, index=index: reference.embedding(index, pool, table, view, 0.7), pool)
        assert_near(embedding.embedding(index, pool, table, view, 0.7), expected, dtype)


def test_an_index_outside_the_table_gives_nan() -> None:
    view, table, shape = CASES["many chunks, padded"].build()
    index = torch.tensor([3, -1, 77, 76], device=DEVICE)
    out = embedding.embedding(index, randn(*shape), table, view, 0.7)
    assert out.isnan().all(1).tolist() == [False, True, True, False]


PRODUCTS = [name for name, case in CASES.items() if case.mapping in ("permutation", "cyclic")]
FEW_ROWS = [
    name for name in PRODUCTS if min(CASES[name].tile) >= 16 and CASES[name].tile[0] != 5 and not CASES[name].strips
]


def product_case(
    name: str, num_rows: int, dtype: torch.dtype, bias: bool = True
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor, TileView, float], Tensor]:
    """Return a product's arguments, and the expected result in float64."""
    view, table, shape = CASES[name].build()
    pool, x = randn(*shape, dtype=dtype), randn(num_rows, view.cols, dtype=dtype, seed=1)
    b = randn(view.rows, dtype=dtype, seed=2) if bias else None
    expected = in_float64(lambda x, pool, b: reference.linear(x, pool, b, table, view, 0.7), x, pool, b)
    return (x, pool, b, table, view, 0.7), expected


def assert_computes(function, arguments, expected: Tensor) -> None:
    found = function(*arguments)
    assert_near(found, expected, arguments[0].dtype)
    assert torch.equal(found, function(*arguments))


@pytest.mark.parametrize(
    ("num_rows", "bias", "dtype"),
    [(1, True, DTYPES[0]), (5, False, DTYPES[0]), (33, True, DTYPES[0]), (5, True, DTYPES[1]), (3, False, DTYPES[2])],
    ids=str,
)
@pytest.mark.parametrize("name", PRODUCTS)
def test_linear(name: str, bias: bool, num_rows: int, dtype: torch.dtype) -> None:
    assert_computes(linear.linear, *product_case(name, num_rows, dtype, bias))


@pytest.mark.parametrize(
    ("num_rows", "block_rows", "dtype"), [(1, 128, DTYPES[0]), (3, 16, DTYPES[1]), (5, 16, DTYPES[2])], ids=str
)
@pytest.mark.parametrize("name", [name for name in FEW_ROWS if CASES[name].sign != "element"])
def test_by_slot(
    monkeypatch: pytest.MonkeyPatch, name: str, block_rows: int, num_rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tuning, "BY_SLOT", tuning.BySlot(block_rows, num_warps=4))
    monkeypatch.setattr(tuning, "SUM_PARTS", 2)
    assert_computes(few_rows.by_slot, *product_case(name, num_rows, dtype))


@pytest.mark.parametrize(("block_rows", "tiles"), [(4, 1), (16, 4)])
@pytest.mark.parametrize("name", FEW_ROWS)
def test_one_row(monkeypatch: pytest.MonkeyPatch, name: str, block_rows: int, tiles: int) -> None:
    monkeypatch.setattr(tuning, "one_row_settings", lambda rows: tuning.OneRow(block_rows, tiles, num_warps=4))
    assert_computes(few_rows.one_row, *product_case(name, 1, torch.float32))


@pytest.mark.parametrize(("num_rows", "tiles", "stacked"), [(1, 100, 4), (1, 1, 1), (6, 3, 4), (6, 3, 1), (20, 100, 2)])
@pytest.mark.parametrize("name", FEW_ROWS)
def test_split(monkeypatch: pytest.MonkeyPatch, name: str, num_rows: int, tiles: int, stacked: int) -> None:
    settings = tuning.Split(block_rows=16, tiles=tiles, stacked=stacked, num_warps=4, num_stages=2)
    monkeypatch.setattr(tuning, "split_settings", lambda *arguments: settings)
    assert_computes(few_rows.split, *product_case(name, num_rows, torch.float32))


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let float32 products use the matrix unit's precision; on a CPU the interpreter computes them exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize(("num_rows", "block_m", "tiles"), [(1, 64, 1), (70, 64, 3), (130, 128, 100)])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("whole columns")])
def test_many_rows(
    monkeypatch: pytest.MonkeyPatch, tf32: None, name: str, num_rows: int, block_m: int, tiles: int, dtype: torch.dtype
) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    settings = tuning.ManyRows(block_m, 128, tiles, num_warps=4, num_stages=3, early=tiles == 1)
    monkeypatch.setattr(tuning, "many_rows_settings", lambda view, num_rows, itemsize: settings)
    arguments, expected = product_case(name, num_rows, dtype)
    assert many_rows.fits(arguments[0], arguments[1], arguments[4])
    if dtype == torch.float32 and DEVICE == "cuda":
        monkeypatch.setitem(TOLERANCE, torch.float32, 2e-3)
    assert_computes(many_rows.many_rows, arguments, expected)


def test_every_kernel_of_the_product_is_chosen_for_some_shape(tf32: None) -> None:
    """If no kernel fits a shape, the weight is gathered."""

    def way(case: Case, num_rows: int, dtype: torch.dtype = torch.bfloat16) -> str:
        view, _, shape = case.build()
        x = torch.empty(num_rows, view.cols, dtype=dtype, device=DEVICE)
        return linear.way(x, torch.empty(shape, dtype=dtype, device=DEVICE), view).__name__

    square = Case(1024, 1024, (128, 64), 100, sign="row")
    assert [way(square, rows) for rows in (1, 2, 32, 129, 5000)] == [
        "one_row",
        "split",
        "split",
        "many_rows",
        "gathered",
    ]
    reread = Case(1024, 1024, (128, 64), 64, sign="row")
    assert [way(reread, rows) for rows in (1, 4, 5)] == ["by_slot", "by_slot", "split"]
    assert way(Case(4096, 4096, (128, 64), 2000, sign="row"), 1) == "split"
    assert way(Case(1024, 1024, (128, 64), 100, sign="row"), 129, torch.float64) == "gathered"
    for finer in ("tile", "element"):
        assert [way(Case(1024, 1024, (128, 64), 100, sign=finer), rows) for rows in (100, 129)] == ["split", "gathered"]
    assert way(Case(1024, 1000, (128, 64), 100, sign="row"), 200) == "gathered"
    assert way(CASES["strips"], 1) == way(CASES["small tiles"], 1) == way(CASES["unaligned tiles"], 1) == "gathered"


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_rows", [33, 64, 65, 200, 512, 700, 4096])
@pytest.mark.parametrize("shape", [(4096, 4096), (768, 768), (9000, 4096), (128, 64)])
def test_many_rows_settings_fit_a_multiprocessor(shape: tuple[int, int], num_rows: int, itemsize: int) -> None:
    view, _, _ = Case(*shape, (128, 64), 100, sign="row").build()
    found = tuning.many_rows_settings(view, num_rows, itemsize)
    assert 2 <= found.num_stages and (found.block_m + found.block_n) * 64 * itemsize * found.num_stages < 227 * 1024
    assert 1 <= found.tiles <= view.grid_cols


def test_float32_follows_torchs_precision(tf32: None) -> None:
    view, _, shape = CASES["whole columns"].build()
    x, pool = torch.empty(200, view.cols, device=DEVICE), torch.empty(shape, device=DEVICE)
    assert linear.way(x, pool, view).__name__ == "many_rows"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert [linear.way(rows, pool, view).__name__ for rows in (x, x[:2], x[:1])] == ["gathered", "gathered", "one_row"]


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", ["padding alone", "sign per element", "large tiles"])
def test_padding_is_not_read(name: str, num_rows: int) -> None:
    """Only elements that the tensor reads are finite: all others in the pool are NaN."""
    view, table, shape = CASES[name].build()
    pool = torch.full(shape, float("nan"), device=DEVICE)
    ones = torch.ones(view.rows, view.cols, device=DEVICE)
    readers = reference.reduce(ones, table, view._replace(sign=0), 1.0, list(shape))
    pool[readers > 0] = 1.0
    assert pool.isnan().any()
    assert not gather.gather(pool, table, view, 1.0).isnan().any()
    pool, x = pool.bfloat16(), randn(num_rows, view.cols, dtype=torch.bfloat16)
    ways = [linear.linear, few_rows.split, *([few_rows.one_row] if num_rows == 1 else [])]
    for product in ways:
        assert not product(x, pool, None, table, view, 1.0).isnan().any(), product.__name__


@pytest.fixture
def wide_integers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TileView]]:
    """Let the products compute addresses in 64 bits; return the views whose address type was asked for."""
    asked: list[TileView] = []

    def address_type(pool_numel: int, view: TileView, num_rows: int) -> triton.language.dtype:
        asked.append(view)
        return triton.language.int64

    remembered = few_rows._by_slot, few_rows._one_row, few_rows._split, many_rows._launch
    for function in remembered:
        function.cache_clear()
    for module in (few_rows, many_rows):
        monkeypatch.setattr(module, "address_type", address_type)
    yield asked
    for function in remembered:
        function.cache_clear()


@pytest.mark.long
@pytest.mark.parametrize("name", ["many chunks, padded", "whole columns, many chunks", "sign per element", "a region"])
def test_products_in_wide_integers(wide_integers: list[TileView], name: str) -> None:
    """Large pools need 64-bit addresses; the results must be the same."""
    arguments, expected = product_case(name, 1, torch.bfloat16)
    ways = [few_rows.one_row, few_rows.split]
    ways += [few_rows.by_slot] if CASES[name].sign != "element" else []
    ways += [many_rows.many_rows] if name.startswith("whole columns") else []
    for product in ways:
        assert_computes(product, arguments, expected)
    assert wide_integers == [arguments[4]] * len(ways)


def test_the_address_type_depends_on_the_largest_address() -> None:
    view, _, shape = CASES["sign per row"].build()
    numel = shape[0] * shape[1]
    narrow, wide = triton.language.int32, triton.language.int64
    assert few_rows.address_type(numel, view, 4) == narrow
    assert few_rows.address_type(numel, view, 1 << 28) == wide
    assert few_rows.address_type(1 << 31, view, 4) == wide
    assert few_rows.address_type(numel, view._replace(num_slots=1 << 16), 4) == wide
    assert few_rows.address_type(numel, view._replace(base=(1 << 31) * 256), 4) == wide


@pytest.mark.parametrize("num_rows", [1, 3, 200])
def test_bias_of_any_strides(tf32: None, num_rows: int) -> None:
    (x, pool, _, table, view, scale), _ = product_case("whole columns", num_rows, torch.bfloat16)
    wide = randn(view.rows, 2, dtype=torch.bfloat16, seed=3)
    for bias in (wide.flatten()[::2], wide[:, 1], wide[:1, 0].expand(view.rows), wide[0, :1]):
        whole = bias.expand(view.rows).contiguous()
        assert torch.equal(
            linear.linear(x, pool, bias, table, view, scale), linear.linear(x, pool, whole, table, view, scale)
        )


A100, RTX_30, H100 = 166_912, 101_376, 232_448


@pytest.mark.parametrize("shared_bytes", [A100, RTX_30, H100])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 33, 64, 128])
@pytest.mark.parametrize(("shape", "num_slots"), [((768, 768), 300), ((4096, 4096), 600), ((4096, 4096), 2100)])
@pytest.mark.parametrize("tile", [(128, 64), (64, 64), (16, 128)])
def test_split_settings_fit_a_multiprocessor(
    tile: tuple[int, int], shape: tuple[int, int], num_slots: int, num_rows: int, itemsize: int, shared_bytes: int
) -> None:
    tile_map = TileMap(40000, num_slots * 128 * 64 // (tile[0] * tile[1]), tile, sign="tile")
    found = tuning.split_settings(tile_map.view(*shape, 0), num_rows, itemsize, shared_bytes)
    # Shared memory holds the usual tiles up to 128 rows in bfloat16, and up to 32 rows in float32.
    assert found is not None or (itemsize == 4 and num_rows > 32) or tile[1] > 64
    if found is not None:
        rows = min(found.block_rows, tile[0]) + max(triton.next_power_of_2(num_rows), 16 // found.stacked)
        assert 1 <= found.num_stages
        assert found.stacked * rows * tile[1] * itemsize * found.num_stages < shared_bytes


@pytest.mark.parametrize(
    ("num_rows", "dtype"), [(2, torch.bfloat16), (9, torch.float16), (20, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("name", ["large tiles", "whole columns, many chunks", "sign per row", "sign per element"])
def test_split_with_the_tables_settings(name: str, num_rows: int, dtype: torch.dtype) -> None:
    assert_computes(few_rows.split, *product_case(name, num_rows, dtype))


def test_reading_slot_by_slot_is_chosen_only_where_it_fits() -> None:
    """It does not fit with many chunks, with padded columns, or if partial sums exceed the scratch memory."""

    def reads(shape: tuple[int, int], num_slots: int, tile: tuple[int, int] = (128, 64), num_rows: int = 4) -> bool:
        return tuning.reads_by_slot(TileMap(3_000_000, num_slots, tile).view(*shape, 0), num_rows)

    assert reads((4096, 4096), 600) and not reads((4096, 4096), 600, num_rows=5)
    assert not reads((4096, 4096), 1500)
    assert not reads((4096, 4096), 4)
    assert not reads((4096, 4095), 600)
    assert not reads((128_000, 4096), 200_000, tile=(16, 16))


@pytest.mark.parametrize("rows", [77, 80, 76])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_vocabulary_of_an_odd_size_pads_its_gradient_once(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the added rows read of the pool does not matter. Without room in the last row of tiles there are none."""
    monkeypatch.setattr(row_padding, "_runs_on_cublas", lambda x: True)
    tile_rows = 16 if rows != 76 else 19
    view, table, shape = Case(rows, 128, (tile_rows, 16), 9, first_tile=5).build()
    pool = randn(*shape, dtype=dtype).requires_grad_()
    x = randn(600, 128, dtype=dtype, seed=1).requires_grad_()
    grad = randn(600, rows, dtype=dtype, seed=2)
    out = ops.linear(x, pool, None, table, view, 0.7)
    found = torch.autograd.grad(out, (x, pool), grad)
    wide, wider = row_padding.padded_gradient(grad, view)
    is_padded = dtype == torch.bfloat16 and rows == 77
    assert wide.shape[1] == wider.rows == (80 if is_padded else rows)
    weight = reference.gather(pool.detach().double(), table, view, 0.7)
    of_pool = reference.reduce(grad.double().t() @ x.detach().double(), table, view, 0.7, list(shape))
    for one, other in zip(found, (grad.double() @ weight, of_pool), strict=True):
        assert_near(one, other, dtype)


@pytest.mark.parametrize("scratch", [1, 2000, 1 << 26])
@pytest.mark.parametrize("name", ["many chunks, padded", "strips", "unaligned tiles", "one chunk"])
def test_products_in_panels(monkeypatch: pytest.MonkeyPatch, name: str, scratch: int) -> None:
    monkeypatch.setattr(tuning, "SCRATCH_ELEMENTS", scratch)
    monkeypatch.setattr(linear, "way", lambda x, pool, view: linear.gathered)
    view, table, shape = CASES[name].build()
    pool = randn(*shape)
    x, grad = randn(6, view.cols, seed=1), randn(6, view.rows, seed=2)
    out_bias, in_bias = randn(view.rows, seed=3), randn(view.cols, seed=4)
    pairs = [
        (
            linear.linear(x, pool, out_bias, table, view, 0.7),
            in_float64(lambda x, p, b: reference.linear(x, p, b, table, view, 0.7), x, pool, out_bias),
        ),
        (
            linear.linear_t(grad, pool, in_bias, table, view, 0.7),
            in_float64(lambda x, p, b: reference.linear_t(x, p, b, table, view, 0.7), grad, pool, in_bias),
        ),
        (
            linear.linear_reduce(grad, x, table, view, 0.7, list(shape)),
            in_float64(lambda g, x: reference.linear_reduce(g, x, table, view, 0.7, list(shape)), grad, x),
        ),
    ]
    for found, expected in pairs:
        assert_near(found, expected, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("num_rows", [1, 5, 200])
def test_tensors_on_a_device_that_is_not_the_current_one(num_rows: int) -> None:

    arguments, expected = product_case("whole columns", num_rows, torch.bfloat16)
    x, pool, bias, table = (value.to("cuda:1") for value in arguments[:4])
    with torch.cuda.device(0):
        found = ops.linear(x, pool, bias, table, *arguments[4:])
    assert_near(found.cpu(), expected.cpu(), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
def test_a_converted_model_on_a_gpu(dtype: torch.dtype) -> None:
    """Through the operators: forward, every gradient, and CUDA graphs, against the densified model."""
    import roastify

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(500, 96), torch.nn.Linear(96, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
    )
    converted = roastify.convert(model, 4).to("cuda", dtype)
    dense = roastify.densify(converted)
    index = torch.randint(0, 500, (4, 3), device="cuda")
    out, expected = converted(index), dense(index)
    assert_near(out.detach(), expected.detach(), dtype)
    out.square().sum().backward()
    first = converted[0].roast_pool.weight.grad.clone()
    assert first.abs().sum() > 0
    converted.zero_grad()
    converted(index).square().sum().backward()
    assert torch.equal(first, converted[0].roast_pool.weight.grad)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        converted(index)
        with torch.cuda.graph(graph):
            captured = converted(index)
        graph.replay()
    assert torch.equal(captured, out)


# Weights of a group: rows, columns, first tile, offset in that tile, λ, and whether transposed.
GROUPS = {
    "one shape": (Case(64, 64, (16, 16), 9, sign="row"), [(64, 64, 0, 0, 0.7, False), (64, 64, 16, 0, -1.3, False)]),
    "padded, many chunks": (
        Case(0, 0, (16, 16), 7, sign="row"),
        [(77, 123, 5, 0, 0.7, False), (77, 123, 45, 0, 2.0, True), (20, 33, 100, 0, 0.1, False)],
    ),
    "sign per element": (
        Case(0, 0, (16, 32), 5, sign="element"), [(77, 123, 2, 0, 0.7, False), (64, 64, 40, 0, 1.0, True)],
    ),
    "none negative beside some": (
        Case(0, 0, (8, 8), 70, sign="row"), [(64, 64, 0, 0, 0.7, False), (64, 64, 64, 0, 1.5, False)],
    ),
    "strips": (
        Case(0, 0, (8, 8), 5, strips=True, sign="row"),
        [(9, 77, 2, 13, 0.7, False), (3, 50, 13, 2, 1.1, False), (32, 48, 20, 5, 0.9, False)],
    ),
    "a region": (
        Case(0, 0, (16, 16), 6, region=True, sign="row"), [(40, 50, 0, 0, 0.7, False), (40, 50, 12, 0, 0.5, False)],
    ),
    "large tiles": (
        Case(0, 0, (128, 64), 3, sign="row"), [(256, 192, 1, 0, 0.7, False), (130, 200, 7, 0, 0.4, False)],
    ),
    "odd tiles": (Case(0, 0, (5, 7), 6, sign="tile"), [(21, 30, 0, 0, 0.7, False), (21, 30, 25, 0, 0.6, True)]),
}  # fmt: skip


def build_group(name: str) -> tuple[group.Group, Tensor, tuple[int, int]]:
    case, parts = GROUPS[name]
    weights = []
    for rows, cols, first_tile, offset, scale, transposed in parts:
        view, table, shape = dataclasses.replace(
            case, rows=rows, cols=cols, first_tile=first_tile, offset=offset
        ).build()
        weights.append(WeightView(view, scale, (cols, rows) if transposed else (rows, cols), transposed))
    return group.Group(weights), table, shape


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_gather_of_a_group(name: str, dtype: torch.dtype) -> None:
    made, table, shape = build_group(name)
    pool = randn(*shape, dtype=dtype)
    for found, weight in zip(made.gather(pool, table), made.weights, strict=True):
        expected = gather.gather(pool, table, weight.view, weight.scale)
        expected = expected.t() if weight.transposed else expected
        assert found.shape == weight.shape and found.data_ptr() % 16 == 0
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_reduce_of_a_group(name: str, dtype: torch.dtype) -> None:
    made, table, shape = build_group(name)
    grads = [randn(*weight.shape, dtype=dtype, seed=seed) for seed, weight in enumerate(made.weights)]
    before = randn(*shape, seed=9)
    expected = before.double()
    for grad, weight in zip(grads, made.weights, strict=True):
        matrix = (grad.t() if weight.transposed else grad).double().contiguous()
        reference.reduce_(expected, matrix, table, weight.view, weight.scale)
    found = []
    for _ in range(2):
        total = before.clone()
        made.reduce_(total, grads, table)
        found.append(total)
    assert_near(found[0], expected, torch.float32)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [*EACH_DTYPE, torch.float64], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_operators_of_a_group(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its tensors a flat gradient may hold anything."""
    monkeypatch.setitem(TOLERANCE, torch.float64, 1e-12)
    made, table, shape = build_group(name)
    view = GroupView(*zip(*((weight.view, weight.scale) for weight in made.weights), strict=True))
    assert group_of_text(view.text) == view
    pool = randn(*shape, dtype=dtype)
    flat, expected = group.gather_group(pool, table, view.text), reference.gather_group(pool, table, view.text)
    assert flat.shape == expected.shape and flat.dtype == dtype
    grad = torch.full_like(flat, torch.nan)
    for number in range(len(view.views)):
        assert_near(view.part(flat, number), view.part(expected, number), dtype)
        view.part(grad, number).copy_(randn(*view.part(flat, number).shape, dtype=dtype, seed=number))
    sum_dtype = reference.summed_in(dtype)
    before = randn(*shape, dtype=sum_dtype, seed=9)
    wanted = before.double().clone()
    reference.reduce_group_(wanted, grad.double(), table, view.text)
    sums = [before.clone(), before.clone()]
    for total in sums:
        group.reduce_group_(total, grad, table, view.text)
    assert_near(sums[0], wanted, sum_dtype)
    assert torch.equal(*sums)
    added = group.reduce_group(grad, table, view.text, list(shape))
    assert added.dtype == dtype
    assert_near(added, wanted - before.double(), dtype)


@pytest.mark.parametrize("captured", [False, True])
def test_a_group_in_a_cuda_graph_keeps_its_tables(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many groups are used later; a replay would else read memory that something else has."""
    made, table, shape = build_group("one shape")
    view = GroupView(*zip(*((weight.view, weight.scale) for weight in made.weights), strict=True))
    group._group.cache_clear()
    pool = randn(*shape)
    flat = group.gather_group(pool, table, view.text)
    monkeypatch.setattr(group, "_captured", set())
    monkeypatch.setattr(group, "is_captured", lambda tensor: captured)
    group.gather_group(pool, table, view.text)
    group.reduce_group_(torch.zeros(shape, device=DEVICE), flat, table, view.text)
    tables = weakref.ref(group._group(view.text)._on(flat.device))
    group._group.cache_clear()
    gc.collect()
    assert (tables() is not None) == captured


@pytest.mark.parametrize(("slots", "together"), [(9, True), (100, True), (400, False)])
def test_one_kernel_adds_the_gradients_of_a_group_that_reads_enough_of_the_pool(
    slots: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots that no weight reads are not written."""
    case = Case(64, 64, (16, 16), slots, sign="row")
    views = [dataclasses.replace(case, first_tile=first).build()[0] for first in (3, 40)]
    _, table, shape = case.build()
    view = GroupView(tuple(views), (0.7, -1.3))
    grad = randn(view.offsets[-1])
    # Adding zero to -0.0 would change its sign.
    total = torch.full(shape, -0.0, device=DEVICE)
    expected = total.double().clone()
    reference.reduce_group_(expected, grad.double(), table, view.text)
    calls = []
    reduce_flat_ = group.Group.reduce_flat_
    monkeypatch.setattr(group.Group, "reduce_flat_", lambda *args: calls.append("") or reduce_flat_(*args))
    group.reduce_group_(total, grad, table, view.text)
    assert bool(calls) == together
    assert_near(total, expected, torch.float32)
    untouched = (expected == 0).view(-1, 16 * 16).all(1)
    assert int(untouched.sum()) == max(0, slots - 32)
    assert torch.signbit(total.view(-1, 16 * 16)[untouched]).all()


@pytest.mark.parametrize(("run", "together"), [(3, True), (2, True), (1, False)])
def test_a_groups_kernel_adds_the_gradients_if_most_of_the_group_has_one(
    run: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:run]:
                x = layer(x).tanh()
            return x

    calls = []
    reduce_ = group.Group.reduce_
    monkeypatch.setattr(group.Group, "reduce_", lambda *args: calls.append("") or reduce_(*args))
    if DEVICE == "cpu":
        monkeypatch.setattr(gathered_weights.WeightGroup, "kernels", lambda chosen, *_: group.Group(chosen.weights))
        monkeypatch.setattr(gathered_weights, "on_device_of", lambda tensor: contextlib.nullcontext())
    config = roastify.RoastConfig(ratio=3.0, min_numel=1, tile="8x8", sign="row")
    torch.manual_seed(0)
    model = roastify.convert(Net().to(DEVICE), config=config)
    dense, x = copy.deepcopy(model).double(), randn(32, 32)
    model(x).square().sum().backward()
    assert bool(calls) == together
    monkeypatch.undo()
    dense(x.double()).square().sum().backward()
    assert_near(next(model.parameters()).grad, next(dense.parameters()).grad, torch.float32)


# Convolutions of a group whose kernels have bases: `(basis kernels, kernel)`, then each one's channels, first tile,
# offset in that tile, and λ.
WITH_BASES = {
    "of nine positions": (
        Case(0, 0, (16, 16), 5, strips=True, sign="row"), (3, (3, 3)),
        [((16, 24), 0, 0, 0.7), ((40, 33), 5, 13, -1.3), ((1, 2), 30, 2, 1.0)],
    ),
    "more of them": (
        Case(0, 0, (8, 8), 7, strips=True, sign="element"), (17, (5, 5)), [((5, 7), 2, 3, 0.7), ((12, 9), 20, 50, 0.4)],
    ),
    "large, and as many as positions": (
        Case(0, 0, (32, 32), 3, strips=True, sign="tile"), (49, (7, 7)), [((30, 3), 1, 0, 0.7), ((3, 30), 9, 1, 2.0)],
    ),
    "one": (Case(0, 0, (8, 8), 9, strips=True, sign="row"), (1, (3, 3)), [((33, 9), 0, 5, 0.5)]),
}  # fmt: skip


def build_with_bases(name: str) -> tuple[group.Group, Tensor, tuple[int, int], list[Tensor]]:
    case, (count, kernel), parts = WITH_BASES[name]
    made, bases = [], []
    for index, ((out, channels), first_tile, offset, scale) in enumerate(parts):
        view, table, shape = dataclasses.replace(
            case, rows=out, cols=channels * count, first_tile=first_tile, offset=offset
        ).build()
        made.append(WeightView(view, scale, (out, channels, *kernel), False, index))
        bases.append(randn(count, kernel[0] * kernel[1], seed=20 + index))
    return group.Group(made), table, shape, bases


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("name", WITH_BASES)
def test_combine_of_a_group(name: str, dtype: torch.dtype) -> None:
    made, table, shape, bases = build_with_bases(name)
    pool = randn(*shape, dtype=dtype)
    gathered = made.gather(pool, table)
    parts = zip(made.combine(gathered, torch.cat(bases)), gathered, made.weights, bases, strict=True)
    for found, coefficients, weight, basis in parts:
        assert torch.equal(coefficients.view(weight.view[:2]), gather.gather(pool, table, weight.view, weight.scale))
        assert coefficients.shape == weight.gathered_shape and weight.basis_shape == basis.shape
        assert found.shape == weight.shape and found.data_ptr() % 16 == 0 and found.is_contiguous()
        # The bits are those of one weight alone, because a checkpoint may recompute one weight alone.
        assert torch.equal(found.view(-1, basis.shape[1]), combine.combine(coefficients, basis))
        expected = in_float64(reference.combine, coefficients, basis)
        assert_near(found, expected.view(weight.shape), dtype)


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("name", WITH_BASES)
def test_reduce_of_a_group_with_bases(name: str, dtype: torch.dtype) -> None:
    made, table, shape, bases = build_with_bases(name)
    grads = [randn(*weight.shape, dtype=dtype, seed=seed) for seed, weight in enumerate(made.weights)]
    # One gradient has its channels last, as cuDNN gives it; another is expanded, as a sum gives it.
    grads[0] = grads[0].to(memory_format=torch.channels_last)
    grads[-1] = randn(1, dtype=dtype, seed=8).expand(made.weights[-1].shape) if len(grads) > 1 else grads[-1]
    before = randn(*shape, seed=9)
    expected = before.double()
    for grad, weight, basis in zip(grads, made.weights, bases, strict=True):
        matrix = (grad.double().reshape(-1, basis.shape[1]) @ basis.double().t()).view(weight.view[:2])
        reference.reduce_(expected, matrix, table, weight.view, weight.scale)
    found = []
    for _ in range(2):
        total = before.clone()
        made.reduce_(total, grads, table, torch.cat(bases))
        found.append(total)
    # Gradients of coefficients are rounded to their dtype, as for one weight alone.
    assert_near(found[0].to(dtype), expected, dtype)
    assert torch.equal(*found)


def test_a_group_is_registered_only_when_all_of_it_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another thread could use a part of it."""
    made, table, shape, _ = build_with_bases("of nine positions")
    seen = []
    bring_to = group.GroupCombine.bring_to

    def watched(self: group.GroupCombine, device: torch.device) -> None:
        seen.append(device in made._tables)
        bring_to(self, device)

    monkeypatch.setattr(group.GroupCombine, "bring_to", watched)
    for _ in range(2):
        made.gather(randn(*shape), table)
    assert seen == [False]


def test_large_bases_have_no_kernel_for_a_group() -> None:
    case = Case(12, 9 * 5, (8, 8), 5, strips=True)
    weight = WeightView(case.build()[0], 1.0, (12, 5, 11, 11), False, 0)
    assert weight.basis_shape == (9, 121) and not group.fits(randn(8, 8), weight)
    assert group.fits(randn(8, 8), dataclasses.replace(weight, shape=(12, 5, 3, 3)))


class Convolutions(nn.Module):
    """Three equal convolutions; `run` of them are called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(24, 24, 3, bias=False) for _ in range(3))
        self.run = 3
        self.again: Any = lambda function, x: function(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.run]:
            x = self.again(layer, x).tanh()
        return x


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[int]]:
    """Return a model on the group's kernels, its float64 copy without them, and how many bases each launch got."""
    calls: list[int] = []
    reduce_ = group.Group.reduce_

    def watched(*args: Any) -> None:
        calls.append(0 if args[-1] is None else len(args[-1]) // args[0].weights[0].basis_shape[0])
        reduce_(*args)

    def forced(chosen: gathered_weights.WeightGroup, pool: Tensor) -> Any:
        return None if pool.dtype == torch.float64 or len(chosen.weights) == 1 else group.Group(chosen.weights)

    monkeypatch.setattr(group.Group, "reduce_", watched)
    if DEVICE == "cpu":
        monkeypatch.setattr(gathered_weights.WeightGroup, "kernels", forced)
        monkeypatch.setattr(gathered_weights, "on_device_of", lambda tensor: contextlib.nullcontext())
    torch.manual_seed(0)
    config = roastify.RoastConfig(ratio=3.0, min_numel=1, tile="8x8")
    model = roastify.convert(Convolutions().to(DEVICE), config=config)
    assert len(pool_of(model).bases()) == 3
    return model, copy.deepcopy(model).double(), calls


def assert_steps_alike(model: Any, dense: Any, step: Any) -> None:
    for each in (model, dense):
        each.zero_grad()
    found, expected = step(model, randn(2, 24, 9, 9)), step(dense, randn(2, 24, 9, 9).double())
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_near(one.detach(), other.detach(), torch.float32)


def loss_and_gradients(model: Any, x: Tensor) -> list[Tensor | None]:
    out = model(x)
    out.square().sum().backward()
    return [out, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.filterwarnings("ignore:.*cannot be frozen in one layer and trained in another")
@pytest.mark.parametrize(("run", "frozen"), [(3, ()), (2, ()), (1, ()), (3, (1, 2)), (3, (0, 1, 2))])
def test_gradients_of_a_group_with_bases_are_those_in_float64(
    run: int, frozen: tuple[int, ...], convolutions: tuple[Any, Any, list[int]], full_precision: None
) -> None:
    model, dense, calls = convolutions
    for each in (model, dense):
        each.run = run
        for index in frozen:
            pool_of(each).bases()[index].requires_grad_(False)
    assert_steps_alike(model, dense, loss_and_gradients)
    # The group's kernel runs if most of the group does; a single layer uses its own kernel.
    assert calls == ([3] if run > 1 else [])
    bases = pool_of(model).bases()
    assert [basis.grad is None for basis in bases] == [index >= run or index in frozen for index in range(3)]


def of_gradients(model: Any, x: Tensor) -> list[Tensor | None]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    sum(each.square().sum() for each in found).backward()
    return [parameter.grad for parameter in parameters]


def only_bases(model: Any, x: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(model(x).square().sum(), pool_of(model).bases()))


def only_pool(model: Any, x: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(model(x).square().sum(), pool_of(model).weight))


def twice(model: Any, x: Tensor) -> list[Tensor | None]:
    out = model(x).square().sum()
    out.backward(retain_graph=True)
    out.backward()
    return [parameter.grad for parameter in model.parameters()]


def a_layer_twice(model: Any, x: Tensor) -> list[Tensor | None]:
    layers = model.layers
    model.layers = nn.ModuleList([layers[0], layers[1], layers[0]])
    found = loss_and_gradients(model, x)
    model.layers = layers
    return found


def checkpointed(model: Any, x: Tensor) -> list[Tensor | None]:
    """A forward pass makes the weights together; backward recomputes them one by one."""
    model.again = functools.partial(checkpoint, use_reentrant=False)
    return loss_and_gradients(model, x)


def written_between_layers(model: Any, x: Tensor) -> list[Tensor | None]:
    basis = pool_of(model).bases()[2]

    def assign(*_: Any) -> None:
        basis.data = basis.data * 2

    hook = model.layers[2].register_forward_pre_hook(assign)
    found = loss_and_gradients(model, x)
    hook.remove()
    return found


def stepped_in_hooks(model: Any, x: Tensor, **options: Any) -> list[Tensor | None]:
    """A basis may change as soon as it has its gradient, before the pool has one."""
    for basis in pool_of(model).bases():
        optimizer = torch.optim.SGD([basis], lr=0.01, **options)
        basis.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    found = loss_and_gradients(model, x)
    return [*found, *pool_of(model).bases()]


def stepped_in_hooks_unseen(model: Any, x: Tensor) -> list[Tensor | None]:
    return stepped_in_hooks(model, x, fused=True)


def parametrized(model: Any, x: Tensor) -> list[Tensor | None]:
    for index in range(3):
        nn.utils.parametrizations.weight_norm(pool_of(model), f"basis_{index}", dim=None)
    return loss_and_gradients(model, x)


def parametrized_and_checkpointed(model: Any, x: Tensor) -> list[Tensor | None]:
    """Reading a parametrized basis runs code; a recomputed region must run that code as often as before."""
    model.again = functools.partial(checkpoint, use_reentrant=False)
    return parametrized(model, x)


def with_other_bases(model: Any, x: Tensor) -> list[Tensor | None]:
    others = {
        name: (0.5 * parameter.detach()).requires_grad_()
        for name, parameter in model.named_parameters()
        if "basis" in name
    }
    out = torch.func.functional_call(model, others, (x,))
    out.square().sum().backward()
    return [out, pool_of(model).weight.grad, *(other.grad for other in others.values())]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize(
    "step",
    [
        of_gradients, only_bases, only_pool, twice, a_layer_twice, checkpointed, written_between_layers,
        stepped_in_hooks, stepped_in_hooks_unseen, parametrized, parametrized_and_checkpointed, with_other_bases,
    ],
)  # fmt: skip
def test_a_group_with_bases_in_training_loops(
    step: Any, convolutions: tuple[Any, Any, list[int]], full_precision: None
) -> None:
    model, dense, _ = convolutions
    assert_steps_alike(model, dense, step)


@pytest.mark.long
@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_backward_pass_of_an_eager_group_with_bases(
    convolutions: tuple[Any, Any, list[int]], full_precision: None
) -> None:
    model, dense, _ = convolutions
    torch.compiler.reset()
    # The dense model's backward pass is not compiled.
    expected = loss_and_gradients(dense, randn(2, 24, 9, 9).double())
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = loss_and_gradients(model, randn(2, 24, 9, 9))
    torch.compiler.reset()
    for one, other in zip(found, expected, strict=True):
        assert_near(one.detach(), other.detach(), torch.float32)


def test_a_parametrized_basis_is_computed_once_a_layer(convolutions: tuple[Any, Any, list[int]]) -> None:
    model, _, calls = convolutions
    made = []

    class Watched(nn.Module):
        def forward(self, basis: Tensor) -> Tensor:
            made.append(basis)
            return basis.abs()

    for index in range(3):
        nn.utils.parametrize.register_parametrization(pool_of(model), f"basis_{index}", Watched())
    made.clear()
    model(randn(2, 24, 9, 9)).square().sum().backward()
    # The group's kernel still makes the coefficients' gradients, without bases.
    assert len(made) == 3 and calls == [0]


def test_a_basis_of_another_shape_is_refused(convolutions: tuple[Any, Any, list[int]]) -> None:
    model, _, _ = convolutions
    pool_of(model).basis_1 = nn.Parameter(randn(9, 9))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(randn(2, 24, 9, 9))


def test_a_failed_backward_pass_leaves_no_gradient_behind(convolutions: tuple[Any, Any, list[int]]) -> None:
    model, _, _ = convolutions
    left = []
    leave = gathered_weights._DeferredGrads.defer

    def watched(self: Any, node: Any, index: int, grad: Tensor) -> bool:
        left.append(StorageWeakRef(grad.untyped_storage()))
        return leave(self, node, index, grad)

    def fail(grad: Tensor) -> None:
        raise ValueError("on purpose")

    out = model(randn(2, 24, 9, 9)).square().sum()
    hook = pool_of(model).bases()[0].register_hook(fail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered_weights._DeferredGrads, "defer", watched)
        with pytest.raises(ValueError, match="on purpose"):
            out.backward(retain_graph=True)
    hook.remove()
    gc.collect()
    assert len(left) == 3 and all(reference.expired() for reference in left)
    model.zero_grad()
    out.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss_and_gradients(model, randn(2, 24, 9, 9))
    assert all(map(torch.equal, found, [parameter.grad for parameter in model.parameters()]))


def test_a_basis_that_is_not_read_gets_no_gradient_and_calls_no_hook(
    convolutions: tuple[Any, Any, list[int]],
) -> None:
    model, _, calls = convolutions
    model.run = 2
    called = []
    for index, basis in enumerate(pool_of(model).bases()):
        basis.register_hook(lambda grad, index=index: called.append((index, grad is None)))
    model(randn(2, 24, 9, 9)).square().sum().backward()
    assert calls and sorted(called) == [(0, False), (1, False)]


def test_a_basis_written_to_before_the_backward_pass_raises(convolutions: tuple[Any, Any, list[int]]) -> None:
    model, dense, _ = convolutions
    for each, x in ((model, randn(2, 24, 9, 9)), (dense, randn(2, 24, 9, 9).double())):
        out = each(x).square().sum()
        with torch.no_grad():
            pool_of(each).bases()[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_a_pool_may_be_written_to_before_the_backward_pass(
    convolutions: tuple[Any, Any, list[int]], full_precision: None
) -> None:
    """The graph keeps coefficients, as it keeps weights without a basis."""

    def step(model: Any, x: Tensor) -> list[Tensor | None]:
        out = model(x).square().sum()
        with torch.no_grad():
            pool_of(model).weight.mul_(2)
        out.backward()
        return [parameter.grad for parameter in model.parameters()]

    model, dense, calls = convolutions
    assert_steps_alike(model, dense, step)
    assert calls


def test_a_group_with_bases_frees_its_weights_in_the_backward_pass(convolutions: tuple[Any, Any, list[int]]) -> None:
    model, _, _ = convolutions
    made = []
    combined = group.Group.combine

    def watched(*args: Any) -> list[Tensor]:
        found = combined(*args)
        made.extend(map(StorageWeakRef, (each.untyped_storage() for each in (*found, *args[1]))))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group.Group, "combine", watched)
        loss = model(randn(2, 24, 9, 9)).square().sum()
    assert len(made) == 6 and not any(reference.expired() for reference in made)
    loss.backward()
    # The graph still exists, but what it saved is freed.
    assert all(reference.expired() for reference in made)


def test_weights_of_a_group_are_of_one_kind() -> None:
    views = [Case(64, 64, (16, 16), slots).build()[0] for slots in (5, 6)]
    with pytest.raises(AssertionError, match="differ in more than"):
        group.Group([WeightView(view, 1.0, (64, 64), False) for view in views])


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize(
    ("rows", "count", "size"), [(1, 1, 2), (5, 6, 9), (300, 6, 9), (1000, 17, 25), (130, 33, 49), (70, 64, 64)]
)
def test_combine(rows: int, count: int, size: int, dtype: torch.dtype) -> None:
    coefficients, basis = randn(rows, count, dtype=dtype), randn(count, size, seed=1)
    expected = in_float64(reference.combine, coefficients, basis)
    assert_near(combine.combine(coefficients, basis), expected, dtype)
    # The backward pass multiplies by the transposed basis.
    grad = randn(rows, size, dtype=dtype, seed=2)
    assert_near(combine.combine(grad, basis.t()), in_float64(reference.combine, grad, basis.t()), dtype)


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("parts", [1, 3, 256])
@pytest.mark.parametrize(("rows", "count", "size"), [(1, 1, 2), (300, 6, 9), (1000, 17, 25), (130, 64, 64)])
def test_combine_reduce(
    rows: int, count: int, size: int, parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "COMBINE_PARTS", parts)
    combine._reduce_launch.cache_clear()
    coefficients, grad = randn(rows, count, dtype=dtype), randn(rows, size, dtype=dtype, seed=1)
    found = combine.combine_reduce(coefficients, grad)
    combine._reduce_launch.cache_clear()
    assert_near(found, in_float64(reference.combine_reduce, coefficients, grad), torch.float32)


def test_combine_reduce_of_two_dtypes() -> None:
    # The gradient exceeds the range of the coefficients' dtype.
    coefficients, grad = randn(300, 6, dtype=torch.float16), 1e5 * randn(300, 9, seed=1)
    expected = in_float64(reference.combine_reduce, coefficients, grad)
    assert_near(combine.combine_reduce(coefficients, grad), expected, torch.float32)


def test_sizes_that_cannot_be_multiplied_are_refused() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        combine.combine(randn(10, 4), randn(6, 9))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        combine.combine_reduce(randn(10, 4), randn(9, 9))


@pytest.mark.parametrize("name", ["combine", "combine_reduce"])
def test_combining_reads_no_row_beyond_the_last(name: str) -> None:
    around = torch.full((64, 6), torch.nan, device=DEVICE)
    around[:50] = randn(50, 6)
    other = randn(6, 9) if name == "combine" else randn(50, 9)
    found, expected = (getattr(home, name)(around[:50], other) for home in (combine, reference))
    assert_near(found, expected, torch.float32)


@pytest.mark.parametrize("size", [65, 121])
def test_large_bases_and_float64_use_the_reference(size: int) -> None:
    coefficients, basis = randn(40, 5), randn(5, size)
    assert torch.equal(combine.combine(coefficients, basis), reference.combine(coefficients, basis))
    wide = coefficients.double(), basis.double()
    assert combine.combine(*wide).dtype == torch.float64
    assert combine.combine_reduce(wide[0], wide[0]).dtype == torch.float64
    assert torch.equal(combine.combine(coefficients[:0], basis[:, :9]), coefficients.new_empty(0, 9))
    assert torch.equal(combine.combine_reduce(coefficients[:0], coefficients[:0]), coefficients.new_zeros(5, 5))

"""The Triton kernels of folds, and products with groups, beside the reference: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from roastify.kernels import ops, reference
from roastify.kernels.view import FoldView, TileView
from roastify.pool.mapping import TileMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton")

from roastify.kernels.gpu import few_rows, fold, linear, many_rows, tuning  # noqa: E402

# The interpreter computes with NumPy, whose integers warn where a hash wraps on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPE = (16, 16)

FOLDS = {
    "shorter last span": FoldView(72, 4, 2, 7, -1234567, 5),
    "all hashes": FoldView(64, 8, 8, 3, 99, 5),
    "one hash": FoldView(48, 2, 1, 64, 1 << 62, 0),
    "sixteen, one column": FoldView(16, 16, 4, 8, 7, 5),
    "span of several blocks": FoldView(600, 2, 2, 200, 3, 5),
    "channels of many places": FoldView(24, 4, 2, 4, 9, 5).over(35),
}
each_fold = pytest.mark.parametrize("view", FOLDS.values(), ids=FOLDS.keys())


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def poisoned(tensor: Tensor) -> Tensor:
    """Return a tensor that lies in the middle of memory full of NaN."""
    around = tensor.new_full((tensor.numel() + 64,), torch.nan)
    inside = around[32 : 32 + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, stored: torch.dtype | None = None) -> None:
    assert found.dtype == (stored or dtype) and found.shape == expected.shape
    atol = TOLERANCE[dtype] * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=atol)


@each_fold
@pytest.mark.parametrize(
    ("dtype", "num_rows"),
    [
        (torch.float32, 0),
        (torch.float32, 9),
        pytest.param(torch.float32, 37, marks=pytest.mark.long),
        (torch.bfloat16, 5),
        pytest.param(torch.float32, 1, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, 37, marks=pytest.mark.long),
        pytest.param(torch.float16, 5, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_folds(view: FoldView, dtype: torch.dtype, num_rows: int) -> None:
    check(view, dtype, num_rows)


@each_fold
def test_folds_without_scales_or_their_unit(view: FoldView) -> None:
    check(view._replace(first_scale=-1), torch.bfloat16, 5)
    check(view._replace(unit=0), torch.float32, 5)


def check(view: FoldView, dtype: torch.dtype, num_rows: int) -> None:
    pool = randn(*SHAPE, dtype=dtype) if view.first_scale >= 0 else None
    wide = None if pool is None else pool.double()
    x = poisoned(randn(num_rows, view.cols, dtype=dtype))
    z = poisoned(randn(num_rows, view.folded_cols, dtype=dtype))
    assert_near(fold.fold(x, pool, view, x.dtype), reference.fold(x.double(), wide, view, torch.float64), dtype)
    assert_near(fold.unfold(z, pool, view, z.dtype), reference.unfold(z.double(), wide, view, torch.float64), dtype)
    reduced = fold.fold_reduce(z, x, view, list(SHAPE))
    assert_near(reduced, reference.fold_reduce(z.double(), x.double(), view, list(SHAPE)), dtype)
    assert torch.equal(reduced, fold.fold_reduce(z, x, view, list(SHAPE)))
    # As under autocast: the input in float32, its folded form and that form's gradient narrow.
    wide_x, other = x.float(), torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    assert_near(fold.fold(wide_x, pool, view, dtype), reference.fold(x.double(), wide, view, torch.float64), dtype)
    found = fold.unfold(z, pool, view, other)
    assert_near(found, reference.unfold(z.double(), wide, view, torch.float64), torch.bfloat16, other)
    total = torch.ones(SHAPE, device=DEVICE)
    fold.fold_reduce_(total, z, wide_x, view)
    assert_near(total - 1, reference.fold_reduce(z.double(), x.double(), view, list(SHAPE)), torch.float32)


def test_folds_of_strided_inputs_and_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    view = FOLDS["shorter last span"]
    monkeypatch.setattr(tuning, "FOLD_ELEMENTS", 64)
    monkeypatch.setattr(tuning, "SCALES_ELEMENTS", 64)
    fold._scales_launch.cache_clear()
    pool, x = randn(*SHAPE, dtype=torch.float32), randn(view.cols, 40, dtype=torch.float32).t()
    z = randn(view.folded_cols, 40, dtype=torch.float32).t()
    assert_near(fold.fold(x, pool, view, x.dtype), reference.fold(x, pool, view, x.dtype), torch.float32)
    assert_near(fold.unfold(z, pool, view, z.dtype), reference.unfold(z, pool, view, z.dtype), torch.float32)
    found = fold.fold_reduce(z, x, view, list(SHAPE))
    assert_near(found, reference.fold_reduce(z, x, view, list(SHAPE)), torch.float32)
    fold._scales_launch.cache_clear()


class Grouped:
    """A matrix of several groups in a pool, and its block-diagonal form."""

    def __init__(self, rows: int, cols: int, tile: tuple[int, int], num_slots: int, groups: int, sign: str) -> None:
        tile_map = TileMap(400, num_slots, tile, 11, sign=sign)
        self.view: TileView = tile_map.view(rows, cols, 3 * tile[0] * tile[1])._replace(groups=groups)
        self.table = torch.tensor(tile_map.chunk_table(), dtype=torch.int64, device=DEVICE)
        self.shape = num_slots * tile[0], tile[1]

    def blocks(self, pool: Tensor) -> Tensor:
        return torch.block_diag(*reference.gather(pool, self.table, self.view, 0.7).chunk(self.view.groups))


GROUPED = {
    "padded columns": Grouped(64, 41, (16, 16), 7, 2, "row"),
    "four groups, element signs": Grouped(64, 40, (16, 32), 5, 4, "element"),
    "whole columns": Grouped(256, 64, (64, 32), 5, 2, "row"),
    "one slot": Grouped(64, 32, (32, 16), 1, 2, "tile"),
}
each_matrix = pytest.mark.parametrize("matrix", GROUPED.values(), ids=GROUPED.keys())


@each_matrix
@pytest.mark.parametrize(
    ("dtype", "num_rows", "biased"),
    [
        (torch.float32, 1, True),
        (torch.bfloat16, 3, False),
        (torch.float32, 40, False),
        (torch.bfloat16, 150, True),
        pytest.param(torch.float16, 3, True, marks=pytest.mark.long),
        pytest.param(torch.float32, 150, True, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, 1, False, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_products_with_groups(matrix: Grouped, dtype: torch.dtype, num_rows: int, biased: bool) -> None:
    pool = randn(*matrix.shape, dtype=dtype)
    view, block = matrix.view, matrix.blocks(pool.double())
    x, grad = randn(num_rows, view.input_cols, dtype=dtype), randn(num_rows, view.rows, dtype=dtype)
    bias = randn(view.rows, dtype=dtype) if biased else None
    wide_bias = randn(view.input_cols, dtype=dtype) if biased else None
    arguments = matrix.table, view, 0.7
    expected = x.double() @ block.t() + (0 if bias is None else bias.double())
    assert_near(linear.linear(x, pool, bias, *arguments), expected, dtype)
    expected = grad.double() @ block + (0 if wide_bias is None else wide_bias.double())
    assert_near(linear.linear_t(grad, pool, wide_bias, *arguments), expected, dtype)
    wanted = reference.linear_reduce(grad.double(), x.double(), *arguments, list(matrix.shape))
    assert_near(linear.linear_reduce(grad, x, *arguments, list(matrix.shape)), wanted, dtype)
    total = torch.ones(matrix.shape, device=DEVICE)
    linear.linear_reduce_(total, grad, x, *arguments)
    torch.testing.assert_close((total - 1).double(), wanted, rtol=0, atol=TOLERANCE[dtype] * float(wanted.abs().max()))


def test_products_with_groups_larger_than_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SCRATCH_ELEMENTS", 1 << 10)
    linear._panels.cache_clear()
    dtype, matrix = torch.float32, GROUPED["four groups, element signs"]
    pool = randn(*matrix.shape, dtype=dtype)
    view, block = matrix.view, matrix.blocks(pool.double())
    x, grad, bias = (randn(*shape, dtype=dtype) for shape in ((9, view.input_cols), (9, view.rows), (view.rows,)))
    arguments = matrix.table, view, 0.7
    assert_near(linear.gathered(x, pool, bias, *arguments), x.double() @ block.t() + bias.double(), dtype)
    assert_near(linear.linear_t(grad, pool, None, *arguments), grad.double() @ block, dtype)
    wanted = reference.linear_reduce(grad.double(), x.double(), *arguments, list(matrix.shape))
    assert_near(linear.linear_reduce(grad, x, *arguments, list(matrix.shape)), wanted, dtype)
    total = torch.zeros(matrix.shape, device=DEVICE)
    linear.linear_reduce_(total, grad, x, *arguments)
    assert_near(total, wanted, dtype)


@each_matrix
@pytest.mark.parametrize("num_rows", [1, 3, 70])
def test_every_kernel_of_products_with_groups(matrix: Grouped, num_rows: int) -> None:
    dtype = torch.bfloat16
    pool = randn(*matrix.shape, dtype=dtype)
    view, x = matrix.view, poisoned(randn(num_rows, matrix.view.input_cols, dtype=dtype))
    bias = randn(view.rows, dtype=dtype)
    expected = x.double() @ matrix.blocks(pool.double()).t() + bias.double()
    kernels = [linear.gathered]
    if num_rows <= 32:
        kernels.append(few_rows.split)
    if num_rows == 1:
        kernels.append(few_rows.one_row)
    if tuning.reads_by_slot(view, num_rows) and view.sign != 2:
        kernels.append(few_rows.by_slot)
    if many_rows.fits(x.clone(), pool, view):
        kernels.append(many_rows.many_rows)
        x = x.clone()
    for kernel in kernels:
        assert_near(kernel(x, pool, bias, matrix.table, view, 0.7), expected, dtype)


ONE_ROW = {
    "row signs": ((64, 64), 2, "row", 4, torch.bfloat16),
    "padded columns, element signs": ((32, 16), 4, "element", 2, torch.float32),
    "tile signs": ((16, 32), 1, "tile", 8, torch.float16),
}


@pytest.mark.parametrize(("tile", "groups", "sign", "folds", "dtype"), ONE_ROW.values(), ids=ONE_ROW.keys())
@pytest.mark.parametrize("learned", [True, False], ids=["scales", "signs"])
def test_one_row_is_folded_where_it_is_multiplied(
    tile: tuple[int, int], groups: int, sign: str, folds: int, dtype: torch.dtype, learned: bool
) -> None:
    width = 3 * tile[1] - 5
    matrix = Grouped(groups * tile[0], width, tile, 40, groups, sign)
    view = FoldView(width * folds, folds, groups, 2 * tile[1], -77, 40 if learned else -1)
    pool = randn(*matrix.shape, dtype=dtype)
    x, bias = poisoned(randn(1, view.cols, dtype=dtype)), randn(matrix.view.rows, dtype=dtype)
    arguments = matrix.table, matrix.view, view, 0.7
    wanted = reference.folded_linear(x.double(), pool.double(), bias.double(), *arguments)
    assert few_rows.folds_fit(matrix.view, view)
    found = few_rows.one_row(x, pool, bias, matrix.table, matrix.view, 0.7, view)
    assert_near(found, wanted, dtype)
    assert_near(linear.folded_linear(x, pool, bias, *arguments), wanted, dtype)
    for odd in (randn(2 * matrix.view.rows, dtype=dtype)[::2], randn(1, dtype=dtype)) if learned else ():
        wanted = reference.folded_linear(x.double(), pool.double(), odd.double(), *arguments)
        assert_near(linear.folded_linear(x, pool, odd, *arguments), wanted, dtype)
    three = randn(3, view.cols, dtype=dtype)
    wanted = reference.folded_linear(three.double(), pool.double(), None, *arguments)
    assert_near(linear.folded_linear(three, pool, None, *arguments), wanted, dtype)


def test_the_kernels_agree_with_the_operators_of_a_folded_layer() -> None:
    view = FoldView(256, 4, 2, 64, 5, -1)
    matrix = Grouped(128, 64, (32, 32), 6, 2, "row")
    pool, x = randn(*matrix.shape, dtype=torch.float32), randn(9, 256, dtype=torch.float32)
    found = linear.linear(fold.fold(x, None, view, x.dtype), pool, None, matrix.table, matrix.view, 0.7)
    wanted = ops.linear(ops.fold(x, None, view), pool, None, matrix.table, matrix.view, 0.7)
    assert_near(found, wanted, torch.float32)

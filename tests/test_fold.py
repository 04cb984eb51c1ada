"""Folding: the mapping, the operators beside their definition, converted models beside their dense weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import roastify
from roastify import RoastConfig
from roastify.artifact import MANIFEST, WEIGHTS, seal
from roastify.conversion.converted import pool_of
from roastify.conversion.fx_pass import trace
from roastify.conversion.planner import make_plan
from roastify.errors import ConfigError, PlanError
from roastify.files import digest_of_file
from roastify.kernels import dispatch, ops, reference
from roastify.kernels.view import FoldView
from roastify.pool.fold import folded, folded_squares, unfolded
from roastify.pool.mapping import TileMap, fold_key, mix64
from roastify.pool.plan import RoastPlan

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

FOLDS = {
    "two": FoldView(24, 2, 1, 4, fold_key(3, 0)),
    "two hashes": FoldView(24, 4, 2, 4, fold_key(3, 1)),
    "shorter last span": FoldView(40, 4, 4, 3, fold_key(3, 2)),
    "all hashes": FoldView(48, 8, 8, 64, fold_key(-5, 7)),
    "sixteen": FoldView(96, 16, 2, 2, fold_key(0, 0)),
}
each_fold = pytest.mark.parametrize("view", FOLDS.values(), ids=FOLDS.keys())


def with_scales(view: FoldView) -> FoldView:
    return view._replace(first_scale=7)


def a_pool(dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(**options)


def fold_matrix(view: FoldView, pool: Tensor | None = None) -> Tensor:
    """Return `S` of `z = S · x`, `[hashes·width, cols]`, one element at a time, as `FoldView` defines it."""
    matrix = torch.zeros(view.folded_cols, view.cols, dtype=torch.float64)
    for g, i, p in itertools.product(range(view.hashes), range(view.fold), range(view.width)):
        span = p // view.span
        sign = -1.0 if mix64(view.key % (1 << 64), i * view.num_spans + span) >> 63 else 1.0
        sign *= (-1) ** bin(g & i).count("1")
        if pool is not None and view.first_scale >= 0:
            place = view.first_scale + (g * view.fold + i) * view.num_spans + span
            sign *= 1.0 + float(pool.detach().double().reshape(-1)[place])
        matrix[g * view.width + p, i * view.width + p] = sign
    return matrix


# The mapping.


def test_golden_signs() -> None:
    # Recorded when version 2 was made. They must never change.
    assert fold_key(0, 0) == GOLDEN_KEYS[0] and fold_key(-5, 7) == GOLDEN_KEYS[1]
    signs = reference.fold_factors(None, FoldView(64, 4, 2, 4, fold_key(0, 0)), torch.float64, torch.device("cpu"))
    text = "".join("+" if sign > 0 else "-" for sign in signs[:, :, ::4].flatten().tolist())
    assert text == GOLDEN_SIGNS


GOLDEN_KEYS = (5085904676777434204, 10279659028870017832)
GOLDEN_SIGNS = "+--+----++-++++++--+++++++-+----"


@each_fold
def test_each_bucket_holds_as_many_columns_as_the_fold_and_hashes_are_orthogonal(view: FoldView) -> None:
    matrix = fold_matrix(view)
    by_hash = matrix.view(view.hashes, view.width, view.cols)
    assert (by_hash.abs().sum(2) == view.fold).all()
    assert (by_hash.abs().sum(1) == 1).all()
    assert torch.equal(matrix @ matrix.t(), view.fold * torch.eye(view.folded_cols, dtype=torch.float64))


# The operators.


@each_fold
@pytest.mark.parametrize("learned", [False, True], ids=["signs", "scales"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (20,), (2, 5), (0,)], ids=str)
def test_operators_are_products_with_the_fold_matrix(
    view: FoldView, learned: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    view = with_scales(view) if learned else view
    pool = a_pool(dtype, requires_grad=False)
    matrix = fold_matrix(view, pool)
    x, z = torch.randn(*shape, view.cols).to(dtype), torch.randn(*shape, view.folded_cols).to(dtype)
    expected = {"fold": x.double() @ matrix.t(), "unfold": z.double() @ matrix}
    for found, wanted in ((ops.fold(x, pool, view), expected["fold"]), (ops.unfold(z, pool, view), expected["unfold"])):
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    assert torch.equal(ops.fold(x, pool, view), ops.fold(x, pool, view))


@each_fold
def test_derivatives_of_every_operator(view: FoldView) -> None:
    view, pool = with_scales(view), a_pool()
    x = torch.randn(2, 3, view.cols, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, view.folded_cols, dtype=torch.float64, requires_grad=True)
    for call, argument in ((ops.fold, x), (ops.unfold, z)):

        def function(a: Tensor, p: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(a, p, view)

        assert gradcheck(function, (argument, pool), fast_mode=True)
        assert gradgradcheck(function, (argument, pool), fast_mode=True)


@pytest.mark.parametrize("learned", [False, True], ids=["signs", "scales"])
@pytest.mark.parametrize("name", ["fold", "unfold", "fold_reduce", "fold_reduce_"])
def test_opcheck(name: str, learned: bool) -> None:
    view = FOLDS["two hashes"]
    view = with_scales(view) if learned else view
    pool = a_pool(torch.float32) if learned else None
    x = torch.randn(3, view.cols, requires_grad=True)
    z = torch.randn(3, view.folded_cols, requires_grad=True)
    arguments: dict[str, tuple[Any, ...]] = {
        "fold": (x, pool, list(view), torch.float32),
        "unfold": (z, pool, list(view), torch.bfloat16),
        "fold_reduce": (z, x, list(view), [64, 8]),
        "fold_reduce_": (torch.zeros(64, 8), z.detach(), x.detach(), list(view)),
    }
    torch.library.opcheck(getattr(torch.ops.roastify, name).default, arguments[name])


def test_an_input_without_a_gradient_gets_none() -> None:
    view = FOLDS["two hashes"]
    folded_input = ops.fold(torch.randn(2, view.cols, dtype=torch.float64), a_pool(), view)
    assert not folded_input.requires_grad


def test_refusals_of_operators() -> None:
    view = FOLDS["two hashes"]
    with pytest.raises(RuntimeError, match="last size must be 24"):
        ops.fold(torch.randn(2, 23), None, view)
    with pytest.raises(RuntimeError, match="last size must be 12"):
        ops.unfold(torch.randn(2, 13), None, view)
    with pytest.raises(RuntimeError, match="expected one dtype"):
        ops.fold(torch.randn(2, 24), a_pool(), with_scales(view))


GROUPS = [(2, (8, 8), 3), (4, (8, 4), 50), (2, (16, 16), 5)]


@pytest.mark.parametrize(("groups", "tile", "num_slots"), GROUPS)
@pytest.mark.parametrize("sign", ["row", "element", "tile", "none"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_groups_are_blocks_on_the_diagonal(
    groups: int, tile: tuple[int, int], num_slots: int, sign: str, rows: int
) -> None:
    tile_map = TileMap(500, num_slots, tile, seed=4, sign=sign)
    view = tile_map.view(6 * tile[0] // groups * groups, 37, 2 * tile[0] * tile[1])._replace(groups=groups)
    if view.rows // groups % tile[0]:
        view = view._replace(rows=2 * groups * tile[0])
    table = torch.tensor(tile_map.chunk_table(), dtype=torch.int64)
    pool = torch.randn(num_slots * tile[0], tile[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(view.rows, dtype=torch.float64, requires_grad=True)
    x = torch.randn(rows, view.input_cols, dtype=torch.float64, requires_grad=True)
    y = torch.randn(rows, view.rows, dtype=torch.float64, requires_grad=True)
    wide_bias = torch.randn(view.input_cols, dtype=torch.float64)

    def block() -> Tensor:
        return torch.block_diag(*ops.gather(pool, table, view, 0.7).chunk(groups))

    for found, wanted, argument in (
        (ops.linear(x, pool, bias, table, view, 0.7), F.linear(x, block(), bias), x),
        (ops.linear_t(y, pool, wide_bias, table, view, 0.7), y @ block() + wide_bias, y),
    ):
        torch.testing.assert_close(found, wanted)
        weight = torch.randn_like(found)
        mine = torch.autograd.grad((found * weight).sum(), (argument, pool), retain_graph=True)
        torch.testing.assert_close(mine, torch.autograd.grad((wanted * weight).sum(), (argument, pool)))


def test_the_joined_operator_and_its_derivative() -> None:
    tile_map = TileMap(50, 5, (8, 8), seed=4, sign="row")
    view = tile_map.view(32, 16, 0)._replace(groups=2)
    fold_view = FoldView(64, 4, 2, 8, 5, 3)
    table = torch.tensor(tile_map.chunk_table(), dtype=torch.int64)
    pool, x = torch.randn(40, 8, requires_grad=True), torch.randn(1, 64, requires_grad=True)
    wanted = ops.linear(ops.fold(x, pool, fold_view), pool, None, table, view, 0.7)
    with torch.no_grad():
        assert torch.equal(ops.folded_linear(x, pool, None, table, view, fold_view, 0.7), wanted)
    grads = torch.autograd.grad(wanted.sum(), (x, pool))
    direct = torch.ops.roastify.folded_linear.default
    for call in (ops.folded_linear, lambda *args: direct(*args[:4], list(args[4]), list(args[5]), args[6])):
        found = call(x, pool, None, table, view, fold_view, 0.7)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), (x, pool)), grads)
    torch.library.opcheck(direct, (x.detach(), pool.detach(), None, table, list(view), list(fold_view), 0.7))
    with torch.no_grad(), pytest.raises(RuntimeError, match="last size must be 64"):
        ops.folded_linear(torch.randn(1, 63), pool, None, table, view, fold_view, 0.7)


@pytest.mark.parametrize("biased", [False, True])
def test_kept_blocks_are_multiplied_as_the_operator_does(biased: bool) -> None:
    matrix = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 15, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True) if biased else None
    wanted = F.linear(x, torch.block_diag(*matrix.chunk(3)), bias)
    torch.testing.assert_close(ops.blocks_linear(x, matrix, bias, 3), wanted)
    arguments = (x, matrix) if bias is None else (x, matrix, bias)

    def function(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.blocks_linear(x, matrix, bias, 3)

    assert gradcheck(function, arguments, fast_mode=True)
    assert gradgradcheck(function, arguments, fast_mode=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), wanted)


# Matrices.


@each_fold
def test_a_dense_matrix_is_the_narrow_one_times_the_fold(view: FoldView) -> None:
    view, pool = with_scales(view), a_pool(requires_grad=False)
    matrix = torch.randn(2 * view.hashes, view.width, dtype=torch.float64)
    blocks = fold_matrix(view, pool).view(view.hashes, view.width, view.cols)
    expected = torch.cat([rows @ block for rows, block in zip(matrix.chunk(view.hashes), blocks, strict=True)])
    dense = unfolded(matrix, pool, view)
    torch.testing.assert_close(dense, expected)
    other = torch.randn_like(dense)
    torch.testing.assert_close((folded(other, pool, view) * matrix).sum(), (other * dense).sum())
    squares = torch.cat([rows @ (block**2).t() for rows, block in zip(other.chunk(view.hashes), blocks, strict=True)])
    torch.testing.assert_close(folded_squares(other, pool, view), squares)


# Converted models.


class Attention(nn.Module):
    """Three projections of one value and a fourth of another, as in a transformer."""

    def __init__(self, width: int = 64, bias: bool = True) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, 2 * width, bias=bias)
        self.out = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (self.query(x) * self.key(x)).softmax(-1).repeat(1, 2) * self.value(x)
        return x + self.out(mixed)


class Opaque(Attention):
    """The same, with a branch that stops torch.fx behind its first layers."""

    def forward(self, x: Tensor) -> Tensor:
        width, rest = (*x.shape[-1:], -1)
        query, key, value = self.query(x), self.key(x).view(rest, width), self.value(x)
        if float(query.detach().sum()) > 1e9:
            return x
        return x + self.out((query * key).softmax(-1).repeat(1, 2) * value)


def a_model(kind: type[nn.Module] = Attention, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for _ in range(layers)))


def settings(**changes: Any) -> RoastConfig:
    return RoastConfig(**{"ratio": 8.0, "fold": 4, "tile": "8x8", **changes})


CONVERSIONS = {
    "one hash": settings(fold_hashes=1),
    "two hashes": settings(),
    "all hashes": settings(fold_hashes=4),
    "scales": settings(learned_scales=True),
    "element signs, wide fold": settings(fold=8, sign="element", tile="8x4"),
    "projected": settings(init="project", learned_scales=True),
    "no preconditioner": settings(precondition=False),
    "local": settings(sharing="local"),
}
each_conversion = pytest.mark.parametrize("config", CONVERSIONS.values(), ids=CONVERSIONS.keys())


def moved_scales(model: nn.Module) -> nn.Module:
    """Give every learned scale a value of its own."""
    pool = pool_of(model)
    with torch.no_grad():
        pool.weight[pool.num_slots * pool.tile[0] :].normal_(0.0, 0.3)
    return model


@each_conversion
def test_a_folded_model_computes_what_its_dense_weights_compute(config: RoastConfig) -> None:
    model = moved_scales(roastify.convert(a_model(), config=config))
    plan = pool_of(model).plan
    assert any(tensor.fold is not None for tensor in plan.shared)
    x = torch.randn(5, 64, requires_grad=True)
    dense = roastify.densify(copy.deepcopy(model))
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1]), dense(x[:1]), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x[:1]), dense(x[:1]), rtol=0.1, atol=0.1)
    (grad_x,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(grad_x, torch.autograd.grad(dense(x).square().sum(), x)[0], rtol=1e-4, atol=1e-4)


@each_conversion
@pytest.mark.parametrize("rows", [5, 200], ids=["few rows", "kept weights"])
def test_the_pool_gradient_is_that_of_the_dense_weights(config: RoastConfig, rows: int) -> None:
    model = moved_scales(roastify.convert(a_model(), config=config)).double()
    x = torch.randn(rows, 64, dtype=torch.float64)
    model(x).square().sum().backward()
    found = pool_of(model).weight.grad
    pool_of(model).weight.grad = None
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = {f"{name}.weight": model.get_submodule(name).weight for name in names}
    dense = roastify.densify(copy.deepcopy(model))
    torch.func.functional_call(dense, weights, (x,)).square().sum().backward()
    assert found is not None
    torch.testing.assert_close(found, pool_of(model).weight.grad)


@pytest.mark.parametrize("learned", [False, True], ids=["signs", "scales"])
def test_gamma_is_the_energy_of_the_weights_that_read_each_element(learned: bool) -> None:
    dense = nn.Sequential(Attention(16))
    config = settings(ratio=4.0, learned_scales=learned, min_numel=0, tile="8x4")
    model = roastify.convert(dense, config=config).double()
    pool = pool_of(model)
    gamma = torch.zeros(pool.weight.numel(), dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            gamma += _squared_derivatives(model, module)
    divided = 1 / pool.per_slot[:, None].expand(-1, pool.slot_size).clone()
    divided[pool.uneven_slots] = 1 / pool.uneven
    of_tiles = slice(0, pool.num_slots * pool.slot_size)
    torch.testing.assert_close(divided.flatten()[of_tiles], gamma[of_tiles].where(gamma[of_tiles] > 0, 1.0))
    if learned:
        # Expected over random pools: each scale scales many weights of this pool.
        count = pool.plan.scale_numel
        found, wanted = divided.flatten()[of_tiles.stop :][:count], gamma[of_tiles.stop :][:count]
        assert count and ((found / wanted - 1).abs() < 0.5).all()


def _squared_derivatives(model: nn.Module, module: nn.Module) -> Tensor:
    """Return the sum over a layer's weights of their squared derivatives by every pool element."""
    shared, pool = module._roast["weight"], pool_of(model)  # type: ignore[union-attr,index]
    values = pool.weight.detach().requires_grad_()
    weight = unfolded(ops.gather(values, pool.table, shared.view, shared.scale), values, shared.fold).flatten()
    total = torch.zeros(values.numel(), dtype=torch.float64)
    for number in range(weight.numel()):
        (grad,) = torch.autograd.grad(weight[number], values, retain_graph=True)
        total += grad.flatten().square()
    return total


def test_a_projected_pool_is_the_nearest_to_the_dense_weights() -> None:
    dense = a_model()
    model = roastify.convert(dense, config=settings(init="project")).double()
    error = torch.zeros((), dtype=torch.float64)
    for name, parameter in dense.named_parameters():
        if name.endswith("weight"):
            error = error + (model.get_submodule(name[:-7]).weight - parameter.double()).square().sum()
    error.backward()
    grad = pool_of(model).weight.grad
    assert grad is not None and float(error.detach()) > 0 and grad.abs().max() < 1e-5


def test_scales_of_a_shorter_last_span_have_their_own_energy() -> None:
    # 20 buckets in a span of 16 and one of 4.
    model = nn.Sequential(nn.Linear(160, 64), nn.Linear(64, 160))
    plan = roastify.convert(model, config=settings(fold=8, learned_scales=True, tile="8x4"))[0].roast_pool.plan
    narrow = dataclasses.replace(plan, folds=tuple(dataclasses.replace(fold, span=16) for fold in plan.folds))
    energies = narrow.scale_energies()[: narrow.folds[0].view(0, 0).num_scales]
    assert len(energies) == 2 * 8 * 2 and energies[0] == pytest.approx(4 * energies[1])


def test_ratio_1_folds_nothing_and_is_the_identity() -> None:
    model = a_model()
    converted = roastify.convert(model, config=RoastConfig(ratio=1, init="project"))
    assert not pool_of(converted).plan.folds and pool_of(converted).plan.mapping_version == 1
    x = torch.randn(3, 64)
    assert torch.equal(converted[0].query.weight, model[0].query.weight) and torch.equal(converted(x), model(x))


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Count the calls of an operator's implementation."""
    calls: list[int] = []
    run = dispatch.implementations[name]
    monkeypatch.setitem(dispatch.implementations, name, lambda *args: (calls.append(1), run(*args))[1])
    return calls


@pytest.mark.parametrize("kind", [Attention, Opaque])
@pytest.mark.parametrize("record", [True, False], ids=["training", "no_grad"])
def test_layers_with_one_input_fold_it_once(
    kind: type[nn.Module], record: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = roastify.convert(a_model(kind), config=settings(learned_scales=True))
    folds, unfolds = counted(monkeypatch, "fold"), counted(monkeypatch, "unfold")
    with torch.set_grad_enabled(record):
        out = model(torch.randn(5, 64, requires_grad=True))
    # In each of two layers: one for query, key and value, one for out.
    assert len(folds) == 4
    if record:
        out.sum().backward()
        assert len(unfolds) == 4


def test_an_input_that_changed_is_folded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            one = self.one(x)
            return one + self.two(x.add_(1.0))

    torch.manual_seed(0)
    model = roastify.convert(Changing(), config=settings())
    folds = counted(monkeypatch, "fold")
    x = torch.randn(3, 64)
    found = model(x.clone())
    assert len(folds) == 2
    torch.testing.assert_close(found, roastify.densify(model)(x.clone()))


def test_checkpoints_and_repeated_calls() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.inside, self.after = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            # All three read the same input, one of them in a region that is computed again.
            before = self.before(x)
            inside = checkpoint(self.inside, x, use_reentrant=False)
            return before * inside * self.after(x)

    torch.manual_seed(0)
    model = roastify.convert(Checkpointed(), config=settings(learned_scales=True))
    x = torch.randn(3, 64, requires_grad=True)
    dense = roastify.densify(copy.deepcopy(model))
    for _ in range(2):
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(dense(x).square().sum(), x)[0], rtol=1e-4, atol=1e-4)


class Region(nn.Module):
    """Three layers that read one input, in one region that is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


@pytest.mark.parametrize("learned", [False, True], ids=["signs", "scales"])
@pytest.mark.parametrize("kind", [Region, lambda: nn.Sequential(Region(), Region())], ids=["one", "two"])
def test_a_region_that_is_computed_again_saves_the_same(kind: Callable[[], nn.Module], learned: bool) -> None:
    torch.manual_seed(0)
    model = roastify.convert(kind(), config=settings(learned_scales=learned))
    x = torch.randn(3, 64, requires_grad=True)
    dense = roastify.densify(copy.deepcopy(model))
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(dense(x).square().sum(), x)[0], rtol=1e-4, atol=1e-4)


def _doubled_data(h: Tensor) -> None:
    h.data = h.data * 2


@pytest.mark.parametrize(
    "change",
    [Tensor.detach_, Tensor.requires_grad_, _doubled_data, lambda h: h.mul_(2)],
    ids=["detach_", "requires_grad_", "data", "mul_"],
)
@pytest.mark.parametrize("tracked", [True, False])
def test_a_changed_input_is_not_taken_for_the_last_one(change: Callable[[Tensor], Any], tracked: bool) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = x * 1.0
            one = self.one(h)
            change(h)
            return one, self.two(h), h

    torch.manual_seed(0)
    model = roastify.convert(Changing(), config=settings())
    dense = roastify.densify(copy.deepcopy(model))
    for other in (model, dense):
        other.requires_grad_(False)
    x = torch.randn(3, 64, requires_grad=tracked)
    ours, theirs = model(x), dense(x)
    torch.testing.assert_close(ours[1], theirs[1])
    assert [out.requires_grad for out in ours] == [out.requires_grad for out in theirs]
    if theirs[1].requires_grad:
        wrt = x if tracked and change is not Tensor.detach_ else None
        for inputs in ([x] if wrt is not None else []) + ([ours[2]] if not tracked else []):
            other = theirs[2] if inputs is ours[2] else inputs
            grads = torch.autograd.grad(ours[1].sum(), inputs), torch.autograd.grad(theirs[1].sum(), other)
            torch.testing.assert_close(*grads)


def test_autocast_and_compile() -> None:
    model = roastify.convert(a_model(), config=settings(learned_scales=True))
    dense = roastify.densify(copy.deepcopy(model))
    x = torch.randn(6, 64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), dense(x).float(), rtol=0.1, atol=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    found = pool_of(model).weight.grad
    pool_of(model).weight.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close(found, pool_of(model).weight.grad)


def test_conv1d_of_transformers_folds_its_input() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    assert transformers
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(128, 64), nn.GELU(), Conv1D(64, 128))
    converted = roastify.convert(model, config=settings())
    plan = pool_of(converted).plan
    assert [(tensor.rows, tensor.cols, tensor.transposed) for tensor in plan.shared] == [
        (128, 16, True),
        (64, 32, True),
    ]
    x = torch.randn(4, 64)
    torch.testing.assert_close(converted(x), roastify.densify(copy.deepcopy(converted))(x))


def test_what_reads_the_whole_weight_gets_it() -> None:
    model = roastify.convert(a_model(), config=settings())
    layer = model[0].query
    assert layer.weight.shape == (64, 64)
    x = torch.randn(3, 64)
    torch.testing.assert_close(x @ layer.weight.t() + layer.bias, layer(x))
    torch.testing.assert_close(layer._roast["weight"].linear_t(x, None), x @ layer.weight)
    torch.testing.assert_close(layer._roast["weight"].rows(torch.tensor([3, 1])), layer.weight[[3, 1]])
    assert layer._roast["weight"].part(8, (8, 64)) is None


# Plans.


def plan_of(model: nn.Module, **changes: Any) -> RoastPlan:
    return roastify.plan(model, config=settings(**changes))


@pytest.mark.parametrize("kind", [Attention, Opaque])
def test_the_pass_finds_layers_that_read_one_input(kind: type[nn.Module]) -> None:
    folds = {tensor.name: tensor.fold for tensor in plan_of(a_model(kind)).shared}
    assert folds == {
        **{f"{layer}.{name}.weight": 2 * layer for layer in (0, 1) for name in ("query", "key", "value")},
        **{f"{layer}.out.weight": 2 * layer + 1 for layer in (0, 1)},
    }


def test_plans_differ_without_the_pass() -> None:
    model = a_model()
    config = settings(learned_scales=True)
    forest = trace(model)
    with_pass = make_plan(model, forest, config)
    for info in forest.parameters:
        info.uses = [use.__class__(use.module, use.attribute, use.op, use.through) for use in info.uses]
    without = make_plan(model, forest, config)
    assert len(with_pass.folds) == 4 and len(without.folds) == 8
    assert with_pass.scale_numel < without.scale_numel


def test_a_small_layer_does_not_make_all_tiles_small() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)), nn.Linear(1024, 48))
    plan = roastify.plan(model, config=RoastConfig(ratio=10, fold=8))
    assert plan.tile[0] >= 64
    assert [tensor.fold is None for tensor in plan.shared] == [False] * 4 + [True]


def test_a_weight_that_opaque_code_reads_is_not_folded() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.detach().sum()) > 1e9:
                return x
            return self.two(x) * self.one.weight.sum() + self.one(x)

    folds = {tensor.name: tensor.fold for tensor in plan_of(Reading()).shared}
    assert folds == {"one.weight": None, "two.weight": 0}


def test_a_weight_that_other_code_reads_is_not_folded() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
            self.read = nn.Linear(64, 64)
            self.head.weight = self.table.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.body(self.table(index))) * self.read.weight.sum() + self.read(self.table(index))

    folds = {tensor.name: tensor.fold for tensor in plan_of(Tied()).shared}
    assert folds == {"table.weight": None, "body.weight": 0, "read.weight": None}


def test_parameters_without_a_layer_fold_where_the_pass_saw_only_products() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out_in, self.in_out, self.sliced = (nn.Parameter(torch.randn(64, 64)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.out_in) + x @ self.in_out + F.linear(x, self.sliced[:64])

    class Unseen(Raw):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().sum()) < 1e9 else x

    torch.manual_seed(0)
    model = Raw()
    converted = roastify.convert(model, config=settings(ratio=4.0))
    shared = {tensor.name: (tensor.fold, tensor.transposed) for tensor in pool_of(converted).plan.shared}
    assert shared == {"out_in": (0, False), "in_out": (0, True), "sliced": (None, False)}
    x = torch.randn(5, 64)
    torch.testing.assert_close(converted(x), roastify.densify(copy.deepcopy(converted))(x))
    with pytest.raises(PlanError, match="fold = 4 fits no weight"):
        plan_of(Unseen(), ratio=4.0)


@pytest.mark.parametrize("config", [settings(), settings(learned_scales=True, fold_hashes=4)], ids=["signs", "scales"])
def test_what_is_stored_is_what_the_plan_promises(config: RoastConfig) -> None:
    model = roastify.convert(a_model(layers=6), config=config)
    plan = pool_of(model).plan
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.stored_numel
    assert plan.achieved_ratio >= plan.ratio
    # Within a slot of what was asked for.
    assert plan.total_numel / (plan.stored_numel + plan.slot_size) < plan.ratio
    assert (plan.scale_slots > 0) == config.learned_scales
    assert plan.folded_numel == 4 * plan.multiplied_numel
    assert plan.mapping_version == 2


def test_auto_folds_large_layers_as_far_as_the_ratio_allows() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 512), nn.Linear(512, 256), nn.Linear(256, 1000))
        odd = nn.Linear(2047, 2048)
    for ratio, expected in ((1, 1), (1.9, 1), (3, 2), (4, 4), (7, 4), (10, 8), (50, 8)):
        plan = roastify.plan(model, ratio=ratio)
        sizes = [tensor.numel // tensor.matrix_numel for tensor in plan.shared if tensor.numel == 2048**2]
        assert sizes == [expected], ratio
        assert all(tensor.fold is None for tensor in plan.shared if tensor.numel < 1 << 20)
    assert not roastify.plan(odd, ratio=10).folds
    with torch.device("meta"):
        head = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 32 * 1024))
    assert [tensor.fold for tensor in roastify.plan(head, ratio=10).shared] == [0, None]
    assert not roastify.plan(model, config=RoastConfig(mapping="cyclic")).folds
    assert not roastify.plan(model, config=RoastConfig(sharing="local")).folds
    assert not roastify.plan(model, config=RoastConfig(fold="none")).folds


def test_auto_folds_smaller_layers_beside_a_large_one() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.alone = nn.Linear(1024, 1024), nn.Linear(1024, 256), nn.Linear(1024, 256)
            self.tiny = nn.Linear(1024, 128)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.query(x), self.key(x), self.alone(x + 1), self.tiny(x)

    with torch.device("meta"):
        model = Grouped()
    folds = {tensor.name: tensor.fold for tensor in roastify.plan(model, ratio=10).shared}
    assert folds == {"query.weight": 0, "key.weight": 0, "alone.weight": None, "tiny.weight": None}


def test_refusals_of_settings() -> None:
    for value in (3, 32, 0, True, "two"):
        with pytest.raises(ConfigError, match="fold must be 'auto', 'none' or a power of 2 up to 16"):
            RoastConfig(fold=value)
    with pytest.raises(ConfigError, match=r"fold must not exceed the ratio, 4; found 8"):
        RoastConfig(ratio=4, fold=8)
    with pytest.raises(ConfigError, match="fold_hashes must be a power of 2"):
        RoastConfig(fold_hashes=3)
    with pytest.raises(ConfigError, match="learned_scales must be true or false"):
        RoastConfig(learned_scales="yes")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="fold = 8 fits no weight"):
        roastify.plan(nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60)), config=RoastConfig(fold=8, min_numel=0))


# Exploring code that torch.fx cannot trace.


def endless(self: Any, x: Tensor) -> Tensor:
    while True:
        x = self.one(x)
        if int(x.argmax()) == 0:
            return x


def shrinking(self: Any, x: Tensor) -> Tensor:
    while len(x) > 0:
        x = self.one(x)[1:]
    return x


def swallowing(self: Any, x: Tensor) -> Tensor:
    while int(x.sum()) != 5:
        try:
            x = self.one(x)
        except Exception:
            pass
    return x


def counting(self: Any, x: Tensor) -> Tensor:
    for _ in range(int(x.shape[0]), 10**9):
        x = self.one(x)
    return x


def leaving(self: Any, x: Tensor) -> Tensor:
    if not x.isfinite().all():
        sys.exit(1)
    return self.one(x)


def moving(self: Any, x: Tensor) -> Tensor:
    y = self.one(x)
    if float(y.detach().sum()) > 1e9:
        return y
    for own, other in zip(self.one.parameters(), self.two.parameters(), strict=True):
        other.data.mul_(0.5).add_(own.data)
    self.count.data.add_(1)
    self._buffers["count"].add_(1)
    return y + self.two(x)


def switching(self: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    sys.stdout.write("seen")
    y = self.one(x)
    return y if float(y.sum()) > 0 else self.two(x)


@pytest.mark.parametrize(
    "forward",
    [
        endless,
        shrinking,
        leaving,
        moving,
        switching,
        pytest.param(swallowing, marks=pytest.mark.long),
        pytest.param(counting, marks=pytest.mark.long),
    ],
)
def test_exploration_ends_and_changes_nothing(
    forward: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
            self.register_buffer("count", torch.zeros(()))

    Model.forward = forward  # type: ignore[method-assign]
    torch.manual_seed(0)
    model = Model()
    before = copy.deepcopy(model.state_dict())
    settings_before = torch.is_grad_enabled(), torch.get_default_dtype()
    begun = time.monotonic()
    plan = plan_of(model)
    assert time.monotonic() - begun < 10 and len(plan.shared) == 2
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == settings_before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not capsys.readouterr().out


def test_exploration_goes_past_assertions_and_absent_arguments() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor, other: Tensor | None = None, strict: bool = True) -> Tensor:
            assert x.dim() == 2
            if not x.isfinite().all():
                raise ValueError("not finite")
            source = x if other is None else other
            return self.query(x) * self.key(source) * self.value(source)

    assert [tensor.fold for tensor in plan_of(Cross()).shared] == [0, 0, 0]


def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As transformers marks attention's forward where an argument was renamed."""

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **{"mask" if name == "attention_mask" else name: kwargs[name] for name in kwargs})

    return renamed


class Decorated(nn.Module):
    """Attention that torch.fx cannot trace to its end, behind a decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    @decorated
    @decorated
    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        weights = self.q(x) @ self.k(x).transpose(-1, -2)
        if weights.sum() > 0:
            weights = weights / 2
        return weights.softmax(-1) @ self.v(x)


def test_layers_behind_a_decorator_share_a_fold() -> None:
    assert [tensor.fold for tensor in plan_of(nn.Sequential(nn.Linear(64, 64), Decorated())).shared] == [0, 1, 1, 1]


# Models of transformers.


def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config_class, model_class, config = {
        "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
        "bert": ("BertConfig", "BertModel", {}),
        "gpt2": ("GPT2Config", "GPT2Model", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
        "t5": ("T5Config", "T5Model", {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16}),
    }[name]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = sizes if name in ("llama", "bert") else {}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    made = getattr(transformers, config_class)(vocab_size=96, **sizes, **config, **ends)
    words = torch.randint(3, 96, (2, 7))
    inputs = {"input_ids": words, **({"decoder_input_ids": words} if name == "t5" else {})}
    return getattr(transformers, model_class)(made).eval(), inputs


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_transformers_compute_what_their_dense_weights_compute(name: str) -> None:
    model, inputs = tiny(name)
    converted = moved_scales(roastify.convert(model, config=settings(ratio=4.0, learned_scales=True)))
    plan = pool_of(converted).plan
    together = [tensor.name for tensor in plan.shared if tensor.fold == 0]
    assert len(together) == {"llama": 3, "bert": 3, "gpt2": 1, "t5": 3}[name]
    dense = roastify.densify(copy.deepcopy(converted))
    with torch.no_grad():
        torch.testing.assert_close(converted(**inputs)[0], dense(**inputs)[0], rtol=1e-4, atol=1e-4)


# State and files.


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = moved_scales(roastify.convert(a_model(), config=settings(learned_scales=True)))
    x = torch.randn(3, 64)
    roastify.save(model, tmp_path / "out")
    loaded = roastify.load(tmp_path / "out", model=a_model())
    assert torch.equal(loaded(x), model(x))
    assert pool_of(loaded).plan == pool_of(model).plan
    again = roastify.convert(a_model(), config=settings(learned_scales=True))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_an_artifact_of_mapping_version_2_loads_with_its_golden_values(tmp_path: Any) -> None:
    # What the first roastify with folds wrote for one layer of 16×16, fold 2, two hashes, learned scales, two slots of
    # 4×8 and one for scales. If this test fails, users' artifacts are read differently.
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    pool = torch.arange(1.0, 97.0).view(12, 8) / 8
    save_file({"roast_pool.weight": pool, "fc.bias": torch.zeros(16)}, tmp_path / WEIGHTS)
    kept = {"name": "fc.bias", "aliases": ["fc.bias"], "shape": [16], "dtype": "float32", "op": "Linear"}
    weight = {"name": "fc.weight", "aliases": ["fc.weight"], "shape": [16, 16], "dtype": "float32", "op": "linear"}
    weight |= {"shared": True, "reason": "eligible", "rows": 16, "cols": 8, "num_tiles": 4, "scale": 0.5, "fold": 0}
    plan = {
        "model": "Tiny", "ratio": 2.0, "seed": 0, "tile": [4, 8], "sign": "row", "mapping": "permutation",
        "mapping_version": 2, "sharing": "global", "precondition": True, "num_slots": 2, "dtype": "float32",
        "trainable": True, "owner": "", "pool_std": 1.0,
        "regions": [{"num_tiles": 4, "num_slots": 2, "first_slot": 0, "first_chunk": 0}],
        "tensors": [weight, kept | {"shared": False, "reason": "vector of Linear"}],
        "folds": [{"cols": 16, "fold": 2, "hashes": 2, "span": 64, "first_scale": 0}],
    }  # fmt: skip
    manifest = {
        "format_version": 5,
        "mapping_version": 2,
        "weights": {"file": WEIGHTS, "sha256": digest_of_file(tmp_path / WEIGHTS)},
        "ties": {},
        "buffers": {},
        "state_dict": ["fc.bias", "roast_pool.weight"],
        "plan": plan,
    }
    (tmp_path / MANIFEST).write_text(json.dumps(seal(manifest)), encoding="utf-8")
    dense = roastify.load(tmp_path, model=Tiny()).fc.weight.detach()
    # Rows of four, halves of eight columns: the slot, the sign, and which scale is added to 1.
    blocks = [(0, "+-", 0), (1, "+-", 0), (1, "--", 2), (0, "++", 2)]
    for number, (slot, signs, scale) in enumerate(blocks):
        for half, sign in enumerate(signs):
            factor = (1 + pool[8, scale + half]) * (1 if sign == "+" else -1) / 2
            found = dense[4 * number : 4 * number + 4, 8 * half : 8 * half + 8]
            torch.testing.assert_close(found, pool[4 * slot : 4 * slot + 4] * factor)


def test_a_state_dict_of_another_fold_is_refused() -> None:
    state = roastify.convert(a_model(), config=settings()).state_dict()
    for other in (settings(fold=2), settings(fold_hashes=4), settings(fold="none"), settings(seed=1)):
        model = roastify.convert(a_model(), config=other)
        # Otherwise the shape alone would be refused.
        assert {name: value.shape for name, value in model.state_dict().items()} == {
            name: value.shape for name, value in state.items()
        }
        with pytest.raises(RuntimeError, match="another plan"):
            model.load_state_dict(state)


def test_plans_without_folds_are_as_before() -> None:
    plan = plan_of(a_model(), fold="none")
    values = plan.to_dict()
    assert plan.mapping_version == 1 and "folds" not in values
    assert not any("fold" in tensor for tensor in values["tensors"])
    assert RoastPlan.from_dict(values) == plan
    folded_plan = plan_of(a_model(), learned_scales=True)
    assert RoastPlan.from_dict(folded_plan.to_dict()) == folded_plan
    assert folded_plan.to_dict()["summary"]["folded_multiply_adds"] * 4 == folded_plan.folded_numel


def test_recovery_aligns_folded_layers() -> None:
    teacher = a_model()
    # Inputs that are far from uncorrelated, which the projection takes them for.
    mixture = torch.randn(6, 64)
    batches = [torch.randn(64, 6) @ mixture for _ in range(4)]
    model = roastify.convert(teacher, config=settings(ratio=4.0, init="project"))
    before = (model(batches[0]) - teacher(batches[0])).square().mean()
    roastify.recover(model, teacher, batches, steps=0)
    after = (model(batches[0]) - teacher(batches[0])).square().mean()
    assert after < 0.9 * before


def test_flop_counters_see_the_products_that_are_left() -> None:
    model = roastify.convert(a_model(layers=1), config=settings())
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 64))
    plan = pool_of(model).plan
    folds = sum(fold.hashes * fold.cols for fold in plan.folds)
    # Each of query, key and value folds its own input, as a counter sees every layer's own operations.
    folds += 2 * plan.folds[0].hashes * plan.folds[0].cols
    assert counter.get_total_flops() == 2 * 3 * (plan.multiplied_numel + folds)

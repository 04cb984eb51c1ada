"""Values of every size: what a dtype cannot hold is named, and nothing becomes NaN or 0 in silence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roastify
from roastify.conversion.converted import pool_of
from roastify.errors import CheckpointError, ConversionError
from roastify.kernels import ops
from roastify.pool.mapping import TileMap
from roastify.tensor_values import is_finite, moments


class Two(nn.Module):
    def __init__(self, first: float, second: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(96, 96, bias=False), nn.Linear(96, 96, bias=False)
        self.kept = nn.Parameter(torch.ones(()))
        self.mask = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))
        self.to(dtype)
        for layer, spread in ((self.first, first), (self.second, second)):
            with torch.no_grad():
                layer.weight.copy_(torch.randn(96, 96, dtype=torch.float64) * spread)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.kept


def spread_of(tensor: Tensor) -> float:
    wide = tensor.detach().double()
    return float((wide / wide.abs().max()).std() * wide.abs().max())


@pytest.mark.parametrize("init", ["match", "project"])
@pytest.mark.parametrize("sharing", ["global", "local"])
@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [
        (torch.float32, 1e17, 1.0),
        (torch.float32, 1e25, 1e25),
        (torch.float32, 1e-25, 1e-25),
        (torch.float64, 1e100, 1.0),
        (torch.float64, 1e200, 1e190),
        (torch.float64, 1e-200, 1e-200),
        (torch.float16, 1.0, 1e-4),
        (torch.float16, 1e3, 1e3),
        (torch.bfloat16, 1.0, 1e-15),
    ],
    ids=str,
)
def test_spreads_far_apart_are_kept_and_train(
    dtype: torch.dtype, first: float, second: float, sharing: str, init: str
) -> None:
    dense = Two(first, second, dtype)
    settings = roastify.RoastConfig(ratio=3, sharing=sharing, init=init)  # type: ignore[arg-type]
    model = roastify.convert(dense, config=settings)
    assert all(map(is_finite, model.parameters()))
    for name in ("first", "second"):
        ours, theirs = (spread_of(getattr(each, name).weight) for each in (model, dense))
        # A least-squares fit of colliding values has less spread than they have.
        assert (0.3 if init == "project" else 0.8) < ours / theirs < 1.25
    x = torch.randn(4, 96, dtype=dtype)
    loss = sum(
        (getattr(model, name)(x).double() / spread_of(getattr(dense, name).weight)).pow(2).mean()
        for name in ("first", "second")
    )
    loss.backward()  # type: ignore[union-attr]
    grad = pool_of(model).weight.grad
    # What dense training would move the smaller weights by: their gradient, divided by λ.
    largest = 1 / min(first, second) / min(tensor.scale or 1.0 for tensor in pool_of(model).plan.shared)
    assert grad is not None and (is_finite(grad) or largest > torch.finfo(dtype).max)


@pytest.mark.parametrize("init", ["match", "project"])
@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [(torch.float32, 1e19, 1.0), (torch.bfloat16, 1e-10, 1e10), (torch.float64, 1e200, 1e-200)],
    ids=str,
)
def test_spreads_too_far_apart_are_refused_by_name(dtype: torch.dtype, first: float, second: float, init: str) -> None:
    wide = "float64" if dtype == torch.float64 else "float32"
    small, large = ("first", "second") if first < second else ("second", "first")
    message = (
        rf"^{small}\.weight has a standard deviation of .*, and {large}\.weight one of .*: {wide} cannot hold the "
        rf"square .*; exclude one of them"
    )
    dense = Two(first, second, dtype)
    with pytest.raises(ConversionError, match=message):
        roastify.convert(dense, 3, init=init)  # type: ignore[call-overload]
    roastify.convert(dense, 1.2, init=init, exclude=f"{large}.weight")  # type: ignore[call-overload]


@pytest.mark.parametrize("constant", [1e30, 3e38, -1e9])
@pytest.mark.parametrize("init", ["match", "project"])
def test_a_huge_constant_leaves_the_other_weights_alone(constant: float, init: str) -> None:
    dense = Two(0.1, 1.0)
    nn.init.constant_(dense.second.weight, constant)
    model = roastify.convert(dense, 3, init=init)  # type: ignore[call-overload]
    assert float(model.second.weight.detach().double().mean()) == pytest.approx(constant)
    assert (0.3 if init == "project" else 0.8) < spread_of(model.first.weight) / spread_of(dense.first.weight) < 1.25


def test_values_that_the_pools_dtype_cannot_hold_are_refused_by_name() -> None:
    dense = Two(1e-3, 6e3, torch.float16)
    with torch.no_grad():
        dense.first.weight[0, 0] = 6e4
    # λ of the first weight is 0.15, so its largest value is 4e5 in the pool.
    config = roastify.RoastConfig(ratio=1.5, sharing="local", init="project")
    with pytest.raises(ConversionError, match=r"^first\.weight has values so large that float16 cannot hold"):
        roastify.convert(dense, config=config)


# Float16 and bfloat16 would round them: to 1 or more, and the last one to 0. Products in float32 are exact.
@pytest.mark.parametrize(
    ("dtype", "scale", "size"),
    [
        (torch.float16, 1 + 3 * 2.0**-12, 1.0),
        (torch.bfloat16, 1 + 3 * 2.0**-9, 1.0),
        (torch.float16, 3 * 2.0**-27, 2e4),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", ["none", "tile", "row", "element"])
def test_a_narrow_dtype_does_not_round_the_scale(dtype: torch.dtype, scale: float, size: float, sign: str) -> None:
    tile_map = TileMap(64, 16, (8, 32), 1, "permutation", sign)  # type: ignore[arg-type]
    table = torch.tensor(tile_map.chunk_table())
    view = tile_map.view(64, 64, 0)
    pool = (torch.rand(128, 32, generator=torch.Generator().manual_seed(0)) + 0.5).mul(size).to(dtype)
    identity = torch.eye(64, dtype=dtype)
    exact = ops.gather(pool.double(), table, view, scale)
    found = {
        "gather": ops.gather(pool, table, view, scale),
        "embedding": ops.embedding(torch.arange(64), pool, table, view, scale),
        "one row": torch.cat([ops.linear(row[None], pool, None, table, view, scale) for row in identity]).t(),
        "many rows": ops.linear(identity, pool, None, table, view, scale).t(),
        "transposed": ops.linear_t(identity, pool, None, table, view, scale),
    }
    for name, weight in found.items():
        assert torch.equal(weight, exact.to(dtype)), name


def with_values(name: str, value: float) -> Two:
    model = Two(0.1, 0.1)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("kept", math.nan, True),
        ("kept", math.inf, False),
        ("first.weight", math.nan, True),
        ("first.weight", math.inf, True),
        ("mask", -math.inf, False),
        ("mask", math.nan, True),
    ],
)
def test_parameters_without_finite_values_are_named(tmp_path: Path, name: str, value: float, refused: bool) -> None:
    def converts() -> Any:
        return roastify.convert(with_values(name, value), 3)

    def saves() -> None:
        model = roastify.convert(Two(0.1, 0.1), 3)
        stored = pool_of(model).weight if name == "first.weight" else model.get_parameter(name)
        with torch.no_grad():
            stored.view(-1)[0] = value
        roastify.save(model, tmp_path / "saved")

    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (converts, ConversionError, name),
        (saves, CheckpointError, "roast_pool.weight" if name == "first.weight" else name),
    ]
    for work, error, named in wrong:
        if refused:
            with pytest.raises(error, match=rf"^{named} holds NaN"):
                work()
        else:
            work()


def test_a_diverged_model_is_saved_if_asked(tmp_path: Path) -> None:
    model = roastify.convert(Two(0.1, 0.1), 3)
    roastify.save(model, tmp_path / "out")
    before = (tmp_path / "out" / "roast.json").read_bytes()
    with torch.no_grad():
        pool_of(model).weight[1, 2] = math.nan
        model.seen[0] = math.nan  # type: ignore[operator, index]
    with pytest.raises(CheckpointError, match="pass allow_nonfinite=True to save it as it is"):
        roastify.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "roast.json").read_bytes() == before
    roastify.save(model, tmp_path / "out", allow_nonfinite=True)
    again = roastify.load(tmp_path / "out", Two(1.0, 1.0))
    torch.testing.assert_close(pool_of(again).weight, pool_of(model).weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 64), (65, 4096), (33, 129), (70_001,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moments_are_the_same_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3 + 5).to(dtype)
    found = moments(values)
    assert found is not None
    wide = values.double()
    assert found.mean == pytest.approx(float(wide.mean()), rel=1e-12)
    assert found.deviation == pytest.approx(float(wide.std(correction=0)), rel=1e-12, abs=1e-300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert moments(values) == found
    finally:
        torch.set_num_threads(threads)
    if len(shape) == 2:
        turned = moments(values.t())
        assert turned is not None and turned == pytest.approx(found, rel=1e-12)


def test_moments_of_extreme_values() -> None:
    for size in (1e300, 1e-300, 5e-324):
        found = moments(torch.tensor([size, -size], dtype=torch.float64))
        assert found is not None and found == (0.0, size)
    assert moments(torch.full((7, 9), 0.1, dtype=torch.bfloat16)) == (0.10009765625, 0.0)
    assert moments(torch.tensor([1.0, math.nan])) is None and moments(torch.tensor([math.inf, 1.0])) is None


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_finiteness_of_every_dtype(dtype: torch.dtype) -> None:
    for value, finite, finite_or_infinite in ((1.0, True, True), (math.inf, False, True), (math.nan, False, False)):
        tensor = torch.tensor([1.0, value, 2.0]).to(dtype)
        assert is_finite(tensor) is finite
        if not dtype.is_complex:
            assert is_finite(tensor, or_infinite=True) is finite_or_infinite
    for empty in (torch.empty(0), torch.ones(3, device="meta"), torch.tensor([1, 2]), torch.tensor([True])):
        assert is_finite(empty)


class Large(nn.Module):
    """Tensors that torch would sum with several threads, each of a kind of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(1000, 128, padding_idx=0)
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(3)])
        self.conv, self.narrow, self.norm = nn.Conv2d(64, 128, 3), nn.Linear(128, 700).bfloat16(), nn.LayerNorm(4096)
        self.wide = nn.Linear(512, 1024)
        with torch.no_grad():
            self.wide.weight += 3 * self.wide.weight.std()
            self.norm.weight += 0.1 * torch.randn(4096)

    def forward(self, index: Tensor) -> Tensor:
        return self.table(index)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fold": 2, "ratio": 8},
        {"fold": "none", "share": "all", "ratio": 20},
        {"sharing": "local"},
        {"sign": "element"},
        {"mapping": "roast"},
        {"mapping": "hashednet"},
        {"kernel_basis": 4},
    ],
    ids=str,
)
def test_a_projected_pool_is_the_same_for_any_number_of_threads(settings: dict[str, Any]) -> None:
    def pool() -> tuple[list[Tensor], list[float | None]]:
        config = roastify.RoastConfig(**{"ratio": 10, "init": "project", **settings})
        converted = pool_of(roastify.convert(Large(), config=config))
        values = [converted.weight, *converted.bases()]
        return [value.detach() for value in values], [tensor.scale for tensor in converted.plan.shared]

    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(pool())
    finally:
        torch.set_num_threads(threads)
    for values, scales in found[1:]:
        assert all(map(torch.equal, values, found[0][0])) and scales == found[0][1]

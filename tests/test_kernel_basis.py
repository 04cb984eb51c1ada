"""Convolution kernels as combinations of basis kernels: the plan, the weights, the gradients, artifacts, compilers."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import losses_of_replays_and_of_steps
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import roastify
from roastify import ConfigError, PlanError, RoastConfig, RoastPlan, artifact
from roastify.checks import numerics as agreement
from roastify.conversion.converted import current_plans, pool_of, pooled_weight
from roastify.conversion.rewrite import copy_weights
from roastify.dense_artifact import dense_state_dict
from roastify.errors import OutputMismatch
from roastify.files import digest_of_file, write_tensors
from roastify.kernels import ops, reference
from roastify.kernels.gathered_weights import WeightGroup
from roastify.layers.base import RoastModule
from roastify.plan_table import plan_table
from roastify.pool import pass_cache
from roastify.pool.kernel_basis import coefficient_matrix, combined_matrix, cosine_basis, principal_basis
from roastify.recovery.align import _curvature, _LinearMap, _Term, align_layers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# The pool keeps 1/Γ in float32 whatever its own dtype is.
_GAMMA_RTOL = 1e-6


class Net(nn.Module):
    """A convolution too small for basis kernels, two that have them, one of them grouped, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 48, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(48)
        self.third = nn.Conv2d(48, 48, 3, groups=2)
        self.head = nn.Linear(48, 24)
        self.again: Callable[..., Tensor] = lambda function, x: function(x)

    def body(self, x: Tensor) -> Tensor:
        return self.third(self.norm(self.second(x.relu())).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.body, self.first(x)).mean((2, 3)))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 24, 3), nn.Conv2d(24, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


class SuperConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3 + 1


class FunctionalConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, padding=1) - self.weight.mean()


class NormedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, F.normalize(self.weight, dim=1), self.bias)


class ReadsTheWeight(nn.Module):
    """Its own code reads the weight of its child, as a whole and in part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.weight.square().mean() + self.conv.weight[3, 2].sum()


class Tied(nn.Module):
    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), second
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.one(x)).tanh())


# A model, and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 7, 7)),
    "no batch": (lambda: nn.Conv2d(16, 24, 3, bias=False), (16, 7, 7)),
    "strided": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=2, dilation=2), (2, 16, 7, 7)),
    "same": (lambda: nn.Conv2d(16, 24, (3, 5), padding="same"), (2, 16, 7, 7)),
    "reflect": (lambda: nn.Conv2d(16, 24, 3, padding=2, padding_mode="reflect"), (2, 16, 7, 7)),
    "circular": (lambda: nn.Conv2d(16, 24, 3, padding=1, padding_mode="circular"), (2, 16, 7, 7)),
    "replicate": (lambda: nn.Conv2d(16, 24, 3, padding=1, padding_mode="replicate"), (2, 16, 7, 7)),
    "groups": (lambda: nn.Conv2d(32, 48, 3, groups=4), (2, 32, 7, 7)),
    "one axis": (lambda: nn.Conv2d(16, 24, (1, 9)), (2, 16, 3, 11)),
    "3-D": (lambda: nn.Conv3d(24, 24, 3, padding=1), (2, 24, 3, 4, 5)),
    "3-D groups": (lambda: nn.Conv3d(24, 48, 3, stride=2, groups=2), (2, 24, 5, 5, 5)),
    "3-D reflect": (lambda: nn.Conv3d(24, 24, 3, padding=1, padding_mode="reflect"), (1, 24, 3, 4, 5)),
    "super": (lambda: SuperConv(16, 24, 3), (2, 16, 7, 7)),
    "functional": (lambda: FunctionalConv(16, 24, 3), (2, 16, 7, 7)),
    "normed": (lambda: NormedConv(16, 24, 3), (2, 16, 7, 7)),
    "read by code": (ReadsTheWeight, (2, 16, 7, 7)),
    "tied": (lambda: Tied(nn.Conv2d(16, 16, 3, stride=2)), (2, 16, 7, 7)),
    "net": (Net, (2, 4, 12, 12)),
}


class Wrap(nn.Module):
    """One layer inside a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ByHand:
    """The dense model; its shared weights are made by indexing a copy of the pool and adding up basis kernels."""

    def __init__(self, model: nn.Module, dense: nn.Module) -> None:
        pool = pool_of(model)
        self.plan: RoastPlan = pool.plan
        self.dense = copy.deepcopy(dense)
        self.dense.load_state_dict(model.state_dict(), strict=False)
        self.pool = pool.weight.detach().clone().requires_grad_()
        self.bases = {
            tensor.name: basis.detach().clone().requires_grad_()
            for tensor, basis in zip(self.plan.with_basis, pool.bases(), strict=True)
        }
        numbers = torch.arange(pool.weight.numel(), dtype=torch.float64, device=self.pool.device).view(self.pool.shape)
        self.reads: dict[str, tuple[Tensor, Tensor]] = {}
        for tensor in self.plan.shared:
            view = self.plan.view(tensor)
            places = reference.gather(numbers, pool.table, view._replace(sign=0), 1.0).long()
            factors = reference.gather(torch.ones_like(numbers), pool.table, view, tensor.scale or 0.0)
            self.reads[tensor.name] = places, factors.to(self.pool.dtype)

    def weights(self) -> dict[str, Tensor]:
        made = {}
        for tensor in self.plan.shared:
            places, factors = self.reads[tensor.name]
            weight = self.pool.flatten()[places] * factors
            if tensor.basis_count:
                coefficients = weight.view(*tensor.shape[:2], tensor.basis_count, 1)
                weight = sum(coefficients[:, :, j] * kernel for j, kernel in enumerate(self.bases[tensor.name]))
            made |= dict.fromkeys(tensor.aliases, weight.view(tensor.shape))
        return made

    def __call__(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.dense, self.weights(), (x,))

    def gradients(self, precondition: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the expected gradients of the pool and the bases, from the gradients that autograd computed here."""
        assert self.pool.grad is not None
        pool, bases = self.pool.grad, {name: basis.grad for name, basis in self.bases.items()}
        if precondition:
            gamma = torch.zeros_like(pool).flatten()
            for places, factors in self.reads.values():
                gamma.index_add_(0, places.flatten(), factors.square().flatten())
            pool = pool / torch.where(gamma == 0, 1, gamma).view_as(pool)
            bases = {name: gradient / self.energy(name) for name, gradient in bases.items()}
        return pool, bases

    def energy(self, name: str) -> float:
        tensor = next(tensor for tensor in self.plan.with_basis if tensor.name == name)
        return math.prod(tensor.shape[:2]) * (tensor.scale * self.plan.pool_std) ** 2


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def config(**changes: Any) -> RoastConfig:
    return RoastConfig(**{"ratio": 3.0, "min_numel": 64, "tile": "8x8", "seed": 7} | changes)


def pair(
    build: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float64, device: str = "cpu", **changes: Any
) -> tuple[Any, nn.Module]:
    """Return a converted model, which has basis kernels, and the dense one."""
    dense = build()
    dense = (dense if isinstance(dense, Net | Tied | ReadsTheWeight | Chain) else Wrap(dense)).to(device, dtype)
    model = roastify.convert(dense, config=config(**changes))
    assert pool_of(model).plan.with_basis, "no kernels are made of basis kernels"
    return model, dense


def named_bases(model: nn.Module) -> dict[str, nn.Parameter]:
    pool = pool_of(model)
    return {tensor.name: basis for tensor, basis in zip(pool.plan.with_basis, pool.bases(), strict=True)}


def assert_gradients(model: nn.Module, hand: ByHand, precondition: bool = False, tolerance: float = 1e-11) -> None:
    """Compare the gradients of the pool, the bases and every kept tensor with those of `ByHand`."""
    pool, bases = hand.gradients(precondition)
    rtol = max(tolerance, _GAMMA_RTOL) if precondition else tolerance
    found = pool_of(model).weight.grad
    assert found is not None and found.any()
    torch.testing.assert_close(found, pool, rtol=rtol, atol=rtol * float(pool.abs().max()))
    for name, basis in named_bases(model).items():
        # The factor of a basis's gradient is a Python float, so this gradient is exact.
        assert basis.grad is not None and basis.grad.any(), name
        expected = bases[name]
        torch.testing.assert_close(
            basis.grad, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()), msg=name
        )
    for tensor in hand.plan.kept:
        expected = hand.dense.get_parameter(tensor.name).grad
        assert expected is not None
        torch.testing.assert_close(
            model.get_parameter(tensor.name).grad, expected, rtol=tolerance, atol=tolerance, msg=tensor.name
        )


def loss(out: Tensor) -> Tensor:
    out = out if out.dtype == torch.float64 else out.float()
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)).sum()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture(autouse=True)
def precise(request: pytest.FixtureRequest) -> None:
    """Use full precision on a GPU, but not under compilers: they refuse the mix of precision flags that this sets."""
    if request.node.get_closest_marker("gpu") and not request.node.get_closest_marker("compiled"):
        request.getfixturevalue("full_precision")


# The formulas.


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (3, 3, 3), (1, 9), (3, 5), (7,)], ids=str)
def test_cosines_are_orthonormal_and_the_first_is_constant(kernel: tuple[int, ...]) -> None:
    positions = math.prod(kernel)
    whole = cosine_basis(kernel, positions)
    assert whole.shape == (positions, positions) and whole.dtype == torch.float64
    torch.testing.assert_close(whole @ whole.t(), torch.eye(positions, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(whole[0], torch.full_like(whole[0], positions**-0.5))
    assert torch.equal(cosine_basis(kernel, 2), whole[:2])


def test_the_highest_three_of_nine_frequencies_are_left_out() -> None:
    # The three are (2, 1), (1, 2) and (2, 2). Along an axis, frequency f is cos(π·f·(p + ½)/3).
    waves = [[math.cos(math.pi * f * (p + 0.5) / 3) for p in range(3)] for f in range(3)]
    basis = cosine_basis((3, 3), 6)
    for one, other in ((2, 1), (1, 2), (2, 2)):
        left_out = torch.tensor([a * b for a in waves[one] for b in waves[other]], dtype=torch.float64)
        assert float((basis @ left_out).abs().max()) < 1e-12
    for one, other in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2)):
        kept = torch.tensor([a * b for a in waves[one] for b in waves[other]], dtype=torch.float64)
        torch.testing.assert_close(float((basis @ kept).norm()), float(kept.norm()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (3, 3, 3)], ids=str)
def test_a_principal_basis_reproduces_a_weight_of_few_independent_kernels(
    kernel: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = (normal(8, 5, 4) @ normal(4, math.prod(kernel))).view(8, 5, *kernel).to(dtype)
    basis = principal_basis(weight, 4)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    matrix = weight.view(8, -1).to(basis.dtype)
    found = combined_matrix(coefficient_matrix(matrix, basis), basis)
    # Rounding to a narrow dtype took the weight out of the subspace.
    atol = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found, matrix, rtol=0, atol=atol)


def test_a_principal_basis_is_turned_to_the_nearest_frequencies() -> None:
    frequencies = cosine_basis((3, 3), 6)
    weight = (normal(32, 16, 6, dtype=torch.float64) @ frequencies).view(32, 16, 3, 3)
    torch.testing.assert_close(principal_basis(weight, 6), frequencies)
    # A weight of zeros decides none of the kernels, so all of them are frequencies.
    torch.testing.assert_close(principal_basis(torch.zeros(32, 16, 3, 3), 9), cosine_basis((3, 3), 9))


def test_coefficient_matrix_is_the_adjoint_of_combined_matrix() -> None:
    # This holds for any basis, orthonormal or not.
    basis, matrix, weight = normal(4, 9), normal(6, 5 * 4, seed=1), normal(6, 5 * 9, seed=2)
    one = (combined_matrix(matrix, basis) * weight).sum()
    torch.testing.assert_close(one, (matrix * coefficient_matrix(weight, basis)).sum())
    by_element = torch.einsum("oij,jk->oik", matrix.view(6, 5, 4), basis).reshape(6, 45)
    torch.testing.assert_close(combined_matrix(matrix, basis), by_element)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_combining_keeps_the_dtype_under_autocast(dtype: torch.dtype, device: str) -> None:
    coefficients, basis = normal(30, 4).to(device, dtype), normal(4, 9).to(device, dtype)
    plain = ops.combine(coefficients, basis)
    with torch.autocast(device, torch.bfloat16):
        found = ops.combine(coefficients, basis)
    assert found.dtype == dtype
    assert torch.equal(found, plain)


def test_a_model_on_the_meta_device_runs() -> None:
    """Such a run gives shapes. Autocast does not know the meta device and raises an error for it."""
    model = roastify.convert(nn.Sequential(nn.Conv2d(64, 64, 3)), 10).to("meta")
    for x in (torch.empty(2, 64, 8, 8, device="meta"), torch.empty(64, 8, 8, device="meta")):
        assert model(x).shape == (*x.shape[:-2], 6, 6)
        with torch.no_grad():
            assert model(x).is_meta


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_model_on_the_meta_device_is_exported_and_compiled() -> None:
    model, x = roastify.convert(nn.Sequential(nn.Conv2d(64, 64, 3)), 10).to("meta"), torch.empty(2, 64, 8, 8)
    exported = torch.export.export(model, (x.to("meta"),)).graph
    assert torch.compile(model, backend="eager", fullgraph=True)(x.to("meta")).shape == (2, 64, 6, 6)
    # One operator gathers the coefficients and one combines them, without an autocast region and without `lerp`.
    called = [str(node.target) for node in exported.nodes if node.op == "call_function"]
    assert [name for name in called if "roastify" in name] == ["roastify.gather.default", "roastify.combine.default"]
    assert not any("autocast" in name or "lerp" in name for name in called)


# The plan.


def counts(model: nn.Module, ratio: float = 4, **changes: Any) -> dict[str, int]:
    plan = roastify.plan(model, config=config(ratio=ratio, **changes))
    assert all(tensor.shared or not tensor.basis_count for tensor in plan.tensors)
    return {tensor.name.removesuffix(".weight"): tensor.basis_count for tensor in plan.shared}


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: nn.Conv2d(32, 32, 3), 6),
        (lambda: nn.Conv2d(32, 32, (1, 9)), 6),
        (lambda: nn.Conv2d(32, 32, (3, 4)), 8),
        (lambda: nn.Conv2d(32, 64, 5), 17),
        (lambda: nn.Conv3d(24, 32, 3), 18),
        (lambda: nn.Conv2d(64, 64, 3, groups=4), 6),
        (lambda: SuperConv(32, 32, 3), 6),
        # The 6 × 9 elements of a basis are an eighth of the tensor's part of the pool, then more than an eighth.
        (lambda: nn.Conv2d(12, 16, 3), 6),
        (lambda: nn.Conv2d(12, 15, 3), 0),
        (lambda: nn.Conv3d(16, 16, 3), 0),
        (lambda: nn.Conv2d(128, 128, 3, groups=128), 0),
        (lambda: nn.Conv2d(64, 64, 1), 0),
        (lambda: nn.Conv2d(64, 64, (2, 4)), 0),
        (lambda: nn.Conv1d(64, 64, 9), 0),
        (lambda: nn.ConvTranspose2d(32, 32, 3), 0),
        (lambda: nn.ConvTranspose3d(24, 32, 3), 0),
        (lambda: nn.Linear(96, 96), 0),
        (lambda: nn.Embedding(96, 96), 0),
    ],
)
def test_which_layers_have_basis_kernels_by_default(build: Callable[[], nn.Module], count: int) -> None:
    model = nn.Sequential(build(), nn.Linear(64, 64))
    assert counts(model) == {"0": count, "1": 0}
    assert counts(model, kernel_basis="none") == {"0": 0, "1": 0}
    assert counts(model, ratio=1)["0"] == counts(model, ratio=1.99)["0"] == 0


def test_no_layer_has_a_basis_under_ratio_2_and_the_least_size_grows_with_the_ratio() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(64, 64, 3))
    found = {ratio: tuple(counts(model, ratio).values()) for ratio in (1, 1.5, 2, 5.3, 5.4, 20)}
    assert found == {1: (0, 0), 1.5: (0, 0), 2: (6, 6), 5.3: (6, 6), 5.4: (0, 6), 20: (0, 6)}


@pytest.mark.parametrize(("kernel", "more", "fewer"), [(3, 6, 3), (5, 17, 8), ((3, 4), 8, 4)])
def test_from_ratio_30_a_basis_has_half_as_many_kernels(kernel: int | tuple[int, int], more: int, fewer: int) -> None:
    model = nn.Sequential(nn.Conv2d(128, 160, kernel))
    found = {ratio: counts(model, ratio)["0"] for ratio in (29.9, 30, 100)}
    assert found == {29.9: more, 30: fewer, 100: fewer}
    # A basis of fewer kernels takes a smaller part of a tensor, so smaller tensors have a basis too.
    assert counts(nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(128, 128, 3)), 30) == {"0": 3, "1": 3}


@pytest.mark.parametrize(
    ("others", "ratio", "sign"), [(128, 30, "row"), (129, 30, "element"), (128, 29.9, "element"), (10, 29.9, "element")]
)
def test_a_pool_of_few_slots_has_row_signs_if_it_mostly_holds_coefficients_of_small_bases(
    others: int, ratio: float, sign: str
) -> None:
    model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.Linear(128, others))
    plan = roastify.plan(model, config=config(ratio=ratio, tile="16x16"))
    assert plan.num_slots < 64 and plan.sign == sign
    assert roastify.plan(model, config=config(ratio=ratio, tile="16x16", sign="tile")).sign == "tile"
    assert roastify.plan(model, config=config(ratio=ratio, tile="8x8")).sign == "row"


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: nn.Conv2d(32, 32, 3), 4),
        (lambda: nn.Conv2d(8, 8, 3), 4),
        (lambda: nn.Conv1d(32, 32, 9), 4),
        (lambda: nn.Conv2d(32, 32, (2, 3)), 4),
        (lambda: nn.Conv2d(128, 128, 3, groups=128), 4),
        # Here a basis saves nothing.
        (lambda: nn.Conv2d(32, 32, 2), 0),
        (lambda: nn.Conv1d(32, 32, 3), 0),
        (lambda: nn.Conv2d(64, 64, 1), 0),
        (lambda: nn.Conv2d(2, 3, 3), 0),
        (lambda: nn.ConvTranspose2d(32, 32, 3), 0),
        (lambda: nn.Linear(96, 96), 0),
    ],
)
def test_a_given_number_of_basis_kernels_is_used_wherever_it_saves_parameters(
    build: Callable[[], nn.Module], count: int
) -> None:
    model = nn.Sequential(build(), nn.Linear(64, 64))
    for ratio in (1.5, 4):
        assert counts(model, ratio, kernel_basis=4, min_numel=0)["0"] == count
    assert counts(model, 1, kernel_basis=4, min_numel=0)["0"] == 0


class Projecting(nn.Module):
    """A product with a convolution's weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.table = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table.flatten(1))


def test_tied_convolutions_share_a_basis_and_one_tied_to_another_kind_of_layer_has_none() -> None:
    assert counts(Tied(nn.Conv2d(16, 16, 3))) == {"one": 6}
    conv = nn.Conv2d(32, 32, 3)
    assert counts(nn.ModuleList([conv, Projecting(conv)])) == {"0": 0}
    transposed = nn.ConvTranspose2d(16, 16, 3)
    assert counts(Tied(transposed)) == {"one": 0}


@pytest.mark.parametrize("kernel_basis", ["auto", "none", 2, 6])
@pytest.mark.parametrize("tile", ["auto", "8x8"])
@pytest.mark.parametrize("ratio", [1.3, 2, 4, 10, 20])
def test_a_model_stores_what_the_plan_says_and_never_more_than_the_budget(
    ratio: float, tile: str, kernel_basis: Any
) -> None:
    model = roastify.convert(Net(), config=config(ratio=ratio, tile=tile, kernel_basis=kernel_basis, min_numel=1024))
    plan = pool_of(model).plan
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert stored == plan.stored_numel == plan.pool_numel + plan.basis_numel + plan.kept_numel
    assert stored <= plan.total_numel / ratio
    assert plan.basis_numel == sum(basis.numel() for basis in pool_of(model).bases())
    assert plan.stored_nbytes == 4 * stored
    assert plan.to_dict()["summary"]["basis_parameters"] == plan.basis_numel
    assert bool(plan.with_basis) == (kernel_basis != "none" and (ratio >= 2 or kernel_basis != "auto"))
    assert RoastPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    expected = [f"roast_pool.basis_{index}" for index in range(len(plan.with_basis))]
    assert [name for name, _ in model.named_parameters() if "basis" in name] == expected


def test_a_basis_of_few_kernels_may_leave_part_of_the_budget_unused() -> None:
    plan = roastify.plan(Net(), config=config(ratio=1.5, kernel_basis=1))
    assert plan.no_sharing
    assert plan.stored_numel < 0.5 * plan.total_numel


def test_bases_are_left_out_if_the_ratio_is_unreachable_with_them() -> None:
    # The budget is a twentieth of the model, 480 parameters; 384 are kept. A slot of 64 fits, but no basis of 54 too.
    model = nn.Sequential(nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(192))
    assert counts(model, 19, share="weights") == {"0": 6}
    assert counts(model, 20, share="weights") == {"0": 0}
    with pytest.raises(PlanError, match="ratio 20 is unreachable") as error:
        counts(model, 20, share="weights", kernel_basis=6)
    assert "must stay dense (384), the basis kernels that kernel_basis asks for (54) and the" in str(error.value)
    # The ratio that the error names can be reached with these bases.
    largest = error.value.largest_ratio
    assert counts(model, largest, share="weights", kernel_basis=6) == {"0": 6}
    with pytest.raises(PlanError):
        counts(model, largest + 0.01, share="weights", kernel_basis=6)


@pytest.mark.parametrize("bad", ["all", "6", "", 0, -1, True, False, 2.5, None, [6]], ids=repr)
def test_an_invalid_kernel_basis_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="kernel_basis must be 'auto', 'none' or a number of basis kernels"):
        RoastConfig(kernel_basis=bad)


def test_kernel_basis_is_read_from_a_file(tmp_path: Path) -> None:
    for text, value in (('"none"', "none"), ("4", 4), ('"auto"', "auto")):
        (tmp_path / "a.toml").write_text(f"kernel_basis = {text}\n", encoding="utf-8")
        read = RoastConfig.from_toml(tmp_path / "a.toml")
        assert read.kernel_basis == value and RoastConfig.from_dict(read.to_dict()) == read
    (tmp_path / "a.toml").write_text("kernel_basis = 0\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a\.toml: kernel_basis must be .*; found 0"):
        RoastConfig.from_toml(tmp_path / "a.toml")


def printed(plan: RoastPlan) -> str:
    console = Console(file=io.StringIO(), width=240)
    console.print(plan_table(plan, full=True))
    return console.file.getvalue()


def test_a_report_names_basis_kernels() -> None:
    plan = roastify.plan(Net(), config=config(ratio=4, min_numel=1024))
    assert plan.basis_numel == 2 * 54
    text = printed(plan)
    assert f"(pool {plan.pool_numel:,} + basis kernels 108 + kept {plan.kept_numel:,})" in text
    assert "of 2 tensors made of basis kernels: 6 for kernels of 9 elements" in text
    budget = [float(word[:-1]) for line in text.splitlines() for word in line.split() if word.endswith("%")]
    # The first is the shared part of the parameters.
    rows = budget[1 : 1 + len(plan.tensors)]
    assert sum(rows) == pytest.approx(100, abs=0.06 * len(rows))
    assert "basis" not in printed(roastify.plan(Net(), config=config(ratio=4, kernel_basis="none")))


# The weights.


@pytest.mark.parametrize("init", ["match", "project"])
@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_the_dense_layer_with_combined_kernels_computes(
    name: str, device: str, precondition: bool, init: str
) -> None:
    build, shape = LAYERS[name]
    model, dense = pair(build, device=device, precondition=precondition, init=init)
    hand = ByHand(model, dense)
    assert not pool_of(model).plan.no_sharing
    for tensor in pool_of(model).plan.with_basis:
        weight = model.get_submodule(tensor.name.rpartition(".")[0]).weight
        assert weight.shape == tensor.shape and weight.dtype == torch.float64
        torch.testing.assert_close(weight.detach(), hand.weights()[tensor.name].detach(), rtol=1e-12, atol=1e-13)
    ours, theirs = (normal(*shape).to(device).requires_grad_() for _ in range(2))
    out, expected = model(ours), hand(theirs)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    loss(out).backward()
    loss(expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    assert_gradients(model, hand, precondition)
    model.eval(), hand.dense.eval()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(model(ours), hand(theirs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sign", ["none", "row", "tile", "element"])
@pytest.mark.parametrize("mapping", ["permutation", "cyclic", "roast", "hashednet"])
def test_coefficients_work_with_every_mapping(mapping: str, sign: str) -> None:
    settings: dict[str, Any] = {"mapping": mapping, "sign": sign} | ({"tile": "auto"} if mapping == "hashednet" else {})
    for sharing in ("global", "local"):
        model, dense = pair(sharing=sharing, **settings)
        hand = ByHand(model, dense)
        x = normal(2, 4, 12, 12)
        loss(model(x)).backward()
        loss(hand(x)).backward()
        assert_gradients(model, hand, True)


# Relative to the largest value.
_TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("first", [True, False], ids=["cast before", "cast after"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", _TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["plain", "3-D", "functional"])
def test_narrow_dtypes(name: str, dtype: torch.dtype, device: str, first: bool) -> None:
    build, shape = LAYERS[name]
    model, dense = pair(build, dtype if first else torch.float32, device)
    model = model.to(dtype)
    (basis,) = named_bases(model).values()
    assert basis.dtype == model.layer.weight.dtype == pool_of(model).weight.dtype == dtype
    hand = ByHand(copy.deepcopy(model).double(), dense.double())
    x = normal(*shape, dtype=dtype).to(device)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            out, expected = model.train(training)(x), hand(x.double())
        assert out.dtype == dtype
        expected = expected.detach()
        assert float((out.detach() - expected).abs().max()) < _TOLERANCES[dtype] * float(expected.abs().max())
    loss(model(x)).backward()
    assert basis.grad is not None and basis.grad.dtype == dtype
    loss(hand(x.double())).backward()
    expected = hand.gradients(True)[1]["layer.weight"]
    assert float((basis.grad - expected).abs().max()) < 3 * _TOLERANCES[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["plain", "super", "functional", "read by code", "net"])
def test_autocast(name: str, device: str) -> None:
    build, shape = LAYERS[name]
    model, dense = pair(build, torch.float32, device, precondition=False)
    hand = ByHand(copy.deepcopy(model).double(), dense.double())
    x = normal(*shape, dtype=torch.float32).to(device)
    expected = hand(x.double())
    name, _ = next(iter(named_bases(model).items()))
    layer = model.get_submodule(name.rpartition(".")[0])
    with torch.autocast(device, torch.bfloat16):
        # The weight reads as float32 here, so autocast must not round the product that makes it.
        assert layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight.detach().double(), hand.weights()[name], rtol=1e-5, atol=1e-6)
        out = model(x)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), model(x))
        model.train()
    assert out.dtype == (torch.float32 if name == "read by code" else torch.bfloat16) or "conv" in name
    assert float((out - expected).detach().abs().max()) < 5e-2 * float(expected.detach().abs().max())
    loss(out).backward()
    loss(expected).backward()
    for key, basis in named_bases(model).items():
        theirs = hand.bases[key].grad
        assert theirs is not None and basis.grad is not None and basis.grad.dtype == torch.float32
        # Roundings of a norm's inputs weigh more in gradients than in outputs.
        assert float((basis.grad - theirs).norm()) < (0.15 if key == "second.weight" else 5e-2) * float(theirs.norm())


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_random_pool_gives_every_layer_its_spread(ratio: float) -> None:
    dense = Net()
    with torch.no_grad():
        dense.third.weight.mul_(4)
    model = roastify.convert(dense, config=config(ratio=ratio, min_numel=1024))
    twin = roastify.densify(model)
    assert named_bases(model).keys() >= {"second.weight", "third.weight"}
    for tensor in pool_of(model).plan.shared:
        expected = float(dense.get_parameter(tensor.name).detach().std())
        assert float(twin.get_parameter(tensor.name).detach().std()) == pytest.approx(expected, rel=0.05), tensor.name
    for name, basis in named_bases(model).items():
        assert torch.equal(basis.detach(), cosine_basis(dense.get_parameter(name).shape[2:], 6).float())


@pytest.mark.parametrize("count", [1, 4, 6])
def test_without_sharing_projection_loses_only_what_the_basis_cannot_express(count: int) -> None:
    dense = Net().double()
    model = roastify.convert(dense, config=config(ratio=1.2, init="project", kernel_basis=count))
    plan = pool_of(model).plan
    assert plan.no_sharing and len(plan.with_basis) == 3
    twin = roastify.densify(model)
    for tensor in plan.shared:
        expected = dense.get_parameter(tensor.name).detach()
        if tensor.basis_count:
            left, values, right = torch.linalg.svd(expected.flatten(2).flatten(0, 1), full_matrices=False)
            values[count:] = 0
            expected = (left * values @ right).view_as(expected)
        torch.testing.assert_close(twin.get_parameter(tensor.name).detach(), expected, rtol=0, atol=1e-9)


def test_projecting_a_densified_model_gives_its_pool_back() -> None:
    """The bases come back as well: other bases would have other coefficients, and a small pool could not hold those."""
    model = roastify.densify(roastify.convert(Net(), config=config(ratio=8)))
    again = roastify.densify(roastify.convert(model, config=config(ratio=8), init="project"))
    for name in ("second", "third"):
        found, weight = (each.get_parameter(f"{name}.weight").detach() for each in (again, model))
        assert float((found - weight).norm()) < 0.02 * float(weight.norm())


def test_projection_is_the_nearest_pool_for_its_basis() -> None:
    model, dense = pair(init="project")
    hand = ByHand(model, dense)
    weights = hand.weights()
    distance = sum((weights[name] - dense.get_parameter(name).detach()).square().sum() for name in hand.reads)
    (gradient,) = torch.autograd.grad(distance, hand.pool)
    assert float(gradient.abs().max()) < 1e-6 * float(distance.detach())


# Gradients in training.


def test_a_basis_gradient_is_divided_by_the_sum_of_squared_coefficients() -> None:
    model, dense = pair(ratio=4)
    hand = ByHand(model, dense)
    for tensor in hand.plan.with_basis:
        places, factors = hand.reads[tensor.name]
        coefficients = (hand.pool.detach().flatten()[places] * factors).view(-1, tensor.basis_count)
        # The divisor is the mean over the kernels that a random pool has.
        assert float(coefficients.square().sum(0).mean()) == pytest.approx(hand.energy(tensor.name), rel=0.15)


def test_decoupled_decay_shrinks_coefficients_and_basis() -> None:
    """Kernels then shrink by the factor's square; if the bases do not decay, they shrink as dense kernels do."""
    for basis_decay, shrunk in ((1.0, 0.81), (0.0, 0.9)):
        model = roastify.convert(nn.Sequential(nn.Conv2d(64, 64, 3)), 10)
        pool = pool_of(model)
        before = model[0].weight.detach().clone()
        groups = [{"params": [pool.weight]}, {"params": pool.bases(), "weight_decay": basis_decay}]
        for parameter in pool.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW(groups, lr=0.1, weight_decay=1.0).step()
        torch.testing.assert_close(model[0].weight.detach(), shrunk * before)


def test_gradients_accumulate() -> None:
    model, dense = pair()
    hand = ByHand(model, dense)
    for seed in range(3):
        x = normal(2, 4, 12, 12, seed=seed)
        loss(model(x)).backward()
        loss(hand(x)).backward()
    assert_gradients(model, hand, True)
    model.zero_grad()
    assert all(basis.grad is None for basis in pool_of(model).bases())


def test_several_forwards_before_one_backward() -> None:
    model, dense = pair()
    hand = ByHand(model, dense)
    for run in (model, hand):
        sum(loss(run(normal(2, 4, 12, 12, seed=seed))) for seed in range(2)).backward()
    assert_gradients(model, hand, True)


def test_a_layer_called_twice_and_by_itself() -> None:
    model, dense = pair(lambda: Tied(nn.Conv2d(16, 16, 3)))
    hand = ByHand(model, dense)
    x = normal(2, 16, 9, 9)
    loss(model.one(x)).backward()
    loss(F.conv2d(x, hand.weights()["one.weight"], hand.dense.one.bias, padding=1)).backward()
    pool, bases = hand.gradients(True)
    torch.testing.assert_close(pool_of(model).weight.grad, pool, rtol=_GAMMA_RTOL, atol=1e-7)
    torch.testing.assert_close(pool_of(model).bases()[0].grad, bases["one.weight"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_checkpointed_layers(device: str) -> None:
    model, dense = pair(device=device)
    model.again = lambda function, x: checkpoint(function, x, use_reentrant=False)
    # Running statistics are updated once more for each time that a region is recomputed.
    hand = ByHand(model, dense)
    x = normal(2, 4, 12, 12).to(device)
    loss(model(x)).backward()
    loss(hand(x)).backward()
    assert_gradients(model, hand, True)


def test_gradients_of_gradients() -> None:
    """The preconditioner is off: its divisor also enters higher derivatives, and test_kernels.py tests how."""
    model, dense = pair(Chain, precondition=False)
    hand = ByHand(model, dense)
    pool = pool_of(model)
    found = []
    for run, parameters in ((model, [pool.weight, *pool.bases()]), (hand, [hand.pool, *hand.bases.values()])):
        x = normal(2, 16, 9, 9).requires_grad_()
        gradients = torch.autograd.grad(run(x).square().sum(), [x, *parameters], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        found.append([*gradients, *torch.autograd.grad(penalty, [x, *parameters])])
    for one, other in zip(*found, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11 * float(other.detach().abs().max()))


def test_a_write_to_a_basis_before_the_backward_pass_raises_as_for_a_dense_weight() -> None:
    model, _ = pair()
    out = loss(model(normal(2, 4, 12, 12)))
    with torch.no_grad():
        pool_of(model).bases()[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_layers_with_bases_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    groups, gather_together = [], pass_cache.gather_together

    def watched(pool: Tensor, table: Tensor, group: WeightGroup) -> Any:
        groups.append([weight.shape for weight in group.weights])
        return gather_together(pool, table, group)

    monkeypatch.setattr(pass_cache, "gather_together", watched)
    model(normal(2, 4, 12, 12))
    assert [(48, 32, 3, 3), (48, 24, 3, 3)] in groups


def test_a_write_to_a_basis_within_a_forward_pass_is_seen_by_later_reads() -> None:
    model, dense = pair(Chain)
    x = normal(2, 16, 9, 9)
    basis = named_bases(model)["two.weight"]

    def double(*_: Any) -> None:
        with torch.no_grad():
            basis.mul_(2)

    expected = model(x)
    model.two.register_forward_pre_hook(double)
    bias = model.two.bias.detach()[:, None, None]
    found = model(x)
    torch.testing.assert_close(found - bias, 2 * (expected - bias), rtol=1e-11, atol=1e-12)
    # Both weights were gathered before the write; the graph has the weight that the layer used.
    hand = ByHand(model, dense)
    loss(found).backward()
    loss(hand(x)).backward()
    assert_gradients(model, hand, True)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_kernels_for_groups_give_the_gradients_of_the_cpu(memory_format: torch.memory_format) -> None:
    """First one kernel makes all weights; then a step is captured before the kernels' tables are on the GPU."""
    model, dense = pair(dtype=torch.float32)
    hand = ByHand(model.double(), dense.double())
    x = normal(2, 4, 12, 12)
    loss(hand(x)).backward()
    for captured in (False, True):
        twin = copy.deepcopy(model).float().cuda().to(memory_format=memory_format)
        there = x.float().cuda().to(memory_format=memory_format)
        if captured:
            # Another model runs first: it compiles the kernels and allocates the libraries' workspaces.
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                loss(copy.deepcopy(twin)(there)).backward()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss(twin(there)).backward()
            graph.replay()
        else:
            loss(twin(there)).backward()
            groups = pool_of(twin)._groups
            assert groups is not None
            assert any(group._kernels is not None and len(group.weights) == 2 for group in groups.values())
        pool, bases = hand.gradients(True)
        found = pool_of(twin).weight.grad.double().cpu()
        torch.testing.assert_close(found, pool, rtol=1e-4, atol=1e-4 * float(pool.abs().max()))
        for name, basis in named_bases(twin).items():
            expected = bases[name]
            torch.testing.assert_close(
                basis.grad.double().cpu(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name
            )


@pytest.mark.filterwarnings("ignore:.*cannot be frozen in one layer and trained in another")
@pytest.mark.parametrize("frozen", ["pool", "bases"])
def test_the_pool_or_a_basis_may_be_frozen(frozen: str) -> None:
    model, dense = pair()
    hand = ByHand(model, dense)
    pool = pool_of(model)
    for parameter in [pool.weight] if frozen == "pool" else pool.bases():
        parameter.requires_grad_(False)
    x = normal(2, 4, 12, 12)
    out, expected = model(x), hand(x)
    torch.testing.assert_close(out, expected)
    loss(out).backward()
    loss(expected).backward()
    gradient, gradients = hand.gradients(True)
    if frozen == "bases":
        torch.testing.assert_close(pool.weight.grad, gradient, rtol=_GAMMA_RTOL, atol=1e-7)
        assert all(basis.grad is None for basis in pool.bases())
    else:
        assert pool.weight.grad is None
        for name, basis in named_bases(model).items():
            torch.testing.assert_close(basis.grad, gradients[name], rtol=1e-11, atol=1e-11)


def test_a_frozen_model_has_frozen_bases() -> None:
    dense = Net().requires_grad_(False)
    model = roastify.convert(dense, config=config())
    assert pool_of(model).bases()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(normal(2, 4, 12, 12, dtype=torch.float32)).requires_grad
    assert not any(parameter.requires_grad for parameter in roastify.densify(model).parameters())
    thawed = roastify.convert(Net(), config=config())
    assert all(basis.requires_grad for basis in pool_of(thawed).bases())
    thawed.requires_grad_(False)
    assert not any(basis.requires_grad for basis in pool_of(thawed).bases())


def test_functional_call_uses_the_pool_and_bases_that_it_is_given() -> None:
    model, _ = pair(precondition=False)
    model.eval()
    x = normal(2, 4, 12, 12)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    given = {name: parameter.detach().clone().requires_grad_() for name, parameter in other.named_parameters()}
    before = model(x)
    out = torch.func.functional_call(model, given, (x,))
    torch.testing.assert_close(out, other(x))
    loss(out).backward()
    loss(other(x)).backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(given[name].grad, parameter.grad, rtol=1e-11, atol=1e-11, msg=name)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(x), before)


def test_a_deep_copy_is_independent() -> None:
    model, _ = pair()
    model.eval()
    x = normal(2, 4, 12, 12)
    twin = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for basis in pool_of(twin).bases():
            basis.zero_()
    assert not twin.third.weight.any()
    assert torch.equal(model(x), expected)
    loss(twin(x)).backward()
    assert pool_of(twin).weight.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kernel_basis", ["auto", 3])
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_trains(device: str, kernel_basis: Any) -> None:
    model, _ = pair(dtype=torch.float32, device=device, kernel_basis=kernel_basis)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = normal(32, 4, 12, 12, dtype=torch.float32).to(device)
    labels = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1, :6].mean((1, 2)) > 0).long()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), labels)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.3 * losses[0]
    for name, parameter in model.named_parameters():
        # A bias before a norm has no gradient.
        assert name == "second.bias" or not torch.equal(parameter.detach(), before[name]), name
    model.eval()
    torch.testing.assert_close(roastify.densify(model)(x), model(x), rtol=1e-4, atol=1e-4)


# Artifacts, dense models, state dicts and plans.


@pytest.mark.parametrize("fresh_on", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, fresh_on: str, dtype: torch.dtype) -> None:
    model, _ = pair(dtype=dtype)
    with torch.no_grad():
        # Training moves the bases, so the saved ones differ from the initial ones.
        for basis in pool_of(model).bases():
            basis.add_(0.1 * torch.randn_like(basis))
    roastify.save(model, tmp_path / "a")
    with torch.device(fresh_on):
        fresh = Net().to(dtype)
    loaded = roastify.load(tmp_path / "a", fresh)
    assert list(loaded.state_dict()) == list(model.state_dict())
    for (name, one), other in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype, name
    assert all(basis.requires_grad for basis in pool_of(loaded).bases())
    x = normal(2, 4, 12, 12, dtype=dtype)
    assert torch.equal(loaded(x), model(x))
    loss(loaded(x)).backward()
    loss(model(x)).backward()
    for one, other in zip(pool_of(loaded).bases(), pool_of(model).bases(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    stored = load_file(tmp_path / "a" / artifact.WEIGHTS)
    parameters = sum(stored[name].numel() for name, _ in model.named_parameters())
    assert parameters == pool_of(model).plan.stored_numel


@pytest.mark.parametrize("inplace", [False, True])
def test_densify_combines_the_kernels(inplace: bool) -> None:
    model, dense = pair()
    loss(model(normal(2, 4, 12, 12))).backward()
    model.eval()
    x = normal(3, 4, 12, 12)
    expected = model(x)
    again = roastify.densify(model, inplace=inplace)
    assert list(again.state_dict()) == list(dense.state_dict())
    assert not any(isinstance(module, RoastModule) for module in again.modules())
    assert [type(module) for module in again.modules()] == [type(module) for module in dense.modules()]
    torch.testing.assert_close(again(x), expected, rtol=1e-11, atol=1e-12)


def test_a_dense_state_dict_of_an_artifact(tmp_path: Path) -> None:
    model, dense = pair(lambda: Tied(nn.Conv2d(16, 16, 3)))
    roastify.save(model, tmp_path / "a")
    found = dense_state_dict(artifact.read_artifact(tmp_path / "a"))
    expected = roastify.densify(model).state_dict()
    assert found.keys() == dense.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_are_copied_into_a_dense_model() -> None:
    model, dense = pair()
    copy_weights(model, dense)
    for tensor in pool_of(model).plan.shared:
        expected = pooled_weight(pool_of(model), tensor).dense()
        assert torch.equal(dense.get_parameter(tensor.name), expected)


def test_an_artifact_from_before_basis_kernels_loads(tmp_path: Path) -> None:
    dense = Net()
    model = roastify.convert(dense, config=config(kernel_basis="none"))
    roastify.save(model, tmp_path / "a")
    path = tmp_path / "a" / artifact.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for tensor in manifest["plan"]["tensors"]:
        assert tensor.pop("basis_count") == 0
    del manifest["plan"]["summary"]["basis_parameters"]
    del manifest["sha256"]
    manifest["format_version"] = 3
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest), encoding="utf-8")
    loaded = roastify.load(tmp_path / "a", Net())
    x = normal(2, 4, 12, 12, dtype=torch.float32)
    assert torch.equal(loaded(x), model(x))
    assert pool_of(loaded).plan == pool_of(model).plan
    assert dense_state_dict(artifact.read_artifact(tmp_path / "a")).keys() == dense.state_dict().keys()


def test_the_error_names_a_missing_basis(tmp_path: Path) -> None:
    model, _ = pair()
    roastify.save(model, tmp_path / "a")
    path = tmp_path / "a" / artifact.WEIGHTS
    tensors = load_file(path)
    del tensors["roast_pool.basis_1"]
    write_tensors(tensors, path)
    manifest = json.loads((tmp_path / "a" / artifact.MANIFEST).read_text(encoding="utf-8"))
    manifest["weights"]["sha256"] = digest_of_file(path)
    (tmp_path / "a" / artifact.MANIFEST).write_text(json.dumps(artifact.seal(manifest)), encoding="utf-8")
    for read in (
        lambda: roastify.load(tmp_path / "a", Net()),
        lambda: dense_state_dict(artifact.read_artifact(tmp_path / "a")),
    ):
        with pytest.raises(roastify.RoastError, match=r"lacks 1 of the tensors it should hold: roast_pool\.basis_1"):
            read()


def test_the_current_plan_is_the_models_plan_with_its_present_dtypes_and_parameters() -> None:
    model, _ = pair()
    assert current_plans(model) == [pool_of(model).plan]
    assert current_plans(model.float())[0].dtype == "float32"
    model.extra = nn.Parameter(torch.ones(3))
    assert current_plans(model)[0].tensors[-1].name == "extra"


def test_a_state_dict_contains_the_bases() -> None:
    model, dense = pair()
    other = roastify.convert(dense, config=config(init="project"))
    state = model.state_dict()
    assert {"roast_pool.weight", "roast_pool.basis_0", "roast_pool.basis_1"} <= state.keys()
    assert not {"second.weight", "third.weight"} & state.keys()
    x = normal(2, 4, 12, 12)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(state)
    assert torch.equal(other.eval()(x), model.eval()(x))


class Minding(Net):
    """Its outputs differ if its layer's class is not exactly torch's."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if type(self.second) is nn.Conv2d else out[:, :7]


def test_a_conversion_that_fails_leaves_the_model_as_it_was() -> None:
    dense = Minding()
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    parameters, kinds = list(dense.parameters()), [type(module) for module in dense.modules()]
    x = normal(2, 4, 12, 12, dtype=torch.float32)
    with pytest.raises(OutputMismatch):
        roastify.convert(dense, config=config(), inplace=True, example_inputs=x)
    assert all(one is other for one, other in zip(dense.parameters(), parameters, strict=True))
    assert [type(module) for module in dense.modules()] == kinds
    assert list(dense.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())


def test_a_conversion_in_place() -> None:
    dense = Net()
    expected = roastify.convert(dense, config=config())
    model = roastify.convert(dense, config=config(), inplace=True)
    assert model is dense
    x = normal(2, 4, 12, 12, dtype=torch.float32)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("init", ["match", "project"])
def test_the_default_device_makes_no_difference(init: str) -> None:
    dense = Net()
    expected = roastify.convert(dense, config=config(init=init))
    with torch.device("meta"):
        model = roastify.convert(dense, config=config(init=init))
    assert named_bases(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_an_emitted_graph_computes_what_the_model_computes() -> None:
    dense = Chain().double()
    model, graph = (roastify.convert(dense, config=config(), emit=emit) for emit in ("model", "graph"))
    assert len(named_bases(model)) == 2
    x = normal(2, 16, 9, 9)
    out = graph(x)
    assert torch.equal(out, model(x))
    loss(out).backward()
    loss(model(x)).backward()
    for (name, one), (other_name, other) in zip(
        sorted(graph.named_parameters()), sorted(model.named_parameters()), strict=True
    ):
        assert name == other_name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-12, msg=name)


def test_verification_and_behaviour_pass_with_bases() -> None:
    dense = Net()
    model = roastify.convert(dense, config=config(), example_inputs=normal(2, 4, 12, 12, dtype=torch.float32))
    report = roastify.verify(dense, model, normal(2, 4, 12, 12, dtype=torch.float32))
    assert report is not None
    assert "basis" in " ".join(model.state_dict())


# Recovery.


def errors_of(student: nn.Module, teacher: nn.Module, x: Tensor, names: list[str]) -> list[float]:
    """Return each layer's squared error on the teacher's inputs, over the squares of the teacher's outputs."""
    found = []
    for name in names:
        seen: list[tuple[Tensor, Tensor]] = []
        hook = teacher.get_submodule(name).register_forward_hook(lambda m, a, o, s=seen: s.append((a[0], o)))
        with torch.no_grad():
            teacher(x)
            hook.remove()
            given, expected = seen[0]
            out = student.get_submodule(name)(given)
        found.append(float((out - expected).square().sum() / expected.square().sum()))
    return found


def smooth(*shape: int, seed: int = 5) -> Tensor:
    """Return images whose neighbouring pixels are alike, as in the images that convolutions usually get."""
    x = normal(*shape, dtype=torch.float32, seed=seed).cumsum(2).cumsum(3)
    return x / x.std()


def test_alignment_brings_layers_with_bases_nearer_than_projection_does() -> None:
    teacher = Net().eval()
    x = smooth(24, 4, 12, 12)
    student = roastify.convert(teacher, config=config(ratio=4, init="project"))
    assert len(named_bases(student)) == 2
    names = ["first", "second", "third", "head"]
    before = errors_of(student, teacher, x, names)
    claimed, reached = align_layers(student, teacher, [lambda: teacher(x)], 40)
    after = errors_of(student, teacher, x, names)
    assert reached < 0.8 * claimed
    assert sum(after) < 0.8 * sum(before)
    assert align_layers(student, teacher, [lambda: teacher(x)], 0)[0] == pytest.approx(reached, rel=1e-3)


def test_alignment_finds_the_least_squares_pool_for_the_bases() -> None:
    teacher = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.Tanh(), nn.Conv2d(8, 8, 3, bias=False)).double().eval()
    student = roastify.convert(teacher, config=config(ratio=3, init="project", kernel_basis=4, share="weights"))
    hand = ByHand(student, teacher)
    assert len(hand.bases) == 2
    x = smooth(8, 8, 9, 9).double()
    _, after = align_layers(student, teacher, [lambda: teacher(x)], 300)
    total = torch.zeros((), dtype=torch.float64)
    hand.pool = pool_of(student).weight.detach().clone().requires_grad_()
    for index, given in ((0, x), (2, teacher[:2](x).detach())):
        weight = teacher[index].weight.detach().flatten(1)
        rows = F.unfold(given, 3).transpose(1, 2).reshape(-1, 72)
        second = rows.t() @ rows / len(rows)
        # The ridge that alignment adds.
        ridge = (1e-2 + 72 / len(rows)) * second.diagonal().mean()
        second += ridge * torch.eye(72, dtype=torch.float64)
        difference = hand.weights()[f"{index}.weight"].flatten(1) - weight
        total = total + ((difference @ second) * difference).sum() / ((weight @ second) * weight).sum()
    assert after == pytest.approx(float(total.detach()) / 2, rel=1e-6)
    # At the minimum the pool's gradient is zero.
    (gradient,) = torch.autograd.grad(total, hand.pool)
    assert float(gradient.norm() * hand.pool.detach().norm()) < 1e-3 * float(total.detach())


def test_alignment_is_preconditioned_by_the_diagonal_of_its_quadratic() -> None:
    # The quadratic is diagonal if nothing is shared and the inputs at a kernel's positions are uncorrelated.
    model, _ = pair(lambda: nn.Conv2d(4, 6, 3), ratio=1.1, kernel_basis=4, init="project")
    pool = pool_of(model)
    (tensor,) = pool.plan.with_basis
    assert pool.plan.no_sharing
    term = _Term(tensor, torch.zeros(6, 36, dtype=torch.float64), second=normal(36).square().diag()[None])
    place = _LinearMap(pool.table, pool.plan.view(tensor), tensor.scale or 0.0, pool.bases()[0].detach())
    units = torch.eye(pool.weight.numel(), dtype=torch.float64).view(-1, *pool.weight.shape)
    expected = torch.stack([term.error(place.weight(unit)) for unit in units])
    assert (expected > 0).sum() == tensor.matrix_numel
    found = _curvature(pool, [term], pool.weight.detach())
    torch.testing.assert_close(found.flatten(), torch.where(expected > 0, expected, 1.0))


@pytest.mark.parametrize("kernel_basis", ["auto", 4])
def test_a_student_with_bases_recovers(kernel_basis: Any) -> None:
    teacher = Net()
    # Statistics of batches this small would undo what alignment did.
    teacher.norm = nn.GroupNorm(4, 48)
    teacher.eval()
    data = [smooth(16, 4, 12, 12, seed=seed) for seed in range(6)]
    student = roastify.convert(teacher, config=config(ratio=4, init="project", kernel_basis=kernel_basis))
    bases = [basis.detach().clone() for basis in pool_of(student).bases()]
    report = roastify.recover(student, teacher, data, 0, align=30)
    assert report.align_error is not None and report.aligned is not None
    assert report.align_error[1] < 0.8 * report.align_error[0]
    assert report.aligned.error < report.before.error
    # Alignment moves the pool; training moves the bases too.
    assert all(map(torch.equal, bases, pool_of(student).bases()))
    report = roastify.recover(student, teacher, data, 12, align=0, lr=3e-3)
    assert report.after.error < report.before.error
    assert not any(map(torch.equal, bases, pool_of(student).bases()))


# Compilers.


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """Return the output and the gradient of every parameter."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = run(x)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(out.float().square().mean(), list(model.parameters()))
    return {"output": out.detach().clone(), **dict(zip(names, (each.clone() for each in gradients), strict=True))}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, other in expected.items():
        assert found[name].dtype == other.dtype
        assert other.any(), name
        torch.testing.assert_close(
            found[name], other, rtol=tolerance, atol=tolerance * float(other.abs().max()), msg=name
        )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_step_is_the_eager_one(autocast: bool, precondition: bool) -> None:
    model, _ = pair(Chain, torch.float32, precondition=precondition)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = normal(2, 16, 9, 9, dtype=torch.float32, seed=seed)
        assert_near(step(compiled, model, x, autocast), step(model, model, x, autocast), 2e-2 if autocast else 1e-5)
    # The compiled model sees what training writes.
    with torch.no_grad():
        for basis in pool_of(model).bases():
            basis.mul_(1.5)
    assert_near(step(compiled, model, x, autocast), step(model, model, x, autocast), 2e-2 if autocast else 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_kernels_are_made_in_float32_under_autocast() -> None:
    """The weight is read in float32 here, so autocast must not round the kernels."""
    coefficients = normal(200, 6, dtype=torch.float32).requires_grad_()
    basis = normal(6, 9, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(ops.combine, backend="aot_eager", fullgraph=True)
    found = []
    for run in (ops.combine, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(coefficients, basis, 0.3)
        assert out.dtype == torch.float32
        found.append([out, *torch.autograd.grad(out.square().sum(), [coefficients, basis])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_runs() -> None:
    model, _ = pair(dtype=torch.float32)
    model.eval()
    program = torch.export.export(
        model, (normal(3, 4, 12, 12, dtype=torch.float32),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for size in (2, 5):
        x = normal(size, 4, 12, 12, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("autocast", [False, True])
def test_inductor_computes_the_eager_step(autocast: bool) -> None:
    model, _ = pair(Chain, torch.float32, "cuda")
    compiled = torch.compile(model, fullgraph=True)
    x = normal(8, 16, 9, 9, dtype=torch.float32).to("cuda")
    # cuDNN computes convolutions in TensorFloat32 here.
    assert_near(step(compiled, model, x, autocast), step(model, model, x, autocast), 5e-2 if autocast else 1e-2)


# On a GPU only.


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_channels_last(autocast: bool) -> None:
    model, dense = pair(dtype=torch.float32, device="cuda", precondition=False)
    hand = ByHand(copy.deepcopy(model).double(), dense.double())
    model = model.to(memory_format=torch.channels_last)
    x = normal(8, 4, 12, 12, dtype=torch.float32).to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out = model(x.contiguous(memory_format=torch.channels_last))
    expected = hand(x.double())
    tolerance = 5e-2 if autocast else 1e-4
    difference = (out - expected).detach().abs().max()
    assert float(difference) < tolerance * float(expected.detach().abs().max())
    loss(out).backward()
    loss(expected).backward()
    # Rounding turns some of the ReLUs on or off.
    tolerance = 0.15 if autocast else 1e-3
    pool = pool_of(model).weight
    assert float((pool.grad - hand.pool.grad).norm()) < tolerance * float(hand.pool.grad.norm())
    for name, basis in named_bases(model).items():
        theirs = hand.bases[name].grad
        assert float((basis.grad - theirs).norm()) < tolerance * float(theirs.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_whole_step_in_a_cuda_graph(autocast: bool) -> None:
    model, _ = pair(dtype=torch.float32, device="cuda")
    model = model.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    xs = [normal(8, 4, 12, 12, dtype=torch.float32, seed=seed).to("cuda") for seed in range(5)]

    def stepper(model: nn.Module) -> Callable[[Tensor], Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
                out = model(x).float().square().mean()
            out.backward()
            optimizer.step()
            return out

        return step

    found, expected = losses_of_replays_and_of_steps(stepper, model, twin, xs)
    assert len(set(found)) == 5
    torch.testing.assert_close(found, expected, rtol=5e-2 if autocast else 1e-3, atol=0)
    for one, other in zip(pool_of(model).bases(), pool_of(twin).bases(), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2 if autocast else 1e-3, atol=1e-2 if autocast else 1e-4)


def test_a_layer_says_that_its_kernels_have_a_basis() -> None:
    model = roastify.convert(nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1)), 10)
    assert "kernels of basis_0" in repr(model[0]) and "basis" not in repr(model[1])


def test_a_wrong_gradient_of_a_basis_is_found() -> None:
    dense = nn.Sequential(nn.Conv2d(64, 64, 3))
    converted = roastify.convert(dense, 10)
    copy_weights(converted, dense)
    x = torch.randn(2, 64, 8, 8)
    for model in (dense, converted):
        model(x).square().sum().backward()
    (basis,) = pool_of(converted).bases()
    right = basis.grad.clone()
    assert agreement._gradient_error(dense, converted) < 1e-4
    basis.grad = right * 1.5
    assert agreement._gradient_error(dense, converted) == pytest.approx(0.5, abs=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(basis.grad, right, rtol=1e-4, atol=1e-6)
    basis.grad = right * math.nan
    assert agreement._gradient_error(dense, converted) == math.inf


def test_without_sharing_coefficients_have_a_scale_of_their_own() -> None:
    """A whole tensor then has λ = 1, which does not give the coefficients' squares that divide a basis's gradient."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(100)
    plan = roastify.plan(model, 1.2, config=RoastConfig(kernel_basis=2), init="project")
    assert plan.no_sharing
    kernels, linear = plan.shared
    assert linear.scale == 1.0 and kernels.scale * plan.pool_std == pytest.approx(
        float(model[0].weight.detach().std()) * 4.5**0.5, rel=1e-3
    )

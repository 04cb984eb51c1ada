"""Tensors that are not matrices around zero keep what they stand for: kept dense, or spread around their mean."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import roastify
from roastify.conversion.converted import pool_of
from roastify.pool.plan import TensorPlan


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.rest = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x)


def convert(part: nn.Module, ratio: float = 2, **settings: Any) -> tuple[Any, dict[str, TensorPlan]]:
    torch.manual_seed(0)
    model: Any = roastify.convert(Net(part), config=roastify.RoastConfig(ratio=ratio, **settings))
    return model, {tensor.name.removeprefix("part."): tensor for tensor in pool_of(model).plan.tensors}


class Scale(nn.Module):
    """A layer scale as ConvNeXt has it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-2 * torch.rand(shape) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def quietly(function: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (lambda: parametrizations.weight_norm(nn.Conv1d(16, 2048, 3)), "parametrizations.weight.original0"),
        (lambda: quietly(lambda: nn.utils.weight_norm(nn.Conv1d(16, 2048, 3))), "weight_g"),
        (lambda: Scale(2048, 1, 1), "gamma"),
        (lambda: Scale(1, 1, 2048), "gamma"),
    ],
    ids=["weight_norm", "old weight_norm", "layer scale", "last"],
)
@pytest.mark.parametrize("init", ["match", "project"])
def test_vectors_of_several_dimensions_are_kept(part: Callable[[], nn.Module], name: str, init: str) -> None:
    _, tensors = convert(part(), init=init)
    assert not tensors[name].shared and tensors[name].reason.startswith("vector of ")
    # Where vectors are shared too, they are spread around their mean.
    model, tensors = convert(part(), init=init, share="all")
    center, value = tensors[name].center, getattr_by_path(model.part, name)
    assert tensors[name].shared and abs(float(value.detach().mean()) - center) < 0.2 * abs(center)


def getattr_by_path(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


@pytest.mark.parametrize("init", ["match", "project"])
def test_weight_normalised_layers_keep_their_spread(init: str) -> None:
    dense = parametrizations.weight_norm(nn.Conv1d(64, 256, 3))
    expected = float(dense.weight.detach().std())
    model, _ = convert(dense, init=init)
    assert 0.8 < float(model.part.weight.detach().std()) / expected < 1.25


def test_a_layers_own_weight_is_a_matrix_whatever_its_sizes() -> None:
    for layer in (nn.Linear(2048, 1), nn.Embedding(2048, 1), nn.Conv2d(1, 2048, 1)):
        _, tensors = convert(layer)
        assert tensors["weight"].shared and tensors["weight"].center == 0


class Log(nn.Module):
    """Mamba's logarithm of the state matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, 17.0).repeat(128, 1)))


class Norm(nn.LayerNorm):
    """A norm of several dimensions after training."""

    def __init__(self) -> None:
        super().__init__((32, 64))
        with torch.no_grad():
            self.weight.add_(0.1 * torch.randn(32, 64))
            self.bias.add_(0.1 * torch.randn(32, 64))


@pytest.mark.parametrize("init", ["match", "project"])
@pytest.mark.parametrize(("part", "name"), [(Log, "A_log"), (Norm, "weight")])
def test_matrices_around_another_mean_keep_it(part: Callable[[], nn.Module], name: str, init: str) -> None:
    dense = getattr(part(), name).detach()
    model, tensors = convert(part(), init=init, ratio=8)
    value = getattr(model.part, name).detach()
    assert tensors[name].shared and tensors[name].center == pytest.approx(float(dense.mean()), rel=0.02)
    assert abs(float(value.mean() - dense.mean())) < 0.3 * float(dense.std())
    # A least-squares fit of colliding values has less spread than they have.
    assert (0.3 if init == "project" else 0.7) < float(value.std() / dense.std()) < 1.4


def test_matrices_around_zero_are_not_centred() -> None:
    for ratio in (1, 8):
        _, tensors = convert(Norm(), ratio=ratio, init="project")
        assert tensors["bias"].center == 0 and tensors["rest.weight"].center == 0
        assert (tensors["weight"].center == 0) == (ratio == 1)


@pytest.mark.parametrize("shape", [(128, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("how", [None, "householder", "matrix_exp", "cayley"])
@pytest.mark.parametrize(("init", "ratio"), [("match", 4), ("project", 4), ("project", 1)])
def test_orthogonal_layers_stay_orthogonal(shape: tuple[int, int], how: str | None, init: str, ratio: float) -> None:
    torch.manual_seed(1)
    layer = parametrizations.orthogonal(nn.Linear(*shape), orthogonal_map=how)
    model, tensors = convert(layer, ratio=ratio, init=init)
    assert ratio > 1 or torch.equal(model.part.weight, layer.weight)
    weight = model.part.weight.detach()
    weight = weight if weight.shape[0] >= weight.shape[1] else weight.t()
    assert float((weight.t() @ weight - torch.eye(weight.shape[1])).abs().max()) < 1e-4
    original = tensors["parametrizations.weight.original"]
    reflectors = how == "householder" or (how is None and shape[0] != shape[1])
    assert original.shared and bool(original.diagonal) == reflectors
    model(torch.randn(2, 256)).sum().backward()
    loaded = roastify.densify(model)
    assert torch.equal(loaded.part.weight, model.part.weight)


def test_reflectors_in_a_batch_are_kept() -> None:
    layer = parametrizations.orthogonal(nn.Conv1d(64, 32, 16), orthogonal_map="householder")
    _, tensors = convert(layer)
    assert "Householder" in tensors["parametrizations.weight.original"].reason


class Signs(nn.Module):
    """A parametrization that wants ones with a sign."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() == 1, x, 0.0)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.sign()


@pytest.mark.parametrize("init", ["match", "project"])
def test_what_a_weight_is_computed_from_stays_dense_if_the_weight_would_lose_its_spread(init: str) -> None:
    part = nn.Linear(64, 64)
    torch.nn.utils.parametrize.register_parametrization(part, "weight", Signs())
    model, tensors = convert(part, init=init)
    source = tensors["parametrizations.weight.original"]
    assert not source.shared and source.reason.startswith(
        "computed from it, part.weight would have a standard deviation"
    )
    assert float(model.part.weight.detach().std()) > 0.9


@pytest.mark.parametrize("init", ["match", "project"])
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_a_spectral_norm_is_that_of_the_converted_weight(norm: Callable[..., Any], init: str) -> None:
    torch.manual_seed(0)
    part = quietly(lambda: norm(nn.Linear(64, 96)))
    model, tensors = convert(part, init=init)
    assert next(tensor for name, tensor in tensors.items() if "orig" in name).shared
    model.eval()
    model.part(torch.randn(2, 64))
    assert torch.linalg.matrix_norm(model.part.weight, ord=2).item() == pytest.approx(1, rel=0.1)


def test_at_ratio_1_a_spectral_norm_stays_bit_for_bit() -> None:
    part = parametrizations.spectral_norm(nn.Linear(64, 96)).eval()
    model, _ = convert(part, ratio=1, init="project")
    assert torch.equal(model.part.weight, part.weight)

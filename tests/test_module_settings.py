"""Settings that a pattern gives to tensors and modules of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import roastify
from roastify import RoastConfig
from roastify.errors import ConfigError, PlanError


class Net(nn.Module):
    """Two convolutions, and two pairs of linear layers, too small to be folded unless they are asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
        self.body = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64))
        self.head = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x).mean(dim=(2, 3))))


def settings(**modules: dict[str, Any]) -> RoastConfig:
    return RoastConfig(ratio=4, tile="8x8", min_numel=0, kernel_basis="none", modules=modules)


def folds(plan: roastify.RoastPlan) -> dict[str, tuple[int, int]]:
    """Return fold and hashes of the folded tensors."""
    found = ((tensor.name, tensor.fold) for tensor in plan.shared if tensor.fold is not None)
    return {name: (plan.folds[index].fold, plan.folds[index].hashes) for name, index in found}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_only_what_a_pattern_names_has_its_settings() -> None:
    assert not folds(roastify.plan(Net(), config=settings()))
    plan = roastify.plan(Net(), config=settings(**{"body": {"fold": 4}, "*.1": {"fold": 2, "fold_hashes": 1}}))
    # Of several patterns the first counts; body.1 is named by both.
    named = {"stem.1.weight": (2, 1), "body.0.weight": (4, 2), "body.1.weight": (4, 2), "head.1.weight": (2, 1)}
    assert folds(plan) == named
    others = roastify.plan(Net(), config=settings(head={"fold": "none"}).replace(fold=4))
    assert folds(others) == {"stem.1.weight": (4, 2), "body.0.weight": (4, 2), "body.1.weight": (4, 2)}


def test_one_convolution_has_a_basis() -> None:
    plan = roastify.plan(Net(), config=settings(**{"stem.1": {"kernel_basis": 3}}))
    assert {tensor.name: tensor.basis_count for tensor in plan.shared if tensor.basis_count} == {"stem.1.weight": 3}


def test_a_model_with_settings_of_its_modules_is_the_dense_model_of_its_weights(tmp_path: Path) -> None:
    model = roastify.convert(Net(), config=settings(body={"fold": 4}, stem={"kernel_basis": 3})).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = roastify.densify(model)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    roastify.save(model, tmp_path)
    assert torch.equal(roastify.load(tmp_path, Net()).eval()(x), model(x))


def test_settings_come_from_toml_dicts_and_keywords(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('ratio = 4\ntile = "8x8"\nmin_numel = 0\nkernel_basis = "none"\n[modules."body.*"]\nfold = 4\n')
    config = RoastConfig.from_toml(file)
    assert config == settings(**{"body.*": {"fold": 4}}) and len({config, settings(**{"body.*": {"fold": 4}})}) == 1
    assert config.to_dict()["modules"] == {"body.*": {"fold": 4}}
    assert RoastConfig.from_dict(config.to_dict()) == config
    plan = roastify.plan(Net(), 4, tile="8x8", min_numel=0, kernel_basis="none", modules={"body.*": {"fold": 4}})
    assert folds(plan) == folds(roastify.plan(Net(), config=config)) != {}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"body": {"ratio": 30}},
            r"modules, 'body': 'ratio' cannot be set for a module.*; fold, .* can, exclude keeps",
        ),
        ({"body": {"fold": 3}}, r"modules, 'body': fold must be 'auto', 'none' or a power of 2"),
        ({"body": {"fold": 8}}, r"modules, 'body': fold must not exceed the ratio, 4; found 8"),
        ({"re:(": {"fold": 2}}, r"modules: 're:\(' is not a valid regular expression"),
        ({"body": 4}, r"modules must be patterns with settings, such as .*; found \{'body': 4\}"),
        ("body", r"modules must be patterns with settings"),
    ],
)
def test_what_no_module_can_have_is_refused(modules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RoastConfig(ratio=4, modules=modules)


def test_a_pattern_without_effect_is_refused() -> None:
    with pytest.raises(PlanError, match=r"modules pattern 'bodi' matched no parameter .*closest: 'body'"):
        roastify.plan(Net(), config=settings(bodi={"fold": 4}))
    with pytest.raises(PlanError, match="fold = 4 fits no weight"):
        roastify.plan(Net(), config=settings(**{"stem.0": {"fold": 4}}))

"""A conversion that throws training away says so, and one of a new model does not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from torch import nn

import roastify
from roastify import RoastConfig
from roastify.cli import main


def build(norm: Callable[[int], nn.Module] = nn.LayerNorm) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), norm(64), nn.ReLU(), nn.Linear(64, 32), norm(32))


def trained(model: nn.Module, steps: int = 2) -> nn.Module:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 32)).square().sum(1).log().mean().backward()
        optimizer.step()
    return model


def said(model: nn.Module, *args: Any, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        roastify.convert(model, 4, *args, **settings)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm, lambda size: nn.GroupNorm(4, size)])
def test_a_trained_model_that_starts_at_random_is_named_once(norm: Callable[[int], nn.Module]) -> None:
    model = trained(build(norm))
    (message,) = said(model)
    assert re.search(r"norm layer 1 shows.*start at random.*init=\"project\" \(--init project\).*recover", message)
    assert said(model, config=RoastConfig(init="auto"), init="auto", emit="graph") == [message]
    # Whoever names a start has chosen it, and a plan converts nothing.
    for quiet in ({"init": "match"}, {"init": "project"}, {"config": RoastConfig(init="match")}):
        assert not said(model, **quiet)
    assert "the model's weights are not kept" in str(roastify.plan(model, 4))
    # As an error it leaves the model as it was.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserWarning, match="start at random"):
        roastify.convert(model, 4, inplace=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_new_model_is_never_named() -> None:
    assert not said(build()) and not said(build(nn.BatchNorm1d))
    # A batch norm that has seen data has not learned from it; a dense layer alone does not tell.
    seen = build(nn.BatchNorm1d)
    seen(torch.randn(16, 32))
    assert not said(seen) and not said(trained(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))))
    # As generative models of images are made.
    random = build(nn.BatchNorm1d)
    for module in (random[1], random[4]):
        nn.init.normal_(module.weight, 1.0, 0.02)
    assert not said(random)


def test_trained_layers_beside_those_that_are_converted_do_not_count() -> None:
    # A frozen backbone with a new head, a new head alone, a model most of which is new.
    backbone = trained(build()).requires_grad_(False)
    assert not said(nn.Sequential(backbone, nn.Linear(32, 512), nn.LayerNorm(512)))
    assert not said(nn.Sequential(trained(build()), nn.Linear(32, 512)), include="1")
    assert not said(nn.Sequential(trained(build()), *(nn.LayerNorm(32) for _ in range(3))))
    assert said(trained(build()).requires_grad_(False))


def test_the_command_says_it_too(tmp_path: Path) -> None:
    torch.save(trained(build()).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch.nn import LayerNorm, Linear, ReLU, Sequential\n"
        f"model = Sequential({', '.join(map(repr, build()))})\n"
        f"model.load_state_dict(torch.load({str(tmp_path / 'weights.pt')!r}))\n"
    )
    command = ["check", str(tmp_path / "model.py"), "--ratio", "4"]
    with pytest.warns(UserWarning, match="the model was trained"):
        assert click.testing.CliRunner().invoke(main, command).exit_code == 0
    assert click.testing.CliRunner().invoke(main, [*command, "--init", "match"]).exit_code == 0

"""What verify checks beside outputs: copies, state dicts and gradients, each with a model that fails it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roastify
from roastify.errors import OutputMismatch
from roastify.layers.base import RoastModule

X = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 48)
        self.norm = nn.LayerNorm(48)
        self.last = nn.Linear(48, 24)
        self.what = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.last(self.norm(self.first(x))).repeat(1, 2))
        if self.what == "no gradient" and isinstance(self.first, RoastModule):
            x = x.detach() + self.norm.bias
        return x

    def __deepcopy__(self, memo: Any) -> Net:
        if self.what == "no copy" or (self.what == "no converted copy" and isinstance(self.first, RoastModule)):
            raise TypeError("no copies of this")
        made = copy._reconstruct(self, memo, *self.__reduce_ex__(4)[:3])  # type: ignore[attr-defined]
        if self.what == "state elsewhere" and isinstance(self.first, RoastModule):
            made.last.eval().forward = lambda x: torch.zeros(3, 24)
        return made


def verified(what: str = "", **settings: Any) -> tuple[str, ...]:
    model = Net()
    converted = roastify.convert(model, 2, **settings)
    model.what = converted.what = what
    return roastify.verify(model, converted, X).behaviour


def test_a_good_model_passes_everything() -> None:
    assert verified() == ("deepcopy", "state dict", "gradients")
    model = Net()
    assert roastify.verify(model, roastify.convert(model, 2)).behaviour == ("deepcopy", "state dict")
    assert roastify.verify(model, model, X).behaviour == ()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no gradient", "no gradient reaches the pool"),
        ("no converted copy", "cannot be deep-copied, but the original can: TypeError: no copies of this"),
        ("state elsewhere", "some state is missing from the state dict"),
    ],
)
def test_a_model_that_loses_copies_state_or_gradients_fails(what: str, message: str) -> None:
    with pytest.raises(OutputMismatch, match=message):
        verified(what)


def test_checks_that_the_original_fails_too_are_left_out() -> None:
    model = Net()
    converted = roastify.convert(model, 2)
    model.what = converted.what = "no copy"
    assert roastify.verify(model, converted, X).behaviour == ("gradients",)
    frozen = Net().requires_grad_(False)
    assert roastify.verify(frozen, roastify.convert(frozen, 2), X).behaviour == ("deepcopy", "state dict")


def test_the_gradient_check_is_left_out_behind_a_head_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 24))
    nn.init.zeros_(model[1].weight)
    converted = roastify.convert(model, 1.5, config=roastify.RoastConfig(share="weights"))
    assert roastify.verify(model, converted, X).behaviour == ("deepcopy", "state dict")
    # If the original's weights get gradients, the pool must get one.
    nn.init.ones_(model[1].weight)
    with pytest.raises(OutputMismatch, match="no gradient reaches the pool"):
        roastify.verify(model, converted, X)


def test_models_are_left_as_they_were() -> None:
    model = Net()
    converted = roastify.convert(model, 2)
    state = copy.deepcopy(converted.state_dict())
    roastify.verify(model, converted, X)
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *converted.parameters()])

"""The sandbox: random generators, modes, buffers and attributes are as they were, whatever ran inside."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from roastify.isolation import RandomStream, modes_kept, random_states_kept, state_kept, without_warnings

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("fails", [False, True])
def test_random_generators_are_put_back(fails: bool) -> None:
    with random_states_kept(seed=3):
        expected = draw()
    for seed in (None, 5):
        with random_states_kept(seed=3):
            try:
                with random_states_kept(seed=seed):
                    draw()
                    if fails:
                        raise KeyError
            except KeyError:
                pass
            assert draw() == expected


def test_a_seed_gives_the_same_numbers_from_all_three_generators() -> None:
    found = []
    for _ in range(2):
        draw()
        with random_states_kept(seed=7):
            found.append(draw())
    assert found[0] == found[1]


def test_a_stream_goes_on_where_it_was_and_leaves_others_alone() -> None:
    with random_states_kept(seed=1):
        expected = [draw() for _ in range(2)]
    stream = RandomStream(1, CPU)
    with random_states_kept(seed=2):
        outside = [draw() for _ in range(2)]
    with random_states_kept(seed=2):
        found = []
        for index in range(2):
            with stream.active():
                found.append(draw())
            assert draw() == outside[index]
    assert found == expected


class Changing(nn.Module):
    """Its forward changes a buffer in place, replaces another, sets an attribute and leaves its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.last = x
        self.calls += 1
        self.extra = x
        return x + torch.rand(())


def test_what_a_forward_changes_is_undone() -> None:
    model = Changing()
    buffers = dict(model._buffers)
    before = torch.rand((), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with state_kept(model):
        model.train(False)
        model(torch.ones(2))
    assert float(model.count) == 0 and model.calls == 0 and model.training and not hasattr(model, "extra")
    assert all(model._buffers[name] is buffer for name, buffer in buffers.items())
    assert torch.rand(()) == before


def test_modes_are_put_back_module_by_module() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), modes_kept(model):
        model.eval()
        raise KeyError
    assert model.training and model[0].training and not model[1].training


def test_warnings_are_kept_from_the_user() -> None:
    with without_warnings():
        warnings.warn("about roastify", stacklevel=1)
    with pytest.warns(UserWarning, match="about them"):
        warnings.warn("about them", stacklevel=1)

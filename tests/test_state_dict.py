"""State dicts say what their pool means: equal plans load, with λ; others are refused by name. Constants stay exact."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import roastify
from roastify.conversion.converted import pool_of
from roastify.errors import CheckpointError
from roastify.pool.state import plan_with

KEY = "roast_pool._extra_state"


class Net(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.words = nn.Embedding(96, 64, padding_idx=0)
        self.conv = nn.Conv2d(8, 16, 3)
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 64)
        with torch.no_grad():
            self.first.weight.mul_(gain)
            self.conv.weight.mul_(2 * gain)
            if gain != 1:
                self.words.weight[0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        image = x.float().view(-1, 1, 1, 1).expand(-1, 8, 3, 3) / 96
        return self.second(self.first(self.words(x)).relu()) + self.conv(image).flatten(1).repeat(1, 4)


X = torch.arange(12) * 7 % 96


def convert(gain: float = 1.0, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(int(gain))
    settings = {"ratio": 4, "kernel_basis": 4, **settings}
    return roastify.convert(Net(gain), config=roastify.RoastConfig(seed=seed, **settings))


@pytest.mark.parametrize("init", ["match", "project"])
def test_a_model_of_other_values_takes_the_scales_of_a_state_dict(init: str) -> None:
    """λ, centers, zero rows and Γ come along, so that outputs and gradients are the saved model's."""
    saved, fresh = convert(4.0, init=init, share="all"), convert(init=init, share="all")
    assert pool_of(saved).plan != pool_of(fresh).plan
    assert fresh.load_state_dict(saved.state_dict()).missing_keys == []
    assert pool_of(saved).plan.tensors == pool_of(fresh).plan.tensors
    gradients = []
    for model in (saved, fresh):
        model(X).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert torch.equal(saved(X), fresh(X))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert roastify.densify(fresh)(X).allclose(saved(X), rtol=1e-5, atol=1e-6)


def test_an_artifact_of_a_model_that_took_a_state_dict_is_the_saved_models(tmp_path: Any) -> None:
    saved, fresh = convert(4.0), convert()
    fresh.load_state_dict(saved.state_dict())
    roastify.save(fresh, tmp_path)
    assert torch.equal(roastify.load(tmp_path, Net())(X), saved(X))


def test_an_artifact_of_a_given_state_dict_is_the_saved_models(tmp_path: Any) -> None:
    saved, fresh = convert(4.0), convert()
    expected = saved(X)
    roastify.save(fresh, tmp_path, state_dict=saved.state_dict())
    assert torch.equal(roastify.load(tmp_path, Net())(X), expected)
    assert torch.equal(fresh(X), convert()(X))


def test_an_artifact_of_values_without_state_has_the_models_own(tmp_path: Any) -> None:
    """Values that were gathered by hand are those of the Parameters and buffers."""
    model = convert()
    roastify.save(model, tmp_path, state_dict={name: value + 1 for name, value in model.named_parameters()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(roastify.load(tmp_path, Net())(X), model(X))


def test_an_artifact_of_values_under_another_plan_is_refused(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be saved with this model: .* another plan \(its seed is 1"):
        roastify.save(convert(), tmp_path / "a", state_dict=convert(seed=1).state_dict())
    damaged = convert().state_dict()
    damaged[KEY] = damaged[KEY][:-1]
    with pytest.raises(CheckpointError, match="something changed its bytes"):
        roastify.save(convert(), tmp_path / "a", state_dict=damaged)
    assert not (tmp_path / "a").exists()


def test_a_state_dict_loads_whatever_the_default_device_is() -> None:
    saved, fresh = convert(4.0), convert()
    with torch.device("meta"):
        fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(X), saved(X))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_without_memory_takes_the_tensors_of_a_state_dict(compiled: bool) -> None:
    saved, fresh = convert(4.0), convert().to("meta")
    fresh.load_state_dict(saved.state_dict(), assign=True)
    run = torch.compile(fresh, backend="aot_eager") if compiled else fresh
    torch.testing.assert_close(run(X), saved(X), rtol=1e-5, atol=1e-6)


def test_compiled_code_sees_the_scales_of_a_state_dict() -> None:
    saved, fresh = convert(4.0), convert()
    run = torch.compile(fresh, backend="aot_eager")
    run(X)
    fresh.load_state_dict(saved.state_dict())
    for model in (run, saved):
        model(X).square().sum().backward()
    torch.testing.assert_close(run(X), saved(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fresh.roast_pool.weight.grad, saved.roast_pool.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seed": 1}, "its seed is 0, this model's is 1"),
        ({"sign": "tile"}, "its sign is element, this model's is tile"),
        ({"tile": "4x8"}, ", this model's is 4×8"),
        ({"mapping": "cyclic"}, "its mapping is permutation, this model's is cyclic"),
        ({"exclude": "conv"}, "its number of shared tensors is 4, this model's is 3"),
    ],
)
def test_another_plan_is_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    model = convert(**settings)
    before = copy.deepcopy(pool_of(model).weight)
    with pytest.raises(RuntimeError, match="saved by a model of another plan") as error:
        model.load_state_dict(convert().state_dict(), strict=False)
    assert reason in str(error.value)
    assert torch.equal(pool_of(model).weight, before)


def test_tensors_at_other_addresses_are_refused() -> None:
    pool = pool_of(convert())
    first, *rest = pool.plan.tensors
    moved = type(pool.plan)(**{**vars(pool.plan), "tensors": (*rest, first)})
    with pytest.raises(ValueError, match="its tensors lie elsewhere in the pool"):
        plan_with(moved, pool.present_names(), pool.get_extra_state())


def test_a_state_dict_of_an_older_version_loads_with_a_warning() -> None:
    saved = convert()
    state = {name: value for name, value in saved.state_dict().items() if name != KEY}
    model = convert(2.0)
    with pytest.warns(UserWarning, match="cannot be checked whether the values were made under this model's seed"):
        result = model.load_state_dict(state)
    assert not result.missing_keys and torch.equal(pool_of(model).weight, pool_of(saved).weight)


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s.flip(0), lambda s: s * 0, lambda s: "text"])
def test_damaged_state_is_refused(change: Callable[[Any], Any]) -> None:
    state = convert().state_dict()
    state[KEY] = change(state[KEY])
    with pytest.raises(RuntimeError, match="something changed its bytes"):
        convert().load_state_dict(state)


def test_the_state_survives_averages_and_casts_of_whole_state_dicts() -> None:
    """Federated averages and hand-written EMAs treat every entry alike."""
    states = [convert(3.0).state_dict() for _ in range(3)]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    ema = {name: 0.999 * value + 0.001 * value for name, value in states[0].items()}
    for state in (mean, ema):
        model = convert()
        model.load_state_dict(state)
        torch.testing.assert_close(model(X), convert(3.0)(X), rtol=1e-4, atol=1e-4)


def test_the_state_has_one_size_whatever_the_values() -> None:
    assert (
        len({pool_of(convert(gain, seed)).get_extra_state().numel() for gain, seed in ((1, 0), (4, 3), (7, -(2**70)))})
        == 1
    )
    pool = pool_of(convert(4.0))
    taken = plan_with(pool_of(convert()).plan, pool.present_names(), pool.get_extra_state())
    assert taken.tensors == pool.plan.tensors


# Constants.


def constants(model: Any) -> list[Tensor]:
    pool = pool_of(model)
    return [pool.table, pool.per_slot, pool.uneven_slots, pool.uneven]


def averaged(model: Any, fn: dict[str, Any]) -> Any:
    average = AveragedModel(model, use_buffers=True, **fn)
    for _ in range(5):
        average.update_parameters(model)
    return average.module


def written(model: Any) -> Any:
    """Do to every buffer and state-dict entry what tools do that mean well."""
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.mul_(0.5)
    for value in model.state_dict().values():
        if not value.is_floating_point():
            value.zero_()
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: averaged(model, {"avg_fn": get_ema_avg_fn(0.9995)}),
        lambda model: averaged(model, {"multi_avg_fn": get_ema_multi_avg_fn(0.9995)}),
        lambda model: averaged(model, {}),
        written,
        lambda model: model.half().float(),
        lambda model: model.bfloat16().to(torch.float32),
        copy.deepcopy,
        lambda model: model._apply(lambda tensor: tensor * 1.0),
    ],
    ids=["ema", "multi ema", "swa", "writes to buffers", "half", "bfloat16", "deepcopy", "apply"],
)
@pytest.mark.parametrize("ratio", [4, 20])
def test_constants_are_no_buffers(change: Callable[[Any], Any], ratio: float) -> None:
    model = convert(ratio=ratio, kernel_basis="none")
    expected = [constant.clone() for constant in constants(model)]
    changed = change(model)
    assert all(torch.equal(one, other) for one, other in zip(constants(changed), expected, strict=True))
    assert not [name for name, _ in model.named_buffers() if "roast_pool" in name]


@pytest.mark.parametrize("compiled", [False, True])
def test_constants_follow_a_pool_that_is_moved_without_a_call(compiled: bool) -> None:
    """Sharding and offloading put another tensor into the Parameter, on another device."""
    model = convert()
    pool = pool_of(model)
    pool._constants_device = torch.device("meta")
    for name in ("table", "per_slot", "uneven_slots", "uneven"):
        setattr(pool, name, getattr(pool, name).to("meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        expected = convert()
        for each in (run, expected):
            each(X).square().sum().backward()
        assert torch.equal(run(X), expected(X))
        torch.testing.assert_close(pool.weight.grad, pool_of(expected).weight.grad)
    assert pool.table.device.type == "cpu" and pool._constants_device.type == "cpu"

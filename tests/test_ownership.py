"""A layer owns the pool that it reads, as it would own a tied weight: copied, moved, replaced, in a new model."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import roastify
from roastify.conversion.converted import find_pool, pool_of, pools_in
from roastify.errors import CheckpointError, ConversionError, RoastError
from roastify.layers.base import RoastModule

POOL = ["roast_pool.weight", "roast_pool._extra_state"]


class Net(nn.Module):
    """A backbone with norms and a head."""

    def __init__(self, classes: int = 128) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128))
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Deep(nn.Module):
    """Equal layers one after the other, which can be moved, repeated and left out."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def converted(model: nn.Module | None = None, ratio: float = 3) -> Any:
    torch.manual_seed(0)
    return roastify.convert(Net() if model is None else model, ratio=ratio)


def batch() -> Tensor:
    return torch.randn(3, 128, generator=torch.Generator().manual_seed(1))


def steps(model: nn.Module, parameters: Any, count: int = 2) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(batch()).pow(2).mean().backward()
        optimizer.step()


def test_a_whole_model_and_each_part_name_the_pool_once() -> None:
    model = converted()
    assert next(iter(dict(model.named_parameters()))) == "roast_pool.weight"
    assert sum("roast_pool" in name for name, _ in model.named_parameters()) == 1
    assert [key for key in model.state_dict() if "roast_pool" in key] == POOL
    for part, first in ((model.backbone, "0."), (model.backbone[3], ""), (model.head, "")):
        names = [name for name, _ in part.named_parameters() if "roast_pool" in name]
        assert names == [first + "roast_pool.weight"]
        assert [key for key in part.state_dict() if "roast_pool" in key] == [first + key for key in POOL]
        assert part.get_parameter(names[0]) is model.roast_pool.weight
    assert [name for name, _ in model.named_children()][-2:] == ["backbone", "head"]


def test_a_part_is_trained_by_its_own_parameters() -> None:
    model = converted()
    before = model.backbone[0].weight.detach().clone()
    steps(model, model.backbone.parameters())
    assert not torch.equal(before, model.backbone[0].weight)


def test_two_groups_of_one_pool_are_refused_by_the_optimizer() -> None:
    model = converted()
    with pytest.raises(ValueError, match="more than one parameter group"):
        torch.optim.SGD([{"params": model.backbone.parameters()}, {"params": model.head.parameters()}], lr=0.1)


@pytest.mark.parametrize("part", ["backbone", "head", "backbone.0"])
def test_a_parts_state_dict_loads_into_the_same_part(part: str) -> None:
    model, other = converted(), converted()
    steps(model, model.parameters())
    assert not torch.equal(model.roast_pool.weight, other.roast_pool.weight)
    state = model.get_submodule(part).state_dict()
    assert not any(other.get_submodule(part).load_state_dict(state))
    assert torch.equal(model.roast_pool.weight, other.roast_pool.weight)
    del state[next(key for key in state if key.endswith("roast_pool.weight"))]
    with pytest.raises(RuntimeError, match=r"Missing key.*roast_pool\.weight"):
        other.get_submodule(part).load_state_dict(state)


def test_a_parts_state_dict_of_another_plan_is_refused() -> None:
    model, other = converted(), roastify.convert(Net(), ratio=3, seed=1)
    with pytest.raises(RuntimeError, match="its seed is 0, this model's is 1"):
        other.backbone.load_state_dict(model.backbone.state_dict())


@pytest.mark.parametrize(
    "dropped",
    [lambda model: nn.Sequential(*list(model.children())[:-1]), lambda model: model.backbone],
    ids=["children", "part"],
)
def test_a_part_in_a_new_model_keeps_its_weights(dropped: Callable[[Any], nn.Module]) -> None:
    model = converted().eval()
    expected = model.backbone(batch())
    part = dropped(model)
    new = nn.Sequential(part, nn.Linear(128, 10)).eval()
    del model
    assert torch.equal(new[0](batch()), expected)
    assert find_pool(new) is not None
    pool = pool_of(new)
    before = pool.weight.detach().clone()
    steps(new, new.parameters())
    assert not torch.equal(before, pool.weight)
    twin = copy.deepcopy(new)
    torch.nn.init.zeros_(pool.weight)
    new.load_state_dict(twin.state_dict())
    assert torch.equal(new(batch()), twin(batch()))
    dense = roastify.densify(new)
    torch.testing.assert_close(dense(batch()), new(batch()))
    assert not any(isinstance(module, RoastModule) for module in dense.modules())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copied_layer_has_a_pool_of_its_own(copied: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model = converted(Deep())
    model.layers.append(copied(model.layers[0]))
    assert len(pools_in(model)) == 2
    assert model.layers[4].roast_pool.weight is not model.roast_pool.weight
    before = model.layers[4].weight.detach().clone()
    steps(model, model.parameters())
    assert not torch.equal(before, model.layers[4].weight)
    assert not torch.equal(model.layers[0].weight, model.layers[4].weight)
    keys = [key for key in model.state_dict() if "roast_pool" in key]
    assert keys == [*POOL, *(f"layers.4.{key}" for key in POOL)]
    roastify.save(model, tmp_path / "saved")
    loaded: Any = roastify.load(tmp_path / "saved", Deep(5))
    assert torch.equal(loaded(batch()), model(batch()))
    assert not any(loaded.load_state_dict(model.state_dict()))
    assert len(pools_in(copy.deepcopy(model))) == 2


def test_casts_and_moves_of_a_part_reach_its_pool_once() -> None:
    model = converted()
    before = model.roast_pool.weight.detach().clone()
    # The other layers read the same pool: a cast of some layers would cost them precision.
    model.backbone.half()
    assert torch.equal(model.roast_pool.weight, before) and model.head.weight.dtype == torch.float32
    assert model.backbone[0].weight.dtype == torch.float16
    copied = copy.deepcopy(model.backbone).double()
    assert copied[0].roast_pool.weight.dtype == copied[0].weight.dtype == torch.float64
    model.double()
    assert model.roast_pool.weight.dtype == model.head.weight.dtype == torch.float64
    assert model.head._parameters["roast_pool.weight"] is model.roast_pool.weight
    model.head.to("meta", torch.float32)
    assert model.roast_pool.weight.is_meta and model.roast_pool.weight.dtype == torch.float64
    meta = converted().to("meta")
    meta.to_empty(device="cpu")
    readers = [module for module in meta.modules() if isinstance(module, RoastModule)]
    assert {id(reader._parameters["roast_pool.weight"]) for reader in readers} == {id(meta.roast_pool.weight)}


def test_an_assigned_pool_is_the_pool_of_every_layer() -> None:
    model, other = converted(), converted()
    steps(other, other.parameters())
    model.roast_pool.weight = nn.Parameter(other.roast_pool.weight.detach().clone())
    assert model.head._parameters["roast_pool.weight"] is model.roast_pool.weight
    model.load_state_dict(other.state_dict(), assign=True)
    assert model.backbone[0]._parameters["roast_pool.weight"] is model.roast_pool.weight
    model.eval(), other.eval()
    assert torch.equal(model(batch()), other(batch()))


@pytest.mark.parametrize("part", ["", "backbone", "head"])
def test_functional_call_reads_the_given_pool_and_leaves_the_models(part: str) -> None:
    model = converted().eval()
    module = model.get_submodule(part)
    expected = module(batch())
    given = {name: torch.zeros_like(value).requires_grad_() for name, value in module.named_parameters()}
    for _ in range(2):
        out = torch.func.functional_call(module, given, (batch(),))
        assert not bool(out.any())
        (out + 1).pow(2).sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(module(batch()), expected)
        assert model.head.roast_pool.weight is model.roast_pool.weight


def test_functional_calls_of_a_part_may_be_nested() -> None:
    head = converted().eval().head
    zeros = {name: torch.zeros_like(value) for name, value in head.named_parameters()}
    twice = {name: 2 * value.detach() for name, value in head.named_parameters()}
    expected = head(batch())

    def nested(module: nn.Module, arguments: tuple[Tensor]) -> None:
        hook.remove()
        assert not bool(torch.func.functional_call(module, zeros, arguments).any())

    hook = head.register_forward_pre_hook(nested)
    torch.testing.assert_close(torch.func.functional_call(head, twice, (batch(),)), 2 * expected)
    assert torch.equal(head(batch()), expected)


def test_a_frozen_model_with_a_dense_head_trains_the_head_alone() -> None:
    model = roastify.convert(Net(), ratio=3, exclude="head")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    pool = model.roast_pool.weight.detach().clone()
    head = model.head.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, [each for each in model.parameters() if each.requires_grad])
    assert torch.equal(pool, model.roast_pool.weight)
    assert not torch.equal(head, model.head.weight)


def freeze_the_backbone(model: Any) -> None:
    model.backbone.requires_grad_(False)


def freeze_one_by_one(model: Any) -> None:
    for parameter in model.backbone.parameters():
        parameter.requires_grad = False


def train_the_head(model: Any) -> None:
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def train_the_last_layer(model: Any) -> None:
    model.requires_grad_(False)
    model.backbone[3].requires_grad_(True)


@pytest.mark.parametrize("change", [freeze_the_backbone, freeze_one_by_one, train_the_head, train_the_last_layer])
@pytest.mark.parametrize("passes", [0, 1])
def test_a_pool_frozen_in_one_layer_and_trained_in_another_is_said(change: Callable[[Any], None], passes: int) -> None:
    model = converted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(passes):
            model(batch())
    change(model)
    with pytest.warns(UserWarning, match="cannot be frozen in one layer and trained in another"):
        model(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch())
        copy.deepcopy(model).requires_grad_(True)(batch())


@pytest.mark.parametrize("trained", ["bias", "weight"])
def test_training_all_biases_or_the_pool_alone_is_no_contradiction(trained: str) -> None:
    model = converted()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if trained == "bias" and name.endswith("bias"):
            parameter.requires_grad_(True)
    if trained == "weight":
        model.roast_pool.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch())


class Language(nn.Module):
    """Layers without biases, as today's language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64, bias=False)) for _ in range(3))
        self.norm = nn.RMSNorm(64)
        self.head = nn.Linear(64, 128, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def freeze_the_table(model: Any) -> None:
    model.embed.requires_grad_(False)


def freeze_by_name(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.1"):
            parameter.requires_grad = False


@pytest.mark.parametrize("change", [freeze_the_table, train_the_head, freeze_by_name])
@pytest.mark.parametrize("passes", [0, 1])
def test_a_partly_frozen_model_without_biases_is_said(change: Callable[[Any], None], passes: int) -> None:
    model, tokens = converted(Language()), torch.arange(6)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(passes):
            model(tokens)
    change(model)
    with pytest.warns(UserWarning, match="cannot be frozen in one layer and trained in another"):
        model(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.requires_grad_(False)(tokens)
        model.requires_grad_(True)(tokens)
        # Norms alone, on purpose.
        model.requires_grad_(False)
        model.roast_pool.requires_grad_(False)
        model.norm.requires_grad_(True)
        for block in model.blocks:
            block[0].requires_grad_(True)
        model(tokens)


def test_a_dense_layer_that_is_frozen_is_no_contradiction() -> None:
    model = roastify.convert(Deep(), ratio=1.5, exclude=["layers.0", "layers.1"])
    model.layers[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch())


def test_a_state_dict_with_two_pools_for_one_is_refused() -> None:
    one, other = converted(), converted()
    steps(other, other.parameters())
    parts = {
        **{f"backbone.{key}": value for key, value in one.backbone.state_dict().items()},
        **{f"head.{key}": value for key, value in other.head.state_dict().items()},
    }
    with pytest.raises(RuntimeError, match="put together from several models"):
        converted().load_state_dict(parts)
    parts |= {f"head.{key}": value for key, value in one.head.state_dict().items()}
    model = converted()
    assert not any(model.load_state_dict(parts))
    assert torch.equal(model.eval()(batch()), one.eval()(batch()))


def test_an_ensemble_under_vmap_has_the_gradients_of_its_members() -> None:
    # Copies: λ is the base's.
    one = converted(Deep(), ratio=4)
    models = [one, copy.deepcopy(one)]
    steps(models[1], models[1].parameters())
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])

    x = batch()

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    out = torch.func.vmap(call)(parameters, buffers)
    out.pow(2).sum().backward()
    for number, model in enumerate(models):
        model.zero_grad()
        expected = model(batch())
        torch.testing.assert_close(out[number], expected)
        expected.pow(2).sum().backward()
        found = parameters["roast_pool.weight"].grad[number]
        torch.testing.assert_close(found, model.roast_pool.weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", ["", "backbone", "head"])
def test_a_part_is_exported(part: str) -> None:
    module = converted().eval().get_submodule(part)
    exported = torch.export.export(module, (batch(),)).module()
    torch.testing.assert_close(exported(batch()), module(batch()))


def test_a_replaced_recurrent_layer_saves_and_loads(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(128, 128)
            self.rnn = nn.GRU(128, 32, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.first(x))[0]

    for change in (False, True):
        model = roastify.convert(Recurrent(), ratio=1.5, exclude=() if change else ("rnn",))
        if change:
            model.rnn = nn.GRU(128, 32, batch_first=True)
        roastify.save(model, tmp_path / "saved")
        x = batch()[None]
        assert torch.equal(roastify.load(tmp_path / "saved", Recurrent())(x), model(x))


def test_other_threads_run_while_a_state_dict_is_made_and_loaded() -> None:
    model = converted(Deep()).eval()
    expected, failures, keys = model(batch()), [], set()
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            try:
                with torch.no_grad():
                    assert torch.equal(model(batch()), expected)
                keys.add(tuple(model.state_dict()))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    state = model.state_dict()
    for thread in threads:
        thread.start()
    for _ in range(60):
        model.load_state_dict(state)
        model.to("cpu")
    done.set()
    for thread in threads:
        thread.join()
    assert not failures and keys == {tuple(state)}


def test_a_parametrized_bias_is_copied_and_not_made_dense() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = converted()
    torch.nn.utils.parametrize.register_parametrization(model.head, "bias", Twice())
    model.eval()
    expected = model(batch())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch()), expected)
    assert twin.head.parametrizations.bias.original is not model.head.parametrizations.bias.original
    for inplace in (False, True):
        with pytest.raises(RoastError, match="was parametrized after the conversion"):
            roastify.densify(model, inplace=inplace)
        assert torch.equal(model(batch()), expected)
    torch.nn.utils.parametrize.remove_parametrizations(model.head, "bias")
    torch.testing.assert_close(roastify.densify(model, inplace=True)(batch()), expected)


def test_norms_and_pruning_after_the_conversion_are_refused_and_leave_the_model_whole() -> None:
    model = converted().eval()
    expected = model(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RoastError, match="before the conversion"):
            nn.utils.weight_norm(model.head)
        with pytest.raises(ValueError, match="cannot be applied"):
            nn.utils.spectral_norm(model.head)
    with pytest.raises(RoastError, match="cannot be pruned"):
        nn.utils.prune.random_unstructured(model.roast_pool, "weight", 0.5)
    assert torch.equal(model(batch()), expected)
    assert list(roastify.densify(model).state_dict()) == list(Net().state_dict())
    assert not any(converted().load_state_dict(model.state_dict()))


class Adapter(nn.Module):
    """A layer with a trained path beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x).mean()


def swap(model: Any) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def turn_round(model: Any) -> None:
    model.layers = nn.ModuleList(list(model.layers)[::-1])


def repeat(model: Any) -> None:
    model.layers[1] = model.layers[0]


def insert(model: Any) -> None:
    model.layers.insert(0, nn.Linear(128, 128))


def remove(model: Any) -> None:
    del model.layers[0]


def wrap(model: Any) -> None:
    model.layers[0] = Adapter(model.layers[0])


def replace(model: Any) -> None:
    model.layers[0] = nn.Linear(128, 128, bias=False)


def assign(model: Any) -> None:
    model.layers[2].weight = nn.Parameter(torch.randn(128, 128))


def rename(model: Any) -> None:
    model.tail = model.layers[3]
    del model.layers[3]
    model.layers.append(nn.Identity())


CHANGES = [swap, turn_round, repeat, insert, remove, wrap, replace, assign, rename]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_models_save_load_and_densify(change: Callable[[Any], None], train: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, dense = converted(Deep()), Deep()
    change(model), change(dense)
    if train:
        steps(model, model.parameters())
    expected = model(batch())
    roastify.save(model, tmp_path / "saved")
    loaded: Any = roastify.load(tmp_path / "saved", dense)
    assert torch.equal(loaded(batch()), expected)
    assert not any(loaded.load_state_dict(model.state_dict()))
    steps(loaded, loaded.parameters())
    roastify.save(loaded, tmp_path / "again")
    back = roastify.densify(model)
    torch.testing.assert_close(back(batch()), expected, rtol=1e-5, atol=1e-4)
    assert not any(isinstance(module, RoastModule) for module in back.modules())
    assert sorted(back.state_dict()) == sorted(dense.state_dict())
    count = roastify.api.densify_artifact(tmp_path / "saved", tmp_path / "dense.safetensors")
    assert count == len(dense.state_dict())


@pytest.mark.parametrize("change", [swap, turn_round])
def test_a_state_dict_of_exchanged_layers_does_not_load_where_none_were(change: Callable[[Any], None]) -> None:
    model, other = converted(Deep()), converted(Deep())
    change(model)
    with pytest.raises(RuntimeError, match="another layer read what layers"):
        other.load_state_dict(model.state_dict())
    change(other)
    assert not any(other.load_state_dict(model.state_dict()))


def test_a_checkpoint_from_before_the_head_was_replaced_loads_without_it() -> None:
    model, other = converted(), converted()
    steps(model, model.parameters())
    other.head = nn.Linear(128, 10)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    found = other.load_state_dict(state, strict=False)
    assert found.missing_keys == ["head.weight", "head.bias"] and not found.unexpected_keys
    model.eval(), other.eval()
    assert torch.equal(model.backbone(batch()), other.backbone(batch()))


class Around(nn.Module):
    """A model around a backbone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.last = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@pytest.mark.parametrize("around", [Around, AveragedModel, nn.Sequential], ids=lambda around: around.__name__)
def test_a_model_around_a_converted_one_saves_loads_and_densifies(
    around: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model, dense = around(converted()).eval(), around(Net()).eval()
    expected = model(batch())
    roastify.save(model, tmp_path / "saved")
    loaded = roastify.load(tmp_path / "saved", dense)
    assert torch.equal(loaded(batch()), expected)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not any(loaded.load_state_dict(model.state_dict()))
    back = roastify.densify(model)
    torch.testing.assert_close(back(batch()), expected)
    assert list(back.state_dict()) == list(dense.state_dict())


def test_two_converted_models_in_one_save_load_and_densify(tmp_path: Path) -> None:
    models = nn.ModuleList([converted().eval(), converted(Deep(), ratio=2)])
    roastify.save(models, tmp_path / "saved")
    loaded: Any = roastify.load(tmp_path / "saved", nn.ModuleList([Net().eval(), Deep()]))
    dense = roastify.densify(models)
    for one, other, back in zip(models, loaded, dense, strict=True):
        assert torch.equal(one(batch()), other(batch()))
        torch.testing.assert_close(one(batch()), back(batch()))
    assert roastify.api.densify_artifact(tmp_path / "saved", tmp_path / "dense.safetensors") == len(dense.state_dict())
    with pytest.raises(ConversionError, match="reads 2 pools"):
        pool_of(models)


def test_another_architecture_than_the_changed_one_is_refused(tmp_path: Path) -> None:
    model = converted()
    model.head = nn.Linear(128, 10)
    roastify.save(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \(128, 128\), expected \(10, 128\)"):
        roastify.load(tmp_path / "saved", Net())


def test_a_model_whose_converted_layers_are_all_gone_still_saves(tmp_path: Path) -> None:
    model = converted(Deep(1), ratio=2)
    model.layers[0] = nn.Linear(128, 128)
    expected = model(batch())
    roastify.save(model, tmp_path / "saved")
    assert torch.equal(roastify.load(tmp_path / "saved", Deep(1))(batch()), expected)
    assert "roast_pool.weight" not in roastify.densify(model).state_dict()

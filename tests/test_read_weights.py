"""Weights read on access: parameters that no layer on the pool reads, in any module; a read weight refuses writes."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo.awkward import MODELS, Lora, Raw, Recurrent, normal

import roastify
import roastify.api
from roastify import RoastConfig, RoastError
from roastify.conversion.converted import current_plans, pool_of
from roastify.layers.base import RoastModule
from roastify.layers.read_weight import GuardedWeight
from roastify.pool import pool as pool_module

transformers.utils.logging.set_verbosity_error()

# torch warns of the models below.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning"),
]


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    output = model(*inputs)
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


SHARES = ("weights", "all")


def settings(ratio: float, share: str, init: str = "match") -> RoastConfig:
    return RoastConfig(ratio=ratio, share=share, init=init, min_numel=40)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_equal_outputs_without_sharing(name: str, training: bool, share: str) -> None:
    build, inputs = MODELS[name]
    model = build().double().train(training)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    converted = roastify.convert(model, config=settings(1, share, "project"))
    plan = pool_of(converted).plan
    assert plan.share == share
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for before, after in zip(run(model, inputs), run(converted, inputs), strict=True):
                torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    # No tensor is kept because of the module that has it.
    for tensor in plan.kept:
        assert tensor.reason.split(":")[0].split(" of ")[0] in ("vector", "small", "constant", "a single number"), (
            tensor
        )


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", MODELS)
def test_the_pools_gradient_equals_finite_differences(name: str, share: str) -> None:
    """Along the pool's gradient, finite differences of the loss give the gradient's norm."""
    build, inputs = MODELS[name]
    model = build().double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    converted = roastify.convert(model, config=settings(1.5, share).replace(precondition=False))
    pool = pool_of(converted)

    def loss() -> Tensor:
        return sum((leaf * normal(*leaf.shape)).sum() for leaf in run(converted, inputs))  # type: ignore[return-value]

    loss().backward()
    assert pool.weight.grad is not None and pool.weight.grad.any()
    direction = pool.weight.grad / pool.weight.grad.norm()
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            pool.weight.add_(direction, alpha=sign * step)
            values.append(float(loss()))
            pool.weight.sub_(direction, alpha=sign * step)
    measured = (values[0] - values[1]) / (2 * step)
    assert math.isclose(measured, float(pool.weight.grad.norm()), rel_tol=1e-3)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# torch refuses to pickle parametrized modules, and copies hooks of the old weight norm with the tensors they set.
_PICKLED = [name for name in MODELS if name not in ("parametrizations",)]


@pytest.mark.parametrize(
    ("name", "copied"),
    [(name, copy.deepcopy) for name in MODELS]
    + [(name, trip) for name in _PICKLED for trip in (through_pickle, through_torch_save)],
)
def test_copies_are_independent_and_equal(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    build, inputs = MODELS[name]
    converted = roastify.convert(build().eval(), config=settings(2, "all"))
    if name == "old weight norm":
        with torch.no_grad():  # its hooks set tensors that are no leaves, and torch does not copy those
            run(converted, inputs)
    twin = copied(converted)
    with torch.no_grad():
        before = run(converted, inputs)
        for one, other in zip(before, run(twin, inputs), strict=True):
            assert torch.equal(one, other)
        pool_of(twin).weight.zero_()
        for one, other in zip(before, run(converted, inputs), strict=True):
            assert torch.equal(one, other)
        assert any(not torch.equal(one, other) for one, other in zip(before, run(twin, inputs), strict=True))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", MODELS)
def test_save_load_densify_and_casts(name: str, share: str, tmp_path: Path) -> None:
    build, inputs = MODELS[name]
    model = build().eval()
    converted = roastify.convert(model, config=settings(2, share))
    with torch.no_grad():
        expected = run(converted, inputs)
        roastify.save(converted, tmp_path / "a")
        # `to` unties weights, and does not move attributes that hooks compute.
        for fresh in (build(), build().to("meta")) if name not in ("tied", "old weight norm") else (build(),):
            loaded = roastify.load(tmp_path / "a", fresh.eval())
            for one, other in zip(expected, run(loaded, inputs), strict=True):
                assert torch.equal(one, other)
        dense = roastify.densify(converted)
        assert not any(isinstance(module, RoastModule) for module in dense.modules())
        assert [type(module) for module in dense.modules()] == [type(module) for module in model.modules()]
        assert list(dense.state_dict()) == list(model.state_dict())
        for one, other in zip(expected, run(dense, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        state = copy.deepcopy(converted.state_dict())
        pool_of(converted).weight.zero_()
        converted.load_state_dict(state)
        double = run(converted.double(), [x.double() if x.is_floating_point() else x for x in inputs])
        for one, other in zip(expected, double, strict=True):
            assert other.dtype == torch.float64
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)
    roastify.api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")


def test_a_recurrent_layer_does_not_keep_its_dense_weights() -> None:
    converted = roastify.convert(Recurrent(nn.LSTM), 4)
    assert "_flat_weights" not in vars(converted.rnn) and "_roast_flat_weights" not in vars(converted.rnn)
    dense = roastify.densify(converted)
    assert all(one is two for one, two in zip(dense.rnn._flat_weights, dense.rnn.parameters(), strict=True))
    assert dense.rnn.all_weights[0][0] is dense.rnn.weight_ih_l0


def test_a_converted_modules_class_has_the_original_name_and_docstring() -> None:
    converted = roastify.convert(Raw(), 4)
    assert isinstance(converted, Raw) and type(converted).__name__ == "Raw"
    assert type(converted).__module__ == Raw.__module__ and type(converted).__doc__ == Raw.__doc__
    assert "positions: " in converted.extra_repr() and "shared slots" in repr(converted)


def test_frozen_weights_with_a_trained_adapter() -> None:
    converted = roastify.convert(Lora(), config=settings(3, "auto"))
    pool = pool_of(converted)
    assert not pool.weight.requires_grad and not pool.plan.trainable
    converted(normal(2, 128)).sum().backward()
    assert converted.lora_B["default"].weight.grad is not None and pool.weight.grad is None


def test_parameters_yields_a_read_weight_if_a_module_has_no_parameter_of_its_own() -> None:
    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU())
    model.head = nn.Linear(32, 32)
    converted = roastify.convert(model, config=settings(2, "weights"))
    body = converted.body
    assert type(body) is nn.Sequential and list(body.parameters()) == [converted.roast_pool.weight]
    # FSDP2 asks in this way, and code that reads a dtype.
    (weight,) = body[0].parameters(recurse=False)
    assert type(weight) is GuardedWeight and torch.equal(weight, body[0].weight)
    assert list(body[0].named_parameters(recurse=False)) == []
    with pytest.raises(RoastError, match="the shared pool, which is trained as a whole"):
        weight.requires_grad_(False)
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD(body[0].parameters(recurse=False), lr=0.1)
    body.requires_grad_(False)
    assert not converted.roast_pool.weight.requires_grad


# A read weight refuses writes.


@pytest.fixture
def layer() -> Any:
    model = nn.Sequential(nn.Linear(32, 32), nn.Embedding(40, 16))
    return roastify.convert(model, config=RoastConfig(ratio=2, share="weights", min_numel=40))[0]


WRITES: list[Callable[[Any], Any]] = [
    lambda layer: nn.init.normal_(layer.weight),
    lambda layer: nn.init.kaiming_uniform_(layer.weight),
    lambda layer: nn.init.trunc_normal_(layer.weight),
    lambda layer: nn.init.orthogonal_(layer.weight),
    lambda layer: nn.init.zeros_(layer.weight.data),
    lambda layer: layer.weight.data.normal_(),
    lambda layer: layer.weight.data.copy_(torch.zeros(32, 32)),
    lambda layer: layer.weight.detach()[0].zero_(),
    lambda layer: layer.weight.data.view(-1)[:7].fill_(0),
    lambda layer: layer.weight.T.mul_(2),
    lambda layer: layer.weight.data.t().chunk(2)[1].zero_(),
    lambda layer: layer.weight.data.__setitem__(0, 1.0),
    lambda layer: layer.weight.data.__iadd__(1),
    lambda layer: layer.weight.data.__imul__(2),
    lambda layer: setattr(layer.weight, "data", torch.zeros(32, 32)),
    lambda layer: layer.reset_parameters(),
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_write_to_a_read_weight_is_refused(layer: Any, write: Callable[[Any], Any], grad: bool) -> None:
    before = layer.weight.clone(), layer.bias.clone()
    with torch.set_grad_enabled(grad), pytest.raises(RoastError, match=r"lives in the shared pool.*roastify\.densify"):
        write(layer)
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.bias, before[1])


def test_a_read_weight_is_an_instance_of_parameter_and_computes_as_a_tensor(layer: Any) -> None:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter) and layer.get_parameter("weight").shape == (32, 32)
    assert type(weight) is GuardedWeight and torch.overrides.has_torch_function((weight,))
    for result in (weight + 1, weight @ weight, weight.clone(), torch.relu(weight), copy.deepcopy(weight.detach())):
        assert type(result) is Tensor
    assert type(weight[0]) is GuardedWeight
    loaded = through_torch_save(weight.detach())  # type: ignore[arg-type]
    assert type(loaded) is Tensor and torch.equal(loaded, weight)
    assert repr(weight).startswith("tensor(")
    other = nn.Linear(32, 32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="non-leaf"):
            other.weight = layer.weight


def test_an_assigned_parameter_takes_the_attribute_out_of_the_pool(layer: Any) -> None:
    own = nn.Parameter(torch.zeros(32, 32))
    layer.weight = own
    assert type(layer) is nn.Linear and layer.weight is own and dict(layer.named_parameters())["weight"] is own
    assert torch.equal(layer(normal(2, 32)), layer.bias.expand(2, 32))


def test_one_of_several_attributes_can_leave_the_pool(tmp_path: Path) -> None:
    converted = roastify.convert(Raw(), config=settings(2, "weights"))
    own = nn.Parameter(torch.zeros(1, 50, 32))
    converted.positions = own
    assert isinstance(converted, RoastModule) and converted.positions is own and converted.relative.any()
    converted(normal(2, 6, 32)).sum().backward()
    assert own.grad is not None and pool_of(converted).weight.grad is not None
    roastify.save(converted, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", Raw())
    assert torch.equal(loaded.positions, own) and torch.equal(loaded.relative, converted.relative)
    del converted.relative
    assert not hasattr(converted, "relative")
    assert roastify.densify(converted).positions.shape == (1, 50, 32)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=120, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=120, **sizes))


@pytest.mark.parametrize("share", ["weights", "all"])
@pytest.mark.parametrize("build", [gpt2, bert])
def test_transformers_can_tie_and_initialise_a_converted_model_again(build: Callable[[], Any], share: str) -> None:
    tokens = torch.arange(8)[None]
    converted = roastify.convert(build().eval(), config=settings(2, share))
    before = converted(tokens).logits
    for again in (converted.tie_weights, converted.init_weights):
        again()
        assert torch.equal(converted(tokens).logits, before)
        assert converted.get_output_embeddings().weight.shape == (120, 32)
    plan, before_again = current_plans(converted)[0], pool_of(converted).plan
    assert plan.shared == before_again.shared and len(plan.kept) == len(before_again.kept)


@pytest.mark.parametrize("build", [gpt2, bert])
@pytest.mark.parametrize("size", [120, 133, 90])
def test_transformers_can_resize_the_vocabulary_of_a_converted_model(
    build: Callable[[], Any], size: int, tmp_path: Path
) -> None:
    converted = roastify.convert(build().eval(), config=settings(2, "weights"))
    dense = roastify.densify(converted)
    converted.resize_token_embeddings(size, mean_resizing=False)
    dense.resize_token_embeddings(size, mean_resizing=False)
    tokens = torch.arange(8)[None]
    seen = min(size, 120)
    expected = dense(tokens).logits[..., :seen]
    torch.testing.assert_close(converted(tokens).logits[..., :seen], expected, rtol=1e-4, atol=1e-4)
    assert converted(tokens).logits.shape[-1] == size
    if size != 120:
        # The table is now a Parameter of the model, and still tied.
        assert converted.get_input_embeddings().weight is converted.get_output_embeddings().weight
    resized = build()
    resized.resize_token_embeddings(size, mean_resizing=False)
    roastify.save(converted, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", resized.eval())
    assert torch.equal(loaded(tokens).logits, converted(tokens).logits)
    expected = converted(tokens).logits
    torch.testing.assert_close(roastify.densify(loaded)(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["raw", "lstm", "tied"])
def test_a_replica_of_data_parallel_reads_the_pools_replica(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test does what `torch.nn.parallel.replicate` does, for one device; the replica holds half of every value."""
    build, inputs = MODELS[name]
    model = roastify.convert(build().eval(), config=settings(2, "all"))
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            setattr(replica, key, None if child is None else replicas[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter * 0.5)
        for key, buffer in module._buffers.items():
            setattr(replica, key, buffer)
    monkeypatch.setattr(pool_module, "current_device", lambda: torch.device("cpu"))
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    output, expected = run(replicas[model], inputs), run(halved, inputs)
    for one, other in zip(output, expected, strict=True):
        torch.testing.assert_close(one, other)
    sum((leaf * normal(*leaf.shape)).sum() for leaf in output).backward()
    sum((leaf * normal(*leaf.shape)).sum() for leaf in expected).backward()
    torch.testing.assert_close(pool_of(model).weight.grad, pool_of(halved).weight.grad * 0.5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_torch_exports_is_exported_after_conversion_too(name: str) -> None:
    build, inputs = MODELS[name]
    # In float64, because the outputs of some are the sum of large terms, which float32 rounds.
    model = build().double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    try:
        torch.export.export(model, inputs)
    except Exception:  # torch exports neither lengths of packed sequences nor the old weight norm
        assert isinstance(model, Recurrent) or name == "old weight norm"
        return
    converted = roastify.convert(model, config=settings(2, "all"))
    exported = torch.export.export(converted, inputs).module()
    for one, other in zip(run(exported, inputs), run(converted, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

"""The adapters of a PEFT model in a pool of their own: where they start, what is trained, saved, loaded and refused."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roastify
from roastify.api import densify_artifact
from roastify.artifact import read_artifact, seal
from roastify.conversion.converted import pool_of
from roastify.errors import CheckpointError, ConversionError, PlanError, RoastError
from roastify.pool.mapping import mix64, start_key
from roastify.pool.start_values import start_offsets, start_values

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS, WIDTH = 40, 16
X = torch.arange(24).view(4, 6) % WORDS
RATIO = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words).mean(1)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["up", "down"], "modules_to_save": ["head"], **settings})


def adapted(config: Any = None, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return peft.get_peft_model(base(), config or lora())


@functools.cache
def _converted(ratio: float, seed: int) -> Any:
    return roastify.convert(adapted(), ratio, include="adapters", seed=seed)


def converted(ratio: float = RATIO, seed: int = 0) -> Any:
    return copy.deepcopy(_converted(ratio, seed))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


def train(model: nn.Module, steps: int = 3) -> Any:
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.arange(4) % 3).backward()
        optimizer.step()
    return model


def trained(seed: int = 0) -> Any:
    return train(converted(seed=seed))


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact of trained adapters."""
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    roastify.save(trained(), folder)
    return folder


# Where they start.

HEAD = [f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")]


@pytest.mark.parametrize("ratio", [1, RATIO])
def test_adapters_start_at_the_base_and_the_budget_is_theirs(ratio: int) -> None:
    model = adapted()
    before, count = outputs(model), sum(each.numel() for each in model.parameters() if each.requires_grad)
    found = roastify.convert(model, ratio, include="adapters")
    assert torch.equal(outputs(found), before)
    plan = pool_of(found).plan
    assert plan.total_numel == count and plan.base_numel == sum(each.numel() for each in base().parameters())
    assert not pool_of(found).weight.any() and trainable(found) == ["roast_pool.weight", *HEAD]
    assert [tensor.name for tensor in plan.kept] == HEAD
    assert plan.stored_numel == sum(found.get_parameter(name).numel() for name in trainable(found))
    assert ratio <= plan.achieved_ratio < ratio + 0.1
    assert trainable(model) == trainable(adapted())


def test_at_ratio_1_a_pool_trains_as_lora_does() -> None:
    model = converted(ratio=1)
    dense = roastify.densify(model)
    torch.testing.assert_close(outputs(train(dense)), outputs(train(model)), rtol=1e-4, atol=1e-5)


def test_the_first_step_moves_the_factor_that_is_zero_as_the_projected_dense_step_does() -> None:
    model = converted()
    dense = roastify.densify(model)
    for each in (model, dense):
        F.cross_entropy(each(X), torch.arange(4) % 3).backward()
    pool = pool_of(model)
    expected, readers = torch.zeros(pool.weight.numel()), torch.zeros(pool.weight.numel())
    for tensor in pool.plan.shared:
        gradient = dense.get_parameter(tensor.name).grad.flatten()
        for index, each in enumerate(gradient.tolist()):
            slot = pool.plan.maps()[0].slot(tensor.base + index)
            expected[slot] += pool.plan.maps()[0].sign_of(tensor.base + index) * each
            readers[slot] += 1
    assert expected.any()
    torch.testing.assert_close(pool.weight.grad.flatten(), expected / readers, rtol=1e-4, atol=1e-7)


def test_start_values_are_the_mappings_formula() -> None:
    plan = pool_of(converted()).plan
    values = start_values(plan)
    for tensor, first in start_offsets(plan):
        key = start_key(plan.seed, tensor.region, tensor.base)
        for index in (0, 1, tensor.numel - 1):
            expected = ((mix64(key, index) >> 40) + 0.5) / 2**23 - 1
            assert values[first + index].item() == torch.tensor(expected * tensor.start).float().item()
    # What is state may never change.
    assert [mix64(start_key(7, 0, 512), index) >> 40 for index in range(3)] == [2198471, 7406760, 547678]


def test_each_factor_starts_with_its_authors_spread_from_the_seed_alone() -> None:
    one, other = (adapted(lora(r=64), seed) for seed in (1, 2))
    spread = one.base_model.model.down.lora_A["default"].weight.std()
    one, other = (roastify.convert(each, 2, include="adapters") for each in (one, other))
    factors = [each.base_model.model.down.lora_A["default"].weight for each in (one, other)]
    torch.testing.assert_close(factors[0].std(), spread, rtol=0.1, atol=0)
    # Only their spreads differ.
    torch.testing.assert_close(factors[0] / factors[0].std(), factors[1] / factors[1].std())
    assert not one.base_model.model.down.lora_B["default"].weight.any()


# What is saved and loaded.


def test_many_adapters_are_saved_without_the_base_and_loaded_onto_one(tmp_path: Path) -> None:
    expected = {}
    for seed in (0, 1):
        model = trained(seed=seed)
        # What was trained is saved, frozen by now or not.
        model.requires_grad_(False)
        roastify.save(model, tmp_path / str(seed))
        expected[seed] = outputs(model)
        stored = read_artifact(tmp_path / str(seed)).weights.stored()
        assert sorted(stored) == sorted(["roast_pool.weight", *HEAD])
    fresh = peft.get_peft_model(base(), peft.PeftConfig.from_pretrained(tmp_path / "0"))
    loaded = {seed: roastify.load(tmp_path / str(seed), fresh) for seed in (1, 0)}
    for seed, model in loaded.items():
        assert torch.equal(outputs(model), expected[seed])
    assert not torch.equal(expected[0], expected[1]) and torch.equal(outputs(fresh), outputs(adapted()))
    words = [model.base_model.model.words.weight for model in (fresh, *loaded.values())]
    assert all(each is words[0] for each in words)
    manifest = json.loads((tmp_path / "0" / "roast.json").read_text())
    assert "words" not in json.dumps(manifest) and manifest["format_version"] == 6
    dense = densify_artifact(tmp_path / "0", tmp_path / "dense.safetensors")
    assert dense == len(pool_of(loaded[0]).plan.tensors)


def test_a_heads_names_may_be_repeated_in_the_configuration(tmp_path: Path) -> None:
    # As PEFT does for a task with a head, for each model that it builds from the saved configuration.
    roastify.save(converted(), tmp_path)
    fresh = adapted(lora(modules_to_save=["head", "head"]))
    assert torch.equal(outputs(roastify.load(tmp_path, fresh)), outputs(converted()))


def changed(model: Any, change: Callable[[Any], Any]) -> Any:
    with torch.no_grad():
        change(model.base_model.model)
    return model


OTHER_BASES = {
    "other values": (lambda: changed(adapted(), lambda net: net.down.base_layer.weight.mul_(2)), "hold other values"),
    "another architecture": (lambda: changed(adapted(), lambda net: setattr(net, "norm", nn.Identity())), "differ"),
    "no adapters": (base, r"has none; pass a PEFT model: peft\.get_peft_model"),
    "another rank": (lambda: adapted(lora(r=2)), r"with r=4, and this PEFT model has r=2; build it with peft"),
    "another scaling": (lambda: adapted(lora(lora_alpha=99)), "lora_alpha=8, and this PEFT model has lora_alpha=99"),
    "on the meta device": (lambda: adapted().to("meta"), "has no values"),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_adapters_are_not_loaded_onto_another_base(case: str, saved: Path) -> None:
    make, message = OTHER_BASES[case]
    with pytest.raises((CheckpointError, ConversionError), match=message):
        roastify.load(saved, make())


def test_a_base_in_another_dtype_is_taken_with_a_warning_unless_its_values_are_the_same(tmp_path: Path) -> None:
    model = trained()
    roastify.save(model, tmp_path)
    # In float64 the values are the same.
    wide = roastify.load(tmp_path, adapted().double())
    torch.testing.assert_close(outputs(wide).float(), outputs(model))
    with pytest.warns(UserWarning, match="was not checked that it is the same base"):
        roastify.load(tmp_path, adapted().bfloat16())


def test_a_state_dict_carries_the_start_values() -> None:
    model = trained()
    again = roastify.convert(adapted(seed=9), RATIO, include="adapters")
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again), outputs(model))
    with pytest.raises(RuntimeError, match="another plan"):
        converted(ratio=4).load_state_dict(model.state_dict())


def test_a_copy_trains_alone() -> None:
    model = trained()
    before, twin = outputs(model), copy.deepcopy(model)
    assert torch.equal(outputs(twin), before)
    train(twin)
    assert torch.equal(outputs(model), before) and not torch.equal(outputs(twin), before)


def test_adapters_in_a_pool_are_exported() -> None:
    model = trained().eval()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), outputs(model))


# PEFT's own methods.


def test_peft_saves_and_loads_the_factors(tmp_path: Path) -> None:
    model = trained()
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    dense = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(outputs(dense), expected)
    # As a trainer resumes.
    again = roastify.convert(adapted(seed=5), RATIO, include="adapters")
    again.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(outputs(again), expected, rtol=1e-5, atol=1e-6)
    assert trainable(again) == ["roast_pool.weight", *HEAD]


def test_a_save_does_not_overwrite_pefts_own_adapter(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json was not written by roastify"):
        roastify.save(model, tmp_path / "peft")
    for _ in range(2):
        roastify.save(model, tmp_path / "own")
    assert {file.name for file in (tmp_path / "own").iterdir()} == {
        "adapter_config.json",
        "model.safetensors",
        "roast.json",
    }


DAMAGES = {
    "no base": lambda manifest: manifest.pop("base"),
    "no configuration": lambda manifest: manifest.pop("peft"),
    "configuration of text": lambda manifest: manifest.update(peft="lora"),
    "another key": lambda manifest: manifest["base"].update(more="x"),
    "no text": lambda manifest: manifest["base"].update(values=3),
    "of a model": lambda manifest: manifest["plan"].pop("scope"),
    "start of a factor": lambda manifest: manifest["plan"]["tensors"][0].update(start=-1.0),
    "no start at all": lambda manifest: manifest["plan"].update(init="project"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_forged_manifest_of_adapters_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "forged"))
    manifest = json.loads((folder / "roast.json").read_text())
    DAMAGES[case](manifest)
    (folder / "roast.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_artifact(folder)


def test_peft_does_not_load_what_the_pool_cannot_hold(tmp_path: Path) -> None:
    train(adapted()).save_pretrained(tmp_path)
    model = trained()
    expected = outputs(model)
    with pytest.raises(RoastError, match=r'the pool cannot hold it.*init="project"'):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(model), expected) and trainable(model) == ["roast_pool.weight", *HEAD]


def test_adapters_are_merged_disabled_and_densified() -> None:
    model = trained()
    expected, plain = outputs(model), outputs(base())
    with model.disable_adapter():
        assert torch.equal(model.base_model.model.up.base_layer.weight, base().up.weight)
    dense = roastify.densify(model)
    assert torch.equal(outputs(dense), expected) and "save_pretrained" not in vars(dense)
    assert list(dense.state_dict()) == list(adapted().state_dict())
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)


METHODS = {
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True, init_lora_weights="gaussian"),
    "embedding": lambda: lora(target_modules=["words", "up"]),
    "biases": lambda: lora(bias="lora_only"),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["up", "down"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=["up", "down"]),
}


@pytest.mark.parametrize(
    "method", [name if name == "dora" else pytest.param(name, marks=pytest.mark.long) for name in METHODS]
)
def test_other_adapters_train_and_load(method: str, tmp_path: Path) -> None:
    make = METHODS[method]
    model = adapted(make())
    before = outputs(model)
    model = roastify.convert(model, 2, include="adapters", example_inputs=X)
    torch.testing.assert_close(outputs(model), before)
    train(model)
    assert not torch.allclose(outputs(model), before, atol=1e-3)
    roastify.save(model, tmp_path)
    assert torch.equal(outputs(roastify.load(tmp_path, adapted(make(), seed=3))), outputs(model))


# What is refused, and the way out.


def test_trained_adapters_do_not_start_anew_but_can_be_projected() -> None:
    model = train(adapted())
    with pytest.raises(ConversionError, match=r'up was trained.*starts anew\. Pass init="project"'):
        roastify.convert(model, RATIO, include="adapters")
    exact = roastify.convert(model, 1, include="adapters", init="project")
    torch.testing.assert_close(outputs(exact), outputs(model))
    near = roastify.convert(model, 1.5, include="adapters", init="project")
    assert pool_of(near).weight.any() and not pool_of(near).plan.has_starts
    assert (outputs(near) - outputs(model)).norm() < (outputs(model) - outputs(base())).norm()


def test_one_pool_is_of_one_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", lora(modules_to_save=None))
    with pytest.raises(PlanError, match="has the adapters default, second, and a pool holds one"):
        roastify.convert(model, RATIO, include="adapters")
    model = trained()
    model.add_adapter("second", lora(modules_to_save=None))
    with pytest.raises(PlanError, match="has the adapters default, second"):
        roastify.save(model, tmp_path)


REFUSED = {
    "unreachable": (lambda: adapted(), 1000, "largest reachable ratio is .*head.modules_to_save.default.weight 48"),
    "no factors": (lambda: adapted(peft.VeraConfig(target_modules=["up"])), 2, r"no low-rank factors to share.*vera_"),
    "chosen values": (lambda: adapted(lora(init_lora_weights="orthogonal")), 2, "'orthogonal' chooses the factors'"),
    "adalora": (lambda: adapted(peft.AdaLoraConfig(target_modules=["up"], total_step=4)), 2, "AdaLoRA drops ranks"),
    "no adapters": (base, 2, r"pattern 'adapters' matched no"),
    "converted base": (lambda: peft.get_peft_model(roastify.convert(base(), 2), lora()), 2, "already converted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_conversions(case: str) -> None:
    make, ratio, message = REFUSED[case]
    model = make()
    with pytest.raises((PlanError, ConversionError), match=message):
        roastify.convert(model, ratio, include="adapters")


def bert(**settings: Any) -> Any:
    """Return a classifier of transformers with adapters: PEFT's model, or if `native`, transformers' own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.max_position_embeddings = 8
    model = transformers.BertForSequenceClassification(config)
    if settings.pop("native", False):
        model.add_adapter(peft.LoraConfig(r=8, target_modules=["query", "value"]))
        return model
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=X).logits


def test_a_transformer_with_a_classifier(tmp_path: Path) -> None:
    """The library's own models, read through PEFT's wrapper for the task, and the plan on the meta device."""
    model = roastify.convert(bert(), 20, include="adapters")
    assert torch.equal(logits(model), logits(bert()))
    model.train()(input_ids=X, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert pool_of(model).weight.grad.any()
    assert [name for name, each in model.named_parameters() if each.grad is not None] == trainable(model)
    with torch.no_grad():
        pool_of(model).weight.normal_(0, 0.02)
    roastify.save(model, tmp_path)
    assert torch.equal(logits(roastify.load(tmp_path, bert())), logits(model))
    planned = roastify.plan(bert().to("meta"), 20, include="adapters")
    assert [tensor.name for tensor in planned.tensors] == [tensor.name for tensor in pool_of(model).plan.tensors]


def test_adapters_that_transformers_added_itself(tmp_path: Path) -> None:
    model = roastify.convert(bert(native=True), 8, include="adapters")
    with torch.no_grad():
        pool_of(model).weight.normal_(0, 0.02)
    expected = logits(model)
    assert not torch.equal(expected, logits(bert(native=True)))
    roastify.save(model, tmp_path / "pool")
    assert torch.equal(logits(roastify.load(tmp_path / "pool", bert(native=True))), expected)
    model.save_pretrained(tmp_path / "dense")
    dense = bert().unload()
    dense.load_adapter(str(tmp_path / "dense"))
    assert torch.equal(logits(dense), expected)


@pytest.mark.long
def test_a_trainer_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": torch.arange(6) + index, "labels": torch.tensor(index % 2)} for index in range(8)]
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    options = transformers.TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, **settings)
    found = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = roastify.convert(bert(), 20, include="adapters")
        transformers.Trainer(model, options, train_dataset=data).train(resume_from_checkpoint=resume)
        found.append(logits(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)

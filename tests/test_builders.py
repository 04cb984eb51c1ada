"""What an artifact names as the code of its model: it loads alone, and nothing that it names is executed or fetched."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trust import mutations
from trust.code_audit import small_bert

import roastify
from roastify.builders import Builder, builder_from
from roastify.errors import CheckpointError, SourceError
from roastify.model_libraries import parse_model

MANIFEST = "roast.json"
WORDS = torch.arange(12).view(2, 6) * 7 % 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Return an artifact of a small BERT, and the model."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = roastify.convert(small_bert(), 3)
    folder = tmp_path_factory.mktemp("saved") / "bert"
    roastify.save(model, folder)
    return folder, model


@pytest.fixture
def forge(saved: tuple[Path, nn.Module], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the artifact with another builder, and makes the digest right again."""

    def forge(change: Callable[[dict[str, Any]], object]) -> Path:
        folder = tmp_path / "forged"
        folder.mkdir()
        for path in saved[0].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        mutations.seal(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return forge


def test_an_artifact_of_transformers_loads_alone(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = saved
    random = torch.get_rng_state()
    loaded = roastify.load(folder)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(loaded) is type(model) and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(WORDS).logits, model(WORDS).logits)
    # What was loaded by name is saved with that name, a copy of it too.
    roastify.save(copy.deepcopy(loaded), tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_generation_is_what_it_was(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(vocab_size=50, **sizes, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.max_new_tokens = 7
    model.generation_config.pad_token_id = 3
    roastify.save(roastify.convert(model, 3), tmp_path / "a")
    loaded = roastify.load(tmp_path / "a")
    assert loaded.generation_config.max_new_tokens == 7  # type: ignore[union-attr]
    assert loaded.generate(WORDS[:, :3]).shape[1] <= 10  # type: ignore[operator]


def test_a_config_says_neither_where_its_code_nor_where_its_weights_were(tmp_path: Path) -> None:
    model = small_bert()
    model.config.auto_map = {"AutoModel": "somewhere--modeling.Model"}  # type: ignore[union-attr]
    model.config.name_or_path = str(tmp_path)  # type: ignore[union-attr]
    roastify.save(roastify.convert(model, 3), tmp_path / "a")
    text = (tmp_path / "a" / MANIFEST).read_text()
    assert "somewhere" not in text and str(tmp_path) not in text
    assert type(roastify.load(tmp_path / "a")).__name__ == "BertForMaskedLM"


def test_a_model_that_its_config_no_longer_describes_is_not_named(tmp_path: Path) -> None:
    model = roastify.convert(small_bert(), 3)
    model.cls.predictions.transform.dense = nn.Linear(16, 16, bias=False)  # type: ignore[union-attr]
    roastify.save(model, tmp_path / "head")
    model = roastify.convert(small_bert(), 3)
    # The same shapes, and another function.
    model.cls.predictions.transform.transform_act_fn = nn.ReLU()  # type: ignore[union-attr]
    roastify.save(model, tmp_path / "activation")
    for name in ("head", "activation"):
        assert json.loads((tmp_path / name / MANIFEST).read_text())["builder"] is None
        with pytest.raises(CheckpointError, match=r"does not name the code .*; pass the dense model: roastify\.load"):
            roastify.load(tmp_path / name)


def test_a_sharded_model_is_named_too(tmp_path: Path) -> None:
    """FSDP2 changes the classes of modules."""
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model = roastify.convert(small_bert(), 3)
        fully_shard(model.bert.encoder.layer[0], mesh=mesh)  # type: ignore[union-attr, index]
        fully_shard(model, mesh=mesh)
        values = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        roastify.save(model, tmp_path / "a", state_dict=values)
    finally:
        distributed.destroy_process_group()
    assert type(roastify.load(tmp_path / "a")).__name__ == "BertForMaskedLM"


def test_other_models_are_not_named_and_load_as_before(tmp_path: Path) -> None:
    roastify.save(roastify.convert(mutations.Linears(), 4), tmp_path / "a")
    with pytest.raises(CheckpointError, match="does not name the code"):
        roastify.load(tmp_path / "a")
    assert isinstance(roastify.load(tmp_path / "a", mutations.Linears()), mutations.Linears)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no object": ({"builder": "BertModel"}, "its builder is not an object with kind, name and arguments"),
    "unknown kind": ({"kind": "pickle"}, "its builder is of the unknown kind 'pickle'"),
    "a function": ({"name": "logging.Logger"}, "its builder has the name 'logging.Logger', which is none of a model"),
    "code": ({"name": "__import__('os')"}, "which is none of a model"),
    "code of the hub": ({"config": {"auto_map": {"AutoModel": "x--y.Z"}}}, "the key 'auto_map', which an artifact"),
    "deep": ({"config": {"a": [{"b": {"auto_map": 1}}]}}, "the key 'auto_map', which an artifact cannot have"),
    "kernels": ({"config": {"attn_implementation": "some/kernel"}}, "the key 'attn_implementation', which an artifact"),
    "quantizer": ({"config": {"quantization_config": {}}}, "the key 'quantization_config', which an artifact"),
    "a backbone's weights": ({"config": {"use_pretrained_backbone": True}}, "the key 'use_pretrained_backbone'"),
    "timm inside": ({"config": {"text": {"model_type": "timm_wrapper"}}}, "which timm would build"),
    "more arguments": ({"arguments": {"config": {}, "trust_remote_code": True}}, "other arguments than config"),
    "no config": ({"arguments": {}}, "other arguments than config"),
    "a hub name": ({"kind": "timm", "name": "hf-hub:a/b", "arguments": {}}, "which is none of a model"),
    "a folder": ({"kind": "timm", "name": "local-dir:/tmp", "arguments": {}}, "which is none of a model"),
    "a checkpoint": (
        {"kind": "timm", "name": "resnet18", "arguments": {"checkpoint_path": "x"}},
        "the argument 'checkpoint_path', which an artifact cannot have",
    ),
    "downloads": (
        {"kind": "torchvision", "name": "resnet18", "arguments": {"weights": "DEFAULT"}},
        "the argument 'weights', which an artifact cannot have",
    ),
    "a path": (
        {"kind": "timm", "name": "resnet18", "arguments": {"act_layer": "/etc/passwd"}},
        "the argument 'act_layer' of its builder is not a number, a word, or a list of these",
    ),
    "an object": (
        {"kind": "timm", "name": "resnet18", "arguments": {"block_args": {"a": 1}}},
        "is not a number, a word, or a list of these",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_forged_builder_is_refused(forge: Callable[..., Path], name: str) -> None:
    values, message = REFUSED[name]

    def change(manifest: dict[str, Any]) -> None:
        if "builder" in values:
            manifest.update(values)
        elif "config" in values:
            manifest["builder"]["arguments"]["config"].update(values["config"])
        else:
            manifest["builder"].update(values)

    folder = forge(change)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(").replace(")", r"\)")):
        roastify.load(folder)
    # The same check holds where the builder is not used.
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(").replace(")", r"\)")):
        roastify.load(folder, small_bert())


@pytest.mark.parametrize("name", ["../escaped", "roast.json", "MODEL.safetensors", ".hidden", "a/b", ""])
def test_forged_names_of_files_are_refused(forge: Callable[..., Path], name: str) -> None:
    with pytest.raises(CheckpointError, match="files have the name"):
        roastify.load(forge(lambda manifest: manifest["files"].update({name: "0" * 64})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(name="BertModel"), r"was saved from another architecture than this BertModel"),
        (lambda b: b.update(name="NoSuchModel"), r"the artifact's model NoSuchModel is unknown to transformers"),
        # A name that transformers has, and that is no model.
        (lambda b: b.update(name="Trainer"), r"the artifact's model Trainer is unknown to transformers"),
        (lambda b: b.update(name="GPT2Model"), r"has a config of the type 'bert'; expected 'gpt2'"),
        (lambda b: b["arguments"]["config"].update(hidden_size="much"), r"cannot be built from its config: "),
        (lambda b: b["arguments"]["config"].update(hidden_size=17), r"cannot be built from its config: "),
    ],
)
def test_a_builder_of_another_model_is_refused(
    forge: Callable[..., Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        roastify.load(forge(lambda manifest: change(manifest["builder"])))


@pytest.mark.parametrize(
    ("sizes", "what"),
    [({"num_hidden_layers": 10**9}, "parameters"), ({"hidden_size": 2**20, "vocab_size": 2**30}, "elements")],
)
def test_a_builder_of_a_huge_model_ends_at_once(forge: Callable[..., Path], sizes: dict[str, int], what: str) -> None:
    folder = forge(lambda manifest: manifest["builder"]["arguments"]["config"].update(sizes))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=f"what its builder names has far more {what} than the artifact"):
        roastify.load(folder)
    assert time.monotonic() - began < 10
    # Other models are built as before.
    nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("resnet18", "resnet18", {}),
        ("resnet18.a1_in1k,num_classes=10", "resnet18.a1_in1k", {"num_classes": 10}),
        ("a,pretrained=true,drop=0.1", "a", {"pretrained": True, "drop": 0.1}),
        ("a,pretrained=False,b=None", "a", {"pretrained": False, "b": None}),
        ("a,img_size=[224,192],pool=avg", "a", {"img_size": [224, 192], "pool": "avg"}),
        ('a,weights=IMAGENET1K_V2,b="1"', "a", {"weights": "IMAGENET1K_V2", "b": "1"}),
    ],
)
def test_names_with_arguments_are_read(text: str, name: str, arguments: dict[str, Any]) -> None:
    assert parse_model(text) == (name, arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b", "'b' is not key=value; expected NAME,key=value,key=value"),
        ("a,1=2", "'1=2' is not key=value"),
        ("a,b=1,b=2", "'b=2' is given twice"),
        ("a,", "'' is not key=value"),
    ],
)
def test_arguments_that_are_none_are_reported(text: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_model(text)
    assert message in str(caught.value)


def test_a_source_for_save_must_be_one_that_an_artifact_can_name(tmp_path: Path) -> None:
    assert builder_from("timm:resnet18,pretrained=true,num_classes=10") == Builder(
        "timm", "resnet18", {"num_classes": 10}
    )
    for source, message in (
        ("hf:somewhere", "expected timm:NAME or torchvision:NAME"),
        ("model.py", "expected timm:NAME or torchvision:NAME"),
        ("timm:hf-hub:a/b", "cannot be named in an artifact"),
    ):
        with pytest.raises(SourceError, match=message):
            roastify.save(roastify.convert(mutations.Linears(), 4), tmp_path / "a", source=source)
    assert not (tmp_path / "a").exists()

"""transformers' own methods on converted models: from_pretrained, save_pretrained, push_to_hub, dequantize, Trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import roastify
from roastify.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")

WORDS = 128
X = torch.arange(24).view(2, 12)
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(tied: bool = False) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=32))


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, tied": lambda: llama(True),
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
}


def built(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def converted(family: str = "llama", ratio: float = 5, **settings: Any) -> Any:
    return roastify.convert(built(family), ratio, inplace=True, **settings)


def outputs(model: Any) -> Tensor:
    arguments = {"decoder_input_ids": X} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(X, **arguments)[0]


def loaded(folder: Path, kind: Any = None, **arguments: Any) -> Any:
    model, info = (kind or transformers.AutoModel).from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


def assert_same_state(found: Any, expected: Any) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def refusal(call: Callable[[], Any], kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = converted(family)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path, type(model))
    assert torch.equal(outputs(again), expected)
    assert_same_state(again, model)
    assert len(list(again.parameters())) == len(list(model.parameters()))
    # And what was loaded is saved like what was converted, also over the files that it was loaded from.
    again.save_pretrained(tmp_path)
    assert torch.equal(outputs(loaded(tmp_path, type(model))), expected)
    # The config of the model that was saved is as it was.
    assert not hasattr(model.config, "quantization_config")


def test_without_roastify_loading_ends_with_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import auto

    converted().save_pretrained(tmp_path)
    config = transformers.LlamaConfig.from_pretrained(tmp_path)
    # As in a process that has not imported roastify; `test_processes_…` starts such a process.
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "roastify")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "roastify")
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        with pytest.raises(FileNotFoundError, match="import-roastify-to-load-this-model"):
            kind.from_pretrained(tmp_path)
    # With a config that names no quantization method, the placeholder's shape stops transformers.
    del config.quantization_config, config.transformers_weights
    for kind in (transformers.LlamaForCausalLM, transformers.LlamaModel):
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            kind.from_pretrained(tmp_path, config=config)


@pytest.mark.long
def test_processes_that_do_and_do_not_import_roastify(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)

    def run(first: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys\n{first}\nm = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        code += "print(type(m.roast_pool).__name__)"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    for first in ("import roastify, transformers", "import transformers, roastify"):
        assert run(first).stdout.strip() == "RoastPool"
    without = run("import transformers")
    assert without.returncode == 1 and "Unknown quantization type, got roastify" in without.stderr
    assert without.stderr.strip().endswith("import-roastify-to-load-this-model.safetensors")


def test_parts_of_a_model_are_saved_too(tmp_path: Path) -> None:
    model = converted()
    expected = model.model(X).last_hidden_state
    model.model.save_pretrained(tmp_path / "part")
    assert torch.equal(outputs(loaded(tmp_path / "part")), expected)
    # A model of converted layers, which was not itself converted.
    other = built()
    other.model = model.model
    other.save_pretrained(tmp_path / "other")
    assert torch.equal(outputs(loaded(tmp_path / "other", type(other))), outputs(other))


def test_the_backbone_and_another_head_are_loaded(tmp_path: Path) -> None:
    model = converted("bert")
    model.save_pretrained(tmp_path / "whole")
    backbone = transformers.AutoModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False)
    assert torch.equal(outputs(backbone), model.bert(X).last_hidden_state)
    labelled = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "whole", num_labels=3)
    assert torch.equal(labelled.bert(X).last_hidden_state, model.bert(X).last_hidden_state)
    assert type(labelled.classifier) is torch.nn.Linear
    backbone.save_pretrained(tmp_path / "backbone")
    labelled = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "backbone", num_labels=3)
    assert torch.equal(labelled.bert(X).last_hidden_state, model.bert(X).last_hidden_state)
    labelled.save_pretrained(tmp_path / "labelled")
    assert torch.equal(outputs(loaded(tmp_path / "labelled", type(labelled))), outputs(labelled))


def test_a_folder_with_something_missing_or_mixed_is_refused(tmp_path: Path) -> None:
    kind = transformers.LlamaForCausalLM
    for name, seed in (("one", 0), ("other", 1)):
        converted(seed=seed).save_pretrained(tmp_path / name)
    one, plan = tmp_path / "one", tmp_path / "one" / "roastify_plan.json"
    good = plan.read_text()
    plan.write_text((tmp_path / "other" / plan.name).read_text())
    assert "its seed is 0, this model's is 1" in refusal(lambda: kind.from_pretrained(one))
    plan.write_text(good.replace('"scale": 1.', '"scale": 2.', 1))
    assert "its digest is wrong" in refusal(lambda: kind.from_pretrained(one))
    plan.write_text(good.replace('"format_version": 1', '"format_version": 2', 1))
    assert "install a newer roastify" in refusal(lambda: kind.from_pretrained(one))
    plan.unlink()
    assert "copy the whole folder" in refusal(lambda: kind.from_pretrained(one))
    plan.write_text(good)
    weights = one / "model.safetensors"
    built().save_pretrained(tmp_path / "dense")
    weights.write_bytes((tmp_path / "dense" / weights.name).read_bytes())
    assert "lacks 2 of the tensors" in refusal(lambda: kind.from_pretrained(one))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    message = refusal(lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path))
    assert "another architecture" in message and "model.layers.2" in message
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    assert "expected (64, 64)" in refusal(lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_settings_are_checked() -> None:
    assert "unknown setting 'ration'" in refusal(lambda: roastify.RoastifyConfig(ration=3), ConfigError)
    assert "ratio must be at least 1" in refusal(lambda: roastify.RoastifyConfig(ratio=0), ConfigError)

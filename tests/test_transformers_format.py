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
from roastify.conversion.converted import pool_of
from roastify.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")

WORDS = 128
X = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def llama(tied: bool = False) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=32))


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=1, n_head=2, n_positions=32)
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


def file_of(tensor: Tensor) -> str:
    """Return the file that a tensor's memory is mapped to, or an empty string."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, _, end = line.split()[0].partition("-")
            if int(begin, 16) <= tensor.data_ptr() < int(end, 16):
                return " ".join(line.split()[5:])
    return ""


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

    quantizers = "from transformers.quantizers.auto import AutoQuantizationConfig as Q; Q.from_dict(dict(METHOD))"
    quantizers = quantizers.replace("METHOD", "quant_method='roastify'")
    for first in ("roastify, transformers", "transformers, roastify", f"roastify, transformers; {quantizers}"):
        found = run(f"import {first}")
        assert found.stdout.strip() == "RoastPool", found.stderr
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


def test_a_model_of_two_converted_models_is_saved(tmp_path: Path) -> None:
    settings = {**SIZES, "max_position_embeddings": 32}
    config = transformers.BertConfig(**settings, is_decoder=True, add_cross_attention=True)
    parts = transformers.BertModel(transformers.BertConfig(**settings)), transformers.BertLMHeadModel(config)
    model = transformers.EncoderDecoderModel(encoder=parts[0], decoder=parts[1]).eval()
    for part in (model.encoder, model.decoder):
        roastify.convert(part, 4, inplace=True)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(loaded(tmp_path, type(model))), outputs(model))


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
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    message = refusal(lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path))
    assert "another architecture" in message and "model.layers.1" in message
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    assert "expected (64, 64)" in refusal(lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_settings_are_checked() -> None:
    assert "unknown setting 'ration'" in refusal(lambda: roastify.RoastifyConfig(ration=3), ConfigError)
    assert "ratio must be at least 1" in refusal(lambda: roastify.RoastifyConfig(ratio=0), ConfigError)


def dense_folder(folder: Path, family: str = "llama", **settings: Any) -> Any:
    model = built(family)
    model.save_pretrained(folder, **settings)
    return model


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "bfloat16"),
        ("llama, tied", "float32"),
        # Some of its weights stay in float32.
        pytest.param("t5", "float16", marks=pytest.mark.long),
    ],
)
def test_loading_converts_to_the_bits_of_a_conversion_in_memory(family: str, dtype: str, tmp_path: Path) -> None:
    kind = type(dense_folder(tmp_path, family, max_shard_size="50KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = loaded(tmp_path, kind, quantization_config=roastify.RoastifyConfig(ratio=5, seed=1), dtype=dtype)
    expected = roastify.convert(loaded(tmp_path, kind, dtype=dtype), 5, init="project", seed=1)
    assert_same_state(found, expected)
    assert torch.equal(outputs(found), outputs(expected))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_what_is_cast_waits_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from roastify.integrations import mapped_tensor
    from roastify.integrations import transformers as ours

    monkeypatch.setattr(mapped_tensor, "_LEAST_BYTES", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    kind = type(dense_folder(tmp_path / "dense"))
    seen: list[str] = []
    convert = ours.api.convert

    def watched(model: Any, **arguments: Any) -> Any:
        seen.extend(file_of(each) for each in model.parameters())
        return convert(model, **arguments)

    monkeypatch.setattr(ours.api, "convert", watched)
    for dtype, place in (("float32", "/dense/model.safetensors"), ("bfloat16", "/temporary/roastify-")):
        config = roastify.RoastifyConfig(ratio=5)
        found = loaded(tmp_path / "dense", kind, quantization_config=config, dtype=dtype)
        assert seen and all(place in each for each in seen), seen
        assert not list((tmp_path / "temporary").iterdir())
        seen.clear()
        found.save_pretrained(tmp_path / "out")
        # Nothing stays mapped: a save may replace the files that a model was loaded from.
        for model in (found, loaded(tmp_path / "out", kind)):
            assert not any(str(tmp_path) in file_of(tensor) for tensor in model.state_dict().values())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match="conver"):
        transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=roastify.RoastifyConfig(ratio=5), dtype="bfloat16"
        )


def test_shards_dtypes_and_devices(tmp_path: Path) -> None:
    kind = type(dense_folder(tmp_path / "dense"))
    config = roastify.RoastifyConfig(ratio=3, exclude=["lm_head"])
    model = loaded(tmp_path / "dense", kind, quantization_config=config, device_map="cpu")
    expected = outputs(model)
    for size, shards in (("20KB", True), ("1GB", False), ("20KB", True)):
        model.save_pretrained(tmp_path / "out", max_shard_size=size)
        assert (tmp_path / "out" / "model.safetensors").exists() is not shards
        assert torch.equal(outputs(loaded(tmp_path / "out", kind, device_map="auto")), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["exclude"] == ["lm_head"]
    half = loaded(tmp_path / "out", kind, dtype="bfloat16")
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.roast_pool.weight, model.roast_pool.weight.bfloat16())
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    assert_same_state(loaded(tmp_path / "half", kind), half)
    spread = {"model": 0, "lm_head": "cpu"}
    message = refusal(lambda: kind.from_pretrained(tmp_path / "out", device_map=spread), ConfigError)
    assert "spreads the model over 0, cpu" in message


def test_a_model_of_several_dtypes_keeps_them(tmp_path: Path) -> None:
    model = converted("llama", 3, exclude=["lm_head"]).half()
    model.lm_head.float()
    model.model.norm.float()
    model.save_pretrained(tmp_path)
    assert_same_state(loaded(tmp_path, type(model)), model)


def test_a_loaded_model_generates_trains_and_becomes_dense(tmp_path: Path) -> None:
    model = converted("llama, tied")
    model.save_pretrained(tmp_path / "one")
    again = loaded(tmp_path / "one", type(model))
    ids = [each.generate(X[:1], max_new_tokens=4, do_sample=False, pad_token_id=0) for each in (model, again)]
    assert torch.equal(*ids)
    for each in (model, again):
        each.train()
        optimizer = torch.optim.AdamW(each.parameters(), 1e-2)
        each(X, labels=X).loss.backward()
        optimizer.step()
        each.eval()
    assert_same_state(again, model)
    again.save_pretrained(tmp_path / "trained")
    trained = loaded(tmp_path / "trained", type(model))
    assert_same_state(trained, model)
    dense = trained.dequantize()
    assert type(dense.lm_head) is torch.nn.Linear and dense.lm_head.weight is dense.model.embed_tokens.weight
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(outputs(loaded(tmp_path / "dense", type(model))), outputs(dense))
    # Made dense by roastify's own function, it is saved as a dense model too.
    roastify.densify(again).save_pretrained(tmp_path / "densified")
    assert torch.equal(outputs(loaded(tmp_path / "densified", type(model))), outputs(dense))


def test_a_dense_model_becomes_no_quantized_one() -> None:
    with pytest.raises(ValueError, match="first quantize"):
        built().dequantize()


def test_what_is_pushed_has_a_card_and_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything but the network runs: what would be uploaded is looked at where transformers hands it over."""
    import huggingface_hub
    from transformers.utils import hub

    pushed: dict[str, bytes] = {}

    class Offline:
        def create_repo(self, repo_id: str, **arguments: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, repo_id: str, operations: list[Any], **arguments: Any) -> None:
            pushed.update({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

    def no_card(*arguments: Any, **others: Any) -> Any:
        raise huggingface_hub.errors.EntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_api", Offline)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", Offline)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    model = converted("bert")
    model.push_to_hub("someone/bert-5", tags=["mine"])
    plan = pool_of(model).plan
    card = pushed["README.md"].decode()
    assert {"model.safetensors", "config.json", "roastify_plan.json"} <= pushed.keys()
    assert "- mine" in card and "- roastify" in card and "library_name: transformers" in card
    for text in (f"{plan.total_numel:,} | {plan.stored_numel:,}", f"{plan.total_nbytes:,} | {plan.stored_nbytes:,}"):
        assert text in card
    assert "import roastify" in card and "read back from the files" in card and "asked for: 5" in card
    card = (tmp_path / "README.md").write_text("---\ntags: [own]\n---\nMy words.\n")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/bert-5")
    assert pushed["README.md"].decode().count("## Verification") == 1


def test_a_card_of_ones_own_keeps_its_words(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\ntags: [own]\n---\nMy words.\n")
    for ratio in (4, 5):
        converted("llama", ratio).save_pretrained(tmp_path)
    text = card.read_text()
    assert "My words." in text and text.count("## Size") == 1 and "asked for: 5" in text
    assert "- own" in text and "- roastify" in text


def test_a_tokenizer_beside_the_model_stays(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    converted().save_pretrained(tmp_path)
    assert tokenizer.read_text() == "{}"


def test_states_of_other_models_are_not_saved(tmp_path: Path) -> None:
    model, other = converted(), converted(seed=1)
    message = refusal(lambda: model.save_pretrained(tmp_path, state_dict=other.state_dict()))
    assert "another model's" in message
    message = refusal(lambda: model.save_pretrained(tmp_path, state_dict=built().state_dict()))
    assert "lacks the model's roast_pool.weight" in message
    message = refusal(lambda: model.save_pretrained(tmp_path, distributed_checkpoint=True))
    assert "state_dict=" in message
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert_same_state(loaded(tmp_path, type(model)), model)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(8) * (index + 1)) % WORDS
        return {"input_ids": row, "labels": row}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_trainer_are_such_folders(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    kind = type(converted())
    converted().save_pretrained(tmp_path / "start")

    def trainer() -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=4,
            save_steps=2,
            eval_steps=2,
            eval_strategy="steps",
            load_best_model_at_end=True,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            seed=0,
        )
        model = kind.from_pretrained(tmp_path / "start")
        return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())

    whole = trainer()
    whole.train()
    last = tmp_path / "run" / "checkpoint-4"
    assert whole.state.best_model_checkpoint == str(last)
    assert_same_state(loaded(last, kind), whole.model)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_state(resumed.model, whole.model)
    resumed.save_model(str(tmp_path / "final"))
    assert_same_state(loaded(tmp_path / "final", kind), whole.model)

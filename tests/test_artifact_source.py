"""An artifact as a SOURCE of every command, `roastify show`, and the config and tokenizer files that -o copies."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from safetensors.torch import load_file

import roastify
from roastify.artifact import write_artifact
from roastify.cli import main
from roastify.errors import CheckpointError
from roastify.pool.plan import RoastPlan
from roastify.source import load_source

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 96)
            self.last = nn.Linear(96, 64)

        def forward(self, x):
            return self.last(self.first(x).relu())

    torch.manual_seed(0)
    model = Net()
    example_inputs = torch.linspace(-1, 1, 128).view(2, 64)
    data = [torch.randn(8, 64) for _ in range(3)]
"""


def _run(*arguments: object, code: int = 0) -> str:
    result = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments], terminal_width=200)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model's file, its artifact, and the artifact of a checkpoint of transformers."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.py").write_text(textwrap.dedent(MODEL))
    _run(folder / "net.py", "--ratio", 3, "--init", "project", "-o", folder / "net")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=60, **sizes)).eval()
    model.save_pretrained(folder / "bert-dense")
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(60)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / "bert-dense")
    (folder / "bert-dense" / "training_args.bin").write_bytes(b"not of the model")
    output = _run(f"hf:{folder / 'bert-dense'}", "--ratio", 1, "-o", folder / "bert")
    assert "with config.json, tokenizer.json, tokenizer_config.json" in output
    assert f'load it with roastify.load("{folder / "bert"}")' in output
    return folder


def test_config_and_tokenizer_are_copied(made: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = {path.name for path in (made / "bert").iterdir()}
    assert names == {"config.json", "model.safetensors", "roast.json", "tokenizer.json", "tokenizer_config.json"}
    assert (made / "bert" / "tokenizer.json").read_bytes() == (made / "bert-dense" / "tokenizer.json").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "bert")
    assert tokenizer("w5")["input_ids"] == [5]
    assert transformers.AutoConfig.from_pretrained(made / "bert").vocab_size == 60
    # At ratio 1 every weight is what it was.
    dense = transformers.AutoModelForMaskedLM.from_pretrained(made / "bert-dense")
    loaded = roastify.load(made / "bert")
    with torch.no_grad():
        words = torch.arange(6)[None]
        torch.testing.assert_close(loaded(words).logits, dense(words).logits, rtol=1e-4, atol=1e-5)


def test_transformers_does_not_take_an_artifact_for_a_dense_model(made: Path) -> None:
    """Without the mark in its config, it would make up the weights that are in the pool."""
    transformers = pytest.importorskip("transformers")
    with pytest.raises(OSError, match=r"this-is-a-roastify-artifact\.read-it-with-roastify\.load"):
        transformers.AutoModelForMaskedLM.from_pretrained(made / "bert")


def test_densified_shards_are_a_model_of_transformers(made: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "tokenizer.json").write_text("mine")
    _run("densify", made / "bert", "-o", tmp_path / "dense", "--shard-size", "1GB")
    assert (tmp_path / "dense" / "tokenizer.json").read_text() == "mine"
    dense = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        words = torch.arange(6)[None]
        torch.testing.assert_close(dense(words).logits, roastify.load(made / "bert")(words).logits)


def test_what_roastify_did_not_write_is_not_overwritten(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"of": "somebody else"}')
    refusal = _run(f"hf:{made / 'bert-dense'}", "--ratio", 2, "-o", out, code=1)
    assert (
        f"{out / 'config.json'} was not written by roastify, or was changed since, so it is not overwritten" in refusal
    )
    assert [path.name for path in out.iterdir()] == ["config.json"]
    model = roastify.convert(torch.nn.Linear(64, 64), 4)
    with pytest.raises(CheckpointError, match=r"config\.json was not written by roastify"):
        write_artifact(model, out, files={"config.json": b"{}"})
    assert [path.name for path in out.iterdir()] == ["config.json"]
    # One of the same content may stay. From then on it is roastify's.
    write_artifact(model, out, files={"config.json": (out / "config.json").read_bytes()})
    write_artifact(model, out, files={"config.json": b"{}", "vocab.txt": b"a"})
    assert (out / "config.json").read_bytes() == b"{}"
    # A save without files keeps them, and knows them for its own.
    roastify.save(model, out)
    assert json.loads((out / "roast.json").read_text())["files"].keys() == {"config.json", "vocab.txt"}
    write_artifact(model, out, files={"config.json": b"[]"})
    # One that the user changed since is the user's.
    (out / "vocab.txt").write_text("b")
    with pytest.raises(CheckpointError, match=r"vocab\.txt was not written by roastify"):
        write_artifact(model, out, files={"vocab.txt": b"c"})
    assert (out / "vocab.txt").read_text() == "b"
    roastify.save(model, out)
    assert json.loads((out / "roast.json").read_text())["files"].keys() == {"config.json"}


def test_files_of_a_hub_name_come_from_its_cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    import huggingface_hub

    snapshot = tmp_path / "models--some--bert" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (snapshot / name).write_bytes((made / "bert-dense" / name).read_bytes())
    refs = tmp_path / "models--some--bert" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = load_source("hf:some/bert")
    assert found.pretrained
    assert found.files() == load_source(f"hf:{made / 'bert-dense'}").files()
    assert found.files()["tokenizer.json"] == (snapshot / "tokenizer.json").read_bytes()


def test_show_says_what_is_in_an_artifact(made: Path, tmp_path: Path) -> None:
    shown = _run("show", made / "bert")
    for expected in (
        "a converted BertForMaskedLM",
        "BertForMaskedLM of transformers, from its config; roastify.load(",
        "config.json, tokenizer.json, tokenizer_config.json",
        "6, mapping version",
        "(asked 1)",
    ):
        assert expected in shown, expected
    net = _run("show", made / "net")
    assert "code that it does not name: roastify.load(" in net and "first.weight" in net
    values = json.loads(_run("show", made / "net", "--json"))
    assert values["builder"] is None and values["format_version"] == 6 and len(values["digest"]) == 64
    (plan,) = values["plans"]
    assert RoastPlan.from_dict(plan).ratio == 3
    assert "sha-256" in _run("show", made / "net", "--digest", "0" * 64, code=1).lower()
    assert "is a dense model; roastify plan shows" in _run("show", made / "net.py", code=2)
    # A file whose model is converted.
    (tmp_path / "conv.py").write_text(
        f"import roastify, sys\nsys.path.insert(0, {str(made)!r})\nimport net\nmodel = roastify.convert(net.model, 3)\n"
    )
    assert "first.weight" in _run("show", tmp_path / "conv.py")


def test_an_artifact_is_checked_and_timed(made: Path) -> None:
    pytest.importorskip("transformers")
    assert _run("check", made / "bert").endswith(f"ok: {made / 'bert'}")
    fast = ("--seconds", 0.05, "--device", "cpu")
    # The code of an artifact that does not name it is given.
    net, dense = made / "net", ("--dense", made / "net.py")
    for command, options in (("check", ()), ("bench", fast)):
        assert "does not name the code that builds its model" in _run(command, net, *options, code=1)
        assert f"--ratio cannot be given with {net}" in _run(command, net, *dense, *options, "--ratio", 3, code=2)
        assert "--dense belongs to an artifact" in _run(command, made / "net.py", *dense, *options, code=2)
    output = _run("check", net, *dense)
    assert "float32[2, 64] on cpu" in output and output.endswith(f"ok: {net}")
    assert "dense ÷ converted" in _run("bench", net, *dense, *fast)


def test_a_conversion_does_not_begin_with_an_artifact(made: Path) -> None:
    for command in ("convert", "plan"):
        refusal = _run(command, made / "net", code=2)
        assert f"{made / 'net'} is converted already" in refusal and "roastify show" in refusal


def test_an_artifact_is_no_folder_of_transformers(made: Path) -> None:
    refusal = _run("plan", f"hf:{made / 'bert'}", code=2)
    assert f"hf:{made / 'bert'} is the folder of an artifact; name it without hf:, as {made / 'bert'}" in refusal


def test_an_artifact_is_recovered(made: Path, tmp_path: Path) -> None:
    options = ("--data", made / "net.py", "--steps", 2, "--device", "cpu")
    net = made / "net"
    refusal = _run("recover", net, *options, "-o", tmp_path / "out", code=2)
    assert "needs the dense pretrained model as its teacher; name it with --dense" in refusal
    output = _run("recover", net, "--dense", made / "net.py", *options, "-o", tmp_path / "out")
    assert "after 2 steps" in output and "aligned" not in output
    assert "(asked 3)" in _run("show", tmp_path / "out")
    for more in (("--artifact", net), ("--ratio", 3)):
        _run("recover", net, "--dense", made / "net.py", *options, *more, "-o", tmp_path / "more", code=2)
    assert "is none" in _run("recover", made / "net.py", "--dense", "x", *options, "-o", tmp_path / "more", code=2)


def test_what_save_pretrained_wrote_is_a_source(made: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out, dense = tmp_path / "out", f"hf:{made / 'bert-dense'}"
    model = transformers.AutoModelForMaskedLM.from_pretrained(made / "bert-dense")
    roastify.convert(model, 3, init="project").save_pretrained(out)
    assert _run("check", out).endswith(f"ok: {out}")
    # With and without hf:, as an artifact has none and a model of transformers has it.
    for source in (out, f"hf:{out}"):
        assert "(asked 3)" in _run("show", source)
    assert "dense ÷ converted" in _run("bench", out, "--seconds", 0.05, "--device", "cpu")
    assert "is converted already" in _run("plan", out, code=2)
    # The dense model of its weights, for transformers without roastify.
    _run("densify", out, "-o", tmp_path / "dense", "--shard-size", "1GB")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "dense")
    again = transformers.AutoModelForMaskedLM.from_pretrained(out)
    words = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(words).logits, again(words).logits)
    assert not hasattr(loaded.config, "quantization_config")
    # It is recovered as an artifact is, and becomes one.
    (tmp_path / "words.py").write_text("import torch\ndata = [torch.arange(12).view(2, 6)] * 2\n")
    options = ("--data", tmp_path / "words.py", "--steps", 1, "--device", "cpu")
    assert "name it with --dense" in _run("recover", out, *options, "-o", tmp_path / "no", code=2)
    both = ("--dense", dense, "--artifact", out)
    assert "--artifact names another" in _run("recover", out, *both, *options, "-o", tmp_path / "no", code=2)
    assert "was not written by roastify" in _run("recover", out, "--dense", dense, *options, "-o", out, code=1)
    recovered = _run("recover", out, "--dense", dense, *options, "-o", tmp_path / "recovered")
    assert "after 1 step" in recovered and "aligned" not in recovered
    assert "(asked 3)" in _run("show", tmp_path / "recovered")
    with pytest.raises(CheckpointError, match=r"roast\.json is missing; if save_pretrained of transformers wrote it"):
        roastify.load(out)


def test_a_converted_model_of_a_file_is_densified(made: Path, tmp_path: Path) -> None:
    text = (
        f"import roastify, sys\nsys.path.insert(0, {str(made)!r})\nimport net\nmodel = roastify.convert(net.model, 3)\n"
    )
    (tmp_path / "conv.py").write_text(text)
    _run("densify", tmp_path / "conv.py", "-o", tmp_path / "dense.safetensors")
    assert load_file(tmp_path / "dense.safetensors").keys() == {
        "first.weight",
        "first.bias",
        "last.weight",
        "last.bias",
    }
    assert _run("check", tmp_path / "conv.py").endswith(f"ok: {tmp_path / 'conv.py'}")
    assert "holds no roastify pool" in _run("densify", made / "net.py", "-o", tmp_path / "x", code=1)


def test_bench_of_a_converted_model_takes_no_settings() -> None:
    model = roastify.convert(torch.nn.Linear(64, 64), 4)
    inputs: Any = torch.ones(1, 64)
    with pytest.raises(roastify.ConfigError, match="ratio, seed cannot be given for a model that is converted already"):
        roastify.bench(model, 4, seed=1, example_inputs=inputs, device="cpu")
    assert roastify.bench(model, example_inputs=inputs, device="cpu", seconds=0.05).ratio == 4

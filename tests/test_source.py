"""Which model a user's SOURCE means: Python files, names in them, transformers' folders; and every refusal."""

from __future__ import annotations

import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from roastify.errors import SourceError
from roastify.source import Source, load_data, load_source

NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.fc = nn.Linear(width, width)

        def forward(self, x):
            return self.fc(x)
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a Python file."""

    def write(text: str, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


def _net_and(text: str) -> str:
    return textwrap.dedent(NET) + textwrap.dedent(text)


def _refusal(name: object) -> str:
    """Return the message with which a source is refused; check that the attempt leaves nothing behind."""
    path = list(sys.path)
    with pytest.raises(SourceError) as caught:
        load_source(str(name))
    assert sys.path == path
    return str(caught.value)


@pytest.mark.parametrize(
    ("rest", "width"),
    [
        ("model = Net(9)", 9),
        ("anything = Net(9)\n_hidden = Net(3)", 9),
        ("def build_model():\n    return Net(10)", 10),
        ("def make_net(width=11, **options):\n    return Net(width)", 11),
        ("def anything() -> Net:\n    return Net(12)", 12),
        ("def anything() -> 'Net':\n    return Net(12)", 12),
        ("def helper(width):\n    return Net(width)", 8),
        # An instance is preferred to a builder, and a builder to a class.
        ("def build_model():\n    return Net(10)\nmine = Net(9)", 9),
        ("", 8),
    ],
)
def test_the_one_model_of_a_file_is_found(write: Callable[..., Path], rest: str, width: int) -> None:
    path = write(_net_and(rest))
    search_path = list(sys.path)
    source = load_source(str(path))
    assert isinstance(source, Source) and source.name == str(path)
    assert type(source.model).__name__ == "Net"
    assert source.model.fc.in_features == width
    assert source.example_inputs is None
    assert source.model(torch.zeros(2, width)).shape == (2, width)
    assert sys.path == search_path


@pytest.mark.parametrize(
    ("attribute", "width"), [("small", 3), ("large", 99), ("Net", 8), ("build", 5), ("fold", 6), ("_hidden", 4)]
)
def test_a_name_chooses_among_many(write: Callable[..., Path], attribute: str, width: int) -> None:
    path = write(
        _net_and(
            """
            import functools
            small, large, _hidden = Net(3), Net(99), Net(4)
            fold = functools.partial(Net, width=6)
            def build():
                return Net(5)
            """
        )
    )
    source = load_source(f"{path}:{attribute}")
    assert source.model.fc.in_features == width


def test_a_class_or_builder_takes_keyword_arguments_after_commas(write: Callable[..., Path]) -> None:
    path = write(_net_and("def build(width, depth=1, *, name='x'):\n    return Net(width)\nmine = Net(9)"))
    assert load_source(f"{path}:build,width=7,name=a:b").build().fc.in_features == 7
    assert load_source(f"{path}:Net,width=3").model.fc.in_features == 3
    for arguments, message in (
        (":build,depth=2", ":build(depth=2): missing a required argument: 'width'; arguments come after commas, as"),
        (":build,width=2,wide=3", ":build(width=2, wide=3): got an unexpected keyword argument 'wide'; arguments come"),
        (":build,width=wide", ":build(width='wide') fails: TypeError: "),
        (":mine,width=3", ":mine is a model already and takes no arguments; name a function or a class, or leave"),
    ):
        assert _refusal(f"{path}{arguments}").startswith(f"{path}{message}")
    assert "'width' is not key=value" in _refusal(f"{path}:build,width")


def test_build_makes_the_model_again(write: Callable[..., Path]) -> None:
    source = load_source(str(write(_net_and("def build_model():\n    return Net(10)"))))
    again = source.build()
    assert again is not source.model and type(again) is type(source.model)
    path = write(_net_and("model = Net(9)"), "instance.py")
    source = load_source(str(path))
    assert source.build() is source.model


def test_a_path_may_be_relative_and_hold_colons_and_spaces(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my: models").mkdir()
    write(_net_and("a = Net(9)\nb = Net(10)"), "my: models/net.py")
    monkeypatch.chdir(tmp_path)
    assert load_source("my: models/net.py:b").model.fc.in_features == 10
    monkeypatch.chdir(tmp_path / "my: models")
    assert load_source("net.py:a").model.fc.in_features == 9


def test_an_imported_class_or_builder_is_not_the_files_own(write: Callable[..., Path]) -> None:
    write(_net_and("def build_model():\n    return Net(5)\ndef get_model():\n    return Net(6)"), "sibling_own.py")
    path = write(
        """
        from torch.nn import Identity, ReLU
        from sibling_own import Net, build_model, get_model

        def create_model():
            return Net(7)
        """
    )
    assert load_source(str(path)).model.fc.in_features == 7


def test_files_beside_it_can_be_imported(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Another `sibling_first` is on the path: the one beside the file is imported, as when a script is run.
    elsewhere = write("raise ImportError('the wrong one')", "decoy.py").parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "sibling_first.py").write_text("WIDTH = 1", encoding="utf-8")
    monkeypatch.syspath_prepend(str(elsewhere))
    write("WIDTH = 13", "sibling_first.py")
    path = write(_net_and("from sibling_first import WIDTH\nmodel = Net(WIDTH)"))
    assert load_source(str(path)).model.fc.in_features == 13


def test_files_beside_it_can_be_imported_inside_the_builder(write: Callable[..., Path]) -> None:
    write("WIDTH = 14", "sibling_late.py")
    path = write(_net_and("def build_model():\n    from sibling_late import WIDTH\n    return Net(WIDTH)"))
    assert load_source(str(path)).model.fc.in_features == 14


def test_dataclasses_and_guarded_scripts_work(write: Callable[..., Path]) -> None:
    path = write(
        "from __future__ import annotations\n"
        + _net_and(
            """
            import dataclasses

            @dataclasses.dataclass
            class Options:
                width: int = 15

            def build_model() -> Net:
                return Net(Options().width)

            if __name__ == "__main__":
                raise SystemExit("run as a script")
            """
        )
    )
    assert load_source(str(path)).model.fc.in_features == 15


@pytest.mark.parametrize(
    "rest",
    [
        "example_inputs = torch.full((2, 8), 3.0)",
        "def example_inputs():\n    return torch.full((2, 8), 3.0)",
        "example_inputs = lambda: torch.full((2, 8), 3.0)",
    ],
)
def test_example_inputs_are_a_value_or_a_function(write: Callable[..., Path], rest: str) -> None:
    source = load_source(str(write(_net_and(rest))) + ":Net")
    assert isinstance(source.example_inputs, Tensor)
    assert torch.equal(source.example_inputs, torch.full((2, 8), 3.0))
    # A function of that name is not taken for the model's builder.
    assert type(load_source(str(write(_net_and(rest), "whole.py"))).model).__name__ == "Net"


def test_example_inputs_that_fail_are_reported(write: Callable[..., Path]) -> None:
    path = write(_net_and("def example_inputs():\n    return torch.zeros(2, 'x')"))
    assert f"{path}:example_inputs() fails: TypeError: zeros()" in _refusal(path)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("import torch\n\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'", 3),
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero", 2),
        # The named line is the file's own, although the error was raised in another file.
        ("import json\n\n\n\njson.loads('{')\n", "JSONDecodeError: Expecting property name", 5),
        ("def f(:\n    pass\n", "SyntaxError: invalid syntax", 1),
        ("if True:\nx = 1\n", "IndentationError: expected an indented block", 2),
    ],
)
def test_a_file_that_does_not_import_is_reported_with_the_line(
    write: Callable[..., Path], text: str, message: str, line: int
) -> None:
    path = write(text)
    refusal = _refusal(path)
    assert refusal.startswith(f"{path} does not import: {message}")
    assert refusal.endswith(f"(line {line})")
    assert "_roastify_source_model" not in sys.modules


def test_a_syntax_error_in_another_file_has_the_line_of_the_import(write: Callable[..., Path]) -> None:
    write("\n\n\n\n\n\ndef f(:\n", "sibling_broken.py")
    path = write("x = 1\nimport sibling_broken\n")
    assert "(line 7)" not in _refusal(path)


@pytest.mark.parametrize("text", ["import sys\n\nsys.exit(3)\n", "import argparse\n\nraise SystemExit('usage')\n"])
def test_a_script_that_exits_is_reported(write: Callable[..., Path], text: str) -> None:
    assert "(line 3)" in _refusal(write(text))


@pytest.mark.parametrize(
    "text",
    [
        "x = 3\n",
        "from torch import nn\nfrom torch.nn import Linear, ReLU\n",
        _net_and("class Net2(Net):\n    def __init__(self, width):\n        super().__init__(width)\ndel Net\n"),
        _net_and("def build_model(width):\n    return Net(width)\nclass Net(Net):\n    def __init__(self, w): ...\n"),
    ],
)
def test_the_error_of_a_file_without_a_model_says_what_counts_as_a_model(write: Callable[..., Path], text: str) -> None:
    path = write(text)
    refusal = _refusal(path)
    assert refusal.startswith(f"{path} holds no model; expected a torch.nn.Module, a function without required arg")
    assert f"{path}:NAME" in refusal


def test_a_function_that_may_build_a_model_is_named(write: Callable[..., Path]) -> None:
    path = write(_net_and("def build():\n    return Net(8)\nclass Net(Net):\n    def __init__(self, w): ...\n"))
    assert f"{path} has the function build(), but neither its name" in _refusal(path)
    assert isinstance(load_source(f"{path}:build").model, nn.Module)


@pytest.mark.parametrize(
    ("rest", "names"),
    [
        ("first = Net()\nsecond = Net()", ["first", "second"]),
        ("def build_model():\n    return Net()\ndef build_net():\n    return Net()", ["build_model", "build_net"]),
        ("class Other(Net):\n    pass", ["Net", "Other"]),
    ],
)
def test_a_file_with_several_models_lists_them_and_how_to_choose(
    write: Callable[..., Path], rest: str, names: list[str]
) -> None:
    path = write(_net_and(rest))
    assert _refusal(path) == f"{path} holds several models ({', '.join(names)}); name one: {path}:{names[0]}"
    # The error's advice works for each name.
    for name in names:
        assert isinstance(load_source(f"{path}:{name}").model, nn.Module)


def test_the_error_of_an_unknown_name_names_the_closest_one(write: Callable[..., Path]) -> None:
    path = write(_net_and("def build_model():\n    return Net()"))
    assert _refusal(f"{path}:bild_model") == f"{path} has no name 'bild_model'; closest: 'build_model'"
    assert _refusal(f"{path}:zzz") == f"{path} has no name 'zzz'"


@pytest.mark.parametrize(
    ("rest", "name", "message"),
    [
        ("def build_model():\n    raise ValueError('no data')", "", ":build_model() fails: ValueError: no data"),
        ("def build_model():\n    return 3", "", ":build_model() returned a int; expected a torch.nn.Module"),
        ("def build_model():\n    return Net", "", ":build_model() returned a type; expected a torch.nn.Module"),
        ("def build(width):\n    return Net(width)", ":build", ":build(): missing a required argument: 'width'; arg"),
        ("settings = {'width': 3}", ":settings", ":settings is a dict; expected a torch.nn.Module, a class of one, or"),
        ("Net.__init__ = lambda self: 1 / 0", "", ":Net() fails: ZeroDivisionError: division by zero"),
    ],
)
def test_a_builder_that_gives_no_model_is_reported(
    write: Callable[..., Path], rest: str, name: str, message: str
) -> None:
    path = write(_net_and(rest))
    assert _refusal(f"{path}{name}").startswith(f"{path}{message}")


def test_a_source_that_is_no_python_file_is_reported(tmp_path: Path, write: Callable[..., Path]) -> None:
    assert _refusal(tmp_path / "gone.py") == f"{tmp_path}/gone.py: there is no file {tmp_path}/gone.py"
    assert _refusal(f"{tmp_path}/gone.py:Net") == f"{tmp_path}/gone.py:Net: there is no file {tmp_path}/gone.py"
    expected = "expected file.py, file.py:NAME, hf:DIRECTORY, timm:NAME, torchvision:NAME or an artifact's folder"
    assert _refusal(write("x", "weights.pt")) == (
        f"{tmp_path}/weights.pt: {expected} (the file exists, but is not a Python file)"
    )
    for name in ("resnet50", "", "huggingface:bert"):
        assert _refusal(name) == f"{name}: {expected}"
    assert _refusal(tmp_path) == f"{tmp_path}: {expected} (the folder has no roast.json)"
    (tmp_path / "config.json").write_text("{}")
    assert _refusal(tmp_path) == f"{tmp_path}: {expected} (the folder has a config.json: hf:{tmp_path})"
    (tmp_path / "folder.py").mkdir()
    assert "there is no file" in _refusal(tmp_path / "folder.py")


def test_a_file_without_its_suffix_or_nearly_of_that_name_is_named(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(_net_and("mine = Net(9)"), "model.py")
    monkeypatch.chdir(tmp_path)
    assert _refusal("model").endswith("or an artifact's folder; did you mean model.py?")
    assert _refusal("model:mine").endswith("; did you mean model.py:mine?")
    assert _refusal("modle.py") == "modle.py: there is no file modle.py; closest: 'model.py'"
    with pytest.raises(SourceError, match=r"expected file.py or file.py:NAME; did you mean model.py\?$"):
        load_data("model")
    with pytest.raises(SourceError, match=r"batches take no arguments; define a name for what you want, as model.py:"):
        load_data("model.py:mine,width=3")


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return transformers in offline mode: a test that uses the network fails."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    # huggingface_hub reads the variable when it is imported, and it may have been imported before.
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def refuse(*args: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return transformers


def _config(transformers: Any, **settings: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        **settings,
    )


@pytest.mark.parametrize("at", ["", "/config.json"])
def test_a_folder_with_a_config_gives_a_new_model(tmp_path: Path, transformers: Any, at: str) -> None:
    _config(transformers, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    source = load_source(f"hf:{tmp_path}{at}")
    assert type(source.model) is transformers.BertForMaskedLM
    assert source.model.config.vocab_size == 60
    assert source.model.bert.embeddings.word_embeddings.weight.std() > 0
    again = source.build()
    assert type(again) is transformers.BertForMaskedLM and again is not source.model
    assert set(source.example_inputs) <= {"input_ids", "attention_mask"}
    assert source.model(**source.example_inputs).logits.shape[-1] == 60


def test_dummy_inputs_outside_the_vocabulary_are_not_used(tmp_path: Path, transformers: Any) -> None:
    config = _config(transformers, architectures=["BertModel"])
    config.vocab_size = 5
    config.save_pretrained(tmp_path)
    source = load_source(f"hf:{tmp_path}")
    assert source.example_inputs is None or int(source.example_inputs["input_ids"].max()) < 5


def test_a_folder_with_weights_gives_those_weights(tmp_path: Path, transformers: Any) -> None:
    torch.manual_seed(5)
    saved = transformers.BertForMaskedLM(_config(transformers))
    saved.save_pretrained(tmp_path)
    source = load_source(f"hf:{tmp_path}")
    for model in (source.model, source.build()):
        assert type(model) is transformers.BertForMaskedLM
        found = model.state_dict()
        assert found.keys() == saved.state_dict().keys()
        for name, value in saved.state_dict().items():
            assert torch.equal(value, found[name]), name


def test_a_config_without_architectures_gives_the_base_model(tmp_path: Path, transformers: Any) -> None:
    _config(transformers).save_pretrained(tmp_path)
    assert type(load_source(f"hf:{tmp_path}").model) is transformers.BertModel


def test_the_error_names_an_architecture_that_transformers_lacks(tmp_path: Path, transformers: Any) -> None:
    _config(transformers, architectures=["BertForDreaming"]).save_pretrained(tmp_path)
    assert _refusal(f"hf:{tmp_path}") == (
        f"hf:{tmp_path}: the config names the architecture 'BertForDreaming', unknown to transformers"
    )


def test_a_folder_without_a_config_is_reported(tmp_path: Path, transformers: Any) -> None:
    for name in (tmp_path, tmp_path / "config.json"):
        assert _refusal(f"hf:{name}").startswith(f"hf:{name}: transformers finds no config there: ")
    (tmp_path / "config.json").write_text('{"hidden_size": 8}', encoding="utf-8")
    assert "Should have a `model_type` key" in _refusal(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "is not a valid JSON file" in _refusal(f"hf:{tmp_path}")


def test_weights_that_cannot_be_read_are_reported(tmp_path: Path, transformers: Any) -> None:
    _config(transformers, architectures=["BertModel"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    assert _refusal(f"hf:{tmp_path}").startswith(f"hf:{tmp_path}: BertModel cannot be built: ")


def test_a_hub_name_is_not_found_offline(transformers: Any) -> None:
    assert _refusal("hf:nobody/no-such-model").startswith("hf:nobody/no-such-model: transformers finds no config there")
    assert _refusal("hf:") == "hf:: expected hf:DIRECTORY, hf:CONFIG.json or hf:HUB-NAME"


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert _refusal("hf:anything") == (
        "hf:anything needs transformers; install it with: pip install 'roastify[integrations]'"
    )

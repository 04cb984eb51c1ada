"""The command line: every command, its exit code, and what it says when something is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import click.testing
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import roastify
from roastify.cli import main
from roastify.pool.plan import RoastPlan

GOOD = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 96)
            self.norm = nn.BatchNorm1d(96)
            self.last = nn.Linear(96, 64)

        def forward(self, x, scale: float = 1.0):
            return self.last(self.norm(self.first(x)).relu()) * scale

    torch.manual_seed(0)
    model = Net()
    # Not equal rows: a batch norm would make rounding errors of their differences.
    example_inputs = torch.linspace(-1, 1, 128).view(2, 64)
"""

# Its outputs differ if its layer's class is not exactly nn.Linear.
MINDING = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 96)

        def forward(self, x):
            y = self.first(x)
            if type(self.first) is nn.Linear:
                return y
            {otherwise}

    example_inputs = torch.ones(2, 64)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which has a `good.py`; environment variables for colours and widths are unset."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text(textwrap.dedent(GOOD), encoding="utf-8")
    return tmp_path


def _write(folder: Path, name: str, text: str, **values: str) -> None:
    (folder / name).write_text(textwrap.dedent(text).replace("{otherwise}", values.get("otherwise", "")), "utf-8")


def _run(*arguments: object, exit_code: int = 0) -> click.testing.Result:
    """Run a command in this process and check the exit code and that no traceback is shown."""
    result = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    return result


def _refusal(*arguments: object, exit_code: int) -> str:
    """Return what a refused command says: on standard error, in plain words."""
    result = _run(*arguments, exit_code=exit_code)
    assert result.stdout == ""
    return result.stderr


def _model(folder: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("good", folder / "good.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model


@pytest.mark.parametrize("command", [[], ["convert"]])
def test_the_default_command_converts_verifies_and_reports(folder: Path, command: list[str]) -> None:
    output = _run(*command, "good.py", "--ratio", 4).stdout
    plan = roastify.plan(_model(folder), 4)
    assert f"{plan.total_numel:,} → {plan.stored_numel:,} stored" in output
    assert f"{plan.achieved_ratio:.2f} (asked 4)" in output
    assert "same: (x, scale: float = 1.0)" in output
    assert "same structure, shape, dtype in eval and train:" in output and "output float32[2, 64] on cpu" in output
    start = 'the model\'s weights are not kept; init="project" (--init project), then recover, keeps them'
    assert f"random, to train from scratch: {start}" in " ".join(output.split())
    assert "nothing written; give -o FOLDER for the artifact" in output
    assert sorted(path.name for path in folder.iterdir()) == ["good.py"]


@pytest.mark.parametrize("arguments", [["good.py", "-o", "out"], ["-o", "out", "good.py"], ["--output=out", "good.py"]])
def test_the_artifact_that_is_written_loads(folder: Path, arguments: list[str]) -> None:
    output = _run(*arguments, "--ratio", 4, "--init", "project", "--seed", 3).stdout
    assert "written to out" in output
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["model.safetensors", "roast.json"]
    dense = _model(folder)
    loaded = roastify.load(folder / "out", dense)
    assert loaded.roast_pool.plan.seed == 3 and loaded.roast_pool.plan.ratio == 4
    expected = roastify.convert(dense, 4, init="project", seed=3)
    x = torch.randn(3, 64)
    assert torch.equal(expected(x), loaded(x))


def test_all_gives_a_row_for_every_tensor(folder: Path) -> None:
    for command in ("convert", "plan"):
        short = _run(command, "good.py", "--ratio", 4).stdout
        full = _run(command, "good.py", "--ratio", 4, "--all").stdout
        names = [name for name, _ in _model(folder).named_parameters()]
        assert all(name in full for name in names)
        assert not all(name in short for name in names)


def test_plan_shows_what_is_shared_and_kept_and_why(folder: Path) -> None:
    output = _run("plan", "good.py", "--ratio", 4, "--all").stdout
    for line in output.splitlines():
        if line.startswith(("first.weight", "last.weight")):
            assert " shared " in line and "eligible" in line
        if line.startswith("norm.bias"):
            assert " kept " in line and "vector" in line
    assert "signature" not in output


def test_plan_shows_folds_and_the_arithmetic_that_is_left(folder: Path) -> None:
    output = " ".join(_run("plan", "good.py", "--ratio", 4, "--fold", 4, "--all").stdout.split())
    assert "12,288 → 3,072 a token in 2 folded layers (fold 4; 2 folds of inputs)" in output
    assert "fold 4" in output
    values = json.loads(_run("plan", "good.py", "--ratio", 4, "--fold", 2, "--json").stdout)
    assert [fold["fold"] for fold in values["folds"]] == [2, 2]
    assert values["summary"]["dense_multiply_adds"] == 2 * values["summary"]["folded_multiply_adds"]
    assert "folds" not in json.loads(_run("plan", "good.py", "--ratio", 4, "--fold", "none", "--json").stdout)
    refused = _refusal("plan", "good.py", "--fold", "three", exit_code=2)
    assert "fold must be 'auto', 'none' or a power of 2 up to 16; found 'three'" in refused


def test_plan_as_json_is_the_plan(folder: Path) -> None:
    values = json.loads(_run("plan", "good.py", "--ratio", 4, "--json").stdout)
    model = _model(folder)
    assert RoastPlan.from_dict(values) == roastify.plan(model, 4)
    summary = values["summary"]
    numel = {tensor["name"]: _product(tensor["shape"]) for tensor in values["tensors"]}
    kept = {tensor["name"] for tensor in values["tensors"] if not tensor["shared"]}
    assert numel == {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert summary["total_parameters"] == sum(numel.values())
    assert summary["kept_parameters"] == sum(numel[name] for name in kept)
    assert summary["shared_parameters"] == summary["total_parameters"] - summary["kept_parameters"]
    assert summary["pool_parameters"] == values["num_slots"] * _product(values["tile"])
    assert summary["stored_parameters"] == summary["pool_parameters"] + summary["kept_parameters"]
    assert summary["achieved_ratio"] == summary["total_parameters"] / summary["stored_parameters"] >= 4
    assert summary["stored_bytes"] == 4 * summary["stored_parameters"]
    assert summary["total_bytes"] == 4 * summary["total_parameters"]


def _product(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def test_pretrained_weights_are_kept_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=60, **sizes, architectures=["BertModel"])
    config.save_pretrained(tmp_path / "config")
    transformers.BertModel(config).save_pretrained(tmp_path / "weights")
    for folder, options, start in (
        ("config", (), "random, to train from scratch"),
        ("weights", (), "fitted to the model's weights"),
        ("weights", ("--init", "match"), "random, to train from scratch"),
        ("config", ("--init", "project"), "fitted to the model's weights"),
    ):
        for command in ("convert", "plan"):
            output = _run(command, f"hf:{tmp_path / folder}", "--ratio", 2, *options).stdout
            assert start in " ".join(output.split()), (folder, options, command)


def test_check_passes_a_good_model(folder: Path) -> None:
    output = _run("check", "good.py", "--ratio", 4).stdout
    assert "same structure, shape, dtype in eval and train" in output
    assert output.splitlines()[-1].strip() == "ok: good.py at ratio 4"
    _write(folder, "bare.py", "from torch import nn\nmodel = nn.Linear(64, 64)\n")
    # If a model brings no inputs, they are guessed; if no guess fits, the message asks for them.
    guessed = _run("check", "bare.py", "--ratio", 2).stdout
    assert "float32[2, 64]" in guessed and "deepcopy, state dict, gradients" in guessed
    _write(
        folder,
        "odd.py",
        "from torch import nn\n"
        "class Odd(nn.Linear):\n"
        "    def forward(self, table): return super().forward(table['x'])\n"
        "model = Odd(64, 64)\n",
    )
    asked = _run("check", "odd.py", "--ratio", 2).stdout
    assert "not compared: the models were not run" in asked and "define `example_inputs` in odd.py" in asked


@pytest.mark.parametrize("command", [[], ["check"]])
@pytest.mark.parametrize(
    ("otherwise", "message"),
    [
        ("return y[:, :7]", "is float32[2, 7] on cpu; expected float32[2, 96] on cpu"),
        ("return y.double()", "is float64[2, 96] on cpu; expected float32[2, 96] on cpu"),
        ("return (y,)", "in eval mode the converted model returns a tuple; expected a Tensor"),
        (
            "raise TypeError('not a Linear')",
            "the converted model fails on the example inputs in eval mode: TypeError: not a Linear",
        ),
    ],
)
def test_a_conversion_that_changes_the_outputs_fails(
    folder: Path, command: list[str], otherwise: str, message: str
) -> None:
    _write(folder, "minding.py", MINDING, otherwise=otherwise)
    arguments = [*command, "minding.py", "--ratio", 2, *([] if command else ["-o", "out"])]
    result = _run(*arguments, exit_code=1)
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "ok:" not in result.stdout
    assert not (folder / "out").exists()


def test_bench_reports_both_models_and_writes_the_raw_result(folder: Path) -> None:
    arguments = ["--ratio", 4, "--device", "cpu", "--seconds", 0.01, "--json", "raw.json"]
    output = _run("bench", "good.py", *arguments, "--batch", 1, "--batch", 5, "--dtype", "bfloat16").stdout
    values = json.loads((folder / "raw.json").read_text())
    assert [case["batch"] for case in values["cases"]] == [1, 5]
    assert (values["ratio"], values["dtype"], values["train"], values["graph"]) == (4, "bfloat16", False, False)
    lines = output.splitlines()
    for case in values["cases"]:
        (row,) = (index for index, line in enumerate(lines) if line.startswith(f"{case['batch']} "))
        for line, side in zip(lines[row : row + 2], (case["dense"], case["converted"]), strict=True):
            time = side["time"]
            assert f"{time['median_ms']:.3f} ms" in line and f"{time['q1_ms']:.3f}–{time['q3_ms']:.3f}" in line
        assert f" {case['dense_over_converted']:.2f} " in lines[row + 2]
    plan = roastify.plan(_model(folder), 4)
    assert f"{plan.total_numel:,} → {plan.stored_numel:,} stored" in output
    assert "inference, bfloat16, called from Python" in output and "(allowed 0.05)" in output
    assert "gradient" not in output
    assert torch.__version__ in output and "peak memory" not in output
    assert lines[-1] == "written to raw.json"


def test_bench_takes_its_other_options(folder: Path) -> None:
    output = _run("bench", "good.py", "--ratio", 2, "--train", "--no-graph", "--device=cpu", "--seconds=0.01").stdout
    assert "forward and backward in train mode, the model's dtype, called from" in output
    assert "gradient" in output
    assert "as given  dense" in output and "above 1 the converted model is faster, below 1 slower" in output
    assert sorted(path.name for path in folder.iterdir()) == ["good.py"]


def test_bench_refuses_a_conversion_that_changes_the_outputs(folder: Path) -> None:
    _write(folder, "minding.py", MINDING, otherwise="return y + 1")
    arguments = ["bench", "minding.py", "--ratio", 2, "--device", "cpu", "--json", "raw.json"]
    assert "so nothing was timed" in _refusal(*arguments, exit_code=1)
    assert not (folder / "raw.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bare.py"], "error: timing needs example inputs, and bare.py has none; define example_inputs in the file.py"),
        (["bare.py"], "that returns one; the model takes for example float32[2, 64] on cpu"),
        (["good.py", "--device", "gpu"], "error: device must be cpu, cuda or cuda:N; found 'gpu'"),
        (["good.py", "--device", "cuda:99"], "error: device 'cuda:99' is not available"),
        (["good.py", "--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["good.py", "--batch", "0"], "error: a batch must be an integer of at least 1; found 0"),
        (["good.py", "--seconds", "-1"], "error: seconds must be a positive number; found -1.0"),
        (["good.py", "--json", "gone/raw.json"], "error: cannot write gone/raw.json: there is no folder gone; create"),
        (["good.py", "--json", "."], "Invalid value for '--json': File '.' is a directory"),
    ],
)
def test_bench_refuses_wrong_usage(folder: Path, arguments: list[str], message: str) -> None:
    _write(folder, "bare.py", "from torch import nn\nmodel = nn.Linear(64, 64)\n")
    assert message in _refusal("bench", *arguments, "--ratio", 2, exit_code=2)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_densify_refuses_the_names_of_pickles(folder: Path, suffix: str) -> None:
    refusal = _refusal("densify", "out", "-o", f"dense{suffix}", exit_code=2)
    assert refusal.strip().endswith(f"found the name dense{suffix}; name it dense.safetensors")
    assert not (folder / f"dense{suffix}").exists()


def test_densify_writes_a_state_dict_that_the_model_takes(folder: Path) -> None:
    _run("good.py", "--ratio", 4, "-o", "out")
    output = _run("densify", "out", "-o", "dense.safetensors").stdout
    state = load_file(folder / "dense.safetensors")
    assert output.strip() == f"{len(state)} tensors written to dense.safetensors"
    model = _model(folder)
    model.load_state_dict(state, strict=True)
    converted = roastify.load(folder / "out", _model(folder))
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), converted(x), rtol=1e-5, atol=1e-5)


def test_doctor_shows_versions_and_devices() -> None:
    output = _run("doctor").stdout
    assert "a panel of tile rows at a time" in output
    for name in ("python", "torch", "triton", "safetensors", "cpu", "cuda"):
        # A GPU's line carries its number: cuda:0.
        assert any(re.match(rf"{name}(:\d+)? ", line) for line in output.splitlines()), name
    versions = dict(line.split()[:2] for line in output.splitlines())
    assert versions["roastify"] == roastify.__version__ and versions["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(flag: str) -> None:
    output = _run(flag).stdout
    for name in ("convert", "plan", "check", "bench", "recover", "sweep", "show", "densify", "settings", "doctor"):
        assert f"\n  {name} " in output
        assert "Usage: " in _run(name, flag).stdout
    assert "--ratio" in _run("convert", flag).stdout


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_has_sentences_and_examples_that_parse(name: str) -> None:
    output = _run(*([name] if name else []), "--help").stdout
    assert max(map(len, output.splitlines())) <= 80
    begin, _, examples = output.partition("\nExamples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert all(line.startswith("# ") and line.endswith(".") for line in lines[::2])
    assert name in ("", "convert") or any(f"roastify {name}" in line for line in lines)
    for line in lines[1::2]:
        program, *arguments = shlex.split(line.partition(" > ")[0])
        assert program == "roastify"
        chosen = arguments[0] if arguments[0] in main.commands else "convert"
        # Parses the arguments, and refuses unknown options and wrong values; nothing runs.
        main.commands[chosen].make_context(chosen, [each for each in arguments if each != chosen])
    # The command's text, and what is said of each option, end as sentences do.
    for option in main.commands[name].params if name else main.params:
        if isinstance(option, click.Option):
            assert option.help and option.help[0].isupper() and option.help.endswith((".", ")")), option.name
    assert begin.split("\n\n")[1].rstrip().endswith(".")
    assert "..." not in begin.partition("Commands:")[2], "a command's line in the list is cut"


def test_version() -> None:
    for arguments in (["--version"], ["good.py", "--version"]):
        assert _run(*arguments).stdout == f"roastify, version {roastify.__version__}\n"


def test_without_arguments_the_help_is_shown() -> None:
    assert "Usage: " in _run(exit_code=2).output


@pytest.mark.parametrize(
    "arguments", [["--traceback", "good.py"], ["good.py", "--traceback"], ["plan", "good.py", "--traceback"]]
)
def test_traceback_shows_one(folder: Path, arguments: list[str]) -> None:
    with pytest.raises(roastify.RoastError, match="is unreachable"):
        _run(*arguments, "--ratio", 5000)


def test_a_config_file_is_read_and_options_override_it(folder: Path) -> None:
    _write(folder, "my.toml", 'ratio = 3.0\nseed = 8\nexclude = ["last"]\n')

    def plan(*arguments: object) -> dict[str, Any]:
        return json.loads(_run("plan", "good.py", "--json", *arguments).stdout)

    def shared(values: dict[str, Any]) -> set[str]:
        return {tensor["name"] for tensor in values["tensors"] if tensor["shared"]}

    default = plan("--ratio", 1.5)
    assert default["seed"] == 0 and shared(default) == {"first.weight", "last.weight"}
    # The kept parameters allow no higher ratio.
    values = plan("--config", "my.toml", "--ratio", 1.5)
    assert (values["ratio"], values["seed"]) == (1.5, 8) and shared(values) == {"first.weight"}
    values = plan("--config", "my.toml", "--exclude", "first", "--ratio", 1.25, "--seed", 9)
    assert (values["ratio"], values["seed"]) == (1.25, 9) and shared(values) == {"last.weight"}
    _write(folder, "other.toml", "ratio = 2.5")
    assert plan("--config", "other.toml")["ratio"] == 2.5
    assert "(asked 2.5)" in _run("--config", "other.toml", "good.py").stdout


def test_include_and_exclude_may_be_given_more_than_once(folder: Path) -> None:
    def shared(*arguments: object) -> list[str]:
        values = json.loads(_run("plan", "good.py", "--ratio", 1.2, "--json", *arguments).stdout)
        return [tensor["name"] for tensor in values["tensors"] if tensor["shared"]]

    assert shared("--include", "first") == ["first.weight"]
    assert shared("--include", "fir*", "--include", "re:la.t") == ["first.weight", "last.weight"]
    assert shared("--exclude", "first.weight") == ["last.weight"]
    assert shared("--include", "*", "--exclude", "last") == ["first.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good.py", "--ratio", "abc"], "Invalid value for '--ratio': 'abc' is not a number"),
        (["good.py", "--ratio", "0.5"], "error: ratio must be at least 1"),
        (["good.py", "--ratio", "nan"], "error: ratio must be a finite number of at least 1; found nan"),
        (["good.py", "--ratio", "-3"], "error: ratio must be at least 1"),
        (["good.py", "--ratio"], "Option '--ratio' requires an argument"),
        (["good.py", "--bogus"], "--bogus"),
        (["good.py", "--rati", "3"], "--ratio"),
        (["good.py", "other.py"], "unexpected extra argument (other.py)"),
        (["good.py", "--seed", "1.5"], "Invalid value for '--seed': '1.5' is not a valid integer"),
        (["good.py", "--init", "random"], "'random' is not one of 'auto', 'match', 'project'"),
        (
            ["good.py", "--config", "gone.toml"],
            "error: cannot read the config file gone.toml: No such file or directory",
        ),
        (["good.py", "--config", "."], "Invalid value for '--config': File '.' is a directory"),
        (["good.py", "--config", "wrong.toml"], "error: wrong.toml: unknown setting 'ratoi'; closest: 'ratio'"),
        (["good.py", "--include", "re:("], "error: include: 're:(' is not a valid regular expression"),
        (["good.py", "-o", "good.py"], "'good.py' is a file"),
        (["gone.py"], "error: gone.py: there is no file gone.py"),
        (["good.py:modle"], "error: good.py has no name 'modle'; closest: 'model'"),
        (["resnet50"], "error: resnet50: expected file.py, file.py:NAME, hf:DIRECTORY, timm:NAME, torchvision:NAME or"),
        (["timm:resnet50,10"], "'10' is not key=value; expected NAME,key=value,key=value"),
        (["plam", "good.py"], "no command 'plam'; closest: 'plan'; a model is named as file.py, file.py:NAME or hf:"),
        (["chek", "good.py"], "no command 'chek'; closest: 'check'"),
        (["plan"], "Missing argument 'SOURCE'"),
        (["densify", "out"], "Missing option '-o'"),
        (["doctor", "good.py"], "unexpected extra argument (good.py)"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(folder: Path, arguments: list[str], message: str) -> None:
    _write(folder, "wrong.toml", "ratoi = 3\n")
    before = sorted(folder.iterdir())
    assert message in _refusal(*arguments, exit_code=2)
    assert sorted(folder.iterdir()) == before


def test_a_file_without_its_suffix_is_no_misspelled_command(folder: Path) -> None:
    (folder / "good.py").rename(folder / "benches.py")
    assert "; did you mean benches.py?" in _refusal("benches", exit_code=2)
    assert "shared" in _run("plan", "benches.py:Net", "--ratio", 2).stdout


@pytest.mark.parametrize("command", [[], ["plan"], ["check"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good.py", "--ratio", "5000"], "error: ratio 5000 is unreachable: it allows 2 stored parameters of 12,640"),
        (["good.py", "--exclude", "*"], "error: no weight of the model is eligible for sharing"),
        (["good.py", "--include", "frist"], "error: include pattern 'frist' matched no parameter"),
        (["nan.py"], "error: weight holds NaN or infinite values; repair the weights or exclude the tensor"),
    ],
)
def test_an_impossible_conversion_exits_with_1(
    folder: Path, command: list[str], arguments: list[str], message: str
) -> None:
    _write(
        folder,
        "nan.py",
        "import torch\nmodel = torch.nn.Linear(64, 64)\ntorch.nn.init.constant_(model.weight[0], float('nan'))\n",
    )
    assert message in _refusal(*command, *arguments, exit_code=1)


def test_a_folder_that_is_no_artifact_exits_with_1(folder: Path) -> None:
    assert "error: there is no artifact folder gone" in _refusal("densify", "gone", "-o", "d.safetensors", exit_code=1)
    (folder / "empty").mkdir()
    refusal = _refusal("densify", "empty", "-o", "d.safetensors", exit_code=1)
    assert "error: empty is not a roastify artifact: roast.json is missing" in refusal
    assert not (folder / "d.safetensors").exists()


def test_example_inputs_that_do_not_fit_are_reported(folder: Path) -> None:
    _write(folder, "wrong.py", textwrap.dedent(GOOD) + "example_inputs = torch.ones(2, 63)\n")
    refusal = _refusal("check", "wrong.py", "--ratio", 2, exit_code=1)
    assert refusal.startswith("error: the original model fails on the example inputs in eval mode: RuntimeError: mat1")


def test_a_folder_with_brackets_in_its_name_is_shown_as_it_is(folder: Path) -> None:
    assert "written to out[v2]" in _run("good.py", "--ratio", 2, "-o", "out[v2]").stdout


def test_an_artifact_in_the_place_of_another_is_said(folder: Path) -> None:
    assert "written to out\n" in _run("good.py", "--ratio", 2, "-o", "out").stdout
    assert "written to out in the place of the artifact that" in _run("good.py", "--ratio", 4, "-o", "out").stdout


def test_a_long_name_of_a_folder_is_shown_on_one_line(folder: Path) -> None:
    name = "a" * 60 + "/" + "b" * 60
    assert f"written to {name}\n" in _run("good.py", "--ratio", 2, "-o", name).stdout


def test_a_dense_file_in_a_folder_that_is_missing_is_reported(folder: Path) -> None:
    _run("good.py", "--ratio", 4, "-o", "out")
    assert "cannot write" in _refusal("densify", "out", "-o", "gone/dense.safetensors", exit_code=1)


def test_a_script_that_exits_is_reported(folder: Path) -> None:
    _write(folder, "script.py", "import sys\nsys.exit(3)\n")
    assert "error: " in _refusal("script.py", exit_code=2)


@pytest.fixture
def script(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the installed script, its output piped."""
    path = Path(sys.executable).with_name("roastify")
    assert path.is_file(), "roastify is not installed in this environment"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # Readline, which pytest imports, sets COLUMNS for children behind the back of os.environ.
        settings: dict[str, Any] = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 120}
        return subprocess.run([str(path), *arguments], cwd=folder, env=dict(os.environ), **settings)

    return run


def test_the_installed_script_converts(folder: Path, script: Callable[..., Any]) -> None:
    done = script("good.py", "--ratio", "4", "-o", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "same structure, shape, dtype in eval and train:" in done.stdout
    assert "output float32[2, 64] on cpu" in done.stdout
    roastify.load(folder / "out", _model(folder))


@pytest.mark.long
def test_the_installed_script_times_compiled_models(folder: Path, script: Callable[..., Any]) -> None:
    done = script("bench", "good.py", "--ratio", "4", "--compile", "--device", "cpu", "--json", "raw.json")
    assert done.returncode == 0, done.stderr
    values = json.loads((folder / "raw.json").read_text())
    assert values["compile"] and values["cases"][0]["agreement"]["error"] < 1e-5
    assert "torch.compile" in done.stdout and "\x1b" not in done.stdout


def test_the_installed_script_fails_without_a_traceback(folder: Path, script: Callable[..., Any]) -> None:
    _write(folder, "minding.py", MINDING, otherwise="return y.double()")
    done = script("check", "minding.py", "--ratio", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: in eval mode output ") and done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr


@pytest.mark.long
def test_the_installed_script_refuses_wrong_usage(script: Callable[..., Any]) -> None:
    done = script("good.py", "--ratio", "0.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ratio must be at least 1") and "Traceback" not in done.stderr


@pytest.mark.long
def test_the_installed_script_shows_a_traceback_when_asked(script: Callable[..., Any]) -> None:
    done = script("--traceback", "good.py", "--ratio", "5000")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "PlanError: ratio 5000 is unreachable" in done.stderr


@pytest.mark.long
def test_the_installed_script_writes_json_for_a_pipe(folder: Path, script: Callable[..., Any]) -> None:
    assert os.environ.get("FORCE_COLOR") is None
    done = script("plan", "good.py", "--ratio", "4", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert RoastPlan.from_dict(json.loads(done.stdout)) == roastify.plan(_model(folder), 4)


DATA = """
    import torch

    class Batches:
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            return iter([torch.randn(8, 64, generator=generator) for _ in range(4)])

    data = Batches()

    def labelled(epoch):
        for x in data:
            yield {"inputs": x, "target": torch.zeros(8, 64)}

    def evaluate(model):
        return round(float(model(torch.ones(2, 64)).mean()), 4)
"""


MORE = """
    def inputs(batch):
        return batch["inputs"]

    def loss_fn(outputs, batch):
        return (outputs - batch["target"]).square().mean()
"""


@pytest.mark.filterwarnings("ignore:the teacher's batch norm", "ignore:recovery has made the student worse")
def test_recover_converts_trains_and_writes(folder: Path) -> None:
    _write(folder, "data.py", DATA)
    common = ("good.py", "--ratio", 4, "--data", "data.py", "--steps", 6, "--save-every", 3, "--device", "cpu")
    common += ("--log-every", 2)
    output = _run("recover", *common, "-o", "out", "--json", "report.json").stdout
    for expected in ("as it came", "layers aligned", "after 6 steps", "evaluated", "written to out"):
        assert expected in output
    report = json.loads((folder / "report.json").read_text())
    assert [point["step"] for point in report["losses"]] == [2, 4, 6]
    assert report["steps"] == 6 and report["after"]["error"] < report["before"]["error"]
    recovered = roastify.load("out", model=_model(folder)).eval()
    with torch.no_grad():
        assert report["evaluations"] == [[6, round(float(recovered(torch.ones(2, 64)).mean()), 4)]]
    assert "resumed at step 6" in _run("recover", *common, "-o", "out", "--resume").stdout
    assert "holds a checkpoint of a recovery; resume it" in _refusal("recover", *common, "-o", "out", exit_code=2)


@pytest.mark.filterwarnings("ignore:the teacher's batch norm", "ignore:recovery has made the student worse")
def test_recover_continues_from_an_artifact(folder: Path) -> None:
    _write(folder, "data.py", DATA + MORE)
    _run("good.py", "--ratio", 4, "--init", "project", "-o", "first")
    arguments = ("recover", "good.py", "--artifact", "first", "--data", "data.py:labelled", "--device", "cpu")
    output = _run(*arguments, "-o", "second", "--steps", 3, "--features", "first", "--logits", "output").stdout
    assert "task" in output and "1 module; logits: output" in output
    assert "aligned" not in output, "alignment would undo what was trained"
    assert "aligned" in _run(*arguments, "-o", "third", "--steps", 1, "--align", 2).stdout
    assert RoastPlan.from_dict(json.loads((folder / "second" / "roast.json").read_text())["plan"]).ratio == 4
    assert "--ratio cannot be given with first, which is converted already" in _refusal(
        *arguments, "-o", "x", "--ratio", 4, exit_code=2
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("--data", "nowhere.py"), 2, "there is no Python file nowhere.py; expected file.py or file.py:NAME"),
        (("--data", "data.py:dat"), 2, "data.py has no name 'dat'; closest: 'data'"),
        (("--data", "broken.py"), 2, "broken.py does not import: ZeroDivisionError"),
        (("--data", "wrong.py"), 1, "the teacher fails on the first batch, called with float32[8, 3]"),
        (("--data", "data.py", "--steps", "-1"), 2, "steps must be an integer of at least 0; found -1"),
        (
            ("--data", "data.py", "--features", "frist"),
            2,
            "features pattern 'frist' matched no module; closest: 'first'",
        ),
        (("--data", "data.py", "--artifact", "nowhere"), 1, "there is no artifact folder nowhere"),
        (("--data", "data.py", "--device", "tpu"), 2, "device must be cpu, cuda or cuda:N; found 'tpu'"),
    ],
)
def test_recover_refuses_wrong_usage(folder: Path, arguments: tuple[str, ...], exit_code: int, message: str) -> None:
    _write(folder, "data.py", DATA)
    _write(folder, "broken.py", "1 / 0")
    _write(folder, "wrong.py", "import torch\ndata = [torch.ones(8, 3)]")
    device = () if "--device" in arguments else ("--device", "cpu")
    assert message in _refusal("recover", "good.py", "-o", "out", *device, *arguments, exit_code=exit_code)
    assert not (folder / "out").exists()

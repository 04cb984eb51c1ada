"""Results as people look at them: printed, in a notebook, in a narrow terminal and in a pipe."""

from __future__ import annotations

import html
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from torch import nn

import roastify
from roastify.cli import main
from roastify.report import print_result
from roastify.text_layout import shortened

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        layers = {"query_projection": nn.Linear(64, 64), "key_projection": nn.Linear(64, 64)}
        self.self_attention = nn.ModuleDict(layers)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        for layer in self.self_attention.values():
            x = layer(x)
        return self.norm(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_layers = nn.ModuleList([Block(), Block()])
        self.classification_head = nn.Linear(64, 64)

    def forward(self, x):
        for layer in self.encoder_layers:
            x = layer(x)
        return self.classification_head(x)

torch.manual_seed(0)
model = Net()
example_inputs = torch.linspace(-1, 1, 128).view(2, 64)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return the model of a `net.py` in the current folder, of which no environment variable sets the width."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    values: dict[str, nn.Module] = {}
    exec(compile(MODEL, "net.py", "exec"), values)
    return values["model"]


def _run(*arguments: str, exit_code: int = 0) -> str:
    result = click.testing.CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.stdout if exit_code == 0 else result.stderr


def test_a_plan_prints_as_the_command_line_shows_it(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = roastify.plan(net, 3)
    for columns in ("", "80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        assert f"{plan}\n" == _run("plan", "net.py", "--ratio", "3")
    numbers = f"{plan.total_numel:,} → {plan.stored_numel:,} parameters, ratio {plan.achieved_ratio:.2f} (asked 3)"
    assert repr(plan) == f"<RoastPlan: Net, {numbers}>"


def test_every_result_is_a_table_and_html(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-1, 1, 128).view(2, 64)
    student = roastify.convert(net, 3, init="project")
    plan = student.roast_pool.plan
    verified = roastify.verify(net, student, x)
    benched = roastify.bench(net, 3, example_inputs=x, device="cpu", seconds=0.01)
    recovered = roastify.recover(student, net, [x, x], steps=2, align=0)
    for result, line in (
        (verified, "<VerifyReport: same signature, same outputs in eval and train, deepcopy ok, state dict ok, "),
        (benched, f"<BenchReport: Net at ratio {plan.achieved_ratio:.2f} on cpu, time dense ÷ converted "),
        (recovered, "<RecoveryReport: 2 steps in "),
    ):
        assert repr(result).startswith(line) and len(repr(result)) < 120, repr(result)
    swept = roastify.sweep(net, [x, x], [3], steps=1, align=0, seconds=0.01)
    for result, words, heading in (
        (plan, ("eligible", "a tensor's scale", "1 kB: 1000 bytes", "(asked 3)"), "tensor "),
        (verified, ("same: (x)", "deepcopy, state dict, gradients"), ""),
        (benched, ("dense ÷ converted", "of one call in milliseconds", "1 kB: 1000 bytes"), "batch "),
        (recovered, ("as it came", "relative to their variance", "after 2 steps"), "student "),
        (swept, ("recovered for 1 steps", "multiply-adds", "above 1 the converted model is faster"), " ratio "),
    ):
        monkeypatch.delenv("COLUMNS", raising=False)
        text, page = str(result), result._repr_html_()
        # IPython asks this of a class that has a `__repr__` of its own.
        assert "_repr_pretty_" in vars(type(result))
        assert all(word in text for word in words), text
        assert "\x1b" not in text and not re.search(" $", text, re.MULTILINE)
        assert page.startswith("<pre ") and page.count("<pre") == page.count("</pre>") == 1
        shown = html.unescape(re.sub("<[^>]*>", "", page))
        assert [line.rstrip() for line in shown.splitlines()] == text.splitlines()
        # The summary comes first, then the table, and below it what its columns mean.
        if heading:
            parts = text.split("\n\n")
            assert len(parts) == 3 and f" {parts[1]}".startswith(f" {heading.strip()} "), text
        monkeypatch.setenv("COLUMNS", "80")
        assert max(map(cell_len, str(result).splitlines())) <= 80


def test_only_a_terminal_gets_colours(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(**settings: str) -> str:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR", "CLICOLOR_FORCE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", **settings}.items():
            monkeypatch.setenv(name, value)
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        print_result(plan)
        return terminal.getvalue()

    plan = roastify.plan(net, 3)
    coloured, plain = shown(), shown(NO_COLOR="1")
    assert "\x1b[32mshared" in coloured
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain) and "shared" in plain
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in coloured.splitlines()]
    assert lines == str(plan).splitlines()
    assert "\x1b" not in shown(TERM="dumb")


def test_html_shows_the_names_of_others_as_text() -> None:
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>", nn.Linear(64, 64))
    page = roastify.plan(model, 2)._repr_html_()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_at_80_columns_every_name_ends_as_it_does_and_nothing_is_broken(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plan = roastify.plan(net, 3)
    for options, tensors in (("--all",), [*plan.shared, *plan.kept]), ((), None):
        text = _run("plan", "net.py", "--ratio", "3", *options)
        assert max(map(cell_len, text.splitlines())) <= 80
        _, table, legend = text.split("\n\n")
        heading, *rows = table.splitlines()
        # A line for each tensor, or group of tensors: none has the rest of another.
        assert heading.startswith("tensor ") and all(re.search(r" (shared|kept) +\d+\.\d% ", row) for row in rows)
        assert "not shown" in legend and "whole" not in legend
        if tensors is None:
            assert rows[0].split()[1] == "2", "the number of tensors in the group"
            continue
        names = [row.split()[0] for row in rows]
        assert len(set(names)) == len(names), "shortened names tell tensors apart"
        for name, tensor in zip(names, tensors, strict=True):
            begin, end = name.split("…")[0], name.split("…")[-1]
            assert tensor.name.startswith(begin) and tensor.name.endswith(end)
            assert end.endswith(tensor.name.rpartition(".")[2])


def test_a_pipe_is_not_cut(net: nn.Module) -> None:
    lines = _run("plan", "net.py", "--ratio", "3", "--all").splitlines()
    for tensor in roastify.plan(net, 3).tensors:
        (line,) = [line for line in lines if line.split()[:1] == [tensor.name]]
        assert line.endswith(tensor.reason) and "…" not in line


_PARTS = st.lists(st.text("abc_度", min_size=1, max_size=9) | st.just("12") | st.just("*"), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(_PARTS.map(".".join), st.integers(4, 40))
def test_a_shortened_name_fits_and_keeps_its_ends_and_numbers(name: str, width: int) -> None:
    short = shortened(name, width)
    assert cell_len(short) <= width
    if cell_len(name) <= width:
        assert short == name
        return
    begin, *_, end = short.split("…")
    assert "…" in short and name.startswith(begin) and name.endswith(end) and end
    *middle, last = name.split(".")[1:] or [""]
    if middle and cell_len("".join(f"….{part}" for part in (*middle, last) if part in ("12", "*", last))) <= width:
        assert end.endswith("." + last)
        assert [part for part in short.split(".")[1:] if part.strip("…") in ("12", "*")] or not {"12", "*"} & {*middle}


def test_every_command_writes_what_it_shows_as_json(net: nn.Module) -> None:
    Path("data.py").write_text("import torch\ndata = [torch.linspace(-1, 1, 128).view(2, 64)] * 2\n")
    convert = ("convert", "net.py", "--ratio", "3", "-o", "out")
    sweep = ("sweep", "net.py", "--init", "project", "--data", "data.py", "--ratios", "3", "--steps", "1")
    sweep += ("--align", "0", "--seconds", "0.01")
    plan = json.loads(json.dumps(roastify.plan(net, 3).to_dict()))
    calls: dict[tuple[str, ...], dict[str, Any]] = {
        convert: {"artifact": "out", "plan": plan},
        ("plan", "net.py", "--ratio", "3"): plan,
        ("check", "net.py", "--ratio", "3"): {"source": "net.py", "ratio": 3.0},
        ("show", "out"): {"folder": "out", "plans": [plan]},
        ("densify", "out", "-o", "dense.safetensors"): {"output": "dense.safetensors", "tensors": 14},
        ("bench", "net.py", "--ratio", "3", "--seconds", "0.01", "--device", "cpu"): {"ratio": 3.0, "train": False},
        ("recover", "net.py", "--data", "data.py", "-o", "again", "--steps", "1", "--align", "0"): {"steps": 1},
        sweep: {"steps": 1},
        ("settings",): roastify.RoastConfig().to_dict(),
        ("doctor",): {"roastify": roastify.__version__},
    }
    assert {call[0] for call in calls} == set(main.commands)
    # Alone on standard output, or in a file and beside the tables.
    forms: list[tuple[str, ...]] = [("result.json",), (), ("-",)]
    for number, (call, expected) in enumerate(calls.items()):
        form = forms[number % 3]
        text = _run(*call, "--json", *form)
        if form == ("result.json",):
            assert text.splitlines()[-1] == "written to result.json"
            text = Path("result.json").read_text()
        values = json.loads(text)
        assert {key: values[key] for key in expected} == expected, call
        if call == convert:
            assert values["verification"]["modes"] == ["eval", "train"]
    # The file that is read is not written.
    assert "it belongs to net.py, which is read" in _run("plan", "net.py", "--json", "net.py", exit_code=2)
    assert Path("net.py").read_text() == MODEL


def test_every_setting_is_a_keyword(net: nn.Module) -> None:
    values: dict[str, Any] = {
        "ratio": 2,
        "init": "project",
        "seed": 3,
        "include": ["encoder_layers"],
        "exclude": ["classification_head"],
        "min_numel": 5000,
        "share": "all",
        "tile": "8x8",
        "sign": "tile",
        "mapping": "roast",
        "sharing": "local",
        "precondition": False,
        "kernel_basis": "none",
        "fold": 2,
        "fold_hashes": 1,
        "learned_scales": True,
        "modules": {"encoder_layers": {"fold": 2}},
    }
    default = roastify.RoastConfig(ratio=2.5)
    assert values.keys() == default.to_dict().keys()
    for name, value in values.items():
        # Settings of folds show in a plan with folds.
        folded = default.replace(fold=2) if name.startswith(("fold_", "learned")) else default
        expected = roastify.plan(net, config=folded.replace(**{name: value}))
        assert roastify.plan(net, config=folded, **{name: value}) == expected, name
        if name not in ("init", "kernel_basis"):
            assert expected != roastify.plan(net, config=folded), name
    x = torch.linspace(-1, 1, 128).view(2, 64)
    converted = roastify.convert(net, 2, fold=2, tile="8x8", share=None)
    assert converted.roast_pool.plan == roastify.plan(net, 2, fold=2, tile="8x8")
    assert roastify.bench(net, 2, fold=2, example_inputs=x, device="cpu", seconds=0.01).ratio == 2
    with pytest.raises(roastify.ConfigError, match="fold cannot be given for a model that is converted already"):
        roastify.bench(converted, fold=2, example_inputs=x, device="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: roastify.convert(net, 2, fodl=2), "convert has no argument or setting 'fodl'; closest: 'fold'"),
        (lambda net: roastify.convert(net, 2, inplce=True), "no argument or setting 'inplce'; closest: 'inplace'"),
        (lambda net: roastify.plan(net, 2, tiles="8x8"), "plan has no argument or setting 'tiles'; closest: 'tile'"),
        (lambda net: roastify.bench(net, 2, example_inputs=1, sgn="row"), "bench has no .*'sgn'; closest: 'sign'"),
        (lambda net: roastify.save("out", net), r'found Net. The call is roastify.save\(model, "out/"\)'),
        (lambda net: roastify.load(net, "out"), r'found Net. The call is roastify.load\("out/", model\)'),
        (lambda net: roastify.densify("out"), "expected a torch.nn.Module; found str"),
        (lambda net: roastify.verify("a", "b"), "expected a torch.nn.Module; found str"),
        (lambda net: roastify.verify(net, torch.ones(2)), "expected a torch.nn.Module; found Tensor"),
        (lambda net: roastify.convert(2, net), "ratio must be a finite number of at least 1; found Net"),
        (lambda net: roastify.convert(net, "50x"), "ratio must be a finite number of at least 1; found '50x'"),
    ],
)
def test_what_was_meant_is_said_in_one_line(net: nn.Module, call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(roastify.RoastError, match=message) as caught:
        call(net)
    assert "\n" not in str(caught.value)


def test_a_ratio_may_be_written_with_an_x(net: nn.Module) -> None:
    expected = _run("plan", "net.py", "--ratio", "3")
    assert _run("plan", "net.py", "--ratio", "3x") == _run("plan", "net.py", "--ratio", "3×") == expected
    said = _run("plan", "net.py", "--ratio", "1/3", exit_code=2)
    assert "'1/3' is not a number; expected one as 50, which stores a fiftieth of the parameters" in said


def test_shells_complete_commands_options_and_files(net: nn.Module) -> None:
    def complete(*words: str) -> list[str]:
        settings = {"_ROASTIFY_COMPLETE": "bash_complete", "COMP_CWORD": str(len(words))}
        settings["COMP_WORDS"] = " ".join(["roastify", *words])
        result = click.testing.CliRunner().invoke(main, prog_name="roastify", env=settings)
        assert result.exit_code == 0 and not result.stderr, result.output
        return result.stdout.splitlines()

    assert complete("pl") == ["plain,plan"]
    assert complete("plan", "--rat") == ["plain,--ratio"]
    # Without a command, it is `convert`.
    assert complete("net.py", "--sig") == ["plain,--signature-only"]
    assert complete("plan", "ne") == complete("show", "ne") == complete("ne") == ["file,ne"]
    assert complete("plann", "") == [""], "a misspelling is no error while a shell asks"

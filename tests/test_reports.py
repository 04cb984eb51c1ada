"""Results as people look at them: printed, in a notebook, in a narrow terminal and in a pipe."""

from __future__ import annotations

import html
import re
from pathlib import Path

import click.testing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from torch import nn

import roastify
from roastify.cli import main
from roastify.report import shortened

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention = nn.ModuleDict({"query_projection": nn.Linear(64, 64), "key_projection": nn.Linear(64, 64)})
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


def _run(*arguments: str) -> str:
    result = click.testing.CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_plan_prints_as_the_command_line_shows_it(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = roastify.plan(net, 3)
    for columns in ("", "80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        assert f"{plan}\n" == _run("plan", "net.py", "--ratio", "3")
    assert repr(plan).startswith("RoastPlan(model='Net', ratio=3.0"), "repr still holds every value"


def test_every_result_is_a_table_and_html(net: nn.Module) -> None:
    x = torch.linspace(-1, 1, 128).view(2, 64)
    student = roastify.convert(net, 3, init="project")
    plan = student.roast_pool.plan
    verified = roastify.verify(net, student, x)
    benched = roastify.bench(net, 3, example_inputs=x, device="cpu", seconds=0.01)
    recovered = roastify.recover(student, net, [x, x], steps=2, align=0)
    for result, words in (
        (plan, ("eligible", "λ: a tensor's scale", "1 kB: 1000 bytes", "(asked 3)")),
        (verified, ("same: (x)", "deepcopy, state dict, gradients")),
        (benched, ("dense ÷ converted", "of one call in milliseconds", "1 kB is 1000 bytes")),
        (recovered, ("as it came", "relative to their variance", "after 2 steps")),
    ):
        text, page = str(result), result._repr_html_()
        assert all(word in text for word in words), text
        assert "\x1b" not in text and not re.search(" $", text, re.MULTILINE)
        assert page.startswith("<pre ") and page.count("<pre") == page.count("</pre>") == 1
        shown = html.unescape(re.sub("<[^>]*>", "", page))
        assert [line.rstrip() for line in shown.splitlines()] == text.splitlines()


def test_html_shows_the_names_of_others_as_text() -> None:
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>", nn.Linear(64, 64))
    page = roastify.plan(model, 2)._repr_html_()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_at_80_columns_every_name_ends_as_it_does_and_nothing_is_broken(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = _run("plan", "net.py", "--ratio", "3", "--all").splitlines()
    assert max(map(cell_len, lines)) <= 80
    table = lines[: lines.index("")]
    rows = [line for line in table if " shared " in line or " kept " in line]
    plan = roastify.plan(net, 3)
    for row, tensor in zip(rows, [*plan.shared, *plan.kept], strict=True):
        begin, mark, end = row.split()[0].partition("…")
        assert tensor.name.startswith(begin) and tensor.name.endswith(end if mark else begin)
        assert (end if mark else begin).endswith(tensor.name.rpartition(".")[2])
    # The other lines of a table's row hold whole words: none is the rest of a name.
    words = {"of", "vector", "LayerNorm", "Linear"}
    rest = [line for line in table if line not in rows and line.startswith(" ")]
    assert rest and {word for line in rest for word in line.split()} <= words, rest


def test_a_pipe_is_not_cut(net: nn.Module) -> None:
    lines = _run("plan", "net.py", "--ratio", "3", "--all").splitlines()
    for tensor in roastify.plan(net, 3).tensors:
        (line,) = [line for line in lines if line.split()[:1] == [tensor.name]]
        assert line.endswith(tensor.reason) and "…" not in line


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("abc_度", min_size=1, max_size=9), min_size=1, max_size=6).map(".".join), st.integers(4, 40))
def test_a_shortened_name_fits_and_keeps_its_ends(name: str, width: int) -> None:
    short = shortened(name, width)
    assert cell_len(short) <= width
    if cell_len(name) <= width:
        assert short == name
        return
    begin, mark, end = short.partition("…")
    assert mark and name.startswith(begin) and name.endswith(end) and end
    last = name.rpartition(".")[2]
    if cell_len(last) + 2 <= width and last != name:
        assert end.endswith("." + last)

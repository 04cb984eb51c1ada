"""Sweeps over ratios: what is measured at each, which ratio is named, and what is refused before work begins."""

from __future__ import annotations

import importlib.util
import json
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from torch import Tensor, nn

import roastify
from roastify.cli import main
from roastify.errors import ConfigError, ConversionError, OutputMismatch, PlanError
from roastify.ratio_sweep import SweepReport, SweepRow

MODEL = """
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
    for _ in range(30):
        model(torch.randn(64, 32))
    model.eval()
    example_inputs = torch.linspace(-1, 1, 256).view(8, 32)
"""

DATA = """
    import torch

    data = list(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).split(16))
"""

TASK = """
    def loss_fn(outputs, batch):
        return (outputs - batch).square().mean()

    def evaluate(model):
        return {"error": float(loss_fn(model(data[0]), data[0])), "rows": 16}
"""

QUICK: dict[str, Any] = {"steps": 2, "seconds": 0.01, "align": 2}
FLAGS = ("--data", "data.py", "--steps", "2", "--seconds", "0.01", "--align", "2", "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which has a model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL), encoding="utf-8")
    (tmp_path / "data.py").write_text(textwrap.dedent(DATA), encoding="utf-8")
    (tmp_path / "task.py").write_text(textwrap.dedent(DATA + TASK), encoding="utf-8")
    return tmp_path


def _sweep(*arguments: str, exit_code: int = 0) -> click.testing.Result:
    """Run `roastify sweep model.py` with some arguments; a later one replaces an earlier one."""
    result = click.testing.CliRunner().invoke(main, ["sweep", "model.py", *FLAGS, *arguments])
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    return result


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pretrained_model_is_recovered_at_each_ratio_and_left_as_it_was(folder: Path) -> None:
    model, data = _module("model").model, _module("data").data
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = roastify.sweep(model, data, (4, 2), **QUICK)
    assert [row.ratio for row in report.rows] == [2, 4] and report.how == "recovered"
    for row in report.rows:
        planned = roastify.plan(model, row.ratio, init="project")
        assert (row.parameters, row.bytes) == (planned.stored_numel, planned.stored_nbytes)
        assert row.ms > 0 and row.dense_over_converted > 0
        # The first batch is timed: 16 rows, each multiplied with both weights.
        assert row.multiply_adds == report.dense.multiply_adds == 16 * 2 * 64 * 32
    alone = roastify.convert(model, 4, init="project")
    assert report.rows[1].quality == roastify.recover(alone, model, data, 2, align=2).after.error
    assert report.dense.parameters == planned.total_numel and report.dense.quality == 0
    assert report.quality == "error of outputs" and report.lower_is_better
    assert repr(report).startswith(f"<SweepReport: {type(model).__name__}, recovered for 2 steps: error of outputs ")
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["quality"] == report.rows[1].quality
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_from_scratch_the_dense_model_trains_as_in_a_loop_of_its_own(folder: Path) -> None:
    """A model without sharing is the dense model: AdamW with the same rates on the same batches gives its weights."""
    task = _module("task")
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    common = {"schedule": "constant", "warmup": 0.0, "clip": None, "lr": 1e-2}
    report = roastify.sweep(
        model, task.data, [2], init="match", evaluate=lambda model: task.evaluate(model)["error"],
        loss_fn=task.loss_fn, lower_is_better=True, steps=3, seconds=0.01, **common,
    )  # fmt: skip
    assert report.how == "trained"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in task.data[:3]:
        optimizer.zero_grad()
        task.loss_fn(model(batch), batch).backward()
        optimizer.step()
    with torch.no_grad():
        assert report.dense.quality == pytest.approx(task.evaluate(model)["error"], rel=1e-4)
    assert report.rows[0].quality != report.dense.quality


def test_training_from_scratch_warns_of_nothing_that_a_teacher_would_need() -> None:
    """Without a teacher, its batch norms and the student's distance from it do not matter."""
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 32))
    student = roastify.convert(model, 2, init="match")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roastify.recover(
            student, model, [torch.randn(16, 32)], 3, align=0, lr=0.1, output_weight=0, feature_weight=0,
            loss_fn=lambda outputs, batch: (outputs - 3).square().mean(),
        )  # fmt: skip


def _row(ratio: float, quality: float) -> SweepRow:
    return SweepRow(ratio, 1, 4, 1, quality, None, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("lower", "part", "qualities", "best"),
    [
        (False, 0.01, {3: 0.91, 10: 0.892, 30: 0.88}, 10),
        (False, 0.01, {3: 0.91, 10: float("nan"), 30: 0.95}, 30),
        (False, 0.001, {3: 0.89, 10: 0.88}, None),
        (True, 0.1, {3: 0.8, 10: 0.98, 30: 1.0}, 10),
        (True, 0, {3: float("nan")}, None),
    ],
)
def test_the_highest_ratio_within_a_part_is_named(
    lower: bool, part: float, qualities: dict[float, float], best: float | None
) -> None:
    rows = tuple(_row(ratio, quality) for ratio, quality in qualities.items())
    report = SweepReport("Net", "recovered", 1, "evaluate", lower, _row(1, 0.9), rows, {})
    found = report.within(part)
    assert (found and found.ratio) == best


def test_a_shuffling_loader_gives_every_ratio_the_same_batches() -> None:
    drawn: list[list[float]] = []

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                drawn[-1].append(float(x[0, 0].detach()))
            return self.layer(x)

    def evaluate(model: nn.Module) -> float:
        drawn.append([])
        return 1.0

    loader = torch.utils.data.DataLoader(
        torch.randn(64, 32), 4, shuffle=True, generator=torch.Generator().manual_seed(3)  # type: ignore[arg-type]
    )  # fmt: skip
    config = roastify.RoastConfig(min_numel=64)
    roastify.sweep(Noting(), loader, [2, 4], config=config, evaluate=evaluate, **QUICK)
    # Before its two steps, a model runs for its conversion.
    assert drawn[0][-2:] == drawn[1][-2:]


def test_the_command_shows_names_writes_and_draws(folder: Path) -> None:
    output = _sweep("--init", "project", "--ratios", "4x,2", "--within", "1000%", "--json", "r.json", "--plot", "r.png")
    lines = output.stdout.partition("\n\n")[2].splitlines()
    assert lines[0].split() == ["ratio", "parameters", "bytes", "multiply-adds", "quality", "time", "dense", "÷"]
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "2", "4"]
    assert "ratio 4 is the highest with an error of outputs of at most 1000%: it has 0." in output.stdout
    written = json.loads((folder / "r.json").read_text())
    assert [row["ratio"] for row in written["rows"]] == [2, 4] and written["steps"] == 2
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, lines[:4])) <= 80, "the table fits a narrow terminal"


def test_the_command_trains_what_has_no_pretrained_weights_and_exits_with_1_if_none_is_near(folder: Path) -> None:
    arguments = ("--data", "task.py", "--ratios", "4", "--metric", "error", "--lower-is-better", "--lr", "0.0001")
    result = _sweep(*arguments, "--within", "0%", exit_code=1)
    assert "trained for 2 steps at each ratio" in result.stdout and "error, lower is better" in result.stdout
    assert "error: no ratio of 4 is within 0% of the dense model's error, " in result.stderr
    assert "the nearest, ratio 4, has " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ((), 2, "model.py has no pretrained weights, so it is trained from scratch, and data.py must define loss_fn("),
        (("--ratios", "2,x"), 2, "'2,x' is not a list of numbers such as 3,10,30"),
        (("--init", "project", "--ratios", "2,0.5"), 2, "ratio must be at least 1"),
        (("--init", "project", "--ratios", "2,900000"), 1, "ratio 900000 is unreachable"),
        (("--within", "1"), 2, "'1' is not a percentage such as 1%"),
        (("--plot", "r.doc"), 2, "matplotlib draws no file like r.doc; the name's ending must be one of"),
        (("--plot", "gone/r.png"), 2, "cannot write gone/r.png: there is no folder gone"),
        (("--data", "task.py"), 2, "evaluate returned several numbers; choose a metric of error, rows"),
        (("--data", "task.py", "--metric", "eror"), 2, "evaluate returned no number 'eror'; closest: 'error'"),
    ],
)
def test_the_command_refuses_wrong_usage_before_work_begins(
    folder: Path, arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    result = _sweep(*arguments, exit_code=exit_code)
    assert message in " ".join(result.stderr.split()) and result.stdout == ""


def test_a_plot_without_matplotlib_is_refused_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    (folder / "model.py").write_text("raise RuntimeError('loaded')", encoding="utf-8")
    result = _sweep("--plot", "r.png", exit_code=2)
    assert "error: a plot needs matplotlib, which is not installed; install it with: pip install" in result.stderr


def test_what_cannot_be_swept_is_refused() -> None:
    model, data = nn.Linear(64, 64), [torch.randn(4, 64)]
    for wrong, message in (
        ({"folder": "runs"}, "folder cannot be given for a sweep"),
        ({"data": iter(data)}, "which can be iterated once, and a sweep needs it for each ratio"),
        ({"ratios": []}, "ratios is empty"),
        ({"init": "match", "loss_fn": "loss"}, "are compared by what evaluate returns; give evaluate"),
        ({"init": "match", "evaluate": len}, "nothing to train on"),
        ({"evaluate": lambda model: "good"}, "evaluate returned 'good'; expected a number, or a dict with numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            roastify.sweep(**{"model": model, "data": data, **wrong})
    with pytest.raises(ConversionError, match="the model is already converted"):
        roastify.sweep(roastify.convert(model, 2), data)
    with pytest.raises(PlanError, match="unreachable"):
        roastify.sweep(model, data, [2, 1e6])


def test_a_model_that_cannot_be_timed_fails_before_it_is_trained() -> None:
    class Minding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + (0.0 if type(self.layer) is nn.Linear else 1.0)

    steps: list[Any] = []
    with pytest.raises(OutputMismatch, match="so nothing was timed"):
        roastify.sweep(Minding(), [torch.randn(4, 64)], [2], on_log=steps.append, **QUICK)
    assert not steps


@pytest.mark.long
def test_the_pages_example_runs_with_the_table_that_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "sweep.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    shown = re.search(r"^\$ roastify ([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patterns.py").write_text(code, encoding="utf-8")
    # Fewer steps than the page's; then no ratio need be near.
    command = [*shown[1].partition(" --within")[0].split(), "--device", "cpu", "--steps", "2", "--seconds", "0.01"]
    result = click.testing.CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    ours, pages = result.stdout.splitlines(), shown[2].splitlines()
    assert ours[0] == pages[0]
    # The table's heading, and of each row what does not depend on steps and machine.
    table = slice(4, 9)
    assert [line.split()[:6] for line in ours[table]] == [line.split()[:6] for line in pages[table]]

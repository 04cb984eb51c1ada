"""A recovery as it runs: what it tells while it does, when it warns, and in several processes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import recover_cases as cases
import torch
from processes import Processes, assert_same

import roastify
from roastify import ConfigError, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)


def recover(steps: int = 4, **settings: Any) -> roastify.RecoveryReport:
    dense = cases.teacher()
    return roastify.recover(cases.student_of(dense), dense, cases.batches(), steps, log_every=2, **settings)


def test_on_log_gets_the_numbers_of_every_point_and_evaluation(
    impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logged: list[dict[str, Any]] = []
    report = recover(on_log=logged.append, evaluate=lambda model: {"accuracy": 0.5, "what": "no number"})
    points, (evaluation,) = logged[:2], logged[2:]
    assert [(each["step"], each["loss"], each["lr"]) for each in points] == [
        (point.step, point.loss, point.lr) for point in report.losses
    ]
    assert points[0].keys() == {"step", "loss", "outputs", "features", "lr", "seconds"}
    assert 0 < points[0]["seconds"] < points[1]["seconds"]
    assert evaluation == {"step": 4, "evaluation/accuracy": 0.5}
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="on_log must be a function of a dict of numbers; found a str"):
        recover(on_log="wandb")


def test_without_a_terminal_each_point_is_a_line_of_json(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    report = recover(evaluate=lambda model: 1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["roastify"] for line in lines] == ["recover"] * 3
    assert [line["step"] for line in lines] == [2, 4, 4] and lines[0]["steps"] == 4
    assert [line["loss"] for line in lines[:2]] == [point.loss for point in report.losses]
    assert lines[2]["evaluation"] == 1


def test_lines_of_short_work_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress.JsonLines("recover", 9)
    lines.write({"step": 1})
    assert capsys.readouterr().err == ""
    lines.begun -= 2
    lines.write({"step": 2})
    written = '{"roastify": "recover", "step": 1, "steps": 9}\n{"roastify": "recover", "step": 2, "steps": 9}\n'
    assert capsys.readouterr().err == written


def test_points_soon_after_a_line_are_no_lines_unless_asked_for(
    impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, logged = cases.teacher(), list[int]()
    evaluated: dict[str, Any] = {"evaluate": lambda model: 1, "evaluate_every": 20}
    report = roastify.recover(cases.student_of(dense), dense, cases.batches(), 30, **evaluated)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    # The first point, two evaluations, the last point: of 30.
    assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (20, False), (30, True), (30, False)]
    assert len(report.losses) == 30
    roastify.recover(
        cases.student_of(dense), dense, cases.batches(), 30, on_log=lambda numbers: logged.append(numbers["step"])
    )
    assert logged == [*range(1, 31)] and not capsys.readouterr().err
    slow = progress.JsonLines("recover", 9)
    for step in range(1, 4):
        slow.write({"step": step, "loss": 1.0})
        slow.last = (slow.last or 0.0) - 6 * (step == 2)
    assert [json.loads(line)["step"] for line in capsys.readouterr().err.splitlines()] == [1, 3]


def test_a_terminal_shows_the_loss_and_the_time_left(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report = recover(20)
    assert f"loss {report.losses[-1].loss:.4g}" in terminal.getvalue()
    assert "recovering" in terminal.getvalue() and "left" in terminal.getvalue() and "{" not in terminal.getvalue()


def test_a_step_without_a_known_length_says_what_it_does(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.working("tracing"):
        while "tracing" not in terminal.getvalue():
            pass
        with progress.working("planning"):
            assert list(progress.track([1, 2], "planning")) == [1, 2]
    assert "planning" not in terminal.getvalue()


def test_a_bar_says_stage_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.stage("ratio 3, 1 of 2"):
        for _ in progress.track(range(8), "training", unit="steps"):
            time.sleep(0.03)
    assert "ratio 3, 1 of 2: training" in terminal.getvalue() and " steps/s" in terminal.getvalue()
    for _ in progress.for_seconds(0.3, 2, "timing"):
        time.sleep(0.03)
    assert "ratio" not in terminal.getvalue().partition("timing")[2] and "left" in terminal.getvalue()
    assert sum(1 for _ in progress.for_seconds(0.0, 5, "timing")) == 5


def test_a_student_that_got_worse_is_reported() -> None:
    with pytest.warns(UserWarning, match=r"made the student worse: .* error was .* and is .*lower learning rate"):
        recover(10, lr=1.0, clip=None)


def test_untrained_batch_norms_are_reported_before_and_after() -> None:
    dense = cases.teacher(trained=False)
    with pytest.warns(UserWarning) as caught:
        roastify.recover(cases.student_of(dense), dense, cases.batches(), 10, lr=1.0, clip=None)
    texts = [str(each.message) for each in caught]
    assert "batch norm norm has never been trained" in texts[0] and "in train mode first" in texts[0]
    assert [text for text in texts[1:] if "made the student worse" in text and "batch norm norm" in text]


def test_two_processes_are_one_with_twice_the_batches(two: Processes, tmp_path: Path) -> None:
    dense = cases.teacher()
    student = cases.student_of(dense)
    report = roastify.recover(student, dense, cases.batches(), 3, log_every=1, accumulate=2)
    losses = [point.loss for point in report.losses]
    answers = two.run(cases.recover_together, tmp_path / "checkpoint")
    for values, found, evaluations, _ in answers:
        # Each process has the statistics of its own batches until the first one's are taken.
        expected = student.state_dict()
        assert_same(
            *(
                {name: each[name] for name in each if ".running_" not in name and ".num_" not in name}
                for each in (values, expected)
            )
        )
        assert found == pytest.approx(losses, rel=1e-4) and evaluations == [(3, 7.0)]
    first, second = answers
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert len(first[3]) == 4 and not second[3]
    assert (tmp_path / "checkpoint" / "recovery.json").exists()


def test_processes_with_other_data_are_refused(two: Processes) -> None:
    for error in two.run(cases.recover_apart):
        assert "process 1 has another data than process 0" in error and "leave out DistributedSampler" in error


@pytest.mark.long
def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    source = "import recover_cases\nmodel = recover_cases.teacher()\n"
    (tmp_path / "model.py").write_text(source)
    (tmp_path / "data.py").write_text("import recover_cases\ndata = recover_cases.batches()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [str(Path(sys.executable).with_name("roastify")), "recover", "model.py", "--ratio", "4"]
    command += ["--data", "data.py", "-o", "out", "--steps", "4", "--device", "cpu"]
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}", "PATH": "/usr/bin:/bin"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("written to out") == 1
    assert {each.name for each in (tmp_path / "out").iterdir()} >= {"roast.json", "model.safetensors"}

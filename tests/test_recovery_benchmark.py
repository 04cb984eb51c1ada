"""The recovery benchmark's smoke run on made-up data: what it trains, records, resumes, and writes."""

from __future__ import annotations

import dataclasses
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import marks, recovery, recovery_page, recovery_runs, signs_tasks


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with reviews whose words tell the label."""
    with lzma.open(tmp_path / "imdb.jsonl.xz", "wt", encoding="utf-8") as lines:
        for split, count in {"train": 160, "test": 40}.items():
            for index in range(count):
                word = "Fine" if index % 2 else "dull"
                review = {"split": split, "label": index % 2, "text": f"A {word} film, {word} number {index}!"}
                lines.write(json.dumps(review) + "\n")
    small = {"epochs": 4, "batch": 16, "train": 160, "test": 40, "length": 8}
    quick = dataclasses.replace(signs_tasks.QUICK, imdb=dataclasses.replace(signs_tasks.QUICK.imdb, **small))
    monkeypatch.setattr(recovery, "QUICK", quick)
    monkeypatch.setattr(recovery, "RATES", (1e-3, 2e-3))
    monkeypatch.setattr(recovery_runs, "_TIMED_STEPS", 2)
    monkeypatch.setattr(recovery_runs, "_WARM_UP_STEPS", 1)
    signs_tasks.on_device.cache_clear()
    return tmp_path


def smoke(data: Path, *arguments: str) -> dict[str, Any]:
    out, document = data / "recovery.json", data / "recovery.md"
    fixed = ["--data", str(data), "--smoke", "--device", "cpu", "--task", "imdb", "--ratio", "3", "--seconds", "0.3"]
    found = CliRunner().invoke(recovery.main, [*fixed, "--out", str(out), "--document", str(document), *arguments])
    assert found.exit_code == 0, found.output
    return json.loads(out.read_text())


def test_smoke_run_trains_records_and_resumes(data: Path) -> None:
    first = smoke(data, "--seeds", "1")["rows"]
    assert [(row["arm"], row["lr"]) for row in first] == [
        ("dense", 2e-3), ("recovered", 1e-3), ("recovered", 2e-3), ("scratch", 1e-3), ("scratch", 2e-3),
    ]  # fmt: skip
    result = smoke(data, "--seeds", "2", "--resume")
    rows = result["rows"]
    assert [row for row in rows if row["seed"] == 0] == first
    later = [row for row in rows if row["seed"] == 1]
    for arm, row in zip(("dense", "recovered", "scratch"), later, strict=True):
        assert row["arm"] == arm
        assert row["lr"] == recovery_page.best_rate(rows, "imdb", row["ratio"], arm)
    for row in rows:
        assert row["curve"][-1] == [row["steps"], row["accuracy"]]
        assert 0 < row["seconds"] and 0 <= row["validation"] <= 1
        if row["arm"] == "recovered":
            assert 0 < row["align_seconds"] < row["seconds"]
            assert row["after"]["error"] < row["before"]["error"]
    dense = next(row for row in rows if row["arm"] == "dense")
    assert all(2.9 < dense["stored"] / row["stored"] < 3.5 for row in rows if row["arm"] != "dense")
    page = (data / "recovery.md").read_text()
    assert recovery_page.markdown(result) in page
    assert page.startswith("# Recovering a pretrained model") and "Not measured yet" not in page


def test_rows_of_another_length_of_training_are_not_mixed_in(data: Path) -> None:
    smoke(data, "--seeds", "1")
    fixed = ["--data", str(data), "--smoke", "--device", "cpu", "--seconds", "1", "--resume"]
    found = CliRunner().invoke(recovery.main, [*fixed, "--out", str(data / "recovery.json")])
    assert found.exit_code == 1 and "another seconds (0.3, now 1.0)" in found.output


def test_no_run_starts_after_the_time_is_up(data: Path) -> None:
    out = data / "recovery.json"
    fixed = ["--data", str(data), "--smoke", "--device", "cpu", "--task", "imdb", "--minutes", "0"]
    found = CliRunner().invoke(recovery.main, [*fixed, "--out", str(out)])
    assert found.exit_code == 0 and not out.exists()


def row(arm: str, seed: int, lr: float, validation: float, accuracy: float) -> dict[str, Any]:
    ratio = 1.0 if arm == "dense" else 10.0
    values = {"validation": validation, "accuracy": accuracy, "steps": 7, "seconds": 1.0, "projected": 0.5}
    return {"task": "imdb", "ratio": ratio, "arm": arm, "seed": seed, "lr": lr, **values}


def test_the_page_takes_the_rate_chosen_on_held_out_examples() -> None:
    rows = [row("dense", seed, 1e-3, 0.9, 0.9) for seed in (0, 1)]
    rows += [
        row("recovered", 0, 1e-3, 0.8, 0.81),
        row("recovered", 0, 2e-3, 0.7, 0.99),
        row("recovered", 1, 1e-3, 0.8, 0.83),
    ]
    rows += [row("scratch", 0, 1e-3, 0.5, 0.9), row("scratch", 0, 2e-3, 0.6, 0.71), row("scratch", 1, 2e-3, 0.6, 0.73)]
    machine = {"torch": "2", "triton": None, "device": "a CPU", "date": "today"}
    text = recovery_page.markdown(
        {"rows": rows, "machine": machine, "settings": {"seconds": 3.0, "imdb": {"title": "IMDB"}}}
    )
    cells = "90.00 ± 0.00 (1.0) | 50.00 ± 0.00 | 82.00 ± 1.00 (7, 1.0, 0.001) | 72.00 ± 1.00 (7, 1.0, 0.002)"
    assert f"| IMDB | 10 | {cells} |" in text
    assert "- IMDB, ratio 10: recovered is above trained from scratch." in text
    near = [{**each, "accuracy": 0.72 + 0.001 * each["seed"]} for each in rows if each["arm"] == "recovered"]
    others = [each for each in rows if each["arm"] != "recovered"]
    text = recovery_page.markdown(
        {"rows": [*others, *near], "machine": machine, "settings": {"seconds": 3.0, "imdb": {"title": "IMDB"}}}
    )
    assert "- IMDB, ratio 10: recovered is not to be told apart from trained from scratch." in text


def test_the_page_is_the_committed_results() -> None:
    result = json.loads(recovery_page.RESULTS.read_text()) if recovery_page.RESULTS.exists() else None
    text = recovery_page.DOCUMENT.read_text()
    assert marks.insert(text, recovery_page.BEGIN, recovery_page.markdown(result)) == text


def test_results_are_written_between_marks_or_not_at_all() -> None:
    page = "Before\n<!-- of: a -->\nold\n<!-- end -->\nAfter\n<!-- of: b -->\nother\n<!-- end -->\n"
    assert marks.insert(page, "<!-- of: a -->", "new\n") == page.replace("old", "new")
    endless = page.replace("<!-- end -->", "")
    for broken in (page.replace("of: a", "of: c"), endless, page.replace("<!-- end -->\n", "", 1)):
        with pytest.raises(ValueError, match=r"has no '<!-- of: a -->' with an '<!-- end -->' after it"):
            marks.insert(broken, "<!-- of: a -->", "new\n")

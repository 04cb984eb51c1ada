"""The accuracy benchmark's smoke run on made-up data: what it trains, records, resumes and concludes."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import data as data_sets
from benchmarks import signs, signs_page, signs_tasks, stats


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with reviews whose words tell the label, and images whose brightness does."""
    counts = {"train": 80, "test": 40}
    with lzma.open(tmp_path / "imdb.jsonl.xz", "wt", encoding="utf-8") as lines:
        for split, count in counts.items():
            for index in range(count):
                word = "Fine" if index % 2 else "dull"
                review = {"split": split, "label": index % 2, "text": f"A {word}<br />film, {word} number {index}!"}
                lines.write(json.dumps(review) + "\n")
    arrays = {}
    for split, count in counts.items():
        labels = (np.arange(count) % 2).astype(np.uint8)
        arrays[f"{split}_jpeg"] = np.repeat(labels * 255, 2)
        arrays[f"{split}_offset"] = np.arange(0, 2 * count + 1, 2)
        arrays[f"{split}_label"] = labels
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    pictures = {bytes([value] * 2): np.full((32, 32, 3), value, dtype=np.uint8) for value in (0, 255)}
    monkeypatch.setattr(data_sets, "decode", pictures.__getitem__)
    small = {"epochs": 3, "batch": 16, "train": 80, "test": 40}
    quick = dataclasses.replace(
        signs_tasks.QUICK,
        imdb=dataclasses.replace(signs_tasks.QUICK.imdb, **small, length=8),
        cifar10=dataclasses.replace(signs_tasks.QUICK.cifar10, **small, width=64),
    )
    monkeypatch.setattr(signs, "QUICK", quick)
    signs_tasks.on_device.cache_clear()
    return tmp_path


def smoke(data: Path, *arguments: str) -> Result:
    out, document = data / "signs.json", data / "signs.md"
    fixed = ["--data", str(data), "--quick", "--device", "cpu", "--workers", "0", "--ratio", "10"]
    return CliRunner().invoke(signs.main, [*fixed, "--out", str(out), "--document", str(document), *arguments])


def test_smoke_run_trains_records_and_resumes(data: Path) -> None:
    found = smoke(data, "--seeds", "1")
    assert found.exit_code == 0, found.output
    first = json.loads((data / "signs.json").read_text())["rows"]
    found = smoke(data, "--seeds", "2", "--task", "imdb", "--resume")
    assert found.exit_code == 0, found.output
    result = json.loads((data / "signs.json").read_text())
    rows = result["rows"]

    assert [row for row in rows if row["seed"] == 0] == first
    kinds = signs.planned_runs(signs_tasks.TASKS, (10.0,), signs_tasks.SIGNS, 2)
    wanted = [run for run in kinds if run.seed == 0 or run.task == "imdb"]
    assert {signs_tasks.Run(*(row[field] for field in signs_tasks.Run._fields)) for row in rows} == set(wanted)
    assert len(rows) == len(wanted) == 3 * (1 + len(signs_tasks.SIGNS))
    for row in rows:
        assert len(row["accuracy"]) == len(row["loss"]) == 3
        assert row["loss"][-1] < row["loss"][0], row
        assert row["accuracy"][-1] > 0.9, row
        assert (row["slots"] == 0) == (row["sign"] == "dense")
    # Only the signs differ: equal losses would mean that the setting has no effect.
    losses = {row["sign"]: row["loss"] for row in rows if row["task"] == "imdb" and row["seed"] == 0}
    assert len({tuple(values) for values in losses.values()}) == len(losses)
    assert (data / "signs.md").read_text() == signs_page.markdown(result)

    found = smoke(data, "--seeds", "1", "--resume")
    assert found.exit_code == 0 and " runs] " not in found.output
    changed = {**result, "settings": {**result["settings"], "tile": "4x4"}}
    (data / "signs.json").write_text(json.dumps(changed))
    found = smoke(data, "--resume")
    assert found.exit_code == 1 and "made with another tile (4x4, now 8x8)" in found.output


def test_a_failed_run_keeps_the_others(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(run: signs_tasks.Run, *_: object) -> dict:
        if run.sign == "tile":
            raise RuntimeError("no tile today")
        return {**run._asdict(), "slots": 0, "stored": 1, "accuracy": [0.5], "loss": [1.0], "seconds": 0.0}

    monkeypatch.setattr(signs, "train", train)
    found = smoke(data, "--seeds", "1", "--task", "imdb")
    assert found.exit_code == 1 and "no tile today" in found.output and "1 of 5 runs failed" in found.output
    assert len(json.loads((data / "signs.json").read_text())["rows"]) == 4


def test_a_seed_gives_every_kind_of_sign_the_same_pool_and_slots() -> None:
    models = [signs_tasks.build(signs_tasks.Run("imdb", 10, sign, 3), signs_tasks.QUICK) for sign in ("row", "element")]
    for (name, ours), (_, theirs) in zip(*(model.named_parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    assert torch.equal(models[0].roast_pool.table, models[1].roast_pool.table)
    other = signs_tasks.build(signs_tasks.Run("imdb", 10, "row", 4), signs_tasks.QUICK)
    assert not torch.equal(models[0].roast_pool.table, other.roast_pool.table)


def test_crops_and_mirrors() -> None:
    images = torch.arange(2 * 32 * 32 * 3, dtype=torch.uint8).view(2, 32, 32, 3)
    found = signs_tasks.crop(images, 30, torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([False, True]))
    expected = torch.stack([images[0, :30, 1:31], images[1, 2:, 2:].flip(1)]).float() / 64 - 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_statistics_equal_a_textbooks_table() -> None:
    # Student's t at a two-sided p of 5 %.
    for degrees, t in ((1, 12.706), (3, 3.182), (12, 2.179), (60, 2.000)):
        assert stats.two_sided_p(t, degrees) == pytest.approx(0.05, abs=2e-4)
        assert stats.two_sided_p(-t, degrees) == stats.two_sided_p(t, degrees)
        assert stats.half_width(2.0, degrees) == pytest.approx(2 * t, rel=1e-3)
    mean, error = stats.mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert (mean, error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))


def test_conclusions_follow_the_numbers() -> None:
    def rows(sign: str, gain: float) -> list[dict]:
        return [
            {"task": "imdb", "ratio": 10.0, "sign": sign, "seed": seed, "slots": 70, "accuracy": [0.1, value]}
            for seed, value in enumerate((0.80 + gain, 0.82 + gain - 0.001, 0.84 + gain + 0.001))
        ]

    table = signs_page.Table([*rows("row", 0.0), *rows("tile", 0.0), *rows("none", -0.02), *rows("element", 0.02)])
    same, worse, better = (table.overall("row", other) for other in ("tile", "element", "none"))
    assert "cannot be told from zero" in signs_page._verdict("tile", same)
    assert "`row` is worse" in signs_page._verdict("element", worse)
    assert "`row` is better" in signs_page._verdict("none", better)
    assert better.mean == pytest.approx(2.0) and better.degrees == 2


def test_the_full_settings_can_answer_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    """In the full run every pool has enough slots and every tensor has tiles: strips have no row signs."""
    runs = signs.planned_runs(signs_tasks.TASKS, (10.0, 30.0), signs_tasks.SIGNS, 4)
    signs.report_slots(runs, signs_tasks.FULL, quick=False)
    assert capsys.readouterr().out.count("slots of 32x32") == 4
    for name in signs_tasks.TASKS:
        plan = signs_tasks.build(signs_tasks.Run(name, 10, "row", 0), signs_tasks.QUICK).roast_pool.plan
        assert plan.sign == "row" and not any(tensor.strips for tensor in plan.shared)


@pytest.mark.skipif(not signs_page.RESULTS.exists(), reason="the full run is not committed")
def test_signs_page_is_the_committed_results() -> None:
    assert signs_page.markdown(json.loads(signs_page.RESULTS.read_text())) == signs_page.DOCUMENT.read_text()

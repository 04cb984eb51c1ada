"""What the benchmarks' pages share, and the pages of finished measurements: marks, statistics, what is concluded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks import (
    adapters,
    adapters_page,
    documents,
    folding_page,
    peers,
    peers_page,
    plots,
    pretrained,
    recovery_page,
    rows,
    signs_page,
    stats,
)


def test_statistics_are_the_textbooks() -> None:
    # Two-sided 5 % points of Student's t.
    for degrees, t in ((1, 12.706), (3, 3.182), (12, 2.179), (60, 2.000)):
        assert stats.two_sided_p(t, degrees) == pytest.approx(0.05, abs=2e-4)
        assert stats.two_sided_p(-t, degrees) == stats.two_sided_p(t, degrees)
        assert stats.half_width(2.0, degrees) == pytest.approx(2 * t, rel=1e-3)
    mean, error = stats.mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert (mean, error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    assert [stats.mean_text(values) for values in ((), (2,), (1, 3))] == ["–", "2.00", "2.00 ± 1.00"]
    assert stats.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median_ms": 3.0, "q1_ms": 1.5, "q3_ms": 4.5, "runs": 5}


def test_sign_flips_are_counted_exactly() -> None:
    assert stats.sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert stats.sign_flip_p([0.1] * 10) == pytest.approx(2 / 1024)
    assert stats.sign_flip_p([1.0, -1.0]) == 1.0
    assert math.isnan(stats.sign_flip_p([]))
    assert 0 < stats.sign_flip_p([0.1] * 25) < 1e-5


def test_results_are_put_between_marks_or_not_at_all() -> None:
    page = "Before\n<!-- of: a -->\nold\n<!-- end -->\nAfter\n<!-- of: b -->\nother\n<!-- end -->\n"
    assert documents.insert(page, "<!-- of: a -->", "new\n") == page.replace("old", "new")
    endless = page.replace("<!-- end -->", "")
    for broken in (page.replace("of: a", "of: c"), endless, page.replace("<!-- end -->\n", "", 1)):
        with pytest.raises(ValueError, match=r"has no '<!-- of: a -->' with an '<!-- end -->' after it"):
            documents.insert(broken, "<!-- of: a -->", "new\n")


def test_paragraphs_lists_and_tables_are_written_alike() -> None:
    assert documents.paragraph("a\n b", "- ") == "- a b"
    lines = documents.paragraph("word " * 60, "- ").splitlines()
    assert len(lines) == 3 and all(len(line) <= 120 for line in lines) and lines[1].startswith("  word")
    assert [documents.listed(items) for items in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    rows_found = [["a", "1"], ["a", "2"], ["b", "1"]]
    assert documents.named_once(rows_found) == [["a", "1"], ["", "2"], ["b", "1"]]


def test_a_difference_is_called_clear_by_its_p() -> None:
    clear, unclear, one = stats.Difference(1.0, 0.1, 2), stats.Difference(1.0, 0.9, 2), stats.Difference(1, math.nan, 0)
    assert [each.is_clear for each in (clear, unclear, one)] == [True, False, False]
    assert [each.place for each in (clear, clear._replace(mean=-1.0), one)] == [
        "above",
        "below",
        "not clearly different from",
    ]


def test_names_at_the_ends_of_lines_are_moved_as_little_as_their_height_asks() -> None:
    assert plots._apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert plots._apart([0.5, 0.5, 0.52], 0.1) == pytest.approx([0.4067, 0.5067, 0.6067], abs=1e-4)
    assert plots._apart([0.0, 0.0, 1.0, 1.0], 0.2) == pytest.approx([0.0, 0.2, 0.8, 1.0])


def test_the_same_rows_draw_the_same_file(tmp_path: Path) -> None:
    def draw() -> plots.Figure:
        figure, axes = plots.plt.subplots(figsize=(4, 3))
        axes.plot([1, 2], [1, 2])
        plots.name_ends(axes, {"a line": (2.0, plots.BLUE), "another": (2.0, plots.ORANGE)})
        return figure

    (first,), (second,) = (plots.save({"a": draw, "none": lambda: None}, tmp_path / name) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes() and b"<dc:date>" not in first.read_bytes()


def test_pictures_are_small_and_each_is_shown() -> None:
    docs = adapters_page.DOCUMENT.parent
    pages = [docs.parent / "README.md", *docs.rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"images/([\w-]+\.svg)", page.read_text())}
    drawn = {path.name: path.stat().st_size for path in (docs / "images").glob("*.svg")}
    assert drawn and drawn.keys() <= shown
    assert max(drawn.values()) < 150_000


def test_rows_stay_only_beside_the_same_machine(tmp_path: Path) -> None:
    path, here = tmp_path / "results" / "rows.json", {"gpu": "one", "torch": "2", "date": "today"}
    rows.Rows(path, here).add({"case": "first"})
    assert not list(path.parent.glob("*.part"))
    later = rows.Rows(path, {**here, "date": "tomorrow"})
    later.add({"case": "second"})
    assert rows.load(path) == {"machine": {**here, "date": "tomorrow"}, "rows": [{"case": "first"}, {"case": "second"}]}
    assert not rows.Rows(path, {**here, "torch": "3"}).rows and not rows.Rows(path, {**here, "cpu": "more"}).rows
    assert len(rows.Rows(path, {**here, "torch": "3"}, same=["gpu"]).rows) == 2
    # Where every row says it itself, rows of any machine stay.
    assert len(rows.Rows(path).rows) == 2


def test_a_case_replaces_its_row_alone_and_what_is_left_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    rows.dump(path, {"rows": [{"case": "a", "value": 1}, {"case": "b", "value": 1}]})
    cases = rows.Cases(path, "a|c", minutes=1)
    assert [case for case in "abc" if cases.wanted(case)] == ["a", "c"]
    cases.add({"case": "a", "value": 2}, "as said")
    cases.add({"case": "c", "failure": "no memory"})
    assert rows.load(path)["rows"] == [
        {"case": "b", "value": 1},
        {"case": "a", "value": 2},
        {"case": "c", "failure": "no memory"},
    ]
    cases.close()
    assert capsys.readouterr().out == f"a: as said\nc: no memory\nwritten to {path}\n"
    # What is missing is what failed, or has no row.
    resumed = rows.Cases(path, "", minutes=1, missing=True)
    assert [case for case in "abcd" if resumed.wanted(case)] == ["c", "d"]
    late = rows.Cases(path, "a", minutes=0)
    assert not late.wanted("a")
    late.close()
    assert capsys.readouterr().out == "not begun within 0 minutes: a\n"
    none = rows.Cases(path, "x", minutes=1)
    assert not none.wanted("a")
    with pytest.raises(click.UsageError, match="no case matches 'x'; the cases are a"):
        none.close()


def test_conclusions_about_signs_follow_the_numbers() -> None:
    def of_sign(sign: str, gain: float) -> list[dict[str, Any]]:
        return [
            {"task": "imdb", "ratio": 10.0, "sign": sign, "seed": seed, "slots": 70, "accuracy": [0.1, value]}
            for seed, value in enumerate((0.80 + gain, 0.82 + gain - 0.001, 0.84 + gain + 0.001))
        ]

    gains = {"row": 0.0, "tile": 0.0, "none": -0.02, "element": 0.02}
    table = signs_page.Table([row for sign, gain in gains.items() for row in of_sign(sign, gain)])
    same, worse, better = (table.overall(other) for other in ("tile", "element", "none"))
    assert "cannot be told from zero" in signs_page._verdict("tile", same)
    assert "`row` is worse" in signs_page._verdict("element", worse)
    assert "`row` is better" in signs_page._verdict("none", better)
    assert better.mean == pytest.approx(2.0) and better.degrees == 2


def test_the_page_of_signs_is_the_committed_results() -> None:
    assert signs_page.markdown(rows.load(signs_page.RESULTS)) == signs_page.DOCUMENT.read_text()


def recovery_row(arm: str, seed: int, lr: float, validation: float, accuracy: float) -> dict[str, Any]:
    ratio = 1.0 if arm == "dense" else 10.0
    values = {"validation": validation, "accuracy": accuracy, "steps": 7, "seconds": 1.0, "projected": 0.5}
    return {"task": "imdb", "ratio": ratio, "arm": arm, "seed": seed, "lr": lr, **values}


def test_the_page_of_recovery_takes_the_rate_chosen_on_held_out_examples() -> None:
    row = recovery_row
    ours = [row("recovered", 0, 1e-3, 0.8, 0.81), row("recovered", 0, 2e-3, 0.7, 0.99)]
    ours.append(row("recovered", 1, 1e-3, 0.8, 0.83))
    others = [row("dense", seed, 1e-3, 0.9, 0.9) for seed in (0, 1)]
    others += [
        row("scratch", 0, 1e-3, 0.5, 0.9),
        row("scratch", 0, 2e-3, 0.6, 0.71),
        row("scratch", 1, 2e-3, 0.6, 0.73),
    ]
    machine = {"torch": "2", "triton": None, "device": "a CPU", "date": "today", "roastify": "0"}
    result = {"machine": machine, "settings": {"seconds": 3.0, "imdb": {"title": "IMDB"}}}
    text = recovery_page.markdown({**result, "rows": [*others, *ours]})
    cells = "90.00 ± 0.00 (1.0) | 50.00 ± 0.00 | 82.00 ± 1.00 (7, 1.0, 0.001) | 72.00 ± 1.00 (7, 1.0, 0.002)"
    assert f"| IMDB | 10 | {cells} |" in text
    assert "- IMDB, ratio 10: recovered is above trained from scratch." in text
    near = [{**each, "accuracy": 0.72 + 0.001 * each["seed"]} for each in ours]
    text = recovery_page.markdown({**result, "rows": [*others, *near]})
    assert "- IMDB, ratio 10: recovered is not clearly different from trained from scratch." in text


def test_the_page_of_recovery_is_the_committed_results() -> None:
    text = recovery_page.DOCUMENT.read_text()
    results = recovery_page.markdown(rows.load(recovery_page.RESULTS))
    assert documents.insert(text, recovery_page.BEGIN, results) == text


def test_the_page_of_folds_is_the_committed_results() -> None:
    text = folding_page.DOCUMENT.read_text()
    assert folding_page.markdown(text, *folding_page.results()) == text


def test_the_page_of_folds_leaves_out_what_is_not_measured() -> None:
    assert folding_page.accuracy([]) == "" and "training step" not in folding_page.speed([], [], [])
    step = {"mode": "graphed", "task": "a", "ratio": 10, "step_ratio": 0.5, "fold": 8}
    before = step | {"step_ratio": 0.9, "fold": 1}
    beside = before | {"task": "a, no folds"}
    shown = folding_page.speed([], [step, before, beside], [])
    assert "as a CUDA graph, ÷ the dense one's: a 0.50; a, no folds 0.90." in " ".join(shown.split())


def test_page_of_adapters_is_the_committed_results() -> None:
    result, text = rows.load(adapters.RESULTS), adapters_page.DOCUMENT.read_text()
    assert documents.insert(text, adapters_page.BEGIN, adapters_page.conclusions(result)) == text
    assert adapters_page.markdown(result) == (adapters_page.DOCUMENT.parent / adapters_page.TABLES).read_text()


def test_the_page_of_peers_is_the_committed_answers_to_the_trials_as_they_are() -> None:
    result, page = rows.load(peers.RESULTS), peers_page.DOCUMENT.read_text()
    assert peers_page.markdown(page, result) == page
    for row in result["rows"]:
        assert row["lines"] == peers.lines_of(row["tool"], row["feature"]), "the trial has changed since it was run"
    found = {(row["tool"], row["feature"]) for row in result["rows"]}
    assert found == peers.TRIALS.keys() == {(tool, feature) for tool in peers.TOOLS for feature in peers.FEATURES}


def test_a_method_that_was_not_measured_has_a_line_with_a_dash() -> None:
    result = rows.load(pretrained.RESULTS)
    text = pretrained.markdown(result)
    assert text.count("\n| ") == 1 + len(pretrained.METHODS) and "–" not in text
    result["rows"] = [row for row in result["rows"] if row["case"] not in ("aligned, 4", "int8")]
    found = pretrained.markdown(result)
    assert "| roastify, aligned | 4 | – |" in found and "| int8, rounded | – | – |" in found


@pytest.mark.long
@pytest.mark.parametrize("feature", peers.FEATURES)
def test_roastify_answers_its_trials_as_the_page_says(feature: str) -> None:
    pytest.importorskip("transformers")
    (row,) = (row for row in rows.load(peers.RESULTS)["rows"] if (row["tool"], row["feature"]) == ("roastify", feature))
    answer, found = peers.TRIALS["roastify", feature]()
    assert answer == row["answer"], found


def test_rates_of_adapters_grow_while_the_best_is_at_an_end() -> None:
    method = adapters.Method("some", "pool", rates=(10**-3.5, 1e-3, 10**-2.5))
    found: list[dict[str, Any]] = []
    for _, rate, seed in adapters.missing([method], found):
        found.append({"name": "some", "rate": rate, "seed": seed, "held_out": -abs(math.log10(rate) + 2)})
    logs = [(round(math.log10(row["rate"]), 3), row["seed"]) for row in found]
    assert logs == [(-3.5, 0), (-3, 0), (-2.5, 0), (-2, 0), (-1.5, 0), (-2, 1), (-2, 2)]
    assert not list(adapters.missing([method], found))

"""The results in docs/folding.md: what folds save, and what they do to accuracy, from the rows of four benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.language.methods import METHODS
from benchmarks.accuracy.language.page import cell, tables
from benchmarks.accuracy.language.table import RESULTS as LANGUAGE
from benchmarks.accuracy.language.table import Table
from benchmarks.accuracy.language.tables_page import loss_text
from benchmarks.accuracy.table import RESULTS as CLASSIFIERS
from benchmarks.accuracy.tasks import TASKS
from benchmarks.documents import insert, listed, paragraph, table
from benchmarks.page import BATCHES
from benchmarks.performance_plots import LAYERS, is_usual
from benchmarks.performance_tables_page import KERNELS, MODELS
from benchmarks.rows import FOLDER, Row, is_folded, load, write
from benchmarks.stats import mean_text, paired
from benchmarks.training.plots import MODES
from benchmarks.training.tables_page import RESULTS as TRAINING
from benchmarks.training.tables_page import single_rows
from roastify import RoastConfig

CONVOLUTIONS = FOLDER / "convolutions.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "folding.md"
CONVOLVED = "<!-- convolutions: written by `python -m benchmarks.folding_page` -->"
CLASSIFIED = "<!-- classification: written by `python -m benchmarks.folding_page` -->"
SPEED = "<!-- speed: written by `python -m benchmarks.folding_page` -->"
ACCURACY = "<!-- accuracy: written by `python -m benchmarks.folding_page` -->"
HASHES = "<!-- hashes: written by `python -m benchmarks.folding_page` -->"
# The default, which rows do not name.
FOLD_HASHES = RoastConfig().fold_hashes
# Batches of which the backward pass is shown too.
WITH_BACKWARD = (2048, 8192)
# Lines of the table of losses: a method, and a setting that is changed.
SIDES = (
    ("global", ""), ("folded", "fold_hashes 1"), ("folded", ""), ("folded", "fold_hashes 4"), ("scaled", ""),
    ("smaller", ""),
)  # fmt: skip


def layers(rows: Sequence[Row]) -> list[str]:
    """Return the table of dense time over ours by layer and batch."""
    found = {
        (tuple(row["shape"]), row["fold"], row["backward"], row["rows"]): f"{row['dense_over_pool']:.2f}"
        for row in rows
        if row["regime"] == "folded" and is_usual(row)
    }
    lines = []
    for shape in LAYERS:
        for fold in sorted({key[1] for key in found if key[0] == shape}, reverse=True):
            cells = [found.get((shape, fold, False, batch), "–") for batch in BATCHES]
            cells += [found.get((shape, fold, True, batch), "–") for batch in WITH_BACKWARD]
            lines.append([f"{shape[0]}×{shape[1]}, {fold}", *cells])
    head = ["layer, fold", *(f"{batch:,} {'row' if batch == 1 else 'rows'}" for batch in BATCHES)]
    return table([*head, *(f"with backward, {batch:,}" for batch in WITH_BACKWARD)], lines)


def speed(kernels: Sequence[Row], training: Sequence[Row], models: Sequence[Row]) -> str:
    """Return what folds save."""
    lines = ["Dense time ÷ ours, so above 1 ours are faster:", "", *layers(kernels), ""]
    steps = [row for row in single_rows(training) if is_folded(row) or row["task"].endswith(", no folds")]
    for mode, (title, *_) in MODES.items():
        found = [row for row in steps if row["mode"] == mode]
        named = [f"{row['task']} {row['step_ratio']:.2f}{_ratio(row, found)}" for row in found]
        if named:
            lines.append(paragraph(f"A whole training step, {title}, ÷ the dense one's: {'; '.join(named)}.", "- "))
    found = [row for row in models if row.get("dense_over_converted") and is_folded(row)]
    named = [
        f"{row['model']}, batch {row['batch']}, {row['dense_over_converted']:.2f}{_ratio(row, found)}" for row in found
    ]
    if named:
        lines.append(paragraph(f"Without training, dense ÷ ours: {'; '.join(named)}.", "- "))
    return "\n".join([*lines, ""])


def _ratio(row: Row, rows: Sequence[Row]) -> str:
    """Return a row's ratio in brackets if it is not the same for all."""
    return f" (ratio {row['ratio']:g})" if len({each["ratio"] for each in rows}) > 1 else ""


def losses(found: Table) -> Iterator[str]:
    """Yield the table of losses and step times by ratio, each side in a line."""
    ratios = found.ratios()
    lines = []
    for method, changes in SIDES:
        cells = []
        for ratio in ratios:
            rows = _rows(found, method, ratio, changes)
            times = [row["step"]["median_ms"] for row in rows.values()]
            text = loss_text(row["loss"] for row in rows.values())
            cells.append(f"{text}, {statistics.median(times):.1f} ms" if times else "–")
        if any(each != "–" for each in cells):
            name = METHODS[method].title.removeprefix("roastify, ")
            hashes = changes.removeprefix("fold_hashes ") or ("2" if method == "folded" else "")
            lines.append([name + (f", {hashes} {'hash' if hashes == '1' else 'hashes'}" if hashes else ""), *cells])
    yield from table(["", *(f"ratio {ratio:g}" for ratio in ratios)], lines)


def _rows(found: Table, method: str, ratio: float, changes: str) -> dict[int, Row]:
    """Return a side's rows by seed."""
    if not changes:
        return {seed: dict(row) for seed, row in found.by_cell.get((method, ratio), {}).items()}
    for other, by_seed in found.others().items():
        if (other.method, other.ratio, other.width, other.changes) == (method, ratio, found.width, changes):
            return {seed: dict(row) for seed, row in by_seed.items()}
    return {}


def accuracy(rows: Sequence[Row]) -> str:
    """Return what folds do to a language model's loss."""
    lines = []
    for found in tables(rows)[:1]:
        lines += [*losses(found), ""]
        for what, side, beside in (
            ("Folds lower the loss of the same pool without by", SIDES[2], SIDES[0]),
            ("A second hash lowers it by", SIDES[2], SIDES[1]),
            ("Four hashes instead of two lower it by", SIDES[3], SIDES[2]),
            ("Learned scales lower it by", SIDES[4], SIDES[2]),
        ):
            texts = []
            for ratio in found.ratios():
                ours, theirs = (
                    {seed: row["loss"] for seed, row in _rows(found, each[0], ratio, each[1]).items()}
                    for each in (side, beside)
                )
                if (difference := paired(theirs, ours)) is not None:
                    texts.append(f"{cell(difference)} at ratio {ratio:g}")
            if texts:
                lines.append(paragraph(f"{what} {listed(texts)}.", "- "))
    return "\n".join([*lines, ""]) if lines else ""


def hashes(rows: Sequence[Row]) -> str:
    """Return the table of losses and step times by the number of hashes, a line for each width, length and rate."""
    found: dict[tuple[int, int, float], dict[int, list[Row]]] = {}
    for row in rows:
        if row["method"] == "folded" and row["ratio"] == 10 and set(row["changes"]) <= {"fold_hashes"}:
            count = row["changes"].get("fold_hashes", FOLD_HASHES)
            found.setdefault((row["width"], row["steps"], row["rate"]), {}).setdefault(count, []).append(row)
    compared = {key: by_count for key, by_count in found.items() if len(by_count) > 1}
    counts = sorted({count for by_count in compared.values() for count in by_count})
    lines = []
    for (width, steps, rate), by_count in sorted(compared.items()):
        cells = []
        for count in counts:
            given = by_count.get(count, [])
            time = f", {statistics.median(row['step']['median_ms'] for row in given):.1f} ms" if given else ""
            cells.append(loss_text(row["loss"] for row in given) + time if given else "–")
        seeds = sorted({len(given) for given in by_count.values()})
        lines.append([f"{width}", f"{steps:,}", f"{rate:g}", "–".join(map(str, seeds)), *cells])
    head = ["width", "steps", "rate", "seeds"]
    heads = [f"{count} {'hash' if count == 1 else 'hashes'}" for count in counts]
    return "\n".join([*table([*head, *heads], lines), ""])


def convolved(rows: Sequence[Row]) -> str:
    """Return the table of dense time over ours by convolution."""
    whats = ("forward", "with backward")
    lines = []
    for row in rows:
        if row["layout"] == "contiguous":
            beside = next(
                (each for each in rows if each["case"] == row["case"].replace(row["layout"], "channels last")), None
            )
            size = f"{row['channels']}→{row['out']}, {row['batch']}×{row['side']}×{row['side']}, {row['fold']}"
            pairs = [(side, what) for side in (row, beside) for what in whats]
            lines.append(
                [size, *(f"{side['dense_over_converted'][what]:.2f}" if side else "–" for side, what in pairs)]
            )
    head = [f"{layout}, {what}" for layout in ("contiguous", "channels last") for what in whats]
    return "\n".join([*table(["channels, images, fold", *head], lines), ""])


def classified(rows: Sequence[Row]) -> str:
    """Return the table of the accuracy of folded classifiers beside that of the same ones without folds."""
    ours = [row for row in rows if row["method"] == "ours" and not row["trial"] and not row["smoke"]]
    final = {(_recipe(row), row["changes"].get("fold")): 100 * row["accuracy"][-1] for row in ours if _is_plain(row)}
    pairs: dict[tuple[str, float, int], dict[int, tuple[float, float]]] = {}
    for (recipe, fold), value in final.items():
        if fold and (recipe, None) in final:
            task, ratio, seed, *_ = recipe
            pairs.setdefault((task, ratio, fold), {})[seed] = value, final[recipe, None]
    lines = []
    for (task, ratio, fold), found in sorted(pairs.items()):
        folded, plain = ({seed: pair[side] for seed, pair in found.items()} for side in (0, 1))
        texts = [mean_text(values.values()) for values in (folded, plain)]
        count, difference = len(found), paired(folded, plain)
        lines.append([TASKS[task].title, f"{ratio:g}", str(fold), str(count), *texts, str(difference or "–")])
    return "\n".join([*table(["", "ratio", "fold", "seeds", "folded", "not folded", "difference"], lines), ""])


def _is_plain(row: Row) -> bool:
    """Whether no setting was changed but the fold."""
    return set(row["changes"]) <= {"fold"}


def _recipe(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "ratio", "seed", "rate", "epochs"))


def markdown(text: str, kernels: Sequence[Row], training: Sequence[Row], models: Sequence[Row],
             language: Sequence[Row], convolutions: Sequence[Row], classifiers: Sequence[Row]) -> str:  # fmt: skip
    """Return the page with its results replaced."""
    text = insert(text, SPEED, speed(kernels, training, models))
    text = insert(text, CONVOLVED, convolved(convolutions))
    text = insert(text, CLASSIFIED, classified(classifiers))
    text = insert(text, HASHES, hashes(language))
    return insert(text, ACCURACY, accuracy(language))


def results() -> list[list[Row]]:
    """Return the committed rows, as `markdown` takes them."""
    return [load(path)["rows"] for path in (KERNELS, TRAINING, MODELS, LANGUAGE, CONVOLUTIONS, CLASSIFIERS)]


if __name__ == "__main__":
    write(DOCUMENT, markdown(DOCUMENT.read_text(encoding="utf-8"), *results()))

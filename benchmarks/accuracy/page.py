"""docs/accuracy.md, the tables behind it, their plots and the README's table of accuracy, from the raw rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from benchmarks.accuracy import picture, readme, tables_page
from benchmarks.accuracy.language import page as language
from benchmarks.accuracy.language import picture as language_picture
from benchmarks.accuracy.language.table import RESULTS as LANGUAGE_RESULTS
from benchmarks.accuracy.language.table import Table as LanguageTable
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.table import RESULTS, Row, Table, Variant
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.verdicts import IMAGE_VARIANTS, TEXT_VARIANT, not_hashed, verdicts
from benchmarks.documents import insert, listed, named_once, paragraph
from benchmarks.documents import table as table_lines
from benchmarks.rows import load, write
from benchmarks.stats import Difference, mean_and_error, sign_flip_p

DOCUMENT = Path(__file__).parents[2] / "docs" / "accuracy.md"
TABLES = "results/accuracy-tables.md"
# Beside labels alone from random values, which is the comparison: longer, taught, begun from a trained model.
OTHERWISE = {
    "resnet9": (*IMAGE_VARIANTS, Variant(24, None, warm=True), Variant(24, 0.9, warm=True)),
    "imdb": (TEXT_VARIANT,),
}

ABOUT = """
What does a model lose that stores 10 or 100 times fewer parameters, and does anything else that stores as few lose
less? A *ratio* is the dense model's parameters ÷ the parameters stored. [The tables]({tables}) have every method, seed,
setting and trial. Both pages are written by `python -m benchmarks.accuracy.page` from
[these](../benchmarks/results/{rows}) and [these raw rows](../benchmarks/results/{language_rows}).
"""
FAIR = """
All models are trained from scratch, unless a line says otherwise. All methods of a task train by one recipe, on the
same batches in the same order. Each chooses its step size, and on text its number of epochs, from the same candidates,
by trials that are judged on held-out examples; a rival's sizes are chosen in the same way or follow from the number of
parameters. The test set chooses nothing. *Stored* counts every parameter. The mask of a pruned model is not counted, in
its favour. Rivals that hash get roastify's λ and its preconditioner, which their papers do not have.
"""
WINS = """
Points of test accuracy (of the language model: nats a token) by which roastify is better (+) or worse (−) than the
dense model, and than the best of its rivals with as many stored parameters: means over seeds. **Bold** where a paired
t-test gives p ≤ 0.05. Three seeds show only differences that are large beside their noise, so the others may be small
rather than zero.
"""
OTHERWISE_ABOUT = """
*Distilled* models learn from the outputs of the trained dense model beside labels. The rival is the best that does not
hash, trained in the same way; the dense model never has a teacher.
"""
PARTS_ABOUT = """
Points of accuracy that three parts of roastify add, over all tasks, ratios and seeds that were run with and without:
"""
PARTS = {
    "local": ("one pool for all tensors, not one for each", 10.0),
    "whole": ("kernels from a basis", 2.0),
    "plain": ("the preconditioner", 1.0),
}
# When to use something else, and why; the first three get examples from the rows.
WHEN_NOT = {
    "A smaller dense model will do.": (
        "It saves arithmetic as well as parameters; roastify does so only in layers that it folds. Where most of a "
        "model is a vocabulary, and in language models, try it first."
    ),
    "A trained model is at hand and a mask costs nothing.": "Try pruning it by magnitude and training on.",
    "The model is small already.": "",
    "There is no time to train.": "Compression is trained; it gains from longer training and from a teacher.",
    "The last point of accuracy counts": "and the dense model fits.",
}


def is_hashed(method: str) -> bool:
    return METHODS[method].kind == "hash"


def is_rival(method: str) -> bool:
    return not_hashed(method) or is_hashed(method)


def cell(difference: Difference | None, name: str = "") -> str:
    """Return a table's cell with a difference in points, bold if it is clear, and whom it is to."""
    if difference is None:
        return "–"
    text = f"{difference.mean:+.2f}"
    return " ".join([f"**{text}**" if difference.is_clear else text, *([name] if name else [])])


def to_dense(table: Table, task: str, ratio: float) -> Difference | None:
    return table.difference(task, ratio, "ours", "dense", 1.0)


def to_best(table: Table, task: str, ratio: float, wanted: Callable[[str], bool]) -> tuple[str, Difference] | None:
    """Return the best rival of those wanted, and ours less it."""
    best = table.best(task, ratio, wanted)
    difference = table.difference(task, ratio, "ours", best[0], ratio) if best else None
    return None if best is None or difference is None else (METHODS[best[0]].title, difference)


def _beside(table: Table, task: str, ratio: float, wanted: Callable[[str], bool]) -> str:
    found = to_best(table, task, ratio, wanted)
    return "–" if found is None else cell(found[1], found[0])


def wins(table: Table, language_tables: Sequence[LanguageTable]) -> list[str]:
    """Return the table of who is better, by ratio."""
    ratios = {ratio for task in table.tasks() for ratio in table.ratios(task)}
    ratios = sorted({*ratios, *(ratio for each in language_tables for ratio in each.ratios())} - {1.0})
    lines = []
    for task in table.tasks():
        title = TASKS[task].title
        lines.append([title, "dense", *(cell(to_dense(table, task, ratio)) for ratio in ratios)])
        for what, wanted in (("best without hashing", not_hashed), ("best other hashing", is_hashed)):
            cells = [_beside(table, task, ratio, wanted) for ratio in ratios]
            if any(each != "–" for each in cells):
                lines.append([title, what, *cells])
    for each in language_tables:
        dense = [language.cell(language.ahead(each, ratio, "dense")) for ratio in ratios]
        rivals = []
        for ratio in ratios:
            best = each.best(ratio, language.is_rival)
            difference = language.ahead(each, ratio, best[0]) if best else None
            named = f" {language.METHODS[best[0]].title}" if best and difference else ""
            rivals.append(language.cell(difference) + named)
        lines += [[language.named(each), "dense", *dense], [language.named(each), "best rival", *rivals]]
    return table_lines(["", "beside", *(f"ratio {ratio:g}" for ratio in ratios)], named_once(lines))


def outcome(table: Table, task: str) -> str:
    """Return in words at which ratios roastify is ahead of every rival, and who is ahead of it."""
    found: dict[str, list[str]] = {}
    for ratio in table.ratios(task):
        best = to_best(table, task, ratio, is_rival) if ratio > 1 else None
        if best is not None:
            name, difference = best
            clear = f"is behind {name}" if difference.mean < 0 else "is ahead of every rival measured"
            what = clear if difference.is_clear else "is not clearly different from the best rival"
            found.setdefault(what, []).append(f"{ratio:g}")
    told = [f"{what} at {'ratio' if len(at) == 1 else 'ratios'} {listed(at)}" for what, at in found.items()]
    return f"roastify {listed(told)}." if told else ""


def outcomes(table: Table, language_tables: Sequence[LanguageTable]) -> Iterator[str]:
    """Yield a line for each task."""
    for task in table.tasks():
        if told := outcome(table, task):
            yield paragraph(f"{TASKS[task].title}: {told}", "- ")
    for each in language_tables:
        if told := language.outcome(each):
            yield paragraph(f"{language.named(each)}: {told}.", "- ")


def section(table: Table, task: str) -> Iterator[str]:
    """Yield a task's section: its picture and what it shows."""
    title = TASKS[task].title
    yield from [f"## {title[0].upper()}{title[1:]}", ""]
    yield from [f"![Accuracy against stored parameters](images/accuracy-{task}.svg)", ""]
    size, accuracy = table.stored(task, "dense", 1.0), table.mean(task, "dense", 1.0)
    if accuracy is not None:
        yield from [f"The dense model of {size:,} parameters reaches {accuracy:.1f} %.", ""]


def otherwise(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of models that were trained longer, with a teacher, or from a trained model."""
    lines = []
    for task, variants in OTHERWISE.items():
        for variant in variants:
            table = Table(rows, variant)
            for ratio in table.ratios(task):
                ours = table.mean(task, "ours", ratio)
                if ratio > 1 and ours is not None:
                    difference = to_dense(table, task, ratio)
                    rival = _beside(table, task, ratio, not_hashed)
                    named = [f"{_short(task)}, {variant}", f"{ratio:g}", f"{ours:.2f}"]
                    lines.append([*named, cell(difference), rival])
    if lines:
        yield from ["## Longer, with a teacher, or from a trained model", "", *OTHERWISE_ABOUT.strip().splitlines(), ""]
        yield from table_lines(["", "ratio", "roastify, %", "beside dense", "beside best rival"], named_once(lines))
        yield ""


def parts(table: Table) -> Iterator[str]:
    """Yield the table of what parts of roastify add."""
    lines = []
    for other, (what, least) in PARTS.items():
        pairs = table.pairs("ours", other, least)
        if pairs:
            flat = [value for values in pairs.values() for value in values]
            lost = [f"{_short(task)} {ratio:g}" for (task, ratio), values in pairs.items() if sum(values) <= 0]
            gain = f"{mean_and_error(flat)[0]:+.2f} (p = {sign_flip_p(flat):.2g}, {len(flat)} pairs)"
            lines.append([what, gain, ", ".join(lost) or "–"])
    if lines:
        yield from ["## What the parts add", "", *PARTS_ABOUT.strip().splitlines(), ""]
        yield from [*table_lines(["", "gain", "no gain at (task, ratio)"], lines), ""]


def when_not(rows: Sequence[Row], language_tables: Sequence[LanguageTable]) -> Iterator[str]:
    """Yield when to use something else, with the differences that say so."""
    table, warm = Table(rows), Table(rows, Variant(24, None, warm=True))
    smaller = []
    for ratio in table.ratios("imdb"):
        found = table.difference("imdb", ratio, "smaller", "ours", ratio)
        smaller += [f"IMDB at ratio {ratio:g} by {found.mean:.2f} points"] if found and found.mean > 0 else []
    for each in language_tables:
        for ratio in each.ratios():
            found = language.ahead(each, ratio, "smaller")
            named = f"{language.named(each).lower()} at ratio {ratio:g}"
            smaller += [f"{named} by {-found.mean:.3f} nats"] if found and found.mean < 0 else []
    begun = []
    for ratio in warm.ratios("resnet9"):
        found = warm.difference("resnet9", ratio, "magnitude", "ours", ratio)
        begun += [f"ResNet-9 at ratio {ratio:g} by {found.mean:.2f} points"] if found and found.mean > 0 else []
    small = {task: to_dense(table, task, 10.0) for task in ("resnet20", "resnet9") if task in table.tasks()}
    lost = [f"a {_short(task)} loses {-found.mean:.2f} points" for task, found in small.items() if found]
    examples = (_ahead(smaller), _ahead(begun), f"At ratio 10 {listed(lost)}." if lost else "", "", "")
    for (what, why), example in zip(WHEN_NOT.items(), examples, strict=True):
        yield paragraph(f"**{what}** {why} {example}", "- ")


def _ahead(cells: Sequence[str]) -> str:
    return f"It is ahead of roastify here: {listed(cells)}." if cells else ""


def _short(task: str) -> str:
    return {"imdb": "IMDB"}.get(task, TASKS[task].title.split(" on ")[0])


def aims(table: Table) -> str:
    """Return how many of the aims were met."""
    found = [verdict.met for verdict in verdicts(table)]
    judged = [met for met in found if met is not None]
    if not judged:
        return ""
    return paragraph(
        f"Of the aims that were set before measuring, {judged.count(True)} of {len(judged)} are met and "
        f"{judged.count(False)} missed: [which]({TABLES}#what-was-to-be-shown)."
    )


def markdown(rows: Sequence[Row], language_rows: Sequence[Row] = ()) -> str:
    """Return docs/accuracy.md of the raw rows, those of the language models among them."""
    table, of_language = Table(rows), language.tables(language_rows)
    about = ABOUT.format(tables=TABLES, rows=RESULTS.name, language_rows=LANGUAGE_RESULTS.name)
    lines = ["# Accuracy at equal stored parameters", "", paragraph(about), "", "## Who wins, by ratio", ""]
    lines += [*outcomes(table, of_language), "", WINS.strip(), "", *wins(table, of_language), "", aims(table), ""]
    lines += ["## How it was measured", "", FAIR.strip(), ""]
    for task in table.tasks():
        lines += section(table, task)
    lines += language.markdown(language_rows)
    lines += [*otherwise(rows), *parts(table)]
    lines += ["## When to use something else", "", *when_not(rows, of_language), ""]
    return "\n".join(lines)


@click.command()
@click.option("--rows", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=RESULTS)
@click.option("--language-rows", "language_path", type=click.Path(dir_okay=False, path_type=Path),
              default=LANGUAGE_RESULTS, help="Rows of the language models, if there are any.")  # fmt: skip
@click.option("--document", type=click.Path(dir_okay=False, path_type=Path), default=DOCUMENT)
def main(path: Path, language_path: Path, document: Path) -> None:
    """Write the page, its tables and plots from the raw rows; beside the page in docs/, the README's table too."""
    rows = load(path)["rows"]
    if not rows:
        raise click.ClickException(f"{path} holds no rows; python -m benchmarks.accuracy makes them")
    language_rows = load(language_path)["rows"]
    for source, found in ((path, rows), (language_path, language_rows)):
        if document == DOCUMENT and any(row["smoke"] for row in found):
            raise click.ClickException(
                f"{source} holds rows of a smoke test, which say nothing; name another --document"
            )
    tables = document.parent / TABLES
    write(document, markdown(rows, language_rows))
    write(tables, tables_page.markdown(rows, language_rows))
    written = [document, tables]
    if document == DOCUMENT:
        write(readme.README, insert(readme.README.read_text(encoding="utf-8"), readme.BEGIN, readme.markdown(rows)))
        written.append(readme.README)
    images = document.parent / "images"
    drawn = [*picture.draw(Table(rows), images), *language_picture.draw(LanguageTable(language_rows), images)]
    print(f"written to {', '.join(str(path) for path in (*written, *drawn))}")


if __name__ == "__main__":
    main()

"""docs/results/accuracy-tables.md from the raw rows: every cell, experiment and choice of the comparisons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from benchmarks.accuracy import trials
from benchmarks.accuracy.language import tables_page as language
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.runs import Run, of_row
from benchmarks.accuracy.table import RESULTS, Row, Table, final
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.teacher import TEMPERATURE
from benchmarks.accuracy.verdicts import IMAGE_VARIANTS, TEXT_VARIANT, not_hashed, verdicts
from benchmarks.stats import Difference, mean_and_error, mean_text, p_text, paired, sign_flip_p

# Columns that say which run a line is of.
NAMED = ("task", "method", "ratio", "change", "rate", "epochs")

METHOD = """
All models are trained from scratch. A seed fixes initial values, data order, augmentation, slots and masks, the same
for every method where they mean the same. All of a task's methods train with one recipe: batches of {batches};
Nesterov SGD for images, AdamW for text; a step size that grows over a fifth of the steps and then falls to zero; crops
and mirrors for images; bfloat16 autocast on a GPU, float32 on a CPU (of text, the smaller models from ratio 30 on).
Vectors do not decay.

Every method chooses its step size (on text the epochs too) from the same few candidates (on images without the
preconditioner, and in low rank, from two smaller ones as well), by one run each, on images a shorter one, that is
judged on 5,000 training examples held out of it; the choices are below, and where longer runs would have chosen
otherwise. The test set chooses nothing, and accuracy is that after the last epoch. A smaller text model is narrower and
knows fewer words; from ratio 30 on its width is about the best of several, judged likewise.

*Stored* counts every parameter: biases, norms, whatever is kept. A pruned model stores the weights that it keeps; its
mask is not counted, in its favour, although a bitmap of it takes a 32nd of the dense model's bytes, three times what is
left at ratio 100. roastify never stores more than asked and leaves up to one slot unused, so it may store a little less
than the others. Rivals that hash are given what their papers do not have: roastify's λ and its preconditioner. They
have whole kernels, as in their papers; "kernels without a basis" is roastify so.
"""

SHARING = """
One pool for all tensors against a region of it for each (`sharing="local"`), the preconditioner on against off, and
kernels made of a basis against whole ones, with as many stored parameters and each with a step size of its own choice.
Percentage points; p of a paired t-test for a line, of the sign-flip test for all lines (exact for up to 20 pairs).
"""

DISTILLED = """
Trained on labels and on the outputs of a teacher: the dense model of the same seed, trained first by its own recipe.
The loss is (1 − a) times the cross entropy of labels and a·T² times the divergence of the model's softmax(logits ÷ T)
from the teacher's; "distilled a at temperature T" names the two, which were chosen by trials of roastify alone, on
ResNet-9, and are the same for its rivals and for text. Rates, and on text epochs, are those that were chosen on labels
alone. Beside it is the same run on labels alone; the difference is over the seeds that both have. Epochs do not count
the teacher's.
"""

RECIPE = """
Means over seeds, their number in brackets where it is not three; of one seed, less than half a point says nothing.
"Kernels without a basis" is what roastify was before kernels had one, and `kernel_basis two thirds, sign element` what
it was from ratio 30 on before a basis had a third as many kernels as a kernel has positions: not a setting's name.

On text a sign for each element of a tile, and not for each of its rows, is better in pools of 80 to 90 slots of small
tiles, a little better in those of 70 to 110 large and of about 300 small ones, and no better from 350 on. The default
has it up to 64 slots, from where on its tiles are large: there signs by row cost a product nothing, and signs by
element make most layers slower than dense ones. Smaller tiles than the default's gain up to half a point on text at
ratio 30, and elsewhere no more than the noise; larger ones run faster.
"""


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table and an empty one."""
    return [*(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)), ""]


def section(title: str, text: str) -> list[str]:
    return [f"## {title}", "", *text.strip().splitlines(), ""]


def seeds_text(values: Collection[float]) -> str:
    """Return the mean over seeds, their number in brackets where it is not three."""
    return mean_text(values) + ("" if len(values) in (0, 3) else f" ({len(values)})")


def described(table: Table) -> str:
    made = sorted({(row["machine"]["device"], row["machine"]["torch"]) for row in table.rows})
    dates = sorted({row["machine"]["date"] for row in table.rows})
    machines = "; ".join(f"{device or 'CPU'}, torch {torch}" for device, torch in made)
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"The tables behind [accuracy.md](../accuracy.md), written by `python -m benchmarks.accuracy.page` from "
        f"[the raw rows](../../benchmarks/results/{RESULTS.name}), which `python -m benchmarks.accuracy` makes: "
        f"{len(table.rows)} runs; {machines}; {span}."
    )


def comparison(table: Table, task: str) -> Iterator[str]:
    """Yield a task's section: its picture, and the table of methods by ratio."""
    ratios = [ratio for ratio in table.ratios(task) if ratio > 1]
    dense = table.accuracies(task, "dense", 1.0)
    one = table.accuracies(task, "ours", 1.0)
    size = table.stored(task, "dense", 1.0)
    epochs = sorted({row["epochs"] for row in table.chosen if row["task"] == task})
    yield from [f"## {TASKS[task].title}", ""]
    if dense:
        at_one = f"; through roastify at ratio 1 {mean_text(one.values())}" if one else ""
        yield (
            f"The dense model of {size:,} parameters: {mean_text(dense.values())} %{at_one}. "
            f"{' or '.join(map(str, epochs))} epochs. Mean ± standard error over seeds, their number in brackets where "
            f"it is not three."
        )
        yield ""
    rows = [
        [METHODS[method].title, *(_cell(table, task, method, ratio) for ratio in ratios)]
        for method in table.methods(task)
        if METHODS[method].kind != "dense"
    ]
    if ratios:
        yield from table_lines(["method", *(f"ratio {ratio:g}" for ratio in ratios)], rows)
        stored = [f"{value:,}" if (value := table.stored(task, "ours", ratio)) else "–" for ratio in ratios]
        yield from [f"roastify stores {', '.join(stored)} parameters.", ""]


def _cell(table: Table, task: str, method: str, ratio: float) -> str:
    if (task, method, ratio) in table.unreachable:
        return "not reachable"
    text = seeds_text(table.accuracies(task, method, ratio).values())
    best = table.best(task, ratio, lambda name: METHODS[name].kind != "dense")
    return f"**{text}**" if best and best[0] == method else text


def against(table: Table, other: str, least_ratio: float) -> Iterator[str]:
    """Yield the table of ours less another method, seed by seed."""
    pairs = table.pairs("ours", other, least_ratio)
    rows = []
    for (task, ratio), values in pairs.items():
        difference = Difference(*mean_and_error(values), len(values) - 1)
        rows.append([TASKS[task].title, f"{ratio:g}", str(len(values)), str(difference)])
    if rows:
        flat = [value for values in pairs.values() for value in values]
        total = f"{sum(flat) / len(flat):+.2f} (p = {sign_flip_p(flat):.2g})"
        rows.append(["all", "", str(len(flat)), total])
        yield from table_lines(["task", "ratio", "seeds", f"roastify − {METHODS[other].title}"], rows)


def experiments(table: Table) -> Iterator[str]:
    """Yield the recipe's experiments, each beside the comparison's run of the same seed."""
    beside = []
    for row in sorted(table.experiments(), key=_order):
        what = _changes(row) or ("its own epochs" if row["tuned"] else "its own rate")
        beside.append((row, what, table.accuracies(row["task"], row["method"], float(row["ratio"])).get(row["seed"])))
    rows, held_out = _lines(beside), _lines(_held_out(table))
    if rows or held_out:
        yield from section("The recipe", RECIPE)
    head = [*NAMED, "stored", "accuracy", "difference"]
    if rows:
        yield from ["The last column is the accuracy less that of the same seeds in the comparison above.", ""]
        yield from table_lines(head, rows)
    if held_out:
        yield (
            "Shorter runs, judged on held-out training examples, by which settings are chosen; the last column is the "
            "accuracy less that of the unchanged recipe."
        )
        yield from ["", *table_lines(head, held_out)]
    if rates := list(_rates(table)):
        yield from ["Learning rates, likewise judged on held-out examples.", ""]
        yield from table_lines(["task", "method", "ratio", "change", "epochs", "rate: accuracy"], rates)


def _rates(table: Table) -> Iterator[list[str]]:
    """Yield what learning rates beyond those that every method chooses from give."""
    found: dict[tuple[str, str, float, int, str], list[Row]] = {}
    for run, row in table.trials().items():
        if "accuracy" in row and not set(row["changes"]) - {"share", "kernel_basis", "sign"}:
            found.setdefault((*run.cell, row["epochs"], _changes(row)), []).append(row)
    for (task, method, ratio, epochs, changes), rows in sorted(found.items()):
        candidates = trials.trials(dataclasses.replace(of_row(rows[0]), rate=None), TASKS[task])
        if len({row["rate"] for row in rows}) > 2 and not all(of_row(row) in candidates for row in rows):
            by_rate: dict[float, list[float]] = {}
            for row in sorted(rows, key=lambda row: row["rate"]):
                by_rate.setdefault(row["rate"], []).append(final(row))
            tried = "; ".join(f"{rate:g}: {sum(values) / len(values):.2f}" for rate, values in by_rate.items())
            yield [TASKS[task].title, METHODS[method].title, f"{ratio:g}", changes, str(epochs), tried]


def distilled(table: Table) -> Iterator[str]:
    """Yield the runs that learn from the dense model, each beside the same run on labels alone."""
    rows = []
    for with_teacher, alone in sorted(table.distilled(), key=lambda pair: _order(_first(pair[0]))):
        row = _first(with_teacher)
        found, without = ({seed: final(row) for seed, row in by_seed.items()} for by_seed in (with_teacher, alone))
        teachers = [100 * row["teacher_accuracy"] for row in with_teacher.values()]
        texts = [seeds_text(values) for values in (found.values(), without.values(), teachers)]
        rows.append([*_named(row, _changes(row)), *texts, str(paired(found, without) or "–")])
    if rows:
        yield from section("Distilled from the dense model", DISTILLED)
        yield from table_lines([*NAMED, "accuracy", "labels alone", "teacher", "difference"], rows)


def _first(by_seed: Mapping[int, Row]) -> Row:
    return next(iter(by_seed.values()))


def _held_out(table: Table) -> Iterator[tuple[Row, str, float | None]]:
    found = table.trials()
    for run, row in sorted(found.items(), key=lambda item: _order(item[1])):
        unchanged = found.get(dataclasses.replace(run, changes=()))
        if run.changes and "accuracy" in row:
            yield row, _changes(row), None if unchanged is None else final(unchanged)


def _lines(experiments: Iterable[tuple[Row, str, float | None]]) -> list[list[str]]:
    """Return a line for each experiment, its seeds together; of each run what it is called and its like's accuracy."""
    found: dict[tuple[str, ...], tuple[Row, dict[int, float], dict[int, float]]] = {}
    for row, what, same in experiments:
        _, accuracies, unchanged = found.setdefault(tuple(_named(row, what)), (row, {}, {}))
        accuracies[row["seed"]] = final(row)
        if same is not None:
            unchanged[row["seed"]] = same
    return [
        [*named, f"{row['stored']:,}", seeds_text(accuracies.values()), str(paired(accuracies, unchanged) or "–")]
        for named, (row, accuracies, unchanged) in found.items()
    ]


def _named(row: Row, what: str) -> list[str]:
    return [
        TASKS[row["task"]].title,
        METHODS[row["method"]].title,
        f"{row['ratio']:g}",
        what,
        f"{row['rate']:g}",
        str(row["epochs"]),
    ]


def _changes(row: Row) -> str:
    changes = dict(row["changes"])
    share, temperature = changes.pop("distill", None), changes.pop("temperature", TEMPERATURE)
    warm = ["from the trained dense model"] if changes.pop("warm", False) else []
    texts = [*warm, *(f"{name} {_plain(value)}" for name, value in changes.items())]
    return ", ".join(texts if share is None else [*texts, f"distilled {share:g} at temperature {temperature:g}"])


def _order(row: Row) -> tuple:
    names = tuple(sorted(row["changes"])), row["rate"] if not row["changes"] else 0, row["epochs"]
    return list(TASKS).index(row["task"]), row["method"], row["ratio"], names, str(row["changes"]), row["seed"]


def _plain(value: object) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def choices(table: Table) -> Iterator[str]:
    """Yield what each method's trials found."""
    made = table.trials()
    found: dict[tuple[str, str, float], list[tuple[float, int, float]]] = {}
    for run, row in made.items():
        if not run.changes and run in trials.trials(run, TASKS[run.task]) and "accuracy" in row:
            found.setdefault(run.cell, []).append((row["rate"], row["epochs"], final(row)))
    rows = []
    for (task, method, ratio), tried in found.items():
        chosen = trials.choose(Run(task, method, ratio), TASKS[task], made)
        texts = [f"{rate:g}, {epochs} epochs: {value:.2f}" for rate, epochs, value in sorted(tried)]
        best = f"{chosen.rate:g}" if TASKS[task].trial_epochs else f"{chosen.rate:g}, {chosen.epochs} epochs"
        rows.append([TASKS[task].title, METHODS[method].title, f"{ratio:g}", "; ".join(texts), best])
    if rows:
        ratios = " and ".join(f"{ratio:g}" for ratio in trials.RATIOS)
        about = (
            f"Held-out accuracy of each trial. Ratio 1 takes the dense model's choice; ratios beside {ratios} that of "
            f"the nearer of these."
        )
        yield from section("What was chosen", about)
        yield from table_lines(["task", "method", "ratio", "tried", "chosen"], rows)
    if otherwise := list(_longer_choices(table)):
        yield "Longer runs, of one seed and judged on the same examples, put another candidate first:"
        yield from ["", *otherwise, ""]


def _longer_choices(table: Table) -> Iterator[str]:
    """Yield a line for each cell whose candidates were also tried at full length, where that chooses another."""
    found = table.trials()
    for run in sorted({dataclasses.replace(run, rate=None, epochs=None) for run in found if not run.changes}, key=str):
        candidates = trials.trials(dataclasses.replace(run, trial=False), TASKS[run.task])
        rates = [dataclasses.replace(run, rate=rate, epochs=epochs) for rate, epochs in candidates.values()]
        if TASKS[run.task].trial_epochs and all("accuracy" in found.get(longer, {}) for longer in rates):
            chosen = trials.choose(dataclasses.replace(run, trial=False), TASKS[run.task], found)
            values = {longer.rate: final(found[longer]) for longer in rates}
            best = max(values, key=values.__getitem__)
            if best != chosen.rate:
                yield (
                    f"- {TASKS[run.task].title}, {METHODS[run.method].title}, ratio {run.ratio:g}: {best:g}, "
                    f"{values[best] - values[chosen.rate]:.2f} points above {chosen.rate:g}."
                )


def is_shared(method: str) -> bool:
    """Whether it shares by hashing, but not as roastify does by default."""
    return METHODS[method].converts and METHODS[method].kind != "ours"


def losses(table: Table) -> Iterator[str]:
    """Yield a line for each cell in which another method is above ours, in longer and taught comparisons as well."""
    yield from _losses(table, "")
    for variant in (*IMAGE_VARIANTS, TEXT_VARIANT):
        yield from _losses(Table(table.rows, variant), f", {variant}")


def _losses(table: Table, named: str) -> Iterator[str]:
    for task in table.tasks():
        for ratio in table.ratios(task):
            ours = table.mean(task, "ours", ratio)
            if ours is None or ratio == 1:
                continue
            for name, wanted in (("no hashing", not_hashed), ("hashing", is_shared)):
                best = table.best(task, ratio, wanted)
                if best and best[1] > ours:
                    difference = table.difference(task, ratio, best[0], "ours", ratio)
                    p = "" if difference is None or math.isnan(difference.p) else f", {p_text(difference.p)}"
                    yield (
                        f"- {TASKS[task].title}{named}, ratio {ratio:g}, {name}: {METHODS[best[0]].title} is "
                        f"{best[1] - ours:.2f} points above roastify{p}."
                    )


def markdown(rows: Sequence[Row], language_rows: Sequence[Row] = ()) -> str:
    """Return the page of the raw rows, those of the language models among them."""
    table = Table(rows)
    lines = ["# Tables of accuracy", "", described(table), "", "## What was to be shown", ""]
    found = [[verdict.aim, verdict.found, verdict.text] for verdict in verdicts(table)]
    lines += table_lines(["aim", "found", ""], found)
    for task in table.tasks():
        lines += comparison(table, task)
    lines += language.markdown(language_rows)
    # At ratio 1 no kernel has a basis.
    pairs = [*against(table, "local", 10.0), *against(table, "plain", 1.0), *against(table, "whole", 2.0)]
    if pairs:
        lines += [*section("One pool or many; the preconditioner; kernels from a basis", SHARING), *pairs]
    if lost := list(losses(table)):
        lines += section("What was more accurate", "Where something else with as many stored parameters was:")
        lines += [*lost, ""]
    lines += experiments(table)
    lines += distilled(table)
    batches = ", ".join(f"{TASKS[task].batch} ({TASKS[task].title})" for task in table.tasks())
    lines += [*section("Method", METHOD.format(batches=batches)), *choices(table)]
    return "\n".join(lines)

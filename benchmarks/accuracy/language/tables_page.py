"""The language model's part of docs/results/accuracy-tables.md, from the raw rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.accuracy.language.methods import METHODS
from benchmarks.accuracy.language.runs import RECIPE
from benchmarks.accuracy.language.table import RESULTS, Row, Table
from benchmarks.accuracy.language.trials import RATIOS
from benchmarks.documents import table as table_lines
from benchmarks.stats import mean_and_error, p_text, paired

TITLE = "Language model on the IMDB reviews' text"

METHOD = """
A decoder (pre-norm, RMSNorm, rotary positions, GELU, no biases, the head tied to the word table) learns to predict the
next token of reviews, in a byte-pair vocabulary of {words:,} words learned from the training text. Dense, it is
{width} wide, {depth} layers deep and stores {size:,} parameters. All methods train with one recipe: {steps:,} steps of
{batch} sequences of {context} tokens; AdamW (betas {betas}, decay {decay:g} of whatever has two dimensions or more),
gradients clipped at norm {clip:g}; a rate that grows over a tenth of the steps and then falls to zero along a cosine;
bfloat16 autocast. A seed fixes initial values, the order of sequences and the mapping, the same for every method where
they mean the same. Reviews of both of the data set's splits are used, each text once: 1,000 choose rates and sizes and
2,000 others give the loss, which is in nats a token; no model trains on these. A lower loss is better.

Trials of {trial_steps:,} steps choose the rate of every method and the sizes of every rival, at ratios {ratios}; other
ratios take the choice of the nearer. Rivals: a *smaller dense model*, whose width follows from the depth and from
whether its word table is factored; *tied layers* (ALBERT), some of whose layers' weights are repeated over the depth;
*low rank*, W = U·V; *Monarch*, two block-diagonal factors with a permutation between. In the last two the word table
has a rank of its own, where a whole one would take more than a share of the budget. No rival is wider than the dense
model.

*Stored* counts every parameter. *Multiply-adds* are those of the matrix products with weights in a forward pass, for a
token; attention's own products are left out, and so is the folding itself, which only adds. *Step* is the time of a
whole training step (forward, backward, clipping, AdamW; one CUDA graph): the median over 200 steps of a run, and of
these the median over seeds. A rival's ranks are what the budget allows; where they are not multiples of 8, its products
are slower than those of a rank that is.
"""


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return the section's lines; none without rows of the comparison."""
    table = Table(rows)
    if not table.by_cell:
        return []
    ratios = table.ratios()
    lines = [f"## {TITLE}", "", described(rows), "", *_method(), ""]
    dense = table.losses("dense", 1.0)
    if (row := table.first("dense", 1.0)) is not None:
        lines += [
            f"The dense model of {row['stored']:,} parameters: {loss_text(dense.values())} nats a token, "
            f"{_millions(row['multiply_adds'])} M multiply-adds a token, {row['step']['median_ms']:.2f} ms a step.",
            "",
        ]
    if ratios:
        lines += [
            "Held-out loss, mean ± standard error over seeds, their number in brackets where it is not three:",
            "",
        ]
        head = ["method", *(f"ratio {ratio:g}" for ratio in ratios)]
        found = [
            [METHODS[method].title, *(_cell(table, method, ratio) for ratio in ratios)] for method in _below(table)
        ]
        lines += [*table_lines(head, found), ""]
        lines += ["What each cell costs:", ""]
        head = ["method", "ratio", "stored", "multiply-adds, M", "step, ms", "rate", "sizes"]
        lines += [*table_lines(head, list(_costs(table))), ""]
    if lost := list(losses(table)):
        lines += ["Where a rival that stores as much has a lower loss than the best of roastify:", "", *lost, ""]
    if rows_changed := list(_others(table)):
        lines += [
            "Other settings and widths; the difference is to the same seeds without the change, and below 0 is better:",
            "",
        ]
        head = ["method", "ratio", "width", "setting", "rate", "steps", "loss", "difference", "multiply-adds, M",
                "step, ms"]  # fmt: skip
        lines += [*table_lines(head, rows_changed), ""]
    if tried := list(_trials(table)):
        lines += ["What trials found, from the lowest loss on the validation reviews:", ""]
        lines += [*table_lines(["method", "ratio", "rate, sizes: loss"], tried), ""]
    return lines


def described(rows: Sequence[Row]) -> str:
    made = sorted({(row["machine"]["device"], row["machine"]["torch"]) for row in rows if "loss" in row})
    dates = sorted({row["machine"]["date"] for row in rows if "loss" in row})
    machines = "; ".join(f"{device or 'CPU'}, torch {torch}" for device, torch in made)
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"From [these raw rows](../../benchmarks/results/{RESULTS.name}), which "
        f"`python -m benchmarks.accuracy.language` makes: {len(rows)} runs; {machines}; {span}."
    )


def _method() -> list[str]:
    shape = RECIPE.shape
    facts = {
        "words": shape.words, "width": shape.width, "depth": shape.depth, "size": shape.size, "steps": RECIPE.steps,
        "batch": RECIPE.batch, "context": RECIPE.context, "betas": " and ".join(map(str, RECIPE.betas)),
        "decay": RECIPE.decay, "clip": RECIPE.clip, "trial_steps": RECIPE.trial_steps,
        "ratios": " and ".join(f"{ratio:g}" for ratio in RATIOS),
    }  # fmt: skip
    return METHOD.format(**facts).strip().splitlines()


def loss_text(values: Iterable[float]) -> str:
    """Return the mean over seeds with its standard error, the number of seeds in brackets where it is not three."""
    found = list(values)
    if not found:
        return "–"
    mean, error = mean_and_error(found)
    text = f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
    return text if len(found) == 3 else f"{text} ({len(found)})"


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f}"


def _below(table: Table) -> list[str]:
    return [method for method in table.methods() if method != "dense"]


def _cell(table: Table, method: str, ratio: float) -> str:
    if (method, ratio) in table.unreachable:
        return "not reachable"
    text = loss_text(table.losses(method, ratio).values())
    if (method, ratio) in table.diverged:
        return "diverged" if text == "–" else f"{text}, and diverged"
    best = table.best(ratio, lambda name: name != "dense")
    return f"**{text}**" if best is not None and best[0] == method else text


def _costs(table: Table) -> Iterator[list[str]]:
    for ratio in table.ratios():
        for method in _below(table):
            row, step = table.first(method, ratio), table.step(method, ratio)
            if row is not None and step is not None:
                counts = [f"{row['stored']:,}", _millions(row["multiply_adds"]), f"{step:.2f}"]
                yield [METHODS[method].title, f"{ratio:g}", *counts, f"{row['rate']:g}", row["note"]]


def losses(table: Table) -> Iterator[str]:
    """Yield a line for each ratio at which the best rival is below the best of ours."""
    for ratio in table.ratios():
        ours = table.best(ratio, lambda name: METHODS[name].is_ours)
        rival = table.best(ratio, lambda name: not METHODS[name].is_ours and name != "dense")
        if ours is not None and rival is not None and (amount := table.below(ratio, rival[0], ours[0])) > 0:
            difference = table.difference(ratio, rival[0], ours[0])
            p = "" if difference is None or math.isnan(difference.p) else f", {p_text(difference.p)}"
            yield (
                f"- ratio {ratio:g}: {METHODS[rival[0]].title}, {amount:.3f} nats below {METHODS[ours[0]].title}{p}."
            )


def _others(table: Table) -> Iterator[list[str]]:
    for other, by_seed in table.others().items():
        found = {seed: row["loss"] for seed, row in by_seed.items()}
        difference = paired(found, table.without(other))
        times = [row["step"]["median_ms"] for row in by_seed.values()]
        yield [
            METHODS[other.method].title,
            f"{other.ratio:g}",
            str(other.width),
            other.changes or "–",
            f"{other.rate:g}",
            f"{other.steps:,}",
            loss_text(found.values()),
            "–" if difference is None else f"{difference.mean:+.3f}",
            _millions(next(iter(by_seed.values()))["multiply_adds"]),
            f"{mean_and_error(times)[0]:.2f}",
        ]


def _trials(table: Table) -> Iterator[list[str]]:
    for (method, ratio), rows in table.trials().items():
        texts = [f"{row['rate']:g}{', ' + row['sizes'] if row['sizes'] else ''}: {_outcome(row)}" for row in rows]
        yield [METHODS[method].title, f"{ratio:g}", "; ".join(texts)]


def _outcome(row: Row) -> str:
    if "unreachable" in row:
        return "not reachable"
    return "diverged" if row["loss"] is None else f"{row['loss']:.3f}"

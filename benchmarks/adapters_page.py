"""The results in docs/adapters.md, the table behind them and their plot, from the rows of the adapter benchmark."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.adapters import METHODS, RESULTS, SEEDS, Method, chosen_rate, of_method
from benchmarks.documents import insert, measured_on, paragraph, table
from benchmarks.plots import BLACK, BLUE, GREEN, ORANGE, WIDTH, save
from benchmarks.rows import Row, load, write
from benchmarks.stats import Difference, mean_and_error, mean_text, p_text, paired

DOCUMENT = Path(__file__).parents[1] / "docs" / "adapters.md"
TABLES = "results/adapters-tables.md"
BEGIN = "<!-- results: written by `python -m benchmarks.adapters_page` -->"
PICTURE = "adapters"
# What the others are compared with.
WHOLE = METHODS[0]
# The ratio at which LoRA's accuracy was the aim.
AIM = 50
# How each kind is drawn and called.
KINDS = {
    "lora": ("LoRA", BLACK, "o"),
    "pool": ("LoRA in a pool", BLUE, "s"),
    "unilora": ("PEFT's Uni-LoRA", ORANGE, "^"),
    "head": ("head alone", GREEN, "D"),
}
Sides = dict[str, tuple[Method, list[Row]]]


def sides_of(rows: list[Row]) -> Sides:
    """Return by method its rows at the rate that was chosen; what an interrupted run has not come to is left out."""
    found: Sides = {}
    for method in METHODS:
        if of_method(rows, method):
            rate = chosen_rate(method, rows)
            side = sorted((row for row in of_method(rows, method) if row["rate"] == rate), key=lambda row: row["seed"])
            if len(side) == len(SEEDS):
                found[method.name] = method, side
    return found


def tests(side: list[Row]) -> dict[int, float]:
    return {row["seed"]: row["test"] for row in side}


def is_usual(method: Method) -> bool:
    """Whether a method is as roastify and PEFT have it, and not with a setting changed."""
    return method.start_scale is None and method.tile == "auto"


def conclusions(result: dict[str, Any]) -> str:
    """Return the results of docs/adapters.md: the picture, and what it says."""
    rows = result["rows"]
    sides = sides_of(rows)
    whole = sides[WHOLE.name][1]
    about = (
        f"Trained with {len(SEEDS)} seeds on {rows[0]['train']:,} reviews; the learning rate of each method is the "
        f"best of a grid on held-out reviews. LoRA of rank {WHOLE.rank} trains {whole[0]['stored']:,} parameters, the "
        f"head's among them, and reaches {mean_text(tests(whole).values())} %. [The table]({TABLES}) has all means, "
        f"sizes and rates."
    )
    lines = [f"![Test accuracy against trained parameters](images/{PICTURE}.svg)", "", paragraph(about), ""]
    for name, (method, side) in sides.items():
        said = name != WHOLE.name and method.kind in ("lora", "pool") and is_usual(method)
        difference = paired(tests(side), tests(whole)) if said else None
        if difference is not None:
            text = f"{name}, {side[0]['stored']:,} parameters: {_placed(difference)} LoRA of rank {WHOLE.rank}."
            if (method.kind, method.ratio, method.rank) == ("pool", AIM, WHOLE.rank):
                missed = difference.is_clear and difference.mean < 0
                text += f" LoRA's accuracy at this ratio was the aim, which is {'missed' if missed else 'met'}."
            lines.append(paragraph(text, "- "))
    for name, (method, side) in sides.items():
        for other, (theirs, their_side) in sides.items():
            same = (method.rank, method.ratio) == (theirs.rank, theirs.ratio)
            if same and (method.kind, theirs.kind) == ("pool", "unilora") and is_usual(method):
                difference = paired(tests(side), tests(their_side))
                if difference is not None:
                    lines.append(f"- {name}: {_placed(difference)} {other}, which stores as much.")
    lines += [told for method in METHODS if method.start_scale is not None and (told := _scaled(rows, method))]
    return "\n".join([*lines, ""])


def _placed(difference: Difference) -> str:
    return f"{difference.mean:+.2f} points ({p_text(difference.p)}), {difference.place}"


def _scaled(rows: list[Row], method: Method) -> str:
    """Return how a method with another λ compares with the usual one at the same rates and seeds."""
    usual = next(each for each in METHODS if each.kind == "pool" and each.ratio == method.ratio and is_usual(each))
    ours, theirs = (
        {(row["rate"], row["seed"]): row["test"] for row in of_method(rows, each)} for each in (method, usual)
    )
    differences = [ours[cell] - theirs[cell] for cell in ours if cell in theirs]
    if not differences:
        return ""
    text = (
        f"{method.name} (the random factor moves that much as far as the other): {mean_and_error(differences)[0]:+.2f} "
        f"points beside {usual.name}, at the same rates and seeds ({len(differences)})."
    )
    return paragraph(text, "- ")


def markdown(result: dict[str, Any]) -> str:
    """Return docs/results/adapters-tables.md."""
    rows, made = result["rows"], result["machine"]
    sides = sides_of(rows)
    whole = tests(sides[WHOLE.name][1])
    lines = []
    for name, (_, side) in sides.items():
        difference = paired(tests(side), whole) if name != WHOLE.name else None
        first = side[0]
        lines.append(
            [
                name,
                f"{first['stored']:,}",
                f"{first['bytes'] / 1000:,.0f}",
                mean_text(tests(side).values()),
                "" if difference is None else str(difference),
                f"{first['rate']:.2g}",
                f"{sum(row['seconds'] for row in side) / len(side):.0f}",
            ]
        )
    first = rows[0]
    about = (
        f"The table behind [adapters.md](../adapters.md): test accuracy in %, mean ± standard error over {len(SEEDS)} "
        f"seeds, from [the raw rows](../../benchmarks/results/{RESULTS.name}): {measured_on(made)}, peft "
        f"{made['peft']}. Each run trains on {first['train']:,} reviews in {first['steps']:,} steps of "
        f"{first['batch']}, in bfloat16 autocast, replayed from a CUDA graph. The learning rate is the best of a grid "
        f"on held-out reviews with the first seed; a grid grows while its best rate lies at an end. Parameters are "
        f"those that are trained, the head's among them; kB are all files of a saved adapter."
    )
    head = ["", "parameters", "kB", "accuracy", "less LoRA", "rate", "s"]
    return "\n".join(["# Table of adapters", "", paragraph(about), "", *table(head, lines), ""])


def compare(rows: list[Row]) -> Figure:
    """Test accuracy by trained parameters, with the range of the seeds."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8))
    labelled = set()
    for name, (method, side) in sides_of(rows).items():
        if not is_usual(method):
            continue
        title, colour, marker = KINDS[method.kind]
        values = tests(side).values()
        mean = mean_and_error(values)[0]
        axes.errorbar(
            side[0]["stored"],
            mean,
            [[mean - min(values)], [max(values) - mean]],
            color=colour,
            marker=marker,
            markersize=8,
            capsize=3,
            linestyle="none",
            label=None if title in labelled else title,
        )
        labelled.add(title)
        # Kinds of as many parameters are neighbours, so each has its names on a side of its own.
        text = f"÷ {method.ratio:g}" if method.kind in ("pool", "unilora") else name
        place, side_of = {"lora": ((8, 5), "left"), "pool": ((-9, 0), "right")}.get(method.kind, ((9, -9), "left"))
        if method.kind == "pool" and method.rank != WHOLE.rank:
            text, place, side_of = f"{text}, rank {method.rank}", (9, -4), "left"
        axes.annotate(
            text, (side[0]["stored"], mean), place, textcoords="offset points", fontsize=10, ha=side_of, color=colour
        )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("trained parameters, the head's among them (on a logarithmic scale)")
    axes.set_ylabel("test accuracy, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    """Write the results, their table and their plot."""
    result = load(RESULTS)
    write(DOCUMENT, insert(DOCUMENT.read_text(encoding="utf-8"), BEGIN, conclusions(result)))
    write(DOCUMENT.parent / TABLES, markdown(result))
    save({PICTURE: partial(compare, result["rows"])}, DOCUMENT.parent / "images")


if __name__ == "__main__":
    main()

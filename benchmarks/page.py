"""docs/performance.md, the tables behind it and their plots, from the raw rows of the GPU and CPU benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import click

from benchmarks import cpu, documents, performance_plots
from benchmarks.documents import listed, paragraph, span
from benchmarks.performance_plots import is_usual
from benchmarks.performance_tables_page import (
    KERNELS,
    MODELS,
    SECTIONS,
    Results,
    layer,
    missed,
    verdicts,
    with_ours,
)
from benchmarks.performance_tables_page import markdown as tables_markdown
from benchmarks.rows import Row, is_folded, load, write

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
TABLES = "results/performance-tables.md"
# Rows of a batch by which layers are summed up.
BATCHES = (1, 16, 64, 512, 2048, 8192)
# A ratio of times that is closer to 1 says nothing.
EVEN = 0.005

ABOUT = """
Is a converted model faster than the dense one? Folded layers save arithmetic ([folding.md](folding.md)) and mostly are.
Layers that are not folded save memory alone: they are faster where a product waits for its weights, and slower where
it waits for arithmetic. Times are those of dense layers in cuBLAS ÷ ours, so above 1 ours are faster. Both sides are
measured in one run: {machine}; bfloat16 and CUDA graphs, unless a line says otherwise.
[The tables]({tables}) have every case, the method and the raw rows. Both pages are written by
`python -m benchmarks.page`.
"""
SPANS = """
Slowest to fastest of the layers measured. Weights of at least a million elements are folded by default, from ratio 2
on, 8 times from ratio 8 on; of those below folded 4 times, the ones of 768×768 are smaller than that.
"""
SIGNS = """
Pools with fewer than 64 slots have a sign for each element, unless most of the pool holds convolution kernels. Their
layers, not folded, are {span} times as fast as dense ones."""
LIMITS = """
An aim is what this project set itself before measuring. {met} of {all} are met.
"""
MODELS_ABOUT = """
Both sides under `torch.compile`. A decoding step has one new token for each sequence. "Folds" marks models with
folded layers; the others were measured before layers could be folded. Peak memory is a side's weights and what one call
allocates.
"""
WHY = """
Why the others are missed: between the least time (every weight read once, from the cache) and a small layer's time lie
the start and the end of a kernel, a second kernel that adds partial sums, and activations, which every program reads
for itself. A folded layer launches one kernel more, which layers of 768×768 do not repay. Forward and backward together
also write the weight out and reduce its gradient into the pool. Where a pool is too large for a fold, as the largest
beside HashedNet are, the product saves no arithmetic. What was tried without gain is in
[the tables]({tables}#method).
"""


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of layers by what they are of."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["regime"] in ("linear", "training", "folded") and is_usual(row):
            folded = f"folded {row['fold']} times" if row["regime"] == "folded" else "not folded"
            both = row["regime"] == "training" or row.get("backward")
            found.setdefault(f"{folded}, {'forward and backward' if both else 'forward'}", []).append(row)
    return dict(sorted(found.items(), key=lambda item: ("backward" in item[0], "not" not in item[0], item[0][::-1])))


def spans(rows: Sequence[Row]) -> list[str]:
    """Return the table of layers by rows of the batch."""
    lines = []
    for what, found in groups(rows).items():
        by_batch = [[row["dense_over_pool"] for row in found if row["rows"] == batch] for batch in BATCHES]
        lines.append([what, *(span(values) if values else "–" for values in by_batch)])
    return documents.table(["rows of the batch", *(f"{batch:,}" for batch in BATCHES)], lines)


def slower(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each kind of layer that has cases slower than dense."""
    for what, found in groups(rows).items():
        texts: dict[str, list[str]] = {}
        lost = [row for row in found if row["dense_over_pool"] < 1 - EVEN]
        for row in lost:
            texts.setdefault(layer(row), []).append(f"{row['dense_over_pool']:.2f} at {row['rows']:,}")
        if texts:
            told = "; ".join(f"{name} {', '.join(cases)}" for name, cases in texts.items())
            yield paragraph(f"{what[0].upper()}{what[1:]}, {len(lost)} of {len(found)} cases: {told} rows.", "- ")
    elements = [row["dense_over_pool"] for row in rows if row["regime"] == "linear" and row["sign"] == "element"]
    if elements:
        yield paragraph(SIGNS.format(span=span(elements)), "- ")
    for what, title in (("embedding", "Embeddings"), ("embedding backward", "The backward pass of embeddings")):
        values = [row["dense_over_pool"] for row in rows if row["regime"] == "memory" and row["what"] == what]
        if values:
            yield f"- {title}: {span(values)}."


def whole_models(found: Results) -> Iterator[str]:
    """Yield the section of whole models."""
    rows = [row for row in found["rows"] if row.get("dense_over_converted")]
    if not rows:
        return
    yield from ["## Whole models", ""]
    yield from ["![Dense time over converted time, by model](images/models.svg)", ""]
    told = [paragraph(MODELS_ABOUT)]
    for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in rows):
        cases = [row for row in rows if (row["model"], row["kind"]) == (model, kind)]
        low, high = (choose(cases, key=lambda row: row["dense_over_converted"]) for choose in (min, max))
        least = min(cases, key=lambda row: row["converted"]["peak_bytes"])
        times = list(dict.fromkeys(f"{row['dense_over_converted']:.2f} at {_case(row)}" for row in (high, low)))
        memory = [f"{least[side]['peak_bytes'] / 1e6:,.0f}" for side in ("dense", "converted")]
        text = f"{model}, {kind}: {' to '.join(times)}; peak memory at best {' → '.join(memory)} MB."
        told.append(paragraph(text, "- "))
    yield from [told[0], "", *told[1:], ""]


def _case(row: Row) -> str:
    return f"batch {row['batch']}, ratio {row['ratio']:g}{', with folds' if is_folded(row) else ''}"


def batch_text(count: int) -> str:
    """Return a number of rows in words."""
    return f"{count:,} {'row' if count == 1 else 'rows'}"


def beside_hashednet(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the section about HashedNet, of the largest layer and batch."""
    measured = [row for row in rows if row["regime"] == "hashednet" and "pool" in row]
    if not measured:
        return
    largest = max((row["shape"], row["rows"]) for row in measured)
    measured = [row for row in measured if (row["shape"], row["rows"]) == largest]
    yield from ["## Beside HashedNet", "", "![Times over the faster of ours](images/hashednet.svg)", ""]
    yield from [
        paragraph("HashedNet hashes each weight by itself. Its fused kernel here is tuned for each size."),
        "",
    ]
    for what in dict.fromkeys(row["what"] for row in measured):
        for title, wanted in (("pools small enough for a fold", True), ("larger pools", False)):
            cases = [row for row in measured if row["what"] == what and ("folded" in row) == wanted]
            if cases:
                fused = span((row["hashednet_over_ours"] for row in cases), 1)
                ours = [min(row[side]["median_us"] for side in ("pool", "folded") if side in row) for row in cases]
                out, dense = (
                    span((row[side]["median_us"] / best for row, best in zip(cases, ours, strict=True)), 1)
                    for side in ("hashednet_gathered", "dense")
                )
                yield paragraph(
                    f"{what.capitalize()}, {title}: ours are {fused} times as fast as HashedNet's fused kernel, "
                    f"{out} times as fast as HashedNet written out for cuBLAS, {dense} times as fast as dense.",
                    "- ",
                )
    yield ""


def on_a_cpu(found: Results) -> Iterator[str]:
    """Yield the section about CPUs, its ratios as the other sections have them."""
    rows = [row for row in found["rows"] if row["case"] == "linear"]
    if not rows:
        return
    made = found["machine"]
    yield from ["## On a CPU", "", f"{made['cpu']}, {made['threads']} threads, torch {made['torch']}, float32.", ""]
    kinds: dict[str, Callable[[Row], bool]] = {
        "Folded": lambda row: row["fold"] > 1,
        "Not folded": lambda row: row["fold"] == 1,
    }
    for kind, wanted in kinds.items():
        cases = [row for row in rows if wanted(row)]
        texts = [
            f"{1 / row['pool_over_dense']:.2f} ({layer(row)}, ratio {row['ratio']:g}, {batch_text(row['rows'])}"
            + (f", {row['layers']} layers)" if row["layers"] > 1 else ")")
            for row in sorted(cases, key=lambda row: row["pool_over_dense"])
        ]
        if texts:
            ends = listed([texts[0], *texts[1:][-1:]], "down to")
            yield paragraph(f"{kind}: {ends} times as fast as dense.", "- ")
    yield ""


def limits(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the section about aims."""
    aimed = verdicts(rows)
    if not aimed:
        return
    yield from ["## Limits reached and missed", ""]
    yield from [paragraph(LIMITS.format(met=aimed.count(False), all=len(aimed))), ""]
    lines = []
    for regime, section in SECTIONS.items():
        found = [row for row in rows if row["regime"] == regime and missed(row, section.value) is not None]
        if found:
            worst = min(found, key=lambda row: row.get(section.value, 0.0) / row["aim"])
            farthest = (
                f"{layer(worst)}, {batch_text(worst['rows'])}: {worst.get(section.value, 0.0):.2f} of {worst['aim']:g}"
            )
            met = sum(not missed(row, section.value) for row in found)
            lines.append([section.title, f"{met} of {len(found)}", farthest if met < len(found) else "–"])
    yield from [*documents.table(["", "aims met", "farthest from its aim"], lines), ""]
    yield from [paragraph(WHY.format(tables=TABLES)), ""]


def markdown(kernels: Results, models: Results, of_cpu: Results) -> str:
    """Return docs/performance.md of the raw results."""
    rows = with_ours(kernels["rows"])
    about = ABOUT.format(machine=documents.measured_on(kernels["machine"]), tables=TABLES)
    lines = ["# Performance", "", paragraph(about), "", "## Layers", ""]
    lines += ["![Dense time over ours by rows, for each layer](images/layers.svg)", "", SPANS.strip(), ""]
    lines += [*spans(rows), "", "Slower than dense are:", "", *slower(rows), ""]
    lines += [*whole_models(models), *beside_hashednet(rows), *on_a_cpu(of_cpu), *limits(rows)]
    return "\n".join(lines)


@click.command()
def main() -> None:
    """Write the page, its tables and plots from the committed raw rows."""
    kernels, models, of_cpu = load(KERNELS), load(MODELS), load(cpu.RESULTS)
    tables = DOCUMENT.parent / TABLES
    write(DOCUMENT, markdown(kernels, models, of_cpu))
    write(tables, tables_markdown(kernels, models, of_cpu))
    drawn = performance_plots.draw(kernels["rows"], models["rows"], DOCUMENT.parent / "images")
    print(f"written to {', '.join(str(path) for path in (DOCUMENT, tables, *drawn))}")


if __name__ == "__main__":
    main()

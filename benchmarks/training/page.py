"""docs/training-cost.md, the tables behind it and their plots, from the raw rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from benchmarks.documents import listed, named_once, paragraph, table
from benchmarks.rows import Row, is_folded, load, write
from benchmarks.training import kernel_times, plots, tables_page
from benchmarks.training.tables_page import RESULTS, machines, single_rows

DOCUMENT = Path(__file__).parents[2] / "docs" / "training-cost.md"
TABLES = "results/training-tables.md"

ABOUT = """
What does a training step of a converted model take beside the dense one's, in time and in memory? A step is forward in
bfloat16 autocast, backward, clipping and AdamW, on random data. [The tables]({tables}) have every case, the method and
the raw rows; both pages are written by `python -m benchmarks.training.page`. Several GPUs are in
[distributed.md](distributed.md#measured).
"""
TIME = """
Time of a converted step ÷ time of a dense one, so below 1 the converted model is faster. Layers of at least a million
weights are folded ([folding.md](folding.md)); models without folded layers are named apart: they have no such layer, or
were measured before layers could be folded, or with `fold = "none"`.
"""
ADVICE = """
So on a GPU, capture the step as a CUDA graph, or compile with `mode="reduce-overhead"`: a converted layer launches more
operators than a dense one, and where Python launches them one by one that sets the time. Where neither is possible, try
`fold = "none"`{example}.
"""
KERNELS = """
Milliseconds that the GPU works for one step as a CUDA graph, by kind of kernel: `python -m
benchmarks.training.kernel_times` asks the profiler. "Pool and folds" are roastify's kernels, "products" are cuBLAS's,
and "optimizer" is AdamW and clipping. The rest is norms, activations, losses, casts and copies. No column has the gaps
between kernels.
"""
LIMITS = """
How much of the dense model's kernels remains in the converted one's. Attention and the rest work on activations, which
compression leaves as they are, so no compressed step is shorter. With the products that folding leaves, they are what a
step would take if reading the pool and the optimizer cost nothing.
"""
MEMORY = """
Parameters, gradients and the optimizer's state fall by the ratio. Activations do not, so what a whole step takes falls
less:
"""


def extremes(rows: Sequence[Row]) -> str:
    """Return the fastest and the slowest of some cases, with their names."""
    ends = sorted(rows, key=lambda row: row["step_ratio"])
    named = [f"{row['step_ratio']:.2f} ({row['task']}, ratio {row['ratio']:g})" for row in (ends[0], ends[-1])]
    return " to ".join(dict.fromkeys(named))


def times(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each way to run a step, apart for models without folded layers."""
    for mode, (title, *_) in plots.MODES.items():
        for folded, of_what in ((True, ""), (False, ", no layer folded")):
            found = [row for row in rows if row["mode"] == mode and is_folded(row) == folded]
            if found:
                faster = sum(row["step_ratio"] < 1 for row in found)
                yield paragraph(
                    f"{title[0].upper()}{title[1:]}{of_what}: {extremes(found)}; {faster} of {len(found)} faster than "
                    f"dense.",
                    "- ",
                )


def without_folds(rows: Sequence[Row]) -> str:
    """Return where eager steps were measured with folds and without, as an example in brackets."""
    eager = {(row["task"], row["ratio"]): row["step_ratio"] for row in rows if row["mode"] == "eager"}
    found = [
        f"{task} at ratio {ratio:g}: {eager[f'{task}, no folds', ratio]:.2f} instead of {value:.2f}"
        for (task, ratio), value in eager.items()
        if (f"{task}, no folds", ratio) in eager
    ]
    return f" ({'; '.join(found)})" if found else ""


def kernels(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of where the time of steps goes, and what limits them."""
    measured = [row for row in rows if "failure" not in row]
    kinds = [*kernel_times.KINDS, kernel_times.REST]
    lines = [
        [row["task"], side, *(f"{row[side][kind]:.2f}" for kind in kinds), f"{sum(row[side].values()):.2f}"]
        for row in measured
        for side in ("dense", "converted")
    ]
    yield from [*table(["model", "side", *kinds, "sum"], named_once(lines)), "", paragraph(LIMITS), ""]
    for row in measured:
        left, dense = row["converted"], sum(row["dense"].values())
        fixed = left["attention"] + left[kernel_times.REST]
        told = f"{row['task']} at ratio {row['ratio']:g}: attention and the rest {fixed / dense:.2f}, with products "
        told += f"{(fixed + left['products']) / dense:.2f}, all kernels {sum(left.values()) / dense:.2f}"
        yield f"- {told} (aim {row['time_aim']:.2f})."
    yield from (
        f"- {row['task']} at ratio {row['ratio']:g} failed: {row['failure']}" for row in rows if "failure" in row
    )


def held(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the peaks are, a line for each ratio."""
    shown = plots.with_memory(rows)
    for ratio in sorted({row["ratio"] for row in shown}):
        parts = {
            row["task"]: row["converted"]["memory"]["peak"] / row["dense"]["memory"]["peak"]
            for row in shown
            if row["ratio"] == ratio
        }
        ends = [choose(parts, key=parts.__getitem__) for choose in (min, max)]
        named = [f"{100 * parts[task]:.0f} % of the dense model's peak ({task})" for task in dict.fromkeys(ends)]
        yield paragraph(f"Ratio {ratio:g}: {' to '.join(named)}.", "- ")


def aims(rows: Sequence[Row]) -> str:
    """Return how many aims are met, and which are missed."""
    timed = [row for row in rows if row["time_aim"] is not None]
    missed = [row for row in timed if row["step_ratio"] > row["time_aim"]]
    named = [
        f"{row['task']} at ratio {row['ratio']:g}, {row['mode']}, {row['step_ratio']:.3f} of {row['time_aim']:g}"
        for row in missed
    ]
    state = [row["state_ratio"] >= row["state_aim"] for row in rows if row.get("state_aim") is not None]
    told = f"Of the aims for time, {len(timed) - len(missed)} of {len(timed)} are met"
    told += f"; missed: {'; '.join(named)}." if named else "."
    return f"{told} Of those for the state's memory, {sum(state)} of {len(state)} are met."


def markdown(rows: Sequence[Row], kernel_rows: Sequence[Row]) -> str:
    """Return docs/training-cost.md of the raw rows, and of those of `kernel_times`."""
    single = single_rows(rows)
    lines = ["# What training costs", "", paragraph(ABOUT.format(tables=TABLES)), ""]
    if single:
        lines += ["## Time of a step", "", f"{machines(single)}.", ""]
        lines += ["![Converted step time over dense step time](images/training-time.svg)", ""]
        lines += [paragraph(TIME), "", *times(single), ""]
        lines += [paragraph(ADVICE.format(example=without_folds(single))), "", paragraph(aims(single)), ""]
    if kernel_rows:
        lines += ["## Where the time goes", "", f"{machines(kernel_rows)}.", "", paragraph(KERNELS), ""]
        lines += [*kernels(kernel_rows), ""]
    if plots.with_memory(single):
        lines += ["## Memory of a step", "", "![Parts of the peak memory](images/training-memory.svg)", ""]
        lines += [paragraph(MEMORY), "", *held(single), ""]
    failed = [f"`{row['case']}`" for row in rows if "failure" in row]
    if failed:
        lines += [f"Failed: {listed(failed)}; [why]({TABLES}#what-failed).", ""]
    return "\n".join(lines)


@click.command()
@click.option("--rows", "source", type=click.Path(exists=True, path_type=Path), default=RESULTS, help="Raw rows.")
@click.option(
    "--kernels",
    "kernels_source",
    type=click.Path(path_type=Path),
    default=kernel_times.RESULTS,
    help="Raw rows of kernel_times.",
)
@click.option("--document", type=click.Path(dir_okay=False, path_type=Path), default=DOCUMENT, help="The page.")
def main(source: Path, kernels_source: Path, document: Path) -> None:
    """Write the page, its tables and its plots, beside it, from raw rows."""
    rows = load(source)["rows"]
    tables = document.parent / TABLES
    write(document, markdown(rows, load(kernels_source)["rows"]))
    write(tables, tables_page.markdown(rows))
    drawn = plots.draw(single_rows(rows), document.parent / "images")
    print(f"written to {', '.join(map(str, (document, tables, *drawn)))}")


if __name__ == "__main__":
    main()

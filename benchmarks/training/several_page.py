"""The measured part of docs/distributed.md and its plot, from the raw rows of several GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import recommendation
from benchmarks.documents import insert, listed, measured_on, paragraph, table
from benchmarks.plots import line_at_one, save
from benchmarks.rows import FOLDER, Row, load, write
from benchmarks.training.distributed import DENSE, PLACES, TOLERANCE

RESULTS = FOLDER / "distributed.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "distributed.md"
BEGIN = "<!-- results: written by `python -m benchmarks.training.several_page` -->"
PLOT = "several-gpus"
IMAGE = f"images/{PLOT}.svg"
# A side's colour: dense, then one for each ratio.
SIDE_COLOURS = ["#000000", "#0072B2", "#D55E00"]
TRAINING = """
Each GPU has a batch of its own, so the work grows with the GPUs. Efficiency is a GPU's throughput among several over
its throughput alone, in the same mode. `graphed` replays a whole step, collectives included, as one CUDA graph: its
time is the GPUs' own. In `eager` steps Python launches every kernel, and small models wait for Python. The losses of
the first steps are compared with those of one GPU on the joint batch; the last column has the largest difference.
After the last step of DDP, the parameters of all GPUs have the same bits. DDP all-reduces float32 gradients. FSDP2
gathers bfloat16 parameters and reduces float32 gradients; dense models are sharded block by block, converted ones as
one unit. Megabytes are of whole tensors, a step, as handed to the collectives. The peak is of an eager step. NVLink
multicast is off.
"""
TABLES = """
A DLRM-like model with {fields} tables of {rows:,} rows × {width} in all, on random ids whose frequencies follow a power
law (exponent {power:g}). Dense, every GPU holds a part of the rows: each step sends ids to where their rows are, rows
back, and gradients there again, by all-to-all, the rows and gradients in bfloat16. "Unique ids" sends an id once that a
batch has many times. Converted (ratio {ratio:g}), every GPU has the whole pool, DDP all-reduces its float32 gradient,
and the step needs no wait for the host, so that a CUDA graph holds it. Both sides look up all tables at once, have the
same layers, and train in bfloat16 autocast. Looked-up rows are compared with expected ones before anything is timed.
The sharded side is plain PyTorch; a library of fused table kernels may be faster.

Throughput and memory are measured here, quality is not. In a first trial (matrix factorisation, not part of this
benchmark), a narrower table without hashing was better than a wide hashed one as long as one number for each row fits.
So measure a table's quality before you share it, and keep small tables dense (`exclude=`).
"""
NOTHING = "Not measured yet.\n"


def training_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that were measured in their order, each with the dense one of its place as `dense`."""
    places = {place: index for index, place in enumerate(PLACES)}
    measured = [row for row in rows if "failure" not in row]
    tasks = list(dict.fromkeys(row["task"] for row in measured))
    measured.sort(
        key=lambda row: (tasks.index(row["task"]), places[row["kind"], row["mode"]], row["gpus"], _ratio(row["side"]))
    )
    dense = {_place(row): row for row in measured if row["side"] == DENSE}
    return [{**row, "dense": dense.get(_place(row)) if row["side"] != DENSE else None} for row in measured]


def _place(row: Row) -> tuple[str, str, str, int]:
    return row["task"], row["kind"], row["mode"], row["gpus"]


def _ratio(side: str) -> float:
    return 1.0 if side == DENSE else float(side.removeprefix("ratio="))


def _gradients(row: Row) -> float:
    return row["bytes"].get("all-reduce", 0) + row["bytes"].get("reduce-scatter", 0)


def training_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table of training, and what it says of the aim."""
    head = ["model", "with", "mode", "GPUs", "side", "step, ms", "÷ dense", "efficiency", "than dense's"]
    head += ["gradients, MB", "÷", "gathered, MB", "peak, GB a GPU", "losses differ by"]
    cells, above, compared = [], 0, 0
    for row in rows:
        dense, efficiency = row["dense"], row.get("efficiency")
        than = fallen = times = ""
        if dense is not None:
            times = f"{row['median_ms'] / dense['median_ms']:.3f}"
            if efficiency is not None and dense.get("efficiency") is not None:
                compared += 1
                above += efficiency >= dense["efficiency"]
                than = "higher" if efficiency >= dense["efficiency"] else "lower"
            if _gradients(row):
                fallen = f"{_gradients(dense) / _gradients(row):.1f}"
        cells.append(
            [
                *(row["task"], row["kind"], row["mode"], str(row["gpus"]), row["side"].replace("=", " ")),
                f"{row['median_ms']:.2f} ({row['q1_ms']:.2f}–{row['q3_ms']:.2f})",
                times,
                "" if efficiency is None else f"{efficiency:.3f}",
                than,
                _mega(_gradients(row)),
                fallen,
                _mega(row["bytes"].get("all-gather", 0)),
                "" if row["peak"] is None else f"{row['peak'] / 1e9:.2f}",
                "" if row.get("loss_error") is None else f"{row['loss_error']:.1e}",
            ]
        )
    said = [f"The aim, efficiency at least dense's, is met in {above} of {compared} cases."] if compared else []
    differing = {_name(row) for row in rows if (row.get("loss_error") or 0) > TOLERANCE}
    if differing:
        said.append(
            f"Losses differ by more than {TOLERANCE:g} for {listed(sorted(differing))}. The difference is relative, "
            f"and some of these losses fall to a thousandth within the first steps."
        )
    return [*([paragraph(" ".join(said)), ""] if said else []), *table(head, cells)]


def _name(row: Row) -> str:
    return f"{row['task']} ({row['side'].replace('=', ' ')}, {row['kind']})"


def _mega(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size else ""


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table of the recommendation model."""
    head = ["samples a GPU", "GPUs", "tables", "optimizer", "mode", "ids", "step, ms", "M samples/s", "÷ best sharded"]
    head += ["all-to-all, MB", "all-reduced, MB", "peak, GB a GPU"]
    cells = []
    for row in sorted(rows, key=lambda row: (row["gpus"], row["batch"])):
        rivals = [
            other["samples_per_s"]
            for other in rows
            if other["tables"] == recommendation.SHARDED and _load(other) == _load(row)
        ]
        pool = row["tables"] == recommendation.POOL
        cells.append(
            [
                *(f"{row['batch']:,}", str(row["gpus"])),
                "in a pool" if pool else "sharded",
                *(row["optimizer"], row["mode"], "" if pool else "unique" if row["unique"] else "all"),
                f"{row['median_ms']:.2f} ({row['q1_ms']:.2f}–{row['q3_ms']:.2f})",
                f"{row['samples_per_s'] / 1e6:.2f}",
                f"{row['samples_per_s'] / max(rivals):.2f}" if rivals else "",
                _mega(row["bytes"].get("all-to-all", 0)),
                _mega(row["bytes"].get("all-reduce", 0)),
                "" if row["peak"] is None else f"{row['peak'] / 1e9:.2f}",
            ]
        )
    return table(head, cells)


def _load(row: Row) -> tuple[int, int, int]:
    return row["gpus"], row["batch"], row["rows"]


def markdown(training: Sequence[Row], tables: Sequence[Row]) -> str:
    """Return the measured part of the page.

    Args:
        training: rows of benchmarks/results/distributed.json.
        tables: rows of benchmarks/results/recommendation.json.
    """
    lines = ["### Training", ""]
    measured = training_rows(training)
    if measured:
        lines += [f"{_machines(measured)}.", ""]
        if scaling(measured) is not None:
            lines += [f"![Efficiency and megabytes of gradients]({IMAGE})", ""]
        lines += [*training_lines(measured), "", TRAINING.format(tolerance=TOLERANCE).strip(), ""]
    else:
        lines += [NOTHING]
    lines += ["### Tables that need no sharding", ""]
    found = [row for row in tables if "failure" not in row]
    if found:
        lines += [f"{_machines(found)}.", "", *table_lines(found), "", TABLES.format(**found[0]).strip(), ""]
    else:
        lines += [NOTHING]
    failed = [row for row in (*training, *tables) if "failure" in row]
    if failed:
        lines += ["### What failed", "", *(f"- `{row['case']}`: {row['failure']}" for row in failed), ""]
    return "\n".join(lines)


def _machines(rows: Iterable[Row]) -> str:
    return "; ".join(dict.fromkeys(measured_on(row["machine"]) for row in rows))


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Draw efficiency and megabytes of gradients, on the most GPUs that were measured."""
    rows = [row for row in rows if row.get("efficiency") is not None]
    if not rows:
        return None
    most = max(row["gpus"] for row in rows)
    rows = [row for row in rows if row["gpus"] == most]
    groups = list(dict.fromkeys((row["task"], row["kind"], row["mode"]) for row in rows))
    sides = sorted({row["side"] for row in rows}, key=_ratio)
    figure, panels = plt.subplots(2, 1, figsize=(9, 6), sharex=True)
    width = 0.8 / len(sides)
    for index, (side, colour) in enumerate(zip(sides, SIDE_COLOURS, strict=False)):
        own = [row for row in rows if row["side"] == side]
        for axes, values in zip(
            panels, ([row["efficiency"] for row in own], [_gradients(row) / 1e6 for row in own]), strict=True
        ):
            middle = (index - (len(sides) - 1) / 2) * width
            places = [groups.index((row["task"], row["kind"], row["mode"])) + middle for row in own]
            axes.bar(places, values, width * 0.92, color=colour, label=side.replace("=", " "))
    for axes, title in zip(panels, (f"efficiency on {most} GPUs", "MB of gradients a step"), strict=True):
        axes.grid(axis="x", visible=False)
        axes.set_title(title, loc="left")
    panels[1].set_xticks(range(len(groups)), ["\n".join(group) for group in groups], fontsize=8.5)
    panels[1].set_yscale("log")
    line_at_one(panels[0])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(sides), frameon=False)
    return figure


def main() -> None:
    """Write the measured part of the page, and its plot."""
    training, tables = load(RESULTS)["rows"], load(recommendation.RESULTS)["rows"]
    text = DOCUMENT.read_text(encoding="utf-8")
    write(DOCUMENT, insert(text, BEGIN, markdown(training, tables)))
    save({PLOT: lambda: scaling(training_rows(training))}, DOCUMENT.parent / "images")


if __name__ == "__main__":
    main()

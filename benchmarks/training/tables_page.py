"""docs/results/training-tables.md from the raw rows: every case, and the method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.documents import measured_on
from benchmarks.performance_tables_page import Column, number, table
from benchmarks.rows import FOLDER, Row
from benchmarks.training.distributed import DENSE

RESULTS = FOLDER / "training.json"

METHOD = """
A step is zeroed gradients (`set_to_none`), forward in bfloat16 autocast, backward, clipping, and fused AdamW, on random
data. Before it is timed, the converted model's loss is held to the dense model's with the same weights. The sides run
in one process in turn, six steps in a row, of which the first is not timed; the GPU is not waited for between them.
Times are medians, with quartiles. `graphed` replays the whole step as one CUDA graph, so that its time is the GPU's
own; its memory is that of the steps before the capture. `compiled` is `torch.compile` as it is, `reduce-overhead` its
mode of that name. In `eager` steps Python launches every kernel,
and a converted layer asks more of Python than a dense one: where a model's kernels are short, that sets the time, and
it is longer than the dense model's. So it is in `compiled` steps, whose operators on the pool are Python's. Such times
move with the host by a fifth from run to run (the dense ResNet-50's eager step took 22.7 ms beside one model and 26.6
beside the next).

Not all rows are of one state of the code. Of the rows of 26 November 2026, the `compiled` steps of "resnet-50, whole
kernels" are from before training passes kept the weights of small layers, which spares the host most of what a
converted layer asked of it beside a dense one. All others of that day but BERT-base's `eager` ones and ResNet-50's are
from before a group's kernel summed gradients of which a few are missing, as that of BERT's pooler is. ResNet-50's
`compiled` rows with a basis are from before eager passes made its kernels together, which compiled ones do not. Only
BERT-base was measured with `reduce-overhead`, and only BERT-base, ResNet-50 and Llama of 1.1 B were compiled.
"resnet-50" has kernels made of a basis, the default; "resnet-50, whole kernels" has none. The eager steps of both were
timed one after the other on a slow host: the dense one took 23 and 27 ms, where the GPU alone needs 17.8. Activations
are what the forward pass leaves for the backward pass; the peak is the allocator's, over one step. An aim is what this
project set itself before measuring, and aims that are missed stay in the tables.
"""


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def at_most(value: float, aim: float | None) -> str:
    return "" if aim is None else f"≤ {aim:g} {verdict(value <= aim)}"


FOLDS = """
From 30 November 2026 on, layers of at least a million weights are folded by default ([folding.md](../folding.md)); rows
with earlier dates are of models without folds. The "lean" models are decoders of torch's own operations with parameters
in bfloat16, in which products take most of a step; the others are transformers', whose elementwise operations run in
float32 under autocast.
"""


def at_least(value: float, aim: float | None) -> str:
    return "" if aim is None else f"≥ {aim:g} {verdict(value >= aim)}"


def megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"


def milliseconds(found: Row) -> str:
    return f"{found['median_ms']:.2f} ({found['q1_ms']:.2f}–{found['q3_ms']:.2f})"


HELD = ("parameters", "gradients", "optimizer", "activations", "peak")
MODEL = [Column("model", lambda row: row["task"]), Column("batch", lambda row: row["shape"])]
TIME_COLUMNS = [
    *MODEL,
    Column("mode", lambda row: row["mode"]),
    Column("ratio", lambda row: f"{row['ratio']:g}"),
    Column("on", lambda row: (row["machine"].get("gpu") or "CPU").removeprefix("NVIDIA ")),
    Column("date", lambda row: row["machine"]["date"]),
    Column("dense, ms", lambda row: milliseconds(row["dense"])),
    Column("converted, ms", lambda row: milliseconds(row["converted"])),
    Column("converted ÷ dense", number("step_ratio", 3)),
    Column("aim", lambda row: at_most(row["step_ratio"], row["time_aim"])),
]
MEMORY_COLUMNS = [
    Column("model", lambda row: row["task"]),
    Column("mode", lambda row: row["mode"]),
    Column("side", lambda row: row["side"]),
    *(
        Column(f"{name}, MB", lambda row, part=part: megabytes(row["memory"][part]))
        for part, name in {**{part: part for part in HELD}, "optimizer": "AdamW"}.items()
    ),
    Column("state ÷", number("state_ratio")),
    Column("aim", lambda row: at_least(row["state_ratio"], row["state_aim"]) if "state_ratio" in row else ""),
]


def single_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of one GPU that were measured."""
    return [row for row in rows if "mode" in row and "failure" not in row]


def memory_rows(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each side: dense once for each model and mode."""
    found: list[Row] = []
    seen = set()
    for row in rows:
        fields = {"task": row["task"], "mode": row["mode"]}
        if (key := (row["task"], row["mode"])) not in seen:
            seen.add(key)
            found.append({**fields, "side": DENSE, "memory": row["dense"]["memory"]})
        aims = {name: row[name] for name in ("state_ratio", "state_aim")}
        found.append({**fields, "side": f"ratio {row['ratio']:g}", "memory": row["converted"]["memory"], **aims})
    return found


def machines(rows: Iterable[Row]) -> str:
    """Return where rows were measured, each place once."""
    return "; ".join(dict.fromkeys(measured_on(row["machine"]) for row in rows))


def markdown(rows: Sequence[Row]) -> str:
    """Return the page."""
    single = single_rows(rows)
    lines = ["# Tables of training", ""]
    lines += [
        "The tables behind [training-cost.md](../training-cost.md), written by `python -m benchmarks.training.page` "
        f"from [the raw rows](../../benchmarks/results/{RESULTS.name}) of `python -m benchmarks.training`.",
        "",
    ]
    if single:
        lines += ["## One GPU: time of a step", "", f"{machines(single)}.", "", FOLDS.strip(), ""]
        lines += [*table(TIME_COLUMNS, single), "", "## One GPU: memory of a step", ""]
        lines += ["Parameters, gradients and AdamW's state together are the state, which falls by the ratio.", ""]
        lines += [*table(MEMORY_COLUMNS, memory_rows(single)), "", METHOD.strip(), ""]
    failed = [row for row in rows if "failure" in row]
    if failed:
        lines += ["## What failed", "", *(f"- `{row['case']}`: {row['failure']}" for row in failed), ""]
    return "\n".join(lines)

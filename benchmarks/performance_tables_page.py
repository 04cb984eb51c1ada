"""docs/results/performance-tables.md from the raw rows of the GPU and CPU benchmarks: every case, and the method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks import cpu, documents
from benchmarks.rows import FOLDER, Row

Results = dict[str, Any]

KERNELS, MODELS = FOLDER / "kernels.json", FOLDER / "models.json"

WHAT_RUNS = """
By shape, and without anything to set:

- Up to 4 rows, where a layer reads every slot of the pool at least twice: each slot is read once and multiplied with
  all its tiles; a second kernel adds what its tiles gave, in a fixed order.
- One row and a weight under 8 M elements: no matrix unit; every program owns whole rows of the weight.
- Up to 32 rows (128 on a GPU without the copy engine, or with a sign for each tile or element): a kernel that
  multiplies tiles as it reads them from the pool; `k` is shared among programs where that pays, and their parts are
  added in a fixed order: no atomics, the same bits on every run.
- Up to 4,096 rows on a Hopper GPU, with a sign for each row of tiles or none: the tensor-copy engine brings whole slots
  to the matrix unit; no weight is gathered.
- More rows, and the backward pass: the weight is gathered into a scratch tensor and multiplied by cuBLAS; its gradient
  is reduced into the pool slot by slot, in a fixed order.
- float64, and the comparison mappings in `reduce`: plain torch.

A sign for each element is hashed for every weight that is read, which a matrix unit waits for; only pools of few slots
use it, for accuracy.
"""
METHOD = """
Each case is checked against float64 before it is timed; the largest error over the largest value is in the raw rows.
Then calls on different layers of one shape run in a row in a CUDA graph, so that launches cost what they cost in a
model and a dense weight comes from memory as it does there; how many layers, and how many megabytes of dense weights,
each raw row says. The graphs of the sides of a comparison are replayed in turn. Times are medians; quartiles and the
number of replays are in the raw rows. An aim is what this project set itself before measuring, and aims that are missed
stay in the tables.
"""
FLOOR = """
The floor is the time below which no product can go that reads every weight: all of them once from the cache (from
memory, for the part of a pool that is larger than the cache), or the arithmetic, at the rates measured in the same run.
A layer that reads each slot once for all its tiles does not read every weight, and may go below it. For dense weights
the floor is one read from memory, or the arithmetic.

Between the floor and the small-batch kernels lie the start and the end of a kernel (programmatic launch hides only the
arithmetic before the first load), the second kernel that adds partial sums, and activations, which every program reads
for itself: at 16 rows of 4096×4096 a quarter as many bytes as the weight, at 64 rows half as many. Tried without gain:
more tiles side by side along `k`, the copy engine at 16 rows and fewer, whole rows of the weight for each program at 16
rows of a pool that is in the cache, and adding partial sums in the program that comes last.
"""
HASHEDNET = """
HashedNet hashes every weight by itself; its fused kernel in this comparison is tuned: a 32-bit hash of two
multiplications, blocks up to the whole batch, and the best of the block settings tried at each size, which the raw rows
name. "Materialised" is HashedNet whose weight is written out element by element for cuBLAS. "Gather + cuBLAS" is the
pool of this project without its fused kernels. "Folded pool" is a pool of the same size, folded 8 times with two
hashes, where it is at most an eighth of the weight. A training step is forward, both gradients and SGD's update, of one
layer and its pool. Budgets are in float32; bfloat16 pools have as many elements. The aims are about the fused kernel,
which is how HashedNet is run elsewhere; where the materialised weight is faster, that is the rival to look at.
"""
REPEAT = """
Whether a second call gave the same bits, with other work in between. HashedNet adds with atomics, in whatever order
they come.
"""
MEMORY = """
GB/s are of the bytes that must be moved at the least: the weight or its gradient, or the tokens, and what is read or
written of the pool. The dense side is a copy of the dense weight (for gather and reduce), `F.embedding`, and its
backward; both backward passes of the embedding run without a graph.
"""


class Column(NamedTuple):
    """A column of a table: its title, and a row's cell."""

    title: str
    cell: Callable[[Row], str]


def time_of(side: str) -> Callable[[Row], str]:
    """Return the cell with a side's median time."""
    return lambda row: f"{row[side]['median_us']:.2f}" if side in row else ""


def number(name: str, digits: int = 2) -> Callable[[Row], str]:
    """Return the cell with a number."""
    return lambda row: f"{row[name]:.{digits}f}" if row.get(name) is not None else ""


def missed(row: Row, value: str) -> bool | None:
    """Return whether the row missed its aim; None without an aim."""
    if row.get("aim") is None:
        return None
    return not row.get(value, 0.0) >= row["aim"]


def aim_of(value: str) -> Callable[[Row], str]:
    """Return the cell with the aim for a ratio, and whether it is met."""

    def cell(row: Row) -> str:
        verdict = missed(row, value)
        return "" if verdict is None else f"{row['aim']:g} {'missed' if verdict else 'met'}"

    return cell


def layer(row: Row) -> str:
    return f"{row['shape'][0]}×{row['shape'][1]}"


def precision(row: Row) -> str:
    return "float32, tf32" if row.get("tf32") and row["dtype"] == "float32" else row["dtype"]


def floor(row: Row) -> str:
    return f"{row['floor']['pool_us']:.2f} {row['floor']['bound']}" if "floor" in row else ""


def said(name: str) -> Callable[[Row], str]:
    """Return the cell with a truth as yes or no."""
    return lambda row: {True: "yes", False: "no"}.get(row.get(name), "")  # type: ignore[call-overload]


LAYER = [Column("layer", layer), Column("pool, MB", lambda row: f"{row['pool_mb']:g}")]
ROWS, DTYPE = Column("rows", lambda row: str(row["rows"])), Column("dtype", precision)
SIGN = Column("sign", lambda row: row["sign"])
WHAT = Column("what", lambda row: row["what"])
TIMES = [Column("dense, µs", time_of("dense")), Column("pool, µs", time_of("pool"))]
OVER_DENSE = Column("dense ÷ pool", number("dense_over_pool"))
AIM = Column("aim", aim_of("dense_over_pool"))
FLOORS = [
    Column("floor, µs", floor),
    Column("dense floor", lambda row: f"{row['floor']['dense_us']:.2f}" if "floor" in row else ""),
]


class Section(NamedTuple):
    """A regime's part of the page.

    Args:
        title: of the section.
        note: a paragraph.
        columns: of its table.
        value: the ratio that its aims are about.
    """

    title: str
    note: str
    columns: list[Column]
    value: str = "dense_over_pool"


FOLDED = """
Layers whose inputs are folded, with two hashes, as the planner has them from a ratio of the fold on: the product takes
as many times less arithmetic. Every call folds its own input; in a model, layers that read the same input fold it once.
"Forward and backward" is forward, the input's gradient, and the gradient of the weight or of the pool.
"""
SECTIONS = {
    "linear": Section(
        "Linear layers",
        "",
        [*LAYER, ROWS, SIGN, DTYPE, *TIMES, OVER_DENSE, AIM, *FLOORS],
    ),
    "float32": Section("Linear layers in float32", "", [*LAYER, ROWS, DTYPE, *TIMES, OVER_DENSE, *FLOORS]),
    "training": Section(
        "Forward and backward",
        "Forward, the input's gradient, and the gradient of the weight or of the pool that all layers share.",
        [*LAYER, ROWS, DTYPE, *TIMES, OVER_DENSE, AIM],
    ),
    "folded": Section(
        "Folded layers",
        FOLDED,
        [
            Column("layer", layer),
            Column("fold", lambda row: str(row["fold"])),
            Column("what", lambda row: "forward and backward" if row["backward"] else "forward"),
            ROWS,
            *TIMES,
            OVER_DENSE,
            AIM,
            *FLOORS,
        ],
    ),
    "hashednet": Section(
        "Beside HashedNet",
        HASHEDNET,
        [
            Column("layer", layer),
            Column("budget, MB", lambda row: f"{row['budget_mb']:g}"),
            ROWS,
            DTYPE,
            WHAT,
            *TIMES,
            Column("folded pool", time_of("folded")),
            Column("gather + cuBLAS", time_of("gathered")),
            Column("HashedNet", time_of("hashednet")),
            Column("materialised", time_of("hashednet_gathered")),
            OVER_DENSE,
            Column("HashedNet ÷ pool", number("hashednet_over_pool", 1)),
            Column("materialised ÷ pool", number("hashednet_gathered_over_pool", 1)),
            Column("HashedNet ÷ faster of ours", number("hashednet_over_ours", 1)),
            Column("aim", aim_of("hashednet_over_ours")),
        ],
        "hashednet_over_ours",
    ),
    "memory": Section(
        "Moving data",
        MEMORY,
        [*LAYER, WHAT, DTYPE, *TIMES, OVER_DENSE, Column("GB/s", number("gb_s", 0))],
    ),
    "repeat": Section(
        "The same bits again",
        REPEAT,
        [
            WHAT,
            Column("layer", layer),
            ROWS,
            DTYPE,
            Column("forward", said("forward_equal")),
            Column("input's gradient", said("grad_x_equal")),
            Column("pool's gradient", said("grad_pool_equal")),
        ],
    ),
}


def of_side(side: str, cell: Callable[[Row], str]) -> Callable[[Row], str]:
    """Return the cell with what a whole model's row says about one of its sides."""
    return lambda row: cell(row[side]) if side in row else ""


MODEL_COLUMNS = [
    Column("model", lambda row: row["model"]),
    Column("what", lambda row: row["kind"]),
    Column("batch", lambda row: str(row["batch"])),
    Column("ratio", lambda row: f"{row['ratio']:g}"),
    Column("pool, MB", lambda row: f"{row['pool_bytes'] / 1e6:.1f}" if "pool_bytes" in row else ""),
    Column("dense, ms", of_side("dense", lambda side: f"{side['time']['median_ms']:.3f}")),
    Column("converted, ms", of_side("converted", lambda side: f"{side['time']['median_ms']:.3f}")),
    Column("dense ÷ converted", number("dense_over_converted")),
    Column("aim", lambda row: aim_of("dense_over_converted")(row | {"aim": MODEL_AIMS.get(row["case"])})),
    Column("dense peak, MB", of_side("dense", lambda side: f"{side['peak_bytes'] / 1e6:.0f}")),
    Column("converted peak, MB", of_side("converted", lambda side: f"{side['peak_bytes'] / 1e6:.0f}")),
]
# The whole models that were aimed at.
MODEL_AIMS = {"llama-1.1b/ratio=50/batch=1": 1.5}
MODEL_NOTE = """
Llama of 1.1 B with one sequence and BERT-base with 32 are measured with large layers folded
([folding.md](../folding.md)); the models of the other rows were converted before that.

Both sides under `torch.compile` and CUDA graphs, in bfloat16; a decoding step has one new token and a static key-value
cache. Peak memory is a side's own weights and buffers and what one call allocates.
"""


def table(columns: Sequence[Column], rows: Iterable[Row]) -> list[str]:
    """Return the lines of a table; a row that failed says so where its times would stand."""
    rows = list(rows)
    # A column that has nothing to say for any row is left out.
    columns = [column for column in columns if any(column.cell(row) for row in rows)]
    lines = []
    for row in rows:
        cells = [column.cell(row) for column in columns]
        if "failed" in row:
            cells[-1] = "failed: " + " ".join(row["failed"].replace("|", "/").split())
        lines.append(cells)
    return documents.table([column.title for column in columns], lines)


def verdicts(rows: Iterable[Row]) -> list[bool]:
    """Return whether each aim was missed."""
    found = [missed(row, SECTIONS[row["regime"]].value) for row in rows]
    return [verdict for verdict in found if verdict is not None]


def with_ours(rows: Iterable[Row]) -> list[Row]:
    """Return rows of kernels; those measured before layers could be folded have one side of ours."""
    return [{"hashednet_over_ours": row.get("hashednet_over_pool"), **row} for row in rows]


def described(machine: Row, layers: set[int]) -> str:
    """Return the machine and the method in a paragraph."""
    found = machine.get("ceilings", {})
    in_a_row = " to ".join(str(count) for count in sorted({min(layers), max(layers)}))
    rates = ""
    if found:
        rates = (
            f" Measured ceilings: {found['memory_copy_gb_s']:.0f} GB/s copying in memory, "
            f"{found['memory_read_gb_s']:.0f} reading it, {found['l2_read_gb_s']:.0f} reading the cache; "
            f"{found['bfloat16_tflop_s']:.0f} TFLOP/s in bfloat16, {found['tf32_tflop_s']:.0f} in tf32, "
            f"{found['float32_tflop_s']:.0f} in float32."
        )
    return (
        f"The tables behind [performance.md](../performance.md), written by `python -m benchmarks.page` from "
        f"[the raw rows](../../benchmarks/results/{KERNELS.name}): "
        f"{documents.measured_on(machine)}. Tiles of "
        f"{machine['tile'][0]}×{machine['tile'][1]}; {in_a_row} different layers in a row. "
        f"Above 1 the pool is faster than the dense layer, below 1 slower.{rates}"
    )


def markdown(kernels: Results, models: Results | None = None, of_cpu: Results | None = None) -> str:
    """Return the page of the raw results."""
    rows = with_ours(kernels["rows"])
    layers = {row["layers"] for row in rows if "layers" in row}
    lines = ["# Tables of performance", "", described(kernels["machine"], layers), ""]
    if aimed := verdicts(rows):
        lines += [f"{aimed.count(False)} of {len(aimed)} aims are met; the tables mark the others as missed.", ""]
    for note in kernels.get("notes", ()):
        lines += [note, ""]
    for regime, section in SECTIONS.items():
        chosen = [row for row in rows if row["regime"] == regime]
        if not chosen:
            continue
        lines += [f"## {section.title}", ""]
        if section.note:
            lines += [section.note.strip(), ""]
        lines += [*table(section.columns, chosen), ""]
    if models is not None:
        source = f"[The raw rows](../../benchmarks/results/{MODELS.name})"
        lines += ["## Whole models", "", f"{source}, {models['machine']['gpu']}.", ""]
        lines += [*MODEL_NOTE.strip().splitlines(), ""]
        lines += [*table(MODEL_COLUMNS, models["rows"]), ""]
    if of_cpu is not None:
        lines += ["## On a CPU", "", cpu.markdown(of_cpu)]
    lines += ["## What runs", "", WHAT_RUNS.strip(), "", "## Method", "", METHOD.strip(), "", FLOOR.strip(), ""]
    return "\n".join(lines)

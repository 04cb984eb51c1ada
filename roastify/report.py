"""The tables of plans and results that the command line shows, made with rich."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from roastify.artifact import Artifact
from roastify.checks.interface import VerifyReport
from roastify.checks.model_bench import BenchReport, Side
from roastify.files import digest_of_file
from roastify.kernels.backend import backend
from roastify.manifest import MANIFEST, WEIGHTS, builder_in, files_in
from roastify.pool.plan import RoastPlan, TensorPlan
from roastify.printable import printable
from roastify.ratio_sweep import SweepReport
from roastify.recovery.report import Likeness, RecoveryReport

# Where nothing limits a line, it is as long as it needs to be.
_NO_LIMIT = 100_000


def as_text(result: object) -> str:
    """Return what the command line shows of a result, without colours.

    Lines are as long as a terminal, or COLUMNS, allows. In a file or a pipe, they are as long as they need to be.

    Args:
        result: a plan, a report, or what a function of this module returned.
    """
    limited = os.environ.get("COLUMNS") or (sys.stdout is not None and sys.stdout.isatty())
    width = Console().width if limited else _NO_LIMIT
    out = Console(file=io.StringIO(), width=width, color_system=None, force_jupyter=False, **_PLAIN)
    out.print(_renderable(result))
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())  # type: ignore[attr-defined]


def as_html(result: object) -> str:
    """Return the same as HTML."""
    options: dict[str, Any] = {"record": True, "color_system": "truecolor", "force_jupyter": False, **_PLAIN}
    out = Console(file=io.StringIO(), width=_NO_LIMIT, **options)
    out.print(_renderable(result))
    style = "font-family:monospace;white-space:pre;overflow-x:auto;line-height:normal"
    return out.export_html(inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>')


def print_result(result: object) -> None:
    """Print a result on standard output, with colours on a terminal."""
    out = Console(**_PLAIN)
    if out.is_terminal:
        out.print(_renderable(result))
    else:
        out.file.write(as_text(result) + "\n")


# Names and reasons are no markup, whatever they hold.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


def _renderable(result: object) -> RenderableType:
    match result:
        case RoastPlan():
            return plan_table(result)
        case VerifyReport():
            return verify_lines(result)
        case BenchReport():
            return bench_table(result)
        case RecoveryReport():
            return recovery_lines(result)
        case SweepReport():
            return sweep_table(result)
    return cast("RenderableType", result)


def human_bytes(count: float) -> str:
    """Return a byte count in the largest decimal unit that leaves a number of at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def plan_table(plan: RoastPlan, full: bool = False) -> RenderableType:
    """Return a plan as a table of tensors and a summary.

    Args:
        plan: the plan.
        full: whether every tensor has a row. If not, shared tensors that differ only in a layer's number are one row,
            and so are kept tensors with the same reason.
    """
    rows, cols = plan.tile
    units = (
        f"λ: a tensor's scale, as its weights are λ · sign · pool; tiles: of {rows}×{cols} weights; "
        f"budget: its part of what is stored; 1 kB: 1000 bytes"
    )
    table = _PlanTable([_row(plan, group) for group in _groups(plan.tensors, full)])
    return Group(table, Text(units, style="dim"), Text(), summary(plan))


class _Words:
    """Text that is wrapped at spaces; a word that is too long for its column is shortened in its middle.

    The ends of names tell tensors apart. rich would break names in the middle of a word.
    """

    def __init__(self, text: str) -> None:
        self.text = printable(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(" ".join(shortened(word, options.max_width) for word in self.text.split(" ")))


def shortened(name: str, width: int) -> str:
    """Return a name in at most so many cells of a terminal; what is left out of its middle is an ellipsis.

    As many of the last parts between dots stay as fit, and the beginning of the name gets what they leave.
    """
    if cell_len(name) <= width:
        return name
    parts = name.split(".")
    for first in range(1, len(parts)):
        end = "." + ".".join(parts[first:])
        if cell_len(end) < width:
            break
    else:
        end = _last_cells(name, width // 2)
    return _last_cells(name[::-1], width - 1 - cell_len(end))[::-1] + "…" + end


def _last_cells(text: str, width: int) -> str:
    while cell_len(text) > width:
        text = text[1:]
    return text


class _PlanTable:
    """A table of tensors, whose wide columns share what the others leave of the line."""

    HEADINGS = ("tensor", "shape", "op", "verdict", "λ", "tiles", "budget", "reason")
    # The columns of words, and how much of the room each gets if there is not enough for all.
    WEIGHTS: ClassVar = {0: 5, 2: 2, 7: 2}
    NUMBERS = (1, 4, 5, 6)

    def __init__(self, rows: Sequence[Sequence[str | Text]]) -> None:
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = zip(self.HEADINGS, *self.rows, strict=True)
        needs = [max(cell_len(str(cell)) for cell in column) for column in columns]
        # Two spaces between columns, or one where the line is short.
        gap = 2 if sum(needs) + 2 * (len(needs) - 1) <= options.max_width else 1
        room = options.max_width - gap * (len(needs) - 1)
        room -= sum(need for column, need in enumerate(needs) if column not in self.WEIGHTS)
        widths = _shares({column: needs[column] for column in self.WEIGHTS}, self.WEIGHTS, room)
        table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=gap == 1)
        for column, heading in enumerate(self.HEADINGS):
            justify: Any = "right" if column in self.NUMBERS else "left"
            table.add_column(heading, justify=justify, width=widths.get(column, needs[column]))
        for row in self.rows:
            table.add_row(*(_Words(str(cell)) if column in self.WEIGHTS else cell for column, cell in enumerate(row)))
        yield table


def _shares(needs: dict[int, int], weights: dict[int, int], room: int) -> dict[int, int]:
    """Return widths for columns: what each needs, or where the room is too small, a part of it by weight."""
    widths: dict[int, int] = {}
    while left := needs.keys() - widths.keys():
        total = sum(weights[column] for column in left)
        parts = {column: max(8, room * weights[column] // total) for column in left}
        content = {column: needs[column] for column in left if needs[column] <= parts[column]}
        widths |= content or parts
        room -= sum(content.values())
    return widths


def _groups(tensors: Iterable[TensorPlan], full: bool) -> list[list[TensorPlan]]:
    groups: dict[object, list[TensorPlan]] = {}
    for tensor in tensors:
        key: object = tensor.name
        if not full:
            key = (_numberless(tensor.name), tensor.shape, tensor.op, tensor.whole) if tensor.shared else tensor.reason
        groups.setdefault(key, []).append(tensor)
    return sorted(groups.values(), key=lambda group: not group[0].shared)


def _numberless(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _row(plan: RoastPlan, group: list[TensorPlan]) -> list[str | Text]:
    first = group[0]
    scales = sorted({f"{tensor.scale:.3g}" for tensor in group if tensor.scale is not None}, key=float)
    shapes = {tensor.shape for tensor in group}
    stored: float = sum(tensor.numel for tensor in group)
    if first.shared:
        # A shared tensor counts for a part of the pool in proportion to its elements.
        part = sum(tensor.matrix_numel for tensor in group) / sum(tensor.matrix_numel for tensor in plan.shared)
        stored = plan.pool_numel * part + sum(math.prod(tensor.basis_shape) for tensor in group if tensor.basis_count)
    return [
        _label(group),
        "×".join(map(str, first.shape)) or "1" if len(shapes) == 1 else "various",
        ", ".join(dict.fromkeys(tensor.op for tensor in group)),
        Text("shared", style="green") if first.shared else Text("kept", style="yellow"),
        scales[0] + (f"…{scales[-1]}" if len(scales) > 1 else "") if scales else "",
        f"{sum(tensor.num_tiles for tensor in group):,}" if first.shared else "",
        f"{stored / plan.stored_numel:.1%}",
        _reason(first),
    ]


def _reason(tensor: TensorPlan) -> str:
    around = f"; spread around {tensor.center:.3g}" if tensor.center else ""
    folded = f"; fold {tensor.numel // tensor.matrix_numel}" if tensor.fold is not None else ""
    return tensor.reason + around + folded + (f"; materialised: {tensor.whole}" if tensor.whole else "")


def _label(group: list[TensorPlan]) -> str:
    names = list(dict.fromkeys(_numberless(tensor.name) for tensor in group))
    if len(group) == 1:
        return group[0].name
    return f"{names[0]} (×{len(group)})" if len(names) == 1 else f"{names[0]} and {len(group) - 1} more"


def summary(plan: RoastPlan) -> RenderableType:
    """Return a plan's sums: what the dense model holds, what will be stored, and how the budget is spent."""
    rows, cols = plan.tile
    shared = plan.total_numel - plan.kept_numel
    basis = f"basis kernels {plan.basis_numel:,} + " if plan.basis_numel else ""
    scales = f", {plan.scale_numel:,} of it learned scales" if plan.scale_numel else ""
    lines = [
        (
            "parameters",
            f"{plan.total_numel:,} → {plan.stored_numel:,} stored "
            f"(pool {plan.pool_numel:,}{scales} + {basis}kept {plan.kept_numel:,})",
        ),
        ("bytes", f"{human_bytes(plan.total_nbytes)} → {human_bytes(plan.stored_nbytes)}"),
        ("ratio", f"{plan.achieved_ratio:.2f} (asked {plan.ratio:g})"),
        ("shared", f"{len(plan.shared)} of {len(plan.tensors)} tensors, {shared / plan.total_numel:.1%} of parameters"),
        ("read by", _read_by(plan)),
        (
            "start",
            "zero: what the pool holds is added to seeded start values" if plan.has_starts else _START[plan.init],
        ),
        ("pool", f"{plan.num_slots:,} slots of {rows}×{cols}, {plan.mapping} mapping, sign per {plan.sign}"),
    ]
    if plan.of_adapters:
        lines.append(("base", f"{plan.base_numel:,} parameters beside the adapters, neither counted nor saved"))
    if plan.with_basis:
        counts = sorted({tensor.basis_shape for tensor in plan.with_basis})
        some = ", ".join(f"{count} for kernels of {positions}" for count, positions in counts)
        lines.append(("kernels", f"of {len(plan.with_basis)} tensors made of basis kernels: {some} elements"))
    if plan.folds:
        sizes = sorted({fold.fold for fold in plan.folds}, reverse=True)
        count = sum(tensor.fold is not None for tensor in plan.shared)
        lines.append(
            (
                "multiply-adds",
                f"{plan.folded_numel:,} → {plan.multiplied_numel:,} a token in {count} folded layers "
                f"(fold {', '.join(map(str, sizes))}; {len(plan.folds)} folds of inputs)",
            )
        )
    if plan.share == "all":
        lines.append(("vectors", "shared too, with constant and small tensors (share = all, or auto at this ratio)"))
    if plan.stored_numel > plan.total_numel:
        lines.append(("note", "nothing is shared at this ratio, and padding to whole tiles stores slightly more"))
    return _named_lines(lines)


def artifact_lines(artifact: Artifact, digest: str) -> RenderableType:
    """Return what an artifact is, in words: what builds its model, its files, versions and digest.

    Args:
        artifact: the artifact.
        digest: the SHA-256 of its manifest.
    """
    builder, folder = builder_in(artifact.manifest), artifact.folder
    how = f'roastify.load("{folder}") needs no model'
    if builder is None:
        how = f'code that it does not name: roastify.load("{folder}", model) needs the dense model'
    companions = files_in(artifact.manifest)
    sizes = [f"{name} {human_bytes((folder / name).stat().st_size)}" for name in (MANIFEST, WEIGHTS)]
    for name, expected in companions.items():
        same = (folder / name).is_file() and digest_of_file(folder / name) == expected
        sizes.append(name if same else f"{name} (changed or removed since)")
    lines = [
        ("artifact", f"{folder}: a converted {artifact.plans[0].model}"),
        ("built by", (f"{builder.describe()}; " if builder else "") + how),
        ("files", ", ".join(sizes)),
        ("buffers", f"{len(artifact.manifest['buffers'])}, stored as they are"),
        ("format", f"{artifact.manifest['format_version']}, mapping version {artifact.manifest['mapping_version']}"),
        ("digest", f"{digest} (SHA-256 of {MANIFEST}, which names that of {WEIGHTS})"),
    ]
    if len(artifact.plans) > 1:
        lines.append(("pools", f"{len(artifact.plans)}, a table for each below"))
    return _named_lines(lines)


def _named_lines(lines: Iterable[tuple[str, str]]) -> Table:
    """Return lines beside their names. `Text`, because rich reads markup in plain strings."""
    grid = Table.grid(padding=(0, 2))
    for name, text in lines:
        grid.add_row(Text(name, style="dim"), Text(printable(text)))
    return grid


_START = {
    "match": "pool initialised at random (for training from scratch; --init project keeps pretrained weights)",
    "project": "pool fitted to the model's weights (for pretrained weights; roastify recover brings the outputs back)",
}


def _read_by(plan: RoastPlan) -> str:
    """Return how many tensors are read in which way; a tensor with several ways counts for the first."""
    ways = [tensor.through.split(", ") for tensor in plan.shared]
    layers = sum("layer" in way for way in ways)
    operations = sum("operation" in way and "layer" not in way for way in ways)
    return (
        f"{layers} by their layers' own operations, {operations} by operations in their modules' code, "
        f"{len(ways) - layers - operations} materialised on access"
    )


def verify_lines(report: VerifyReport) -> RenderableType:
    """Return what a verification found equal."""
    grid = Table.grid(padding=(0, 2))
    signature = report.signature if len(report.signature) < 200 else report.signature[:197] + "..."
    grid.add_row(Text("signature", style="dim"), Text(printable(f"same: {signature}")))
    if report.modes:
        outputs = ", ".join(f"{path} {description}" for path, description in report.outputs[:4])
        more = f" and {len(report.outputs) - 4} more" if len(report.outputs) > 4 else ""
        compared = f"same structure, shape, dtype in {' and '.join(report.modes)}:"
        grid.add_row(Text("outputs", style="dim"), Text(f"{compared}\n{printable(outputs)}{more}"))
    else:
        grid.add_row(Text("outputs", style="dim"), Text("not compared: the models were not run", style="yellow"))
    if report.behaviour:
        grid.add_row(Text("works", style="dim"), Text(printable(", ".join(report.behaviour))))
    return grid


def bench_table(report: BenchReport) -> RenderableType:
    """Return a benchmark as a table of both sides at every batch size, and how it was measured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("batch", no_wrap=True)
    table.add_column("model", no_wrap=True)
    # Only a GPU's allocator separates the memory of the two models.
    with_peak = report.cases[0].dense.peak_bytes is not None
    for heading in ("median", "quartiles", "weights", *(["peak memory"] if with_peak else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in report.cases:
        batch = "as given" if case.batch is None else str(case.batch)
        table.add_row(batch, "dense", *_measured(case.dense))
        table.add_row("", "converted", *_measured(case.converted))
        speed = Text(f"{case.dense_over_converted:.2f}", style="green" if case.dense_over_converted >= 1 else "yellow")
        table.add_row("", "dense ÷ converted", speed, "", *_memory_ratios(case.dense, case.converted))
    return Group(table, Text(), _bench_lines(report))


def _measured(side: Side) -> list[str]:
    time = side.time
    memory = [human_bytes(side.parameter_bytes)]
    if side.peak_bytes is not None:
        memory.append(human_bytes(side.peak_bytes))
    return [f"{time.median_ms:.3f} ms", f"{time.q1_ms:.3f}…{time.q3_ms:.3f}", *memory]


def _memory_ratios(dense: Side, converted: Side) -> list[str]:
    ratios = [f"{dense.parameter_bytes / converted.parameter_bytes:.2f}"]
    if dense.peak_bytes is not None and converted.peak_bytes is not None:
        ratios.append(f"{dense.peak_bytes / converted.peak_bytes:.2f}")
    return ratios


def _bench_lines(report: BenchReport) -> RenderableType:
    how = ["forward and backward in train mode" if report.train else "inference", report.dtype or "the model's dtype"]
    how += ["torch.compile"] if report.compile else []
    how += ["CUDA graph"] if report.graph else ["called from Python"]
    first = report.cases[0]
    machine = dict(report.machine)
    device = machine.pop("gpu", None) or f"{machine['cpu']}, {machine['threads']} threads"
    for name in ("cpu", "threads"):
        machine.pop(name, None)
    lines = [
        ("time", "of one call in milliseconds; above 1 the converted model is faster, below 1 slower"),
        ("bytes", "1 kB is 1000 bytes; weights are what is stored of them"),
        ("parameters", f"{first.dense.parameters:,} → {first.converted.parameters:,} stored"),
        ("ratio", f"{report.achieved_ratio:.2f} (asked {report.ratio:g})"),
        ("how", ", ".join(how)),
        ("checked", _agreement(report)),
        ("on", f"{report.device}: {device}"),
        ("pool on", backend(torch.device(report.device))),
        ("with", ", ".join(f"{name} {value}" for name, value in machine.items() if name != "date")),
        ("date", machine["date"]),
    ]
    return _named_lines(lines)


def _agreement(report: BenchReport) -> str:
    found = [case.agreement for case in report.cases]
    error = max(agreement.error for agreement in found)
    equal = f"within {error:.1e} of their largest value" if error else "to the last bit"
    text = f"outputs equal {equal} (allowed {found[0].tolerance:g})"
    for dense_error, error in (agreement.from_float32 for agreement in found if agreement.from_float32):
        text += f"; against float32 it errs by {error:.1e}, the dense model by {dense_error:.1e}"
    gradients = [agreement.gradient_error for agreement in found if agreement.gradient_error is not None]
    if gradients:
        text += f", the pool's gradient within {max(gradients):.1e} (allowed {found[0].gradient_tolerance:g})"
    return text


def recovery_lines(report: RecoveryReport) -> RenderableType:
    """Return how alike student and teacher were at each stage, and how the loss went."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    with_top = report.after.top is not None
    for heading in ("student", "error of outputs", *(["same top class"] if with_top else [])):
        table.add_column(heading, justify="left" if heading == "student" else "right", no_wrap=True)
    stages: list[tuple[str, Likeness | None]] = [
        ("as it came", report.before),
        ("layers aligned", report.aligned),
        (f"after {report.steps:,} steps", report.after),
    ]
    for name, likeness in stages:
        if likeness is not None:
            top = [] if likeness.top is None else [f"{likeness.top:.1%}"]
            table.add_row(name, f"{likeness.error:.4f}", *top)
    lines = []
    if report.align_error is not None:
        before, after = report.align_error
        lines.append(("layers", f"error {before:.4f} → {after:.4f} in {report.align_seconds:.1f} s"))
    if report.losses:
        first, last = report.losses[0], report.losses[-1]
        parts = ", ".join(f"{name} {first.parts[name]:.4f} → {value:.4f}" for name, value in last.parts.items())
        lines.append(("loss", f"{first.loss:.4f} → {last.loss:.4f} ({parts})"))
    lines += [("evaluated", f"{value} after {step:,} steps") for step, value in report.evaluations]
    lines.append(("matched", f"{_count(len(report.features), 'module')}; logits: {', '.join(report.logits) or 'none'}"))
    resumed = f", resumed at step {report.resumed_at:,}" if report.resumed_at else ""
    lines.append(("time", f"{report.seconds:.1f} s{resumed}"))
    meaning = "error of outputs: the squared difference from the teacher's, relative to their variance"
    if with_top:
        meaning += "; same top class: predictions whose first choice is the teacher's"
    return Group(table, Text(meaning, style="dim"), Text(), _named_lines(lines))


def sweep_table(report: SweepReport) -> RenderableType:
    """Return a sweep as a table of the dense model and every ratio, and how it was made."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("ratio", "parameters", "bytes", "multiply-adds", "quality", "time", "dense ÷"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (report.dense, *report.rows):
        speed = Text(f"{row.dense_over_converted:.2f}", style="green" if row.dense_over_converted >= 1 else "yellow")
        table.add_row(
            "dense" if row is report.dense else f"{row.ratio:g}",
            f"{row.parameters:,}",
            human_bytes(row.bytes),
            human_bytes(row.multiply_adds).removesuffix("B").rstrip(),
            f"{row.quality:.4g}",
            f"{row.ms:.3f} ms",
            speed,
        )
    better = "lower is better" if report.lower_is_better else "higher is better"
    seconds = [row.seconds for row in report.rows]
    machine = report.machine
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        ("quality", f"{report.quality}, {better}"),
        ("how", f"{report.how} for {report.steps:,} steps at each ratio, {max(seconds):.1f} s at most"),
        ("time", "of one forward pass; dense ÷ is above 1 where the converted model is faster"),
        ("multiply-adds", "of that forward pass, those of folds and kernel bases included"),
        ("on", f"{machine['device']}: {device}"),
    ]
    return Group(table, Text(), _named_lines(lines))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

"""Results as the command line shows them, made with rich: a summary, a table, and what its columns mean."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, cast

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text

from roastify.artifact import Artifact
from roastify.checks.interface import VerifyReport
from roastify.checks.model_bench import BenchReport, Side
from roastify.files import digest_of_file
from roastify.kernels.backend import backend
from roastify.manifest import MANIFEST, WEIGHTS, builder_in, files_in
from roastify.plan_table import plan_table
from roastify.pool.plan import RoastPlan
from roastify.ratio_sweep import SweepReport
from roastify.recovery.report import Likeness, RecoveryReport
from roastify.text_layout import human_bytes, legend, named_lines, results_table

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
    return named_lines(lines)


def verify_lines(report: VerifyReport) -> RenderableType:
    """Return what a verification found equal."""
    signature = report.signature if len(report.signature) < 200 else report.signature[:197] + "..."
    lines = [("signature", f"same: {signature}")]
    if report.modes:
        outputs = ", ".join(f"{path} {description}" for path, description in report.outputs[:4])
        more = f" and {len(report.outputs) - 4} more" if len(report.outputs) > 4 else ""
        lines.append(("outputs", f"same structure, shape, dtype in {' and '.join(report.modes)}: {outputs}{more}"))
    else:
        lines.append(("outputs", "not compared: the models were not run"))
    if report.behaviour:
        lines.append(("works", ", ".join(report.behaviour)))
    return named_lines(lines)


def bench_table(report: BenchReport) -> RenderableType:
    """Return how a benchmark was measured, and a table of both sides at every batch size."""
    # Only a GPU's allocator separates the memory of the two models.
    with_peak = report.cases[0].dense.peak_bytes is not None
    peak = ["peak memory"] if with_peak else []
    table = results_table("batch", "model", "median", "quartiles", "weights", *peak, left=2)
    for case in report.cases:
        batch = "as given" if case.batch is None else str(case.batch)
        table.add_row(batch, "dense", *_measured(case.dense))
        table.add_row("", "converted", *_measured(case.converted))
        memory = _memory_ratios(case.dense, case.converted)
        table.add_row("", "dense ÷ converted", _speed(case.dense_over_converted), "", *memory)
    meanings = {
        "time": "of one call in milliseconds",
        "dense ÷ converted": "above 1 the converted model is faster, below 1 slower",
        "weights": "bytes that are stored of them (1 kB: 1000 bytes)",
    }
    return Group(_bench_lines(report), Text(), table, Text(), legend(meanings))


def _speed(dense_over_converted: float) -> Text:
    return Text(f"{dense_over_converted:.2f}", style="green" if dense_over_converted >= 1 else "yellow")


def _measured(side: Side) -> list[str]:
    time = side.time
    memory = [human_bytes(side.parameter_bytes)]
    if side.peak_bytes is not None:
        memory.append(human_bytes(side.peak_bytes))
    return [f"{time.median_ms:.3f} ms", f"{time.q1_ms:.3f}–{time.q3_ms:.3f}", *memory]


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
        ("parameters", f"{first.dense.parameters:,} → {first.converted.parameters:,} stored"),
        ("ratio", f"{report.achieved_ratio:.2f} (asked {report.ratio:g})"),
        ("how", ", ".join(how)),
        ("checked", _agreement(report)),
        ("on", f"{report.device}: {device}"),
        ("pool on", backend(torch.device(report.device))),
        ("with", ", ".join(f"{name} {value}" for name, value in machine.items() if name != "date")),
        ("date", machine["date"]),
    ]
    return named_lines(lines)


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
    """Return how a recovery's loss went, and how alike student and teacher were at each stage."""
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
    with_top = report.after.top is not None
    table = results_table("student", "error of outputs", *(["same top class"] if with_top else []))
    stages: list[tuple[str, Likeness | None]] = [
        ("as it came", report.before),
        ("layers aligned", report.aligned),
        (f"after {report.steps:,} steps", report.after),
    ]
    for name, likeness in stages:
        if likeness is not None:
            top = [] if likeness.top is None else [f"{likeness.top:.1%}"]
            table.add_row(name, f"{likeness.error:.4f}", *top)
    meanings = {"error of outputs": "squared difference from the teacher's, relative to their variance"}
    if with_top:
        meanings["same top class"] = "predictions whose first choice is the teacher's"
    return Group(named_lines(lines), Text(), table, Text(), legend(meanings))


def sweep_table(report: SweepReport) -> RenderableType:
    """Return how a sweep was made, and a table of the dense model and every ratio."""
    table = results_table("ratio", "parameters", "bytes", "multiply-adds", "quality", "time", "dense ÷", left=0)
    for row in (report.dense, *report.rows):
        table.add_row(
            "dense" if row is report.dense else f"{row.ratio:g}",
            f"{row.parameters:,}",
            human_bytes(row.bytes),
            human_bytes(row.multiply_adds).removesuffix("B").rstrip(),
            f"{row.quality:.4g}",
            f"{row.ms:.3f} ms",
            _speed(row.dense_over_converted),
        )
    better = "lower is better" if report.lower_is_better else "higher is better"
    seconds = [row.seconds for row in report.rows]
    machine = report.machine
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        ("quality", f"{report.quality}, {better}"),
        ("how", f"{report.how} for {report.steps:,} steps at each ratio, {max(seconds):.1f} s at most"),
        ("on", f"{machine['device']}: {device}"),
    ]
    meanings = {
        "multiply-adds": "of a forward pass, those of folds and kernel bases included",
        "time": "of a forward pass",
        "dense ÷": "above 1 the converted model is faster",
        "bytes": "1 kB: 1000 bytes",
    }
    return Group(named_lines(lines), Text(), table, Text(), legend(meanings))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

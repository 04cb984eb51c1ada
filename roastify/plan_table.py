"""A plan as the command line shows it: its sums, a line for each group of tensors, and what the columns mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from roastify.pool.plan import ELIGIBLE, RoastPlan, TensorPlan
from roastify.printable import printable
from roastify.text_layout import human_bytes, legend, named_lines, shortened

_HEADINGS = ("tensor", "×", "shape", "op", "verdict", "λ", "tiles", "budget", "reason")
_NUMBERS = ("×", "shape", "λ", "tiles", "budget")
# The columns of words, and the cells that each should have at least; the first get what is left.
_WORDS = {"tensor": 32, "reason": 19, "op": 17}
# Columns that a short line has no room for, the first to go first. A pipe and `--json` have them.
_LEFT_OUT = ("λ", "tiles", "op")
_START = {
    "match": "random, to train from scratch: the model's weights are not kept; "
    'init="project" (--init project), then recover, keeps them',
    "project": "fitted to the model's weights; roastify recover brings its outputs back",
}


def plan_table(plan: RoastPlan, full: bool = False) -> RenderableType:
    """Return a plan as a summary and a table of tensors.

    Args:
        plan: the plan.
        full: whether every tensor has a row. If not, shared tensors that differ only in a layer's number are one row,
            and so are kept tensors with the same reason.
    """
    return Group(summary(plan), Text(), _Tensors(plan, full))


def summary(plan: RoastPlan) -> RenderableType:
    """Return a plan's sums: what the dense model holds, what will be stored, and how the budget is spent."""
    rows, cols = plan.tile
    shared = plan.total_numel - plan.kept_numel
    basis = f"basis kernels {plan.basis_numel:,} + " if plan.basis_numel else ""
    scales = f", {plan.scale_numel:,} of it learned scales" if plan.scale_numel else ""
    lines = [
        ("model", plan.model),
        (
            "parameters",
            f"{plan.total_numel:,} → {plan.stored_numel:,} stored "
            f"(pool {plan.pool_numel:,}{scales} + {basis}kept {plan.kept_numel:,})",
        ),
        ("bytes", f"{human_bytes(plan.total_nbytes)} → {human_bytes(plan.stored_nbytes)} (1 kB: 1000 bytes)"),
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
        layers = [tensor for tensor in plan.shared if tensor.fold is not None]
        unit = "a token or output place" if any(len(tensor.shape) > 2 for tensor in layers) else "a token"
        lines.append(
            (
                "multiply-adds",
                f"{plan.folded_numel:,} → {plan.multiplied_numel:,} {unit} in {len(layers)} folded layers "
                f"(fold {', '.join(map(str, sizes))}; {len(plan.folds)} folds of inputs)",
            )
        )
    if plan.share == "all":
        lines.append(("vectors", "shared too, with constant and small tensors (share = all, or auto at this ratio)"))
    if plan.stored_numel > plan.total_numel:
        lines.append(("note", "nothing is shared at this ratio, and padding to whole tiles stores slightly more"))
    return named_lines(lines)


def _read_by(plan: RoastPlan) -> str:
    """Return how many tensors are read in which way; a tensor with several ways counts for the first."""
    ways = [tensor.through.split(", ") for tensor in plan.shared]
    layers = sum("layer" in way for way in ways)
    operations = sum("operation" in way and "layer" not in way for way in ways)
    counts = {
        "by layers' own operations": layers,
        "by operations in modules' code": operations,
        "materialised on access": len(ways) - layers - operations,
    }
    return ", ".join(f"{count} {way}" for way, count in counts.items() if count) or "nothing"


class _Tensors:
    """A line for each group of tensors, and a legend; where the line is short, some columns are left out."""

    def __init__(self, plan: RoastPlan, full: bool) -> None:
        self.plan = plan
        self.rows = [_row(plan, group) for group in _groups(plan.tensors, full)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths, gap = _widths(self.rows, options.max_width)
        table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=gap == 1)
        for heading, width in widths.items():
            justify: Any = "right" if heading in _NUMBERS else "left"
            table.add_column(heading, justify=justify, width=width, no_wrap=True)
        for row in self.rows:
            cells = (Text(shortened(str(row[heading]), width), row[heading].style) for heading, width in widths.items())
            table.add_row(*cells)
        yield table
        yield Text()
        yield legend(self._meanings(widths))

    def _meanings(self, widths: dict[str, int]) -> dict[str, str]:
        rows, cols = self.plan.tile
        meanings = {
            "×": "tensors in the line, whose numbers * stands for; --all lists them",
            "λ": "a tensor's scale, as its weights are λ · sign · pool",
            "tiles": f"of {rows}×{cols} weights",
            "budget": "part of what is stored",
        }
        meanings = {word: meaning for word, meaning in meanings.items() if word in widths}
        if absent := [heading for heading in _HEADINGS if heading not in widths and heading != "×"]:
            meanings["not shown"] = f"{', '.join(absent)}: the line is too short; a file or a pipe has them"
        cut = [str(row["reason"]) for row in self.rows if cell_len(str(row["reason"])) > widths["reason"]]
        if cut:
            meanings["reasons"] = ", ".join(dict.fromkeys(cut))
        return meanings


def _widths(rows: Sequence[dict[str, Text]], line: int) -> tuple[dict[str, int], int]:
    """Return the columns that are shown with their widths, and the spaces between two."""
    needs = {heading: max(cell_len(str(row[heading])) for row in rows) for heading in _HEADINGS}
    if not needs["×"]:
        del needs["×"]
    needs = {heading: max(cell_len(heading), need) for heading, need in needs.items()}
    if sum(needs.values()) + 2 * (len(needs) - 1) <= line:
        return needs, 2
    for heading in ("", *_LEFT_OUT):
        needs.pop(heading, None)
        words = {name: needs[name] for name in _WORDS if name in needs}
        room = line - (len(needs) - 1) - sum(need for name, need in needs.items() if name not in _WORDS)
        if room >= sum(min(need, _WORDS[name]) for name, need in words.items()):
            break
    return needs | _shares(words, room), 1


def _shares(needs: dict[str, int], room: int) -> dict[str, int]:
    """Return widths for columns of words: what each needs, or where the room is too small, a part of it."""
    widths = {heading: min(need, _WORDS[heading]) for heading, need in needs.items()}
    least = sum(widths.values())
    if room < least:
        return {heading: max(4, width * room // least) for heading, width in widths.items()}
    for heading in widths:
        widths[heading] += min(needs[heading] - widths[heading], room - sum(widths.values()))
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


def _row(plan: RoastPlan, group: list[TensorPlan]) -> dict[str, Text]:
    first = group[0]
    shapes = {tensor.shape for tensor in group}
    stored: float = sum(tensor.numel for tensor in group)
    if first.shared:
        # A shared tensor counts for a part of the pool in proportion to its elements.
        part = sum(tensor.matrix_numel for tensor in group) / sum(tensor.matrix_numel for tensor in plan.shared)
        stored = plan.pool_numel * part + sum(math.prod(tensor.basis_shape) for tensor in group if tensor.basis_count)
    cells = {
        "tensor": _label(group),
        "×": f"{len(group):,}" if len(group) > 1 else "",
        "shape": "×".join(map(str, first.shape)) or "1" if len(shapes) == 1 else "various",
        "op": ", ".join(dict.fromkeys(tensor.op for tensor in group)),
        "verdict": "shared" if first.shared else "kept",
        "λ": _scales(group),
        "tiles": f"{sum(tensor.num_tiles for tensor in group):,}" if first.shared else "",
        "budget": f"{stored / plan.stored_numel:.1%}",
        "reason": _reason(plan, first),
    }
    colour = "green" if first.shared else "yellow"
    return {heading: Text(printable(cell), colour if heading == "verdict" else "") for heading, cell in cells.items()}


def _label(group: list[TensorPlan]) -> str:
    if len(group) == 1:
        return group[0].name
    names = list(dict.fromkeys(_numberless(tensor.name) for tensor in group))
    return names[0] if len(names) == 1 else f"{names[0]} and others"


def _scales(group: list[TensorPlan]) -> str:
    scales = sorted({f"{tensor.scale:.3g}" for tensor in group if tensor.scale is not None}, key=float)
    return "–".join(dict.fromkeys([*scales[:1], *scales[-1:]]))


def _reason(plan: RoastPlan, tensor: TensorPlan) -> str:
    """Return why a tensor is shared or kept, and what is special about it; "eligible" says less than anything else."""
    special = [f"spread around {tensor.center:.3g}"] if tensor.center else []
    special += [f"fold {plan.folds[tensor.fold].fold}"] if tensor.fold is not None else []
    special += [f"materialised: {tensor.whole}"] if tensor.whole else []
    return "; ".join(special if special and tensor.reason == ELIGIBLE else [tensor.reason, *special])

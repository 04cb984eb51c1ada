"""Examines one model for everything that a conversion promises; the result is a row of the coverage table."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import roastify
from roastify.calls import run_model, split_inputs
from roastify.checks.example_inputs import find_inputs
from roastify.conversion.converted import pool_of
from roastify.conversion.fx_pass import trace
from roastify.conversion.trained_weights import trained_norms
from roastify.kernels.torch_internals import pytree

RATIO = 10
LARGE = 1_000_000
LEAST_SHARED = 0.98
LONGEST_TRACE_S = 30.0


class Unbuilt(Exception):
    """The model itself cannot be built or run here, converted or not."""


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Args:
        name: its name in the table.
        family: such as `encoder`, `vision`, `awkward`.
        build: builds it.
        inputs: its inputs; None to have them guessed.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Row:
    """What was found; `failure` is empty if everything held."""

    name: str
    family: str
    parameters: int = 0
    traced: int = 0
    opaque: int = 0
    trace_s: float = 0.0
    layer: int = 0
    operation: int = 0
    attribute: int = 0
    shared: float = 0.0
    kept: str = ""
    share: str = ""
    ratio: float = 0.0
    failure: str = ""


def examine(entry: Entry) -> Row:
    """Convert at ratio 10 and verify, in train and eval; convert at ratio 1 and compare outputs; go back to dense.

    Raises:
        Unbuilt: the model cannot be built, or does not run unconverted.
    """
    try:
        torch.manual_seed(0)
        model = entry.build()
        inputs = entry.inputs() if entry.inputs else find_inputs(model)
        if inputs is None:
            raise Unbuilt("no inputs fit it")
        args, kwargs = split_inputs(inputs)
        expected = {mode: run_model(model, args, kwargs, mode) for mode in ("eval", "train")}
    except Exception as error:
        raise Unbuilt(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
        ) from error
    row = Row(entry.name, entry.family)
    try:
        begun = time.perf_counter()
        forest = trace(model)
        row = dataclasses.replace(
            row,
            trace_s=time.perf_counter() - begun,
            traced=sum(region.graph is not None for region in forest.regions),
            opaque=sum(region.graph is None for region in forest.regions),
        )
        converted = roastify.convert(model, RATIO, example_inputs=inputs)
        row = _with_plan(row, pool_of(converted).plan)
        if trained := trained_norms(model, pool_of(converted).plan):
            raise AssertionError(f"{trained[0]} counts as trained in a new model")
        roastify.verify(model, converted, inputs)
        _go_back(model, converted)
        _compare_without_sharing(model, args, kwargs, expected)
        _check_promises(row)
    except Exception as error:
        lines = str(error).strip().splitlines()
        row = dataclasses.replace(row, failure=f"{type(error).__name__}: {lines[0][:300] if lines else ''}")
    return row


def _with_plan(row: Row, plan: roastify.RoastPlan) -> Row:
    through = Counter(tensor.through for tensor in plan.shared)
    kept: Counter[str] = Counter()
    for tensor in plan.kept:
        kept[tensor.reason.split(":")[0] if not tensor.reason.startswith("vector") else "vector"] += tensor.numel
    return dataclasses.replace(
        row,
        parameters=plan.total_numel,
        layer=sum(count for how, count in through.items() if "layer" in how),
        operation=sum(count for how, count in through.items() if "operation" in how and "layer" not in how),
        attribute=through["attribute"],
        shared=1 - plan.kept_numel / plan.total_numel,
        kept="; ".join(f"{reason} {count / plan.total_numel:.1%}" for reason, count in kept.most_common()),
        share=plan.share,
        ratio=plan.achieved_ratio,
    )


def _go_back(model: nn.Module, converted: nn.Module) -> None:
    dense = roastify.densify(converted)
    if list(dense.state_dict()) != list(model.state_dict()):
        raise AssertionError("densify gives other state-dict keys")
    if [type(module) for module in dense.modules()] != [type(module) for module in model.modules()]:
        raise AssertionError("densify gives other classes")


def _compare_without_sharing(model: nn.Module, args: Any, kwargs: Any, expected: dict[str, Any]) -> None:
    same = roastify.convert(model, 1, init="project")
    for mode, before in expected.items():
        leaves = [leaf for leaf in pytree.tree_leaves(before) if isinstance(leaf, Tensor)]
        after = [leaf for leaf in pytree.tree_leaves(run_model(same, args, kwargs, mode)) if isinstance(leaf, Tensor)]
        for one, other in zip(leaves, after, strict=True):
            if one.is_floating_point() and one.numel():
                size = float(torch.nan_to_num(one.float(), posinf=0, neginf=0).abs().max())
                torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * max(size, 1e-3), equal_nan=True)


def _check_promises(row: Row) -> None:
    if row.ratio < RATIO:
        raise AssertionError(f"ratio {row.ratio:.2f}, promised {RATIO}")
    if row.parameters >= LARGE and row.shared < LEAST_SHARED:
        raise AssertionError(f"{row.shared:.1%} of parameters shared, promised {LEAST_SHARED:.0%}: kept {row.kept}")
    if row.trace_s > LONGEST_TRACE_S:
        raise AssertionError(f"tracing took {row.trace_s:.0f} s, promised {LONGEST_TRACE_S:.0f}")

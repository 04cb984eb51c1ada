"""What the operators cost, for torch's `FlopCounterMode`: their own products, and the sums of folds.

Torch's counter has a table of formulas, and an operator that is not in it counts as nothing. The counter's module takes
long to import, so the formulas are given to it where one is running.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from roastify.kernels.torch_internals import dispatch_mode_stack
from roastify.kernels.view import FoldView, TileView

Shape = Sequence[int]


def _linear(x: Shape, pool: Shape, bias: Shape | None, table: Shape, view: Sequence[int], *_: Any, **__: Any) -> int:
    tiles = TileView(*view)
    # Of `linear` x has `cols` features, of `linear_t` it has `rows`.
    return 2 * math.prod(x[:-1]) * tiles.rows * tiles.cols


def _linear_reduce(grad: Shape, x: Shape, table: Shape, view: Sequence[int], *_: Any, **__: Any) -> int:
    tiles = TileView(*view)
    return 2 * math.prod(x[:-1]) * tiles.rows * tiles.cols


def _linear_reduce_(total: Shape, grad: Shape, x: Shape, table: Shape, view: Sequence[int], *_: Any, **__: Any) -> int:
    return _linear_reduce(grad, x, table, view)


def _fold(x: Shape, pool: Shape | None, fold: Sequence[int], *_: Any, **__: Any) -> int:
    view = FoldView(*fold)
    # Of `fold` x has `cols` features, of `unfold` `folded_cols`.
    return 2 * math.prod(x[:-1]) * view.hashes * view.cols


def _folded_linear(x: Shape, pool: Shape, bias: Any, table: Any, view: Sequence[int], fold: Sequence[int], *_: Any,
                   **__: Any) -> int:  # fmt: skip
    return _fold(x, None, fold) + _linear(x, pool, None, pool, view)


def _combine(coefficients: Shape, basis: Shape, *_: Any, **__: Any) -> int:
    return 2 * coefficients[0] * coefficients[1] * basis[1]


def _combine_reduce(coefficients: Shape, grad: Shape, *_: Any, **__: Any) -> int:
    return 2 * coefficients[0] * coefficients[1] * grad[1]


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear": _linear,
    "linear_t": _linear,
    "linear_reduce": _linear_reduce,
    "linear_reduce_": _linear_reduce_,
    "folded_linear": _folded_linear,
    "fold": _fold,
    "unfold": _fold,
    "combine": _combine,
    "combine_reduce": _combine_reduce,
}


def teach_flop_counters() -> None:
    """Give the formulas to torch's counter and to every counter that is running."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    operators = {getattr(torch.ops.roastify, name): formula for name, formula in _FORMULAS.items()}
    for operator, formula in operators.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
    for mode in dispatch_mode_stack():
        if isinstance(mode, counting._FlopCounterMode):
            for operator in operators:
                mode.counter.flop_registry.setdefault(operator, counting.flop_registry[operator])

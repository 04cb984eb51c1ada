"""The operators `torch.ops.roastify.*`: schemas, implementations and fakes (for tensors without data)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roastify.kernels import dispatch, reference
from roastify.kernels.group_view import group_of_text
from roastify.kernels.view import FoldView, TileView

_VIEW = "Tensor table, int[] view, float scale"
SCHEMAS = {
    "gather": f"(Tensor pool, {_VIEW}) -> Tensor",
    "reduce": f"(Tensor grad_weight, {_VIEW}, int[] pool_shape) -> Tensor",
    "gather_group": "(Tensor pool, Tensor table, str group) -> Tensor",
    "reduce_group": "(Tensor grad_flat, Tensor table, str group, int[] pool_shape) -> Tensor",
    "linear": f"(Tensor x, Tensor pool, Tensor? bias, {_VIEW}) -> Tensor",
    "linear_t": f"(Tensor x, Tensor pool, Tensor? bias, {_VIEW}) -> Tensor",
    "linear_reduce": f"(Tensor grad, Tensor x, {_VIEW}, int[] pool_shape) -> Tensor",
    "embedding": f"(Tensor index, Tensor pool, {_VIEW}) -> Tensor",
    "embedding_reduce": f"(Tensor grad, Tensor index, {_VIEW}, int[] pool_shape) -> Tensor",
    "folded_linear": (
        "(Tensor x, Tensor pool, Tensor? bias, Tensor table, int[] view, int[] fold, float scale) -> Tensor"
    ),
    "fold": "(Tensor x, Tensor? pool, int[] fold, ScalarType dtype) -> Tensor",
    "unfold": "(Tensor z, Tensor? pool, int[] fold, ScalarType dtype) -> Tensor",
    "fold_reduce": "(Tensor grad, Tensor x, int[] fold, int[] pool_shape) -> Tensor",
    "combine": "(Tensor coefficients, Tensor basis, float grad_scale) -> Tensor",
    "combine_reduce": "(Tensor coefficients, Tensor grad, float grad_scale) -> Tensor",
    "fold_reduce_": "(Tensor(a!) total, Tensor grad, Tensor x, int[] fold) -> ()",
    "reduce_": f"(Tensor(a!) total, Tensor grad_weight, {_VIEW}) -> ()",
    "reduce_group_": "(Tensor(a!) total, Tensor grad_flat, Tensor table, str group) -> ()",
    "linear_reduce_": f"(Tensor(a!) total, Tensor grad, Tensor x, {_VIEW}) -> ()",
    "embedding_reduce_": f"(Tensor(a!) total, Tensor grad, Tensor index, {_VIEW}) -> ()",
}

library = torch.library.Library("roastify", "DEF")
# The positions of views among an operator's arguments, and their types.
_view_types = {" int[] view": TileView, " int[] fold": FoldView}
_views: dict[str, list[tuple[int, type[TileView] | type[FoldView]]]] = {}


def with_view(name: str, function: Any) -> Any:
    """Return an operator's function, which then takes its views, if any, as the schema's lists of integers."""
    views = _views[name]
    if not views:
        return function

    def call(*args: Any) -> Tensor | None:
        changed = list(args)
        for position, view_type in views:
            changed[position] = view_type(*args[position])
        return function(*changed)

    return call


for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    dispatch.implementations[_name] = dispatch.implementation(_name)
    _arguments = _schema.split("->")[0].rstrip(" )").split(",")
    _views[_name] = [(place, _view_types[text]) for place, text in enumerate(_arguments) if text in _view_types]
    library.impl(_name, with_view(_name, dispatch.implementations[_name]), "CompositeExplicitAutograd")


@torch.library.register_fake("roastify::gather", lib=library)
def _(pool: Tensor, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    tiles = TileView(*view)
    return pool.new_empty(tiles.rows, tiles.cols)


@torch.library.register_fake("roastify::reduce", lib=library)
def _(grad_weight: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]) -> Tensor:
    return grad_weight.new_empty(pool_shape)


@torch.library.register_fake("roastify::gather_group", lib=library)
def _(pool: Tensor, table: Tensor, group: str) -> Tensor:
    return pool.new_empty(group_of_text(group).offsets[-1])


@torch.library.register_fake("roastify::reduce_group", lib=library)
def _(grad_flat: Tensor, table: Tensor, group: str, pool_shape: Sequence[int]) -> Tensor:
    return grad_flat.new_empty(pool_shape)


@torch.library.register_fake("roastify::linear", lib=library)
def _(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], TileView(*view).rows)


@torch.library.register_fake("roastify::linear_t", lib=library)
def _(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], TileView(*view).input_cols)


@torch.library.register_fake("roastify::linear_reduce", lib=library)
def _(grad: Tensor, x: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]) -> Tensor:
    return x.new_empty(pool_shape)


@torch.library.register_fake("roastify::embedding", lib=library)
def _(index: Tensor, pool: Tensor, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    return pool.new_empty(*index.shape, TileView(*view).cols)


@torch.library.register_fake("roastify::embedding_reduce", lib=library)
def _(
    grad: Tensor, index: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]
) -> Tensor:
    return grad.new_empty(pool_shape)


@torch.library.register_fake("roastify::folded_linear", lib=library)
def _(
    x: Tensor,
    pool: Tensor,
    bias: Tensor | None,
    table: Tensor,
    view: Sequence[int],
    fold: Sequence[int],
    scale: float,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], TileView(*view).rows, dtype=pool.dtype)


@torch.library.register_fake("roastify::fold", lib=library)
def _(x: Tensor, pool: Tensor | None, fold: Sequence[int], dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], FoldView(*fold).folded_cols, dtype=dtype)


@torch.library.register_fake("roastify::unfold", lib=library)
def _(z: Tensor, pool: Tensor | None, fold: Sequence[int], dtype: torch.dtype) -> Tensor:
    return z.new_empty(*z.shape[:-1], FoldView(*fold).cols, dtype=dtype)


@torch.library.register_fake("roastify::fold_reduce", lib=library)
def _(grad: Tensor, x: Tensor, fold: Sequence[int], pool_shape: Sequence[int]) -> Tensor:
    return grad.new_empty(pool_shape)


@torch.library.register_fake("roastify::combine", lib=library)
def _(coefficients: Tensor, basis: Tensor, grad_scale: float) -> Tensor:
    torch._check(coefficients.shape[1] == basis.shape[0], lambda: f"no product of {coefficients.shape}, {basis.shape}")
    return coefficients.new_empty(coefficients.shape[0], basis.shape[1])


@torch.library.register_fake("roastify::combine_reduce", lib=library)
def _(coefficients: Tensor, grad: Tensor, grad_scale: float) -> Tensor:
    torch._check(coefficients.shape[0] == grad.shape[0], lambda: f"no sum over {coefficients.shape}, {grad.shape}")
    return grad.new_empty(coefficients.shape[1], grad.shape[1], dtype=reference.summed_in(coefficients.dtype))


def _adds_in_place(*args: Any) -> None:
    """The fake of operators that only write to their first argument."""


for _name in ("reduce_", "reduce_group_", "linear_reduce_", "embedding_reduce_", "fold_reduce_"):
    torch.library.register_fake(f"roastify::{_name}", _adds_in_place, lib=library)

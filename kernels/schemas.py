"""The operators `torch.ops.roastify.*`: schemas, implementations and fakes (for tensors without data)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roastify.kernels import dispatch, reference
from roastify.kernels.view import TileView

_VIEW = "Tensor table, int[] view, float scale"
SCHEMAS = {
    "gather": f"(Tensor pool, {_VIEW}) -> Tensor",
    "reduce": f"(Tensor grad_weight, {_VIEW}, int[] pool_shape) -> Tensor",
    "linear": f"(Tensor x, Tensor pool, Tensor? bias, {_VIEW}) -> Tensor",
    "linear_t": f"(Tensor x, Tensor pool, Tensor? bias, {_VIEW}) -> Tensor",
    "linear_reduce": f"(Tensor grad, Tensor x, {_VIEW}, int[] pool_shape) -> Tensor",
    "embedding": f"(Tensor index, Tensor pool, {_VIEW}) -> Tensor",
    "embedding_reduce": f"(Tensor grad, Tensor index, {_VIEW}, int[] pool_shape) -> Tensor",
    "combine": "(Tensor coefficients, Tensor basis, float grad_scale) -> Tensor",
    "combine_reduce": "(Tensor coefficients, Tensor grad, float grad_scale) -> Tensor",
    "reduce_": f"(Tensor(a!) total, Tensor grad_weight, {_VIEW}) -> ()",
    "linear_reduce_": f"(Tensor(a!) total, Tensor grad, Tensor x, {_VIEW}) -> ()",
    "embedding_reduce_": f"(Tensor(a!) total, Tensor grad, Tensor index, {_VIEW}) -> ()",
}

library = torch.library.Library("roastify", "DEF")
# The position of the `TileView` among an operator's arguments; None if it takes none.
_view_positions: dict[str, int | None] = {}


def with_view(name: str, function: Any) -> Any:
    """Return an operator's function, which then takes its `TileView`, if any, as the schema's list of integers."""
    view_position = _view_positions[name]
    if view_position is None:
        return function

    def call(*args: Any) -> Tensor | None:
        return function(*args[:view_position], TileView(*args[view_position]), *args[view_position + 1 :])

    return call


for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    dispatch.implementations[_name] = dispatch.implementation(_name)
    _arguments = _schema.split("->")[0].split(",")
    _view_positions[_name] = _arguments.index(" int[] view") if " int[] view" in _arguments else None
    library.impl(_name, with_view(_name, dispatch.implementations[_name]), "CompositeExplicitAutograd")


@torch.library.register_fake("roastify::gather", lib=library)
def _(pool: Tensor, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    tiles = TileView(*view)
    return pool.new_empty(tiles.rows, tiles.cols)


@torch.library.register_fake("roastify::reduce", lib=library)
def _(grad_weight: Tensor, table: Tensor, view: Sequence[int], scale: float, pool_shape: Sequence[int]) -> Tensor:
    return grad_weight.new_empty(pool_shape)


@torch.library.register_fake("roastify::linear", lib=library)
def _(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], TileView(*view).rows)


@torch.library.register_fake("roastify::linear_t", lib=library)
def _(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: Sequence[int], scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], TileView(*view).cols)


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


for _name in ("reduce_", "linear_reduce_", "embedding_reduce_"):
    torch.library.register_fake(f"roastify::{_name}", _adds_in_place, lib=library)

r"""The operators as functions, which check their arguments, follow autocast and call the operator.

Each operator takes the pool, the chunk table, a `TileView` as ``int[]`` and the tensor's scale λ. It computes the dense
operation on :math:`W = \lambda \cdot sign \cdot pool[slot]`. The gradient of every operator is another operator of this
family, so second derivatives work as well. `fold` and `unfold` prepare the inputs of products with narrower matrices.
`combine` and `combine_reduce` do not read the pool: they compute convolution kernels from coefficients and a basis.

The operators that compute the pool's gradient have in-place twins (`reduce_`, `reduce_group_`, `linear_reduce_`,
`embedding_reduce_`, `fold_reduce_`). A twin adds the gradient to a tensor of the pool's shape and touches only the
elements that its weight reads. A backward pass calls the twins if the pool was read through a gate (`grad_buffer`).

`schemas` defines the operators and `autograd` their derivatives. `reference` implements them in plain torch and `gpu`
in Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Imported for its effect: it registers the operators' derivatives.
from roastify.kernels import autograd as autograd
from roastify.kernels import blocks
from roastify.kernels.dispatch import call
from roastify.kernels.group_view import GroupView
from roastify.kernels.view import FoldView, TileView


def gather(pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    r"""Return the dense tensor :math:`W = \lambda \cdot sign \cdot pool[slot]`.

    Args:
        pool: the whole pool, `[slots · tile_rows, tile_cols]`, any floating dtype.
        table: the pool's chunk table, int64 `[chunks, 3]`.
        view: where the tensor lies.
        scale: λ.

    Returns:
        `[rows, cols]`, of the pool's dtype.
    """
    return call("gather", pool, table, view, scale)


def reduce(grad_weight: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: Sequence[int]) -> Tensor:
    r"""Return the adjoint of `gather`: :math:`\sum \lambda \cdot sign \cdot grad` over the readers of each element.

    Args:
        grad_weight: `[rows, cols]`; sums accumulate in float32 (float64 for float64), in a fixed order.
        table: the pool's chunk table.
        view: where the tensor lies.
        scale: λ.
        pool_shape: the pool's shape.

    Returns:
        a tensor of `pool_shape` and of `grad_weight`'s dtype.
    """
    return call("reduce", grad_weight, table, view, scale, list(pool_shape))


def gather_group(pool: Tensor, table: Tensor, group: GroupView) -> Tensor:
    """Return the dense tensors of a group in one flat tensor, of the pool's dtype; `group.part` returns one of them.

    Args:
        pool: the whole pool.
        table: the pool's chunk table.
        group: where the tensors lie, and λ of each. What lies between them in the flat tensor is undefined.
    """
    return call("gather_group", pool, table, group.text)


def reduce_group(grad_flat: Tensor, table: Tensor, group: GroupView, pool_shape: Sequence[int]) -> Tensor:
    """Return the adjoint of `gather_group`, a tensor of `pool_shape` and of the gradient's dtype; see `reduce`."""
    return call("reduce_group", grad_flat, table, group.text, list(pool_shape))


def linear(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias`, like `torch.nn.functional.linear`; under autocast, in autocast's dtype.

    Args:
        x: `[..., cols]`; with a view of several groups `[..., groups·cols]`, where `W` is block-diagonal.
        pool: the whole pool.
        bias: `[rows]` or None.
        table: the pool's chunk table.
        view: where `W` lies.
        scale: λ.

    Returns:
        `[..., rows]`.

    Raises:
        RuntimeError: `x` has another last size than `cols`, or another dtype than the pool or the bias.
    """
    x, pool, bias = _like_autocast(x, pool, bias)
    _check_product("linear", x, view.input_cols, pool, bias)
    return call("linear", x, pool, bias, table, view, scale)


def linear_t(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · W + bias`, `[..., rows] → [..., groups·cols]`; arguments, dtypes and errors as in `linear`."""
    x, pool, bias = _like_autocast(x, pool, bias)
    _check_product("linear_t", x, view.rows, pool, bias)
    return call("linear_t", x, pool, bias, table, view, scale)


def embedding(index: Tensor, pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the rows `W[index]`, like `torch.nn.functional.embedding`; only those rows' pool elements are read.

    Args:
        index: integers of any shape, each from 0 to `rows - 1`.
        pool: the whole pool.
        table: the pool's chunk table.
        view: where `W` lies.
        scale: λ.

    Returns:
        `[*index.shape, cols]`.

    Raises:
        IndexError: an index is outside the table.
        RuntimeError: `index` is not of an integer dtype.
    """
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"embedding: the indices must be int64 or int32; found {index.dtype}")
    return call("embedding", index, pool, table, view, scale)


def fold(x: Tensor, pool: Tensor | None, view: FoldView) -> Tensor:
    r"""Return a product's folded input, :math:`z_{g,p} = \sum_i s_{g,i,p} x_{i \cdot width + p}`; see `FoldView`.

    Args:
        x: `[..., cols]`.
        pool: the whole pool, of the same dtype, which holds the learned scales; None if there are none.
        view: the fold.

    Returns:
        `[..., hashes·width]`, of the input's dtype; under autocast of autocast's, without a cast of the input.

    Raises:
        RuntimeError: `x` has another last size than `cols`, or another dtype than the pool.
    """
    return _call_fold("fold", x, view.cols, pool, view)


def folded_linear(
    x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, fold_view: FoldView, scale: float
) -> Tensor:
    """Return `linear(fold(x))`; without gradients, one kernel does both for one row on a GPU.

    Args:
        x: `[..., fold_view.cols]`; under autocast it may be of another dtype than the pool.
        pool: the whole pool.
        bias: `[rows]` or None.
        table: the pool's chunk table.
        view: where the narrow matrix lies.
        fold_view: the fold.
        scale: λ.

    Returns:
        `[..., rows]`, of the pool's dtype.

    Raises:
        RuntimeError: see `linear` and `fold`.
    """
    if torch.is_grad_enabled():
        return linear(fold(x, pool, fold_view), pool, bias, table, view, scale)
    dtype = autocast_dtype(x)
    if dtype is not None:
        pool = pool if pool.dtype == dtype else pool.to(dtype)
        bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    # Under autocast, the kernel reads the input in the dtype that it has.
    _check_product("folded_linear", x, fold_view.cols, pool if dtype is None else None, bias if dtype is None else None)
    return call("folded_linear", x, pool, bias, table, view, fold_view, scale)


def unfold(z: Tensor, pool: Tensor | None, view: FoldView) -> Tensor:
    """Return the adjoint of `fold`, `[..., hashes·width] → [..., cols]`; arguments, dtypes and errors as in `fold`."""
    return _call_fold("unfold", z, view.folded_cols, pool, view)


def _call_fold(name: str, x: Tensor, size: int, pool: Tensor | None, view: FoldView) -> Tensor:
    # A pool without learned scales would make every folded input require a gradient.
    pool = pool if view.first_scale >= 0 else None
    dtype = autocast_dtype(x)
    if dtype is not None and pool is not None:
        pool = pool if pool.dtype == dtype else pool.to(dtype)
    _check_product(name, x, size, pool if dtype is None else None, None)
    return call(name, x, pool, view, dtype or x.dtype)


def blocks_linear(x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Return the product of `linear` with a view of several groups, for a dense `matrix`, `[rows, cols]`.

    Args:
        x: `[..., groups·cols]`.
        matrix: the blocks, one above the other.
        bias: `[rows]` or None.
        groups: the number of blocks.

    Returns:
        `[..., rows]`; under autocast, in autocast's dtype.
    """
    return blocks.differentiable_product(*_like_autocast(x, matrix, bias), groups)


def combine(coefficients: Tensor, basis: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Return `coefficients · basis`, computed in float32 (float64 for float64), whatever autocast is set to.

    Args:
        coefficients: `[rows, count]`.
        basis: `[count, size]`, of any floating dtype.
        grad_scale: the factor of the basis's gradient.

    Returns:
        `[rows, size]`, of the coefficients' dtype.
    """
    return call("combine", coefficients, basis, float(grad_scale))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast would cast the arguments of a product with `x` to, or None if it would not."""
    # Asking for autocast's state on the meta device is an error.
    if x.is_meta or x.dtype == torch.float64:
        return None
    kind = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _like_autocast(x: Tensor, pool: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to autocast's dtype where autocast would cast the dense product's arguments."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, pool, bias
    # Comparing dtypes costs the host less than a call of `to` that changes nothing.
    x = x if x.dtype == dtype else x.to(dtype)
    pool = pool if pool.dtype == dtype else pool.to(dtype)
    return x, pool, bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _check_product(name: str, x: Tensor, size: int, pool: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] != size:
        raise RuntimeError(f"{name}: the input's last size must be {size}; found the shape {tuple(x.shape)}")
    if pool is not None and x.dtype != pool.dtype:
        raise RuntimeError(f"{name}: the input is {x.dtype} and the weights are {pool.dtype}; expected one dtype")
    if bias is not None and bias.dtype != x.dtype:
        raise RuntimeError(f"{name}: the input is {x.dtype} and the bias is {bias.dtype}; expected one dtype")

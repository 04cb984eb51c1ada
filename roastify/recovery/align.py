r"""Alignment: finds the pool for which every layer's outputs are nearest to the dense layer's.

Every layer's inputs :math:`X_l` are those of the teacher's layer. Weights are linear in the pool, so the error of all
layers together,

.. math:: \sum_l \frac{\lVert X_l\,(W_l(pool) - W_l)^\top \rVert^2}{\lVert X_l\,W_l^\top \rVert^2},

is one convex quadratic. Of the data it needs only each layer's second moments :math:`X_l^\top X_l`. Conjugate gradients
then find the minimum without reading the data again. The projection (`init="project"`) is the special case of inputs
that are uncorrelated and equally large, which no layer's inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roastify.conversion.converted import basis_of, matrix, owners, pool_of
from roastify.errors import RecoveryError
from roastify.kernels import ops
from roastify.kernels.reference import summed_in
from roastify.kernels.view import FoldView, SignKind, TileView
from roastify.layers.kinds import kind_of
from roastify.pool.fold import folded, folded_squares, unfolded
from roastify.pool.kernel_basis import coefficient_matrix, combined_matrix
from roastify.pool.plan import TensorPlan
from roastify.pool.pool import RoastPool
from roastify.progress import track

# This share of the mean second moment is added to each. Weights about which the data says little then stay near the
# dense weights.
_RIDGE = 1e-2
# The most elements of a convolution's inputs that are unfolded at a time.
_UNFOLDED = 1 << 25
# A step whose gain is below this share of the first step's gains only rounding.
_CONVERGED = 1e-10
# A target whose squared size is below this share of the one that its tensor's scale gives counts as zero.
_NOTHING = 1e-2


class _Moments:
    """First and second moments of the inputs that a layer multiplies by its weight, for each group of channels."""

    def __init__(self) -> None:
        self.second: Tensor | None = None
        self.first: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add inputs `[groups, samples, features]`."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        second, first = rows.transpose(1, 2) @ rows, rows.sum(1)
        self.second = second if self.second is None else self.second + second
        self.first = first if self.first is None else self.first + first
        self.count += rows.shape[1]

    def mean(self) -> Tensor:
        """Return the inputs' mean, `[groups, features]`."""
        assert self.first is not None
        return self.first / self.count

    def spread(self, like: Tensor, centered: bool) -> Tensor:
        """Return the second moments, around the mean if `centered`, with the ridge."""
        assert self.second is not None
        second = self.second / self.count
        if centered:
            second = second - self.mean()[:, :, None] * self.mean()[:, None, :]
        second = second.to(like)
        # The ridge grows as samples become few, because their moments are noisy and the dense weights a better guide.
        ridge = (_RIDGE + second.shape[1] / self.count) * second.diagonal(dim1=1, dim2=2).mean()
        return second + ridge * torch.eye(second.shape[1], dtype=like.dtype, device=like.device)


@dataclass
class _Reader:
    """A layer that multiplies by a shared tensor or looks up its rows, with statistics of its inputs.

    Args:
        name: the module's name.
        tensor: the shared tensor.
        rows_of: the function from the layer's input to the rows that the weight multiplies; None for a lookup.
        has_bias: whether the layer has a trainable bias, which can absorb the mean of the error.
        moments: the moments of the layer's inputs.
        lookups: how often each row was looked up; None before the first lookup.
    """

    name: str
    tensor: TensorPlan
    rows_of: Callable[[Tensor], Iterator[Tensor]] | None
    has_bias: bool
    moments: _Moments
    lookups: Tensor | None = None

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add an input to the statistics; the teacher's layer calls this as a forward pre-hook."""
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        # Without autocast, which would round sums of many terms.
        with torch.autocast(x.device.type, enabled=False):
            if self.rows_of is not None:
                for rows in self.rows_of(x):
                    self.moments.add(rows)
            else:
                count = torch.bincount(x.reshape(-1), minlength=self.tensor.rows).float()
                self.lookups = count if self.lookups is None else self.lookups + count

    def check(self) -> None:
        """Raise `RecoveryError` if an input was not finite, because its moments are then useless."""
        second = self.moments.second
        if second is not None and not bool(second.isfinite().all()):
            raise RecoveryError(
                f"the inputs of the teacher's layer {self.name} are not finite on the first batches, or their squares "
                f"are not; look for NaN and infinite values in the data and for an overflow in the teacher, or skip "
                f"alignment (align=0); the student is unchanged"
            )


@dataclass
class _Term:
    """The error of one reader of a tensor, defined by the inputs' second moments or by a weight for each row.

    Args:
        tensor: the shared tensor.
        target: the dense matrix.
        second: second moments of the inputs, `[groups, cols, cols]`; None for a lookup.
        weight: the weight of each row; None for a product.
    """

    tensor: TensorPlan
    target: Tensor
    second: Tensor | None = None
    weight: Tensor | None = None

    def apply(self, difference: Tensor) -> Tensor:
        """Return half the gradient of the error with respect to the matrix, at a difference from the target."""
        if self.tensor.zero_row is not None:
            difference = difference.clone()
            difference[self.tensor.zero_row] = 0
        if self.weight is not None:
            return self.weight[:, None] * difference
        assert self.second is not None
        return (difference.view(len(self.second), -1, difference.shape[1]) @ self.second).view_as(difference)

    def error(self, difference: Tensor) -> Tensor:
        """Return the squared error of a difference from the target."""
        return (difference * self.apply(difference)).sum()

    def curvature(self) -> Tensor:
        """Return the diagonal of `apply`."""
        if self.weight is not None:
            curvature = self.weight[:, None].expand_as(self.target).clone()
        else:
            assert self.second is not None
            diagonal = self.second.diagonal(dim1=1, dim2=2)
            curvature = diagonal.repeat_interleave(self.tensor.rows // len(diagonal), 0)
        if self.tensor.zero_row is not None:
            curvature[self.tensor.zero_row] = 0
        return curvature


def align_layers(
    student: nn.Module, teacher: nn.Module, forwards: Sequence[Callable[[], Any]], steps: int
) -> tuple[float, float]:
    """Set the pool, and the biases beside shared weights, so that the layers' outputs are nearest to the teacher's.

    Args:
        student: a converted model.
        teacher: the dense model that the student was converted from, in eval mode.
        forwards: functions that each run the teacher on one batch.
        steps: the most steps of conjugate gradients.

    Returns:
        the errors before and after: the squared error of a layer's outputs, relative to the outputs' squares, in the
        mean over layers.
    """
    pool = pool_of(student)
    readers = [reader for tensor in pool.plan.shared for reader in _readers(tensor, student, teacher)]
    hooks = [
        teacher.get_submodule(each.name).register_forward_pre_hook(each.look, with_kwargs=True) for each in readers
    ]
    try:
        with torch.no_grad():
            for forward in track(forwards, "reading layers' inputs", unit="batches"):
                forward()
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for reader in readers:
            reader.check()
        std = pool.plan.pool_std or 0.0
        terms = [term for tensor in pool.plan.shared for term in _terms(tensor, teacher, readers, std)]
        before, after = _solve(pool, terms, steps)
        for reader in readers:
            if reader.has_bias and reader.moments.count:
                _move_bias(student.get_submodule(reader.name), teacher.get_submodule(reader.name), reader.moments)
    return before, after


def _readers(tensor: TensorPlan, student: nn.Module, teacher: nn.Module) -> Iterator[_Reader]:
    """Yield the teacher's layers whose operation on a shared tensor is known."""
    for module, attribute in owners(teacher, tensor):
        kind = kind_of(type(module), attribute)
        if kind is None or kind.transposed != tensor.transposed:
            continue
        name = next(name for name, other in teacher.named_modules() if other is module)
        rows_of = _inputs_of(module, kind.op)
        if rows_of is not None:
            bias = student.get_submodule(name)._parameters.get("bias")
            yield _Reader(name, tensor, rows_of, bias is not None and bias.requires_grad, _Moments())
        elif kind.op in ("embedding", "embedding_bag"):
            yield _Reader(name, tensor, None, False, _Moments())


def _inputs_of(module: Any, op: str) -> Callable[[Tensor], Iterator[Tensor]] | None:
    """Return the function from a layer's input to rows `[groups, samples, features]`; None for other operations."""
    if op == "linear":
        return lambda x: iter([x.reshape(1, -1, x.shape[-1])])
    if op in ("conv1d", "conv2d", "conv3d"):
        return lambda x: _unfolded(module, x)
    return None


def _unfolded(layer: nn.modules.conv._ConvNd, x: Tensor) -> Iterator[Tensor]:
    """Yield a convolution's input as the rows that its weight multiplies, a part of the batch at a time."""
    dims = len(layer.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    size = math.prod(layer.kernel_size) * x[0].numel()
    for part in x.split(max(1, _UNFOLDED // size)):
        for dim, (width, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2
        ):
            part = part.unfold(dim, (width - 1) * dilation + 1, stride)[..., ::dilation]
        # [batch, channels, *places, *kernel] → [groups, batch · places, channels of a group · kernel]
        part = part.unflatten(1, (layer.groups, -1))
        places = range(3, 3 + dims)
        rows = part.permute(1, 0, *places, 2, *range(3 + dims, 3 + 2 * dims))
        yield rows.reshape(layer.groups, -1, part.shape[2] * math.prod(layer.kernel_size))


def _terms(tensor: TensorPlan, teacher: nn.Module, readers: Sequence[_Reader], pool_std: float) -> Iterator[_Term]:
    """Yield a tensor's terms of the error; if its readers are unknown or were not called, all elements count alike."""
    dense = teacher.get_parameter(tensor.name).detach()
    target = matrix(tensor, dense - tensor.center if tensor.center else dense)
    target = target if target.dtype == torch.float64 else target.float()
    terms = []
    for reader in readers:
        if reader.tensor is not tensor:
            continue
        if reader.moments.count:
            terms.append(_Term(tensor, target, second=reader.moments.spread(target, centered=reader.has_bias)))
        elif reader.lookups is not None:
            counts = reader.lookups.to(target)
            terms.append(_Term(tensor, target, weight=counts + _RIDGE * counts.mean()))
    for term in terms or [_Term(tensor, target, weight=target.new_ones(tensor.rows))]:
        # The target of a constant tensor (a bias of zeros, a new norm) is zero, so no error is small relative to it.
        # Its error is taken relative to the scale that the conversion gave the tensor.
        size, usual = term.error(target), ((tensor.scale or 0.0) * pool_std) ** 2 * term.curvature().sum()
        size = torch.where(size > _NOTHING * usual, size, usual).clamp(min=torch.finfo(target.dtype).tiny)
        if term.second is not None:
            term.second = term.second / size
        if term.weight is not None:
            term.weight = term.weight / size
        yield term


@dataclass
class _LinearMap:
    """A tensor's weight as a linear function of the pool.

    Args:
        table: the pool's chunk table.
        view: where the tensor's matrix lies.
        scale: λ.
        basis: the tensor's basis kernels, or None.
        fold: how the tensor's inputs are folded, and the learned scales' values, which stay as they are; or None.
    """

    table: Tensor
    view: TileView
    scale: float
    basis: Tensor | None = None
    fold: tuple[FoldView, Tensor] | None = None

    def weight(self, pool: Tensor) -> Tensor:
        """Return the weight, `[rows, …]`."""
        matrix = ops.gather(pool, self.table, self.view, self.scale)
        if self.basis is not None:
            matrix = combined_matrix(matrix, self.basis)
        if self.fold is not None:
            view, scales = self.fold
            return unfolded(matrix, scales, view)
        return matrix

    def adjoint(self, weight: Tensor, pool_shape: Sequence[int]) -> Tensor:
        """Return the transpose of the function `weight`, applied to a tensor of the weight's shape."""
        matrix = weight
        if self.fold is not None:
            view, scales = self.fold
            matrix = folded(matrix, scales, view)
        if self.basis is not None:
            matrix = coefficient_matrix(matrix, self.basis)
        return ops.reduce(matrix.contiguous(), self.table, self.view, self.scale, pool_shape)


def _basis(pool: RoastPool, term: _Term, dtype: torch.dtype) -> Tensor | None:
    basis = basis_of(pool, term.tensor)
    return None if basis is None else basis.detach().to(dtype)


def _fold(pool: RoastPool, term: _Term, dtype: torch.dtype) -> tuple[FoldView, Tensor] | None:
    index = term.tensor.fold
    return None if index is None else (pool.plan.fold_view(index), pool.weight.detach().to(dtype, copy=True))


def _solve(pool: RoastPool, terms: Sequence[_Term], steps: int) -> tuple[float, float]:
    """Minimise the mean of the terms by conjugate gradients on the pool; return the mean before and after."""
    wide = summed_in(pool.weight.dtype)
    x = pool.weight.detach().to(wide, copy=True)
    places = [
        _LinearMap(
            pool.table,
            pool.plan.view(term.tensor),
            term.tensor.scale or 0.0,
            _basis(pool, term, wide),
            _fold(pool, term, wide),
        )
        for term in terms
    ]

    def product(vector: Tensor, target: bool = False) -> Tensor:
        total = torch.zeros_like(vector)
        for term, place in zip(terms, places, strict=True):
            difference = place.weight(vector)
            if target:
                difference = term.target.to(wide) - difference
            total += place.adjoint(term.apply(difference), vector.shape)
        return total

    def error() -> float:
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for term, place in zip(terms, places, strict=True):
            total += term.error(place.weight(x) - term.target.to(wide))
        return float(total) / len(terms)

    before = error()
    scaling = _curvature(pool, terms, x)
    residual = product(x, target=True)
    direction = residual / scaling
    gain = first_gain = (residual * direction).sum()
    for _ in track(range(steps), "aligning layers", unit="steps"):
        if not gain > _CONVERGED * first_gain:
            break
        image = product(direction)
        step = gain / (direction * image).sum()
        x += step * direction
        residual -= step * image
        preconditioned = residual / scaling
        previous, gain = gain, (residual * preconditioned).sum()
        direction = preconditioned + (gain / previous) * direction
    after = error()
    # Conjugate gradients never increase the error, but rounding at the minimum may.
    if after < before:
        pool.weight.copy_(x)
    return before, min(before, after)


def _curvature(pool: RoastPool, terms: Sequence[_Term], like: Tensor) -> Tensor:
    """Return the quadratic's diagonal, which preconditions conjugate gradients; 1 for an element without readers."""
    total = torch.zeros_like(like)
    for term in terms:
        scale = term.tensor.scale or 0.0
        view = pool.plan.view(term.tensor)._replace(sign=int(SignKind.NONE))
        basis = _basis(pool, term, like.dtype)
        # For coefficients, the inputs at a kernel's positions are taken as uncorrelated.
        squared = None if basis is None else basis**2
        curvature = term.curvature() * scale
        if (fold := _fold(pool, term, like.dtype)) is not None:
            curvature = folded_squares(curvature, fold[1], fold[0])
        total += _LinearMap(pool.table, view, scale, squared).adjoint(curvature, like.shape)
    return torch.where(total > 0, total, 1.0)


def _move_bias(student: Any, teacher: Any, moments: _Moments) -> None:
    """Set the student layer's bias so that the mean of its output is the teacher's."""
    mean = moments.mean()
    difference = teacher.weight.detach().to(mean.dtype) - student.weight.detach().to(mean.dtype)
    if kind_of(type(teacher)).transposed:  # type: ignore[union-attr]
        difference = difference.t()
    by_group = difference.reshape(len(mean), -1, mean.shape[1])
    student.bias.copy_(teacher.bias + torch.einsum("gok,gk->go", by_group, mean).flatten())

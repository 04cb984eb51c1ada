"""`LazyWeight`: a shared tensor as the code of a module's forward is given it, where it is read by operations only.

It is no tensor: nothing is materialised until an operation asks. Products, lookups and slices run on the pool; whatever
else torch is asked to do with it is done with the dense tensor. `reading` says which code may be given one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.read_weight import INPLACE_OPERATORS, ReadWeight


class LazyWeight:
    """A shared tensor that has not been read yet.

    Args:
        shared: where it lies.
        read: returns it as a dense tensor.
        flipped: whether this is its transpose.
        of_parts: whether a matrix picked from it by a number is an operand too, or is read.
    """

    def __init__(
        self, shared: PooledWeight, read: Callable[[], Tensor], flipped: bool = False, of_parts: bool = False
    ) -> None:
        self.shared = shared
        self.read = read
        self.flipped = flipped
        self.of_parts = of_parts

    def dense(self) -> Tensor:
        """Return the dense, differentiable tensor."""
        weight = self.read()
        return weight.mT if self.flipped else weight

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        shape = self.shared.shape
        return torch.Size((*shape[:-2], shape[-1], shape[-2]) if self.flipped else shape)

    @property
    def ndim(self) -> int:
        """Its number of dimensions."""
        return len(self.shared.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.shared.current_dtype

    @property
    def device(self) -> torch.device:
        """Its device."""
        return self.shared.pool.weight.device

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach the pool, where they are recorded."""
        return self.shared.pool.weight.requires_grad

    def size(self, dim: int | None = None) -> Any:
        """Return its shape, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return its number of dimensions."""
        return self.ndim

    def numel(self) -> int:
        """Return its number of elements."""
        return self.shape.numel()

    @property
    def mT(self) -> LazyWeight:
        """Its transpose."""
        return LazyWeight(self.shared, self.read, not self.flipped)

    @property
    def T(self) -> Any:
        """Its transpose."""
        return self.mT if self.ndim == 2 else self.dense().T

    def t(self) -> Any:
        """Return its transpose."""
        return self.mT if self.ndim == 2 else self.dense().t()

    def matmul(self, other: Any) -> Tensor:
        """Return `weight · other`."""
        return _from_left(self, _given(other))

    __matmul__ = matmul

    def mm(self, other: Any) -> Tensor:
        """Return `weight · other`, both of them matrices."""
        result = _mm(self, other)
        return self.dense().mm(_given(other)) if result is NotImplemented else result

    def __rmatmul__(self, other: Any) -> Tensor:
        return _from_right(_given(other), self)

    def __getitem__(self, key: Any) -> Any:
        if self.flipped or self._irregular:
            return self.dense()[key]
        place = key if isinstance(key, tuple) else (key,)
        found = _picked(self, place)
        if type(found) is not Tensor or torch.compiler.is_compiling() or _is_copied(place):
            return found
        # In the dense model a view of the Parameter, to which one may write.
        return found.as_subclass(ReadWeight)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.dense()[key] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what torch is asked for: on the pool, or with the dense tensor."""
        kwargs = kwargs or {}
        operation = _OPERATIONS.get(function)
        if operation is not None and not (kwargs and operation in _POSITIONAL):
            result = operation(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return function(*(_given(arg) for arg in args), **{name: _given(arg) for name, arg in kwargs.items()})

    @property
    def _irregular(self) -> bool:
        """Whether its elements are not what the pool's operations give: centers, and rows that are zero."""
        return bool(self.shared.center) or self.shared.zero_row is not None

    def product(self, x: Tensor, bias: Tensor | None, transposed: bool) -> Tensor | None:
        """Return `x · weightᵀ + bias`, or if `transposed` `x · weight + bias`; None if that is no matrix's product."""
        if self.ndim != 2 or self._irregular or x.dim() == 0:
            return None
        if bias is not None and bias.shape != self.shape[transposed : transposed + 1]:
            return None
        shared = self.shared
        return shared.linear_t(x, bias) if transposed != self.flipped else shared.linear(x, bias)


def _given(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value.dense()
    return type(value)(_given(part) for part in value) if type(value) in (list, tuple) else value


def _from_right(x: Tensor, weight: LazyWeight) -> Tensor:
    """Return `x · weight`."""
    result = weight.product(x, None, transposed=True)
    return torch.matmul(x, weight.dense()) if result is None else result


def _from_left(weight: LazyWeight, x: Tensor) -> Tensor:
    """Return `weight · x`."""
    if x.dim() < 2:
        result = weight.product(x, None, transposed=False)
        return torch.matmul(weight.dense(), x) if result is None else result
    result = weight.product(x.mT, None, transposed=False)
    return torch.matmul(weight.dense(), x) if result is None else result.mT


def _matmul(x: Any, other: Any) -> Any:
    if isinstance(x, LazyWeight):
        return x.matmul(other)
    return _from_right(x, other)


def _mm(x: Any, other: Any) -> Any:
    return _matmul(x, other) if x.ndim == 2 and other.ndim == 2 else NotImplemented


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, LazyWeight) or not isinstance(weight, LazyWeight):
        return NotImplemented
    result = weight.product(input, bias, transposed=False)
    return NotImplemented if result is None else result


def _addmm(input: Any, mat1: Any, mat2: Any, **factors: Any) -> Any:
    if factors or isinstance(mat1, LazyWeight) or isinstance(input, LazyWeight) or mat1.dim() != 2:
        return NotImplemented
    result = mat2.product(mat1, input, transposed=True)
    return NotImplemented if result is None else result


def _embedding(input: Any, weight: Any, padding_idx: int | None = None, max_norm: Any = None, **options: Any) -> Any:
    options.pop("norm_type", None)
    if (
        max_norm is not None
        or any(options.values())
        or not isinstance(weight, LazyWeight)
        or weight.ndim != 2
        or weight.flipped
    ):
        return NotImplemented
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        return NotImplemented
    rows = weight.shared.rows(input)
    if padding_idx is None or not torch.is_grad_enabled():
        return rows
    return torch.where((input == padding_idx % weight.shape[0])[..., None], rows.detach(), rows)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.matmul: _matmul,
    torch.mm: _mm,
    Tensor.matmul: _matmul,
    Tensor.mm: _mm,
    Tensor.__matmul__: _matmul,
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.embedding: _embedding,
}
# What their arguments are called differs; with names, or a tensor to write to, the dense tensor is taken.
_POSITIONAL = (_matmul, _mm)


def _refusing_operator(operator: str) -> Callable[[LazyWeight, Any], Any]:
    """Return an in-place operator; the dense tensor that it is done to refuses, and says what to do."""
    return lambda weight, other: getattr(weight.dense(), operator)(other)


for _name in INPLACE_OPERATORS:
    setattr(LazyWeight, _name, _refusing_operator(_name))


def _picked(weight: LazyWeight, key: tuple[Any, ...]) -> Any:
    """Return `weight[key]`, reading no more than the rows that its first places name."""
    shape = weight.shape
    if len(shape) == 3 and shape[0] == 1 and _is_all(key[0]) and not _is_special(key[1:]):
        # A table with a batch's dimension in front of it.
        return _rows(weight.shared, shape[1:], key[1:]).unsqueeze(0)
    if _is_special(key) or len(shape) not in (2, 3):
        return weight.dense()[key]
    if len(shape) == 2:
        return _rows(weight.shared, shape, key)
    return _matrices(weight, key)


def _is_all(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _is_copied(key: tuple[Any, ...]) -> bool:
    """Whether torch gives a copy of what an index names, not a view."""
    return any(isinstance(index, Tensor) and index.dim() for index in key)


def _is_special(key: tuple[Any, ...]) -> bool:
    """Whether an index is empty, or has more to it than numbers, plain slices, and a tensor of numbers in front."""
    if not key:
        return True
    for place, index in enumerate(key):
        if isinstance(index, slice):
            if index.step not in (None, 1):
                return True
        elif isinstance(index, Tensor):
            if index.dtype not in (torch.int64, torch.int32) or (index.dim() and place):
                return True
        elif isinstance(index, bool) or not isinstance(index, int | torch.SymInt):
            return True
    return False


def _rows(shared: PooledWeight, shape: Sequence[int], key: tuple[Any, ...]) -> Tensor:
    """Return `matrix[key]` of a matrix of this shape."""
    first, rest = key[0], key[1:]
    if isinstance(first, slice):
        start, stop = _bounds(first, shape[0])
        rows = _span(shared, start, stop)
        return rows[:, *rest] if rest else rows
    if isinstance(first, Tensor) and first.dim():
        rows = shared.rows(_from_start(first, shape[0], shared))
        return rows if all(_is_all(index) for index in rest) else rows[..., *rest]
    rows = shared.rows(_row_index(first, shape[0], shared))
    return rows[rest] if rest else rows


def _matrices(weight: LazyWeight, key: tuple[Any, ...]) -> Any:
    """Return `weight[key]` of a stack of matrices."""
    first, rest, shared = key[0], key[1:], weight.shared
    count, rows, cols = weight.shape
    if isinstance(first, slice):
        start, stop = _bounds(first, count)
        part = _span(shared, start * rows, stop * rows).view(-1, rows, cols)
        return part[:, *rest] if rest else part
    if isinstance(first, Tensor) and (first.dim() or torch.compiler.is_compiling()):
        chosen = _from_start(first, count, shared)[..., None] * rows
        part = shared.rows(chosen + torch.arange(rows, device=chosen.device))
        return part[(slice(None),) * first.dim() + rest] if rest else part
    number = int(first)
    if not -count <= number < count:
        raise IndexError(f"index {number} is out of bounds for dimension 0 with size {count}")
    number = number % count
    # Where a part lies is made here, and a compiler wants it to be there before (torch 2.11).
    matrix = None if torch.compiler.is_compiling() else shared.part(number * rows, (rows, cols))
    if matrix is not None and rest:
        return _rows(matrix, matrix.shape, rest)
    if matrix is None or not weight.of_parts:
        part = _span(shared, number * rows, (number + 1) * rows)
        return part[rest] if rest else part
    return LazyWeight(matrix, matrix.dense)


def _bounds(index: slice, size: int) -> tuple[int, int]:
    """Return where a slice begins and ends, as torch cuts it."""
    start = 0 if index.start is None else index.start
    stop = size if index.stop is None else index.stop
    start = min(max(start + size, 0) if start < 0 else start, size)
    stop = min(max(stop + size, 0) if stop < 0 else stop, size)
    return start, max(start, stop)


def _span(shared: PooledWeight, start: int, stop: int) -> Tensor:
    if torch.compiler.is_compiling():
        # Lengths may vary from call to call, and where a tensor lies is a constant of the graph.
        return shared.rows(torch.arange(start, stop, device=shared.pool.weight.device))
    return shared.rows_between(start, stop)


def _from_start(index: Tensor, size: int, shared: PooledWeight) -> Tensor:
    """Return an index whose numbers count from the start; torch takes negative ones, and an index from the CPU."""
    index = index.to(shared.pool.weight.device)
    return torch.where(index < 0, index + size, index)


def _row_index(index: Any, size: int, shared: PooledWeight) -> Tensor:
    """Return a number as the index of a lookup."""
    if isinstance(index, int) and not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for dimension 0 with size {size}")
    if not isinstance(index, Tensor):
        index = torch.full((), index, dtype=torch.int64, device=shared.pool.weight.device)
    return _from_start(index, size, shared)

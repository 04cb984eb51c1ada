"""`LazyWeight`: a shared tensor that is not materialised, for module code that only operates on it.

A lazy weight is not a tensor, and nothing is materialised until an operation needs it. Products, lookups and slices
read the pool. All other operations of torch get the dense tensor. `reading` decides which code gets a lazy weight.
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
        shared: the tensor in the pool.
        read: a function that returns the dense tensor.
        flipped: whether this object is the tensor's transpose.
        of_parts: whether a matrix picked by a number (`weight[2]`) is a lazy weight too; if not, it is a tensor.
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
        """The tensor's shape."""
        shape = self.shared.shape
        return torch.Size((*shape[:-2], shape[-1], shape[-2]) if self.flipped else shape)

    @property
    def ndim(self) -> int:
        """The tensor's number of dimensions."""
        return len(self.shared.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.shared.current_dtype

    @property
    def device(self) -> torch.device:
        """The tensor's device."""
        return self.shared.pool.parameter().device

    @property
    def requires_grad(self) -> bool:
        """Whether the pool requires a gradient."""
        return self.shared.pool.parameter().requires_grad

    def size(self, dim: int | None = None) -> Any:
        """Return the tensor's shape, or its size along one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the tensor's number of dimensions."""
        return self.ndim

    def numel(self) -> int:
        """Return the tensor's number of elements."""
        return self.shape.numel()

    @property
    def mT(self) -> LazyWeight:
        """The transpose of the last two dimensions."""
        return LazyWeight(self.shared, self.read, not self.flipped)

    @property
    def T(self) -> Any:
        """The transpose."""
        return self.mT if self.ndim == 2 else self.dense().T

    def t(self) -> Any:
        """Return the transpose."""
        return self.mT if self.ndim == 2 else self.dense().t()

    def matmul(self, other: Any) -> Tensor:
        """Return `weight · other`."""
        return _from_left(self, _without_lazy(other))

    __matmul__ = matmul

    def mm(self, other: Any) -> Tensor:
        """Return `weight · other` for two matrices."""
        result = _mm(self, other)
        return self.dense().mm(_without_lazy(other)) if result is NotImplemented else result

    def __rmatmul__(self, other: Any) -> Tensor:
        return _from_right(_without_lazy(other), self)

    def __getitem__(self, key: Any) -> Any:
        if self.flipped or self._irregular:
            return self.dense()[key]
        place = key if isinstance(key, tuple) else (key,)
        part = _picked(self, place)
        if type(part) is not Tensor or torch.compiler.is_compiling() or _is_copied(place):
            return part
        # In the dense model the part is a view, and a write to it changes the Parameter. A `ReadWeight` refuses writes.
        return part.as_subclass(ReadWeight)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.dense()[key] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch: on the pool if it can be, otherwise with the dense tensor."""
        kwargs = kwargs or {}
        operation = _OPERATIONS.get(function)
        if operation is not None and not (kwargs and operation in _POSITIONAL):
            result = operation(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return function(
            *(_without_lazy(arg) for arg in args), **{name: _without_lazy(arg) for name, arg in kwargs.items()}
        )

    @property
    def _irregular(self) -> bool:
        """Whether the pool's operations do not give the tensor's elements: a center, a zero row or a fold."""
        return not self.shared.can_be_whole

    def product(self, x: Tensor, bias: Tensor | None, transposed: bool) -> Tensor | None:
        """Return `x · weightᵀ + bias`, or if `transposed`, `x · weight + bias`.

        None if the pool's operations do not support this product.
        """
        if self.ndim != 2 or not self.shared.can_multiply or x.dim() == 0:
            return None
        if bias is not None and bias.shape != self.shape[transposed : transposed + 1]:
            return None
        shared = self.shared
        return shared.linear_t(x, bias) if transposed != self.flipped else shared.linear(x, bias)


def _without_lazy(value: Any) -> Any:
    """Return an argument with every lazy weight in it replaced by its dense tensor."""
    if isinstance(value, LazyWeight):
        return value.dense()
    return type(value)(_without_lazy(part) for part in value) if type(value) in (list, tuple) else value


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
# The names of these functions' arguments differ. If a call has keyword arguments (or `out=`), it gets the dense tensor.
_POSITIONAL = (_matmul, _mm)


def _refusing_operator(operator: str) -> Callable[[LazyWeight, Any], Any]:
    """Return an in-place operator that applies itself to the dense tensor, which refuses with a helpful error."""
    return lambda weight, other: getattr(weight.dense(), operator)(other)


for _name in INPLACE_OPERATORS:
    setattr(LazyWeight, _name, _refusing_operator(_name))


def _picked(weight: LazyWeight, key: tuple[Any, ...]) -> Any:
    """Return `weight[key]`. Only the rows that the first index of the key selects are read."""
    shape = weight.shape
    if len(shape) == 3 and shape[0] == 1 and _is_all(key[0]) and not _is_special(key[1:]):
        # A table with a batch dimension of size 1 before it, as position embeddings have.
        return _rows(weight.shared, shape[1:], key[1:]).unsqueeze(0)
    if _is_special(key) or len(shape) not in (2, 3):
        return weight.dense()[key]
    if len(shape) == 2:
        return _rows(weight.shared, shape, key)
    return _matrices(weight, key)


def _is_all(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _is_copied(key: tuple[Any, ...]) -> bool:
    """Whether indexing by this key gives a copy, not a view."""
    return any(isinstance(index, Tensor) and index.dim() for index in key)


def _is_special(key: tuple[Any, ...]) -> bool:
    """Whether a key is empty, or has more than numbers, slices of step 1, and an integer tensor in first place."""
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
    """Return `matrix[key]`, where `shape` is the matrix's shape."""
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
    """Return `weight[key]`, where the weight is a stack of matrices."""
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
    # Not under a compiler: `part` creates a new view, and torch 2.11 can only trace views that exist before the call.
    matrix = None if torch.compiler.is_compiling() else shared.part(number * rows, (rows, cols))
    if matrix is not None and rest:
        return _rows(matrix, matrix.shape, rest)
    if matrix is None or not weight.of_parts:
        part = _span(shared, number * rows, (number + 1) * rows)
        return part[rest] if rest else part
    return LazyWeight(matrix, matrix.dense)


def _bounds(index: slice, size: int) -> tuple[int, int]:
    """Return where a slice begins and ends, clamped as torch does."""
    start = 0 if index.start is None else index.start
    stop = size if index.stop is None else index.stop
    start = min(max(start + size, 0) if start < 0 else start, size)
    stop = min(max(stop + size, 0) if stop < 0 else stop, size)
    return start, max(start, stop)


def _span(shared: PooledWeight, start: int, stop: int) -> Tensor:
    if torch.compiler.is_compiling():
        # Not `rows_between`: the view that it creates is a constant of the graph, and the slice's length may vary.
        return shared.rows(torch.arange(start, stop, device=shared.pool.parameter().device))
    return shared.rows_between(start, stop)


def _from_start(index: Tensor, size: int, shared: PooledWeight) -> Tensor:
    """Return an index without negative numbers and on the pool's device, as torch's indexing accepts both."""
    index = index.to(shared.pool.parameter().device)
    return torch.where(index < 0, index + size, index)


def _row_index(index: Any, size: int, shared: PooledWeight) -> Tensor:
    """Return a number as an index tensor for a lookup."""
    if isinstance(index, int) and not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for dimension 0 with size {size}")
    if not isinstance(index, Tensor):
        index = torch.full((), index, dtype=torch.int64, device=shared.pool.parameter().device)
    return _from_start(index, size, shared)

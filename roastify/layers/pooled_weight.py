"""`PooledWeight`: one tensor in the pool, the operations that read it, and parts of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.errors import RoastError
from roastify.kernels import ops
from roastify.kernels.torch_internals import is_exporting, is_jit_tracing
from roastify.kernels.view import WeightView
from roastify.pool import compiled_read
from roastify.pool.fold import unfolded
from roastify.pool.members import is_sharded
from roastify.pool.pool import RoastPool

# From this many elements of a weight on, the GPU's time limits a product; below, the host's time does.
_SMALL_ELEMENTS = 1 << 22


@dataclass(eq=False)
class PooledWeight(WeightView):
    """One tensor in the pool, as its layers read it: its place (`WeightView`), its pool, and its dense values.

    Args:
        pool: the pool's module. Its Parameter is looked up at each use, because sharding replaces the Parameter.
        dtype: dtype of the dense tensor.
        zero_row: a row that is zero and stays zero (an embedding's padding row), or None.
        diagonal: signs of the ones on the diagonal; see `TensorPlan`.
        center: number that is added to every element, such as 1 for a norm's weights, which start from ones.
        start_at: place of the tensor's first start value in `pool.starts`; None if it has none.
    """

    pool: RoastPool = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    zero_row: int | None = field(default=None, kw_only=True)
    center: float = field(default=0.0, kw_only=True)
    diagonal: str = field(default="", kw_only=True)
    start_at: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Attributes and not properties, because every call of a layer needs them, and a property is slow.
        self.numel = self.view.numel
        self.is_small = self.numel < _SMALL_ELEMENTS
        # Whether every element is a sign times λ times an element of the pool.
        self.is_scaled_pool = not self.center and not self.diagonal and self.start_at is None
        self.can_multiply = self.is_scaled_pool and self.zero_row is None
        self.can_be_whole = self.can_multiply and self.fold is None

    @property
    def current_dtype(self) -> torch.dtype:
        """The dtype that the dense tensor has now.

        While a forward pass runs, FSDP2's mixed precision shows every Parameter in the dtype of its policy.
        """
        pool = self.pool
        shown = pool.parameter().dtype
        return self.dtype if shown == pool.stored_dtype else shown

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense, differentiable tensor, in a dtype (default: the tensor's own)."""
        dtype = dtype or self.current_dtype
        weight = self._gathered(dtype)
        if self.fold is not None:
            matrix = weight.t() if self.transposed else weight.flatten(1)
            matrix = unfolded(matrix, self.pool.read(dtype), self.fold)
            weight = matrix.t() if self.transposed else matrix.view(self.shape)
        if self.center:
            weight = weight + self.center
        if self.start_at is not None:
            weight = weight + self.starts(dtype)
        if self.diagonal:
            weight = self._with_diagonal(weight)
        if self.zero_row is None:
            return weight
        # The comparison runs on the device, because a CUDA graph cannot capture a copy from the CPU. Not `index_fill`:
        # if the gradient is one expanded number (as a sum's is), Inductor of torch 2.13 sets all of it to zero.
        row = torch.arange(weight.shape[0], device=weight.device) == self.zero_row
        return weight.masked_fill(row.view(-1, *(1,) * (weight.dim() - 1)), 0.0)

    def starts(self, dtype: torch.dtype) -> Tensor:
        """Return what the tensor starts from, and the pool holds the difference from, in a dtype."""
        assert self.start_at is not None, "the tensor starts from zero"
        return self.pool.starts[self.start_at : self.start_at + math.prod(self.shape)].view(self.shape).to(dtype)

    def _with_diagonal(self, weight: Tensor) -> Tensor:
        rows, cols = (torch.arange(size, device=weight.device) for size in self.shape)
        # The comparison runs on the device, and each run of equal signs is one comparison: see `dense`.
        on_diagonal = rows[:, None] == cols
        weight = weight.masked_fill(on_diagonal, 1.0)
        start = 0
        for sign, run in itertools.groupby(self.diagonal):
            stop = start + len(list(run))
            if sign == "-":
                weight = weight.masked_fill(on_diagonal & (cols >= start) & (cols < stop), -1.0)
            start = stop
        return weight

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x · weightᵀ + bias`."""
        return self._multiply(x, bias, along_cols=not self.transposed)

    def linear_t(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x · weight + bias`."""
        return self._multiply(x, bias, along_cols=self.transposed)

    def _multiply(self, x: Tensor, bias: Tensor | None, along_cols: bool) -> Tensor:
        """Return `x · matrixᵀ + bias`, or `x · matrix + bias` if not `along_cols`, where the pool holds the matrix."""
        if not self.is_scaled_pool:
            weight = self.dense()
            return F.linear(x, weight if along_cols != self.transposed else weight.t(), bias)
        if self.fold is None:
            return self._multiply_gathered(x, bias, along_cols)
        if along_cols:
            without_graph = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_jit_tracing()
            if without_graph and x.dim() > 0 and x.numel() == x.shape[-1]:
                pool = self.pool.read(ops.autocast_dtype(x) or self.current_dtype)
                return ops.folded_linear(x, pool, bias, self.pool.table, self.view, self.fold, self.scale)
            return self._multiply_gathered(self.folded(x), bias, along_cols)
        buckets = self._multiply_gathered(x, None, along_cols)
        out = ops.unfold(buckets, self.pool.read(buckets.dtype), self.fold)
        return out if bias is None else out + bias

    def _multiply_gathered(self, x: Tensor, bias: Tensor | None, along_cols: bool) -> Tensor:
        """Return what `_multiply` does, for the matrix as the pool holds it: the narrow one of a folded weight."""
        if type(x) is not Tensor:
            _refuse_distributed(x)
        groups = self.view.groups
        weight = self._retained_for(x) if along_cols or groups == 1 else None
        if weight is None:
            return self._product(ops.linear if along_cols else ops.linear_t, x, bias)
        if groups > 1:
            return ops.blocks_linear(x, weight.t() if self.transposed else weight, bias, groups)
        return F.linear(x, weight if along_cols != self.transposed else weight.t(), bias)

    def folded(self, x: Tensor, dims: int = 0) -> Tensor:
        """Return the folded input of a product, or of a convolution of `dims` dimensions.

        Layers that fold the same input alike share it within a forward pass.
        """
        assert self.fold is not None
        if type(x) is not Tensor:
            _refuse_distributed(x)
        dtype = ops.autocast_dtype(x) or self.current_dtype
        return self.pool.folded(x, self.fold, dtype, dims)

    def _is_recorded(self) -> bool:
        """Whether autograd records this forward pass for the pool's gradient."""
        if not torch.is_grad_enabled() or not self.pool.parameter().requires_grad:
            return False
        # An exported graph has no backward pass.
        if torch.compiler.is_compiling():
            return not is_exporting()
        return not is_jit_tracing()

    def _retained_for(self, x: Tensor) -> Tensor | None:
        """Return the dense weight for a product if it is kept for the backward pass, which else gathers it again.

        A weight is kept if two conditions hold. It is small: then the host's time limits the layer, and a second gather
        costs the host time. It has at most as many elements as the layer's input, which autograd keeps anyway. Only
        sizes may decide, because a recomputed checkpoint must keep the same weights.
        """
        if not self.is_small or not self._is_recorded():
            return None
        if torch.compiler.is_compiling():
            # Imported here, because this import loads sympy.
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            # If a size is symbolic, the weight is not kept: a comparison would specialise the graph to the size.
            kept = statically_known_true(x.numel() >= self.numel)
        else:
            kept = x.numel() >= self.numel
        return self._retained(x) if kept else None

    def _retained(self, x: Tensor) -> Tensor:
        """Return the dense tensor for a recorded operation on `x`, in the dtype that the operation runs in."""
        dtype = ops.autocast_dtype(x) or self.current_dtype
        if torch.compiler.is_compiling():
            if self.group is not None and torch.compiler.is_dynamo_compiling():
                return self._as_read(compiled_read.gathered_matrix(self.pool, self.group, self.number, dtype))
            return self._gathered(dtype)
        return self.pool.gathered_weight(self, dtype)

    def _gathered(self, dtype: torch.dtype) -> Tensor:
        """Return what the layer's operation takes: the weight, or the narrow one of a folded weight."""
        return self._as_read(ops.gather(self.pool.read(dtype), self.pool.table, self.view, self.scale))

    def _as_read(self, matrix: Tensor) -> Tensor:
        """Return what the layer's operation takes, of the matrix that the pool holds."""
        gathered = (matrix.t() if self.transposed else matrix).reshape(self.gathered_shape)
        if self.basis_index is None:
            return gathered
        return ops.combine(gathered, *self.pool.basis(self.basis_index)).view(self.read_shape)

    def whole(self, x: Tensor) -> Tensor:
        """Return the dense tensor for an operation on `x` that needs all of it, in the operation's dtype."""
        if type(x) is not Tensor:
            _refuse_distributed(x)
        if self.can_be_whole and self._is_recorded():
            return self._retained(x)
        return self.dense(ops.autocast_dtype(x))

    def narrow(self, x: Tensor) -> Tensor:
        """Return the narrow weight of a folded one for an operation on the folded `x`, in the operation's dtype."""
        if self._is_recorded():
            return self._retained(x)
        return self._gathered(ops.autocast_dtype(x) or self.current_dtype)

    def _product(self, product: Callable[..., Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        # The pool is read in the dtype that the product runs in, so that autocast does not cast it again.
        pool = self.pool.read(ops.autocast_dtype(x) or self.current_dtype)
        return product(x, pool, bias, self.pool.table, self.view, self.scale)

    def rows(self, index: Tensor) -> Tensor:
        """Return `weight[index]`."""
        if type(index) is not Tensor:
            _refuse_distributed(index)
        if self.transposed or not self.is_scaled_pool or self.fold is not None:
            return F.embedding(index, self.dense())
        rows = ops.embedding(index, self.pool.read(self.current_dtype), self.pool.table, self.view, self.scale)
        if self.zero_row is None:
            return rows
        return rows.masked_fill((index == self.zero_row)[..., None], 0.0)

    def part(self, start: int, shape: Sequence[int]) -> PooledWeight | None:
        """Return the matrix's rows from `start` on, in this shape, as a tensor of its own on the same tiles.

        None if the part begins inside a row of tiles, or if the tensor is transposed, folded, in strips, or has a
        diagonal, a basis or start values.
        """
        view = self.view
        irregular = bool(self.diagonal) or any(
            each is not None for each in (self.fold, self.basis_index, self.start_at)
        )
        if self.transposed or view.strips or irregular or start % view.tile_rows:
            return None
        base = view.base + start // view.tile_rows * view.grid_cols * view.slot_size
        rows = math.prod(shape) // view.cols
        zero_row = None if self.zero_row is None else self.zero_row - start
        if zero_row is not None and not 0 <= zero_row < rows:
            zero_row = None
        part = view._replace(rows=rows, base=base)
        return dataclasses.replace(self, view=part, shape=torch.Size(shape), zero_row=zero_row)

    def split(self, numel: int) -> Iterator[PooledWeight]:
        """Yield parts of about so many elements, one after another; the whole tensor if `part` gives none of it."""
        rows, cols, height = self.view.rows, self.view.cols, self.view.tile_rows
        step = max(1, numel // (cols * height)) * height
        for start in range(0, rows, step):
            part = self.part(start, (min(step, rows - start), cols)) if step < rows else None
            yield part or self
            if part is None:
                return

    def rows_between(self, start: int, stop: int) -> Tensor:
        """Return the matrix's rows `[start:stop]`. Only the tiles that hold these rows are read."""
        # A part must begin with a row of tiles, so these rows before `start` are read too.
        extra = start % self.view.tile_rows
        part = self.part(start - extra, (max(stop - start, 0) + extra, self.view.cols))
        if part is None or stop <= start:
            return self.dense().reshape(-1, self.shape[-1])[start:stop]
        return part.dense()[extra:]


def _refuse_distributed(x: object) -> None:
    """Raise `RoastError` for a tensor that is distributed over processes, as sequence and tensor parallelism make."""
    if isinstance(x, Tensor) and is_sharded(x):
        placements = tuple(cast(Any, x).placements)
        raise RoastError(
            f"a layer on the pool got a DTensor of placements {placements}; it takes plain tensors, because "
            f"the pool is one for all layers and is not split for one. Give it local values (use_local_output=True, or "
            f"DTensor.to_local()), or leave the layers that are to be parallel out of the conversion (exclude=)"
        )

"""`PooledWeight`: one tensor in the pool as its readers see it, and parts of it as tensors of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.kernels import ops
from roastify.kernels.torch_internals import is_exporting, is_jit_tracing
from roastify.kernels.view import WeightView
from roastify.pool.pool import RoastPool

# Elements of a weight from which on its product's time is the GPU's rather than the host's.
_SMALL_ELEMENTS = 1 << 22


@dataclass(eq=False)
class PooledWeight(WeightView):
    """One tensor in the pool, as its layers see it: where it lies (`WeightView`), in which pool, and what it reads as.

    Args:
        pool: the pool's module; its Parameter is read at each use, because sharding replaces it.
        dtype: of the dense tensor.
        zero_row: a row that is zero and stays so (an embedding's padding row), or None.
        center: what is added to every element: the ones that a norm's weights start from.
    """

    pool: RoastPool = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    zero_row: int | None = field(default=None, kw_only=True)
    center: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Looked up in every call, where a property would cost as much as what it tells.
        self.numel = self.view.numel
        self.is_small = self.numel < _SMALL_ELEMENTS
        self.can_be_whole = not self.center and self.zero_row is None

    @property
    def current_dtype(self) -> torch.dtype:
        """The dtype that the dense tensor would have now.

        While a forward pass runs, FSDP2's mixed precision shows every Parameter in the dtype of its policy.
        """
        pool = self.pool
        shown = pool.parameter().dtype
        return self.dtype if shown == pool.stored_dtype else shown

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense, differentiable tensor, in a dtype (default: its own)."""
        weight = self._gathered(dtype or self.current_dtype)
        if self.center:
            weight = weight + self.center
        if self.zero_row is None:
            return weight
        # On the device: a copy from the CPU cannot be captured in a CUDA graph. Not `index_fill`: of a gradient that is
        # one number expanded, as a sum's, Inductor makes zeros everywhere (torch 2.13).
        row = torch.arange(weight.shape[0], device=weight.device) == self.zero_row
        return weight.masked_fill(row.view(-1, *(1,) * (weight.dim() - 1)), 0.0)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x · weightᵀ + bias`."""
        if self.center:
            return F.linear(x, self.dense(), bias)
        weight = self._kept_for(x)
        if weight is not None:
            return F.linear(x, weight, bias)
        return self._product(ops.linear_t if self.transposed else ops.linear, x, bias)

    def linear_t(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x · weight + bias`."""
        if self.center:
            return F.linear(x, self.dense().t(), bias)
        weight = self._kept_for(x)
        if weight is not None:
            return F.linear(x, weight.t(), bias)
        return self._product(ops.linear if self.transposed else ops.linear_t, x, bias)

    def _is_recorded(self) -> bool:
        """Whether a graph of the pool's gradient is being made."""
        if not torch.is_grad_enabled() or not self.pool.parameter().requires_grad:
            return False
        # What is exported has no backward pass.
        if torch.compiler.is_compiling():
            return not is_exporting()
        return not is_jit_tracing()

    def _kept_for(self, x: Tensor) -> Tensor | None:
        """Return a product's weight, kept for the backward pass; None for one that the backward pass gathers again.

        It is kept where its layer is small, so that the host's time counts, and where it has no more elements than its
        input, which is kept anyway. Nothing but sizes may decide: what is run again for a checkpoint must keep the
        same.
        """
        if not self.is_small or not self._is_recorded():
            return None
        if torch.compiler.is_compiling():
            # Here, because it imports sympy.
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            # A size that is left open decides nothing, and none is fixed for this.
            kept = statically_known_true(x.numel() >= self.numel)
        else:
            kept = x.numel() >= self.numel
        return self._kept(x) if kept else None

    def _kept(self, x: Tensor) -> Tensor:
        """Return the dense tensor for a recorded product with `x`, in the dtype that it runs in."""
        dtype = ops.autocast_dtype(x) or self.current_dtype
        if torch.compiler.is_compiling():
            return self._gathered(dtype)
        return self.pool.read_weight(self, dtype)

    def _gathered(self, dtype: torch.dtype) -> Tensor:
        matrix = ops.gather(self.pool.read(dtype), self.pool.table, self.view, self.scale)
        gathered = (matrix.t() if self.transposed else matrix).reshape(self.gathered_shape)
        if self.basis_index is None:
            return gathered
        return ops.combine(gathered, *self.pool.basis(self.basis_index)).view(self.shape)

    def whole(self, x: Tensor) -> Tensor:
        """Return the dense tensor for an operation on `x` that wants all of it, in the dtype that it runs in."""
        if self.can_be_whole and self._is_recorded():
            return self._kept(x)
        return self.dense(ops.autocast_dtype(x))

    def _product(self, product: Callable[..., Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        # Read in the dtype that the product runs in, so that autocast finds nothing left to cast.
        pool = self.pool.read(ops.autocast_dtype(x) or self.current_dtype)
        return product(x, pool, bias, self.pool.table, self.view, self.scale)

    def rows(self, index: Tensor) -> Tensor:
        """Return `weight[index]`."""
        if self.transposed or self.center:
            return F.embedding(index, self.dense())
        rows = ops.embedding(index, self.pool.read(self.current_dtype), self.pool.table, self.view, self.scale)
        if self.zero_row is None:
            return rows
        return rows.masked_fill((index == self.zero_row)[..., None], 0.0)

    def part(self, start: int, shape: Sequence[int]) -> PooledWeight | None:
        """Return the rows of the matrix from `start` on, of this shape, as a tensor of its own in the same tiles.

        None for a part that begins inside a row of tiles, a transposed matrix, one in strips, or one with a row that is
        zero.
        """
        view = self.view
        if self.transposed or view.strips or self.zero_row is not None or start % view.tile_rows:
            return None
        base = view.base + start // view.tile_rows * view.grid_cols * view.slot_size
        rows = math.prod(shape) // view.cols
        return dataclasses.replace(self, view=view._replace(rows=rows, base=base), shape=torch.Size(shape))

    def rows_between(self, start: int, stop: int) -> Tensor:
        """Return `weight[start:stop]` of the matrix's rows; the tiles that they touch are read."""
        ahead = start % self.view.tile_rows
        part = self.part(start - ahead, (max(stop - start, 0) + ahead, self.view.cols))
        if part is None or stop <= start:
            return self.dense().reshape(-1, self.shape[-1])[start:stop]
        return part.dense()[ahead:]

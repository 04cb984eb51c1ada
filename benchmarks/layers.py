"""Many layers of one shape, dense and on one pool, whose products the GPU benchmarks time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Call
from roastify.kernels import ops, reference
from roastify.kernels.view import FoldView, TileView, to_signed64
from roastify.pool.fold import folded, unfolded
from roastify.pool.mapping import TileMap, fold_key

# A CPU is for the tests of the benchmark itself.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = (128, 64)
SLOT = TILE[0] * TILE[1]
SCALE = 0.7
# What the planner chooses for pools of as many slots.
SIGN = "row"
# Columns that share signs in a fold, as the planner has it.
SPAN = 64
# So small that a thousand steps leave the weights as they are.
LEARNING_RATE = 1e-9
# Largest error over the largest value, against float64.
LIMITS = {"bfloat16": 1e-2, "float16": 5e-3, "tf32": 5e-3, "float32": 1e-5}

_MOST_IN_A_ROW = 16
_BYTES_IN_A_ROW = 2e9


def l2_bytes() -> int:
    """Return the size of the GPU's cache."""
    return torch.cuda.get_device_properties(0).L2_cache_size


def count_in_a_row(weight_bytes: int) -> int:
    """Return how many layers make a row: 16, fewer huge ones, and always over four caches full of dense weights."""
    enough = min(_MOST_IN_A_ROW, math.ceil(_BYTES_IN_A_ROW / weight_bytes))
    return max(2, enough, 4 * l2_bytes() // weight_bytes + 1)


def precision_name(dtype: torch.dtype) -> str:
    """Return the name of the precision of a product, as in `LIMITS`, under torch's present setting."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


class Layers:
    """Layers of one shape in a row, dense and on one pool.

    Args:
        shape: `(out, in)`.
        pool_elements: about so many elements in the pool, in whole slots.
        dtype: of everything.
        count: layers; by default as many as `count_in_a_row` says.
        fold: input columns that share a bucket; 1 for layers that are not folded.
        hashes: of a fold.
        dense: whether there are dense weights too.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        pool_elements: float,
        dtype: torch.dtype,
        count: int | None = None,
        fold: int = 1,
        hashes: int = 1,
        dense: bool = True,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.width, self.hashes = shape[1] // fold, hashes
        self.fold = None if fold == 1 else FoldView(shape[1], fold, hashes, SPAN, to_signed64(fold_key(0, 0)))
        weight_bytes = shape[0] * shape[1] * dtype.itemsize
        self.count = count or count_in_a_row(weight_bytes)
        self.num_slots = max(1, int(pool_elements / SLOT))
        self._tiles = math.ceil(shape[0] / TILE[0]) * math.ceil(self.width / TILE[1])
        self.table = torch.tensor(self._map("none").chunk_table(), dtype=torch.int64, device=DEVICE)
        self.pool = randn(self.num_slots * TILE[0], TILE[1], dtype=dtype)
        self.dense = [randn(*shape, dtype=dtype) for _ in range(self.count if dense else 0)]

    def _map(self, sign: str) -> TileMap:
        # The chunk table is of the slots alone: layers with any sign read the same one.
        return TileMap(self._tiles * self.count, self.num_slots, TILE, seed=0, sign=sign)

    def views(self, sign: str) -> list[TileView]:
        """Return where each layer lies in the pool."""
        tile_map = self._map(sign)
        rows, step = self.shape[0], self._tiles * SLOT
        views = (tile_map.view(rows, self.width, layer * step) for layer in range(self.count))
        return [view._replace(groups=self.hashes) for view in views]

    def activations(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return an input, and a gradient of the output."""
        return randn(rows, self.shape[1], dtype=self.dtype), randn(rows, self.shape[0], dtype=self.dtype)

    def facts(self) -> dict[str, Any]:
        """Return what a raw row says about the layers."""
        return {
            "pool_elements": self.pool.numel(),
            "layers": self.count,
            "dense_mb_in_a_row": self.count * self.dense[0].nbytes / 1e6,
            "dense_from_memory": self.count * self.dense[0].nbytes > 4 * l2_bytes(),
        }

    def dense_forward(self, x: Tensor) -> list[Call]:
        return [lambda weight=weight: F.linear(x, weight) for weight in self.dense]

    def pool_forward(self, x: Tensor, views: Sequence[TileView]) -> list[Call]:
        return [lambda view=view: self.product(self.folded(x), view) for view in views]

    def folded(self, x: Tensor) -> Tensor:
        """Return what the product on the pool takes: the input, folded if the layers are."""
        return x if self.fold is None else ops.fold(x, None, self.fold)

    def product(self, folded: Tensor, view: TileView) -> Tensor:
        return ops.linear(folded, self.pool, None, self.table, view, SCALE)

    def grad_x(self, grad: Tensor, view: TileView) -> Tensor:
        found = ops.linear_t(grad, self.pool, None, self.table, view, SCALE)
        return found if self.fold is None else ops.unfold(found, None, self.fold)

    def weight(self, view: TileView) -> Tensor:
        """Return a layer's dense weight in float64."""
        matrix = reference.gather(self.pool.double(), self.table, view, SCALE)
        return matrix if self.fold is None else unfolded(matrix, None, self.fold)

    def gathered_forward(self, x: Tensor, views: Sequence[TileView]) -> list[Call]:
        """Return the forward of those who gather the whole weight and leave the rest to cuBLAS."""
        return [lambda view=view: F.linear(x, ops.gather(self.pool, self.table, view, SCALE)) for view in views]

    def grad_pool(self, grad: Tensor, folded: Tensor, view: TileView) -> Tensor:
        return torch.ops.roastify.linear_reduce(grad, folded, self.table, view, SCALE, list(self.pool.shape))

    def dense_backward(self, x: Tensor, grad: Tensor) -> list[Call]:
        """Return forward, input's gradient and weight's gradient, as autograd calls them."""

        def step(weight: Tensor) -> object:
            return F.linear(x, weight), grad @ weight, grad.t() @ x

        return [lambda weight=weight: step(weight) for weight in self.dense]

    def pool_backward(self, x: Tensor, grad: Tensor, views: Sequence[TileView]) -> list[Call]:
        """Return the same on the pool, and the addition into the one gradient that all layers share."""
        total = torch.zeros(self.pool.shape, device=DEVICE)

        def step(view: TileView) -> object:
            folded = self.folded(x)
            out, grad_x = self.product(folded, view), self.grad_x(grad, view)
            torch.ops.roastify.linear_reduce_(total, grad, folded, self.table, view, SCALE)
            return out, grad_x

        return [lambda view=view: step(view) for view in views]

    def dense_step(self, x: Tensor, grad: Tensor) -> list[Call]:
        """Return a whole training step of one layer: forward, both gradients, and SGD's update."""

        def step(weight: Tensor) -> object:
            out, grad_x, grad_weight = F.linear(x, weight), grad @ weight, grad.t() @ x
            return out, grad_x, weight.add_(grad_weight, alpha=-LEARNING_RATE)

        return [lambda weight=weight: step(weight) for weight in self.dense]

    def pool_step(self, x: Tensor, grad: Tensor, views: Sequence[TileView]) -> list[Call]:
        """Return the same on the pool, whose update comes after every layer, as if it had the pool to itself."""

        def step(view: TileView) -> object:
            folded = self.folded(x)
            out, grad_x = self.product(folded, view), self.grad_x(grad, view)
            return out, grad_x, self.pool.add_(self.grad_pool(grad, folded, view), alpha=-LEARNING_RATE)

        return [lambda view=view: step(view) for view in views]

    def gathered_step(self, x: Tensor, grad: Tensor, views: Sequence[TileView]) -> list[Call]:
        """Return the same with one gathered weight for forward and backward, and a whole weight's gradient."""

        def step(view: TileView) -> object:
            weight = ops.gather(self.pool, self.table, view, SCALE)
            out, grad_x, grad_weight = F.linear(x, weight), grad @ weight, grad.t() @ x
            grad_pool = ops.reduce(grad_weight, self.table, view, SCALE, self.pool.shape)
            return out, grad_x, self.pool.add_(grad_pool, alpha=-LEARNING_RATE)

        return [lambda view=view: step(view) for view in views]

    def forward_error(self, x: Tensor, view: TileView) -> float:
        """Return the forward's error against float64; raise if it is not the product."""
        found = self.product(self.folded(x), view)
        return self.checked("forward", relative_error(found, x.double() @ self.weight(view).t()))

    def backward_error(self, x: Tensor, grad: Tensor, view: TileView) -> float:
        """Return the larger error of the two gradients against float64; raise if it is too large."""
        expected_x = grad.double() @ self.weight(view)
        error = self.checked("input's gradient", relative_error(self.grad_x(grad, view), expected_x))
        of_weight = grad.double().t() @ x.double()
        of_matrix = of_weight if self.fold is None else folded(of_weight, None, self.fold)
        expected = reference.reduce(of_matrix, self.table, view, SCALE, list(self.pool.shape))
        found = self.grad_pool(grad, self.folded(x), view)
        return max(error, self.checked("pool's gradient", relative_error(found, expected)))

    def checked(self, what: str, error: float) -> float:
        """Return the error, or raise if it is too large for what was computed."""
        limit = LIMITS[precision_name(self.dtype)]
        if not error < limit:
            raise ArithmeticError(f"{what} of {self.shape}, {self.dtype}: error {error:.2e}, expected below {limit:g}")
        return error


def floor_us(layers: Layers, rows: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Return the least time of one product on the pool and on the dense weight, and what bounds it.

    The pool's weights are read from the cache, all of them; where the pool is larger than the cache, the part that
    cannot be there comes from memory. Dense weights come from memory. Both do the same arithmetic.
    """
    out, cols = layers.shape[0], layers.width
    dense_bytes = math.prod(layers.shape) * layers.dtype.itemsize
    itemsize = layers.dtype.itemsize
    weight_bytes, pool_bytes = out * cols * itemsize, layers.pool.nbytes
    missed = max(0.0, 1 - ceilings["l2_mb"] * 1e6 / pool_bytes)
    memory = max(ceilings["memory_copy_gb_s"], ceilings["memory_read_gb_s"]) * 1e3
    precision = precision_name(layers.dtype)
    rate = ceilings["bfloat16_tflop_s" if precision == "float16" else f"{precision}_tflop_s"] * 1e6
    arithmetic = 2 * rows * out * cols / rate
    dense_arithmetic = 2 * rows * math.prod(layers.shape) / rate
    bounds = {
        "memory": weight_bytes * missed / memory,
        "cache": (weight_bytes + rows * (out + layers.shape[1]) * itemsize) / (ceilings["l2_read_gb_s"] * 1e3),
        "arithmetic": arithmetic,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return {"pool_us": bounds[bound], "bound": bound, "dense_us": max(dense_bytes / memory, dense_arithmetic)}

"""One size of the comparison with HashedNet, which runs at the best settings found for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources

from benchmarks import hashednet, timing
from benchmarks.hashednet import Blocks, Hashed
from benchmarks.layers import LEARNING_RATE, LIMITS, SIGN, Layers, precision_name, relative_error
from benchmarks.timing import Call

T = TypeVar("T")
# As the planner folds layers of this size, if their weights are as many times more than the pool's elements.
FOLD, HASHES = 8, 2
# HashedNet's calls take milliseconds, so a large weight has few layers in a row there.
_HASHED_ELEMENTS = 2e8
_TUNING_RUNS = 3


class Rival:
    """HashedNet's layers in a row, and the block settings that are its best here.

    Args:
        layers: what it competes with: shape, dtype, and as many elements in the pool.
        rows: of the batch.
    """

    def __init__(self, layers: Layers, rows: int) -> None:
        self.x, self.grad = layers.activations(rows)
        self.dtype = layers.dtype
        out, cols = layers.shape
        count = max(2, min(layers.count, int(_HASHED_ELEMENTS / (out * cols))))
        self.weights = [Hashed(out, cols, seed=1 + layer) for layer in range(count)]
        # A float32 pool beside narrow activations costs twice the bytes, but Triton can prefetch its reads.
        pools = dict.fromkeys((layers.dtype, torch.float32))
        self.pools = {dtype: layers.pool.flatten().to(dtype, copy=True) for dtype in pools}
        self.grad_pool = torch.zeros(layers.pool.numel(), device=layers.pool.device)
        self.blocks = hashednet.blocks_to_try(rows)
        self.tried: dict[str, int] = {}
        self.refused: dict[str, str] = {}

    @functools.cached_property
    def forward_settings(self) -> tuple[torch.dtype, Blocks]:
        """The pool's dtype and the blocks that make the fastest forward."""
        options = [(dtype, blocks) for dtype in self.pools for blocks in self.blocks]
        return self._fastest("forward", options, self.forward)

    @functools.cached_property
    def grad_x_settings(self) -> Blocks:
        """The blocks that make the fastest input's gradient, from the pool that is the forward's best."""
        return self._fastest("grad_x", self.blocks, self._grad_x)

    @functools.cached_property
    def grad_pool_settings(self) -> Blocks:
        """The blocks that make the fastest pool's gradient."""
        return self._fastest("grad_pool", hashednet.GRADIENT_BLOCKS, self._grad_pool)

    def _fastest(self, what: str, options: Sequence[T], calls: Callable[[T], list[Call]]) -> T:
        times: list[tuple[float, T]] = []
        for option in options:
            try:
                found = timing.measure({"rival": calls(option)}, most=_TUNING_RUNS)
            except (OutOfResources, RuntimeError) as error:
                # Too large for this GPU, or too much for this version of Triton; the raw row says so.
                self.refused[f"{what} {option}"] = f"{type(error).__name__}: {str(error)[:100]}"
            else:
                times.append((found["rival"]["median_us"], option))
        if not times:
            raise RuntimeError(f"HashedNet, {what}: no block setting runs: {self.refused}")
        self.tried[what] = len(times)
        return min(times, key=lambda pair: pair[0])[1]

    def forward(self, settings: tuple[torch.dtype, Blocks] | None = None) -> list[Call]:
        """Return the forward of each layer; at its best settings by default."""
        dtype, blocks = settings or self.forward_settings
        pool = self.pools[dtype]
        return [lambda weight=weight: hashednet.forward(self.x, pool, weight, blocks) for weight in self.weights]

    def _grad_x(self, blocks: Blocks) -> list[Call]:
        pool = self.pools[self.forward_settings[0]]
        return [lambda weight=weight: hashednet.grad_x(self.grad, pool, weight, blocks) for weight in self.weights]

    def _grad_pool(self, blocks: Blocks) -> list[Call]:
        def call(weight: Hashed) -> None:
            hashednet.add_grad_pool(self.grad, self.x, self.grad_pool, weight, blocks)

        return [lambda weight=weight: call(weight) for weight in self.weights]

    def step(self) -> list[Call]:
        """Return a whole training step of each layer: forward, both gradients, and SGD's update of the pool."""
        (dtype, forward), grad_x, grad_pool = self.forward_settings, self.grad_x_settings, self.grad_pool_settings
        pool = self.pools[dtype]

        def call(weight: Hashed) -> object:
            out = hashednet.forward(self.x, pool, weight, forward)
            found = hashednet.grad_x(self.grad, pool, weight, grad_x)
            self.grad_pool.zero_()
            hashednet.add_grad_pool(self.grad, self.x, self.grad_pool, weight, grad_pool)
            return out, found, pool.add_(self.grad_pool, alpha=-LEARNING_RATE)

        return [lambda weight=weight: call(weight) for weight in self.weights]

    def gathered_forward(self) -> list[Call]:
        """Return the forward through the weight materialised element by element, and cuBLAS."""
        pool = self.pools[self.dtype]
        return [lambda weight=weight: F.linear(self.x, hashednet.gather(pool, weight)) for weight in self.weights]

    def gathered_step(self) -> list[Call]:
        """Return the training step through one materialised weight and cuBLAS; the gradient is scattered."""
        pool = self.pools[self.dtype]

        def call(weight: Hashed) -> object:
            dense = hashednet.gather(pool, weight)
            out, found = F.linear(self.x, dense), self.grad @ dense
            self.grad_pool.zero_()
            hashednet.scatter(self.grad.t() @ self.x, self.grad_pool, weight)
            return out, found, pool.add_(self.grad_pool, alpha=-LEARNING_RATE)

        return [lambda weight=weight: call(weight) for weight in self.weights]

    def error(self, backward: bool) -> float:
        """Return the largest error of what is timed, against float64; raise if it is not HashedNet's product."""
        weight = self.weights[-1]
        dtype, blocks = self.forward_settings
        # The pool as the forward reads it: in the activations' dtype.
        pool = self.pools[dtype].to(self.dtype).double()
        index, sign = hashednet.reference_index(pool.numel(), weight, pool.device)
        dense = pool[index] * sign
        x, grad = self.x.double(), self.grad.double()
        pairs = [(hashednet.forward(self.x, self.pools[dtype], weight, blocks), x @ dense.t())]
        if backward:
            found = hashednet.grad_x(self.grad, self.pools[dtype], weight, self.grad_x_settings)
            pairs.append((found, grad @ dense))
            self.grad_pool.zero_()
            hashednet.add_grad_pool(self.grad, self.x, self.grad_pool, weight, self.grad_pool_settings)
            expected = torch.zeros_like(pool).index_add_(0, index.flatten(), ((grad.t() @ x) * sign).flatten())
            pairs.append((self.grad_pool, expected))
        error = max(relative_error(*pair) for pair in pairs)
        limit = LIMITS[precision_name(self.dtype)]
        if not error < limit:
            raise ArithmeticError(f"HashedNet, {weight}: error {error:.2e}, expected below {limit:g}")
        return error


class Contest:
    """All sides at one size; the rival is tuned once for inference and training."""

    def __init__(self, layers: Layers, rows: int, sign: str = SIGN) -> None:
        self.layers, self.rival = layers, Rival(layers, rows)
        self.x, self.grad, self.views = self.rival.x, self.rival.grad, layers.views(sign)
        self.folded: Layers | None = None
        if math.prod(layers.shape) >= FOLD * layers.pool.numel():
            elements, count = layers.pool.numel(), layers.count
            self.folded = Layers(layers.shape, elements, layers.dtype, count, FOLD, HASHES, dense=False)
            self.folded_views = self.folded.views(sign)

    def inference(self, most: int) -> dict[str, Any]:
        """Time the forward product of every side."""
        error = self.layers.forward_error(self.x, self.views[-1])
        sides = {
            "dense": self.layers.dense_forward(self.x),
            "pool": self.layers.pool_forward(self.x, self.views),
            "gathered": self.layers.gathered_forward(self.x, self.views),
            "hashednet": self.rival.forward(),
            "hashednet_gathered": self.rival.gathered_forward(),
        }
        if self.folded is not None:
            error = max(error, self.folded.forward_error(self.x, self.folded_views[-1]))
            sides["folded"] = self.folded.pool_forward(self.x, self.folded_views)
        return self._row(sides, most, error, backward=False)

    def training(self, most: int) -> dict[str, Any]:
        """Time the training step of every side."""
        error = self.layers.forward_error(self.x, self.views[-1])
        error = max(error, self.layers.backward_error(self.x, self.grad, self.views[-1]))
        sides = {
            "dense": self.layers.dense_step(self.x, self.grad),
            "pool": self.layers.pool_step(self.x, self.grad, self.views),
            "gathered": self.layers.gathered_step(self.x, self.grad, self.views),
            "hashednet": self.rival.step(),
            "hashednet_gathered": self.rival.gathered_step(),
        }
        if self.folded is not None:
            error = max(error, self.folded.backward_error(self.x, self.grad, self.folded_views[-1]))
            sides["folded"] = self.folded.pool_step(self.x, self.grad, self.folded_views)
        return self._row(sides, most, error, backward=True)

    def _row(self, sides: dict[str, list[Call]], most: int, error: float, backward: bool) -> dict[str, Any]:
        error = max(error, self.rival.error(backward))
        times = timing.measure(sides, most)
        pool = times["pool"]["median_us"]
        ours = min(times[side]["median_us"] for side in ("pool", "folded") if side in times)
        dtype, forward = self.rival.forward_settings
        blocks = {"forward": forward}
        if backward:
            blocks |= {"grad_x": self.rival.grad_x_settings, "grad_pool": self.rival.grad_pool_settings}
        return {
            **self.layers.facts(),
            **times,
            **{f"{name}_over_pool": side["median_us"] / pool for name, side in times.items() if name != "pool"},
            "hashednet_over_ours": times["hashednet"]["median_us"] / ours,
            "hashednet_layers": len(self.rival.weights),
            "hashednet_pool_dtype": str(dtype).removeprefix("torch."),
            "hashednet_blocks": {name: found._asdict() for name, found in blocks.items()},
            "hashednet_blocks_tried": self.rival.tried,
            **({"hashednet_blocks_refused": self.rival.refused} if self.rival.refused else {}),
            "error": error,
        }

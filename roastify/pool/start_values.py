"""Start values: what tensors start from whose pool holds only the difference, computed from the seed and never stored.

A low-rank adapter's product starts at zero, because one of its factors does. If both factors came from one random pool,
neither would be zero. So the pool of adapters starts at zero, and each factor starts where its author lets it start:
one at random numbers, the other at zero. The product is then exactly zero, and the pool gets a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from roastify.kernels.tile_hash import hash64, shift_right
from roastify.pool.mapping import start_key
from roastify.pool.plan import RoastPlan, TensorPlan

_BITS = 24


def start_offsets(plan: RoastPlan) -> Iterator[tuple[TensorPlan, int]]:
    """Yield the shared tensors that have start values, each with the place of its first one among those of all."""
    tensors = [tensor for tensor in plan.shared if tensor.start]
    yield from zip(tensors, itertools.accumulate((tensor.numel for tensor in tensors), initial=0), strict=False)


def start_values(plan: RoastPlan) -> Tensor:
    """Return the start values of all tensors that have some, one after the other, in float32 on the CPU."""
    parts = [_values(plan, tensor) for tensor, _ in start_offsets(plan)]
    return torch.cat(parts) if parts else torch.empty(0, device="cpu")


def _values(plan: RoastPlan, tensor: TensorPlan) -> Tensor:
    key = start_key(plan.seed, tensor.region, tensor.base)
    words = shift_right(hash64(key, torch.arange(tensor.numel, device="cpu")), 64 - _BITS)
    return (((words.double() + 0.5) / (1 << (_BITS - 1)) - 1.0) * tensor.start).float()

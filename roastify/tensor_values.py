"""What values a large tensor holds, found without a copy of it: whether all are finite, mean and deviation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Elements that are widened at once, which stay in a core's cache, and elements in a row of them. A row is summed by one
# thread, so that results do not depend on the number of threads.
_AT_ONCE = 1 << 16
_AT_ONCE_ON_GPU = 1 << 24
_ROW = 1 << 12
# Squares of numbers up to 2^500 do not overflow, and those from 2^-500 do not vanish.
_LARGEST_EXPONENT = 1000


class Moments(NamedTuple):
    """Mean and standard deviation of all elements; the deviation is 0 just if all are equal."""

    mean: float
    deviation: float


def is_finite(tensor: Tensor, *, or_infinite: bool = False) -> bool:
    """Return whether no element is NaN or infinite.

    True for integers, for tensors without values, and for tensors whose values are not simply their elements: sparse
    ones, and those of subclasses.

    Args:
        tensor: a tensor of any dtype.
        or_infinite: infinite values are right too, as those of a mask that is added to scores.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return True
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    parts = [part.float() for part in _parts(tensor)] if tensor.dtype.itemsize == 1 else [tensor]
    found = [float(value) for part in parts for value in torch.aminmax(part)]
    return not any(map(math.isnan, found)) if or_infinite else all(map(math.isfinite, found))


def is_constant(tensor: Tensor) -> bool:
    """Return whether all elements are equal; a tensor must have at least one."""
    # The first elements of most tensors differ, so the rest is not read.
    head = next(_parts(tensor))[:64]
    return bool((head == head[0]).all()) and all(bool((part == head[0]).all()) for part in _parts(tensor))


def moments(tensor: Tensor) -> Moments | None:
    r"""Return mean and standard deviation, :math:`\sqrt{\sum (w - mean)^2 / n}`, in float64; None if one is not finite.

    They are the same for any number of threads, and exact for constant tensors.

    Args:
        tensor: float16, bfloat16, float32 or float64, with at least one element.
    """
    low, high = (float(value) for value in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    if low == high:
        return Moments(low, 0.0)
    exponent = min(max(math.frexp(max(abs(low), abs(high)))[1], -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
    if tensor.numel() <= _ROW:
        found = torch.std_mean(tensor.double() * 2.0**-exponent, correction=0)
        return Moments(math.ldexp(float(found[1]), exponent), math.ldexp(float(found[0]), exponent))
    counts, means, squares = [], [], []
    for part in _parts(tensor):
        for rows in _rows(part):
            # A power of two, so that nothing is rounded.
            wide = rows.double() * 2.0**-exponent
            mean = wide.sum(1) / wide.shape[1]
            counts += [wide.shape[1]] * wide.shape[0]
            means += mean.tolist()
            squares += (wide - mean[:, None]).square_().sum(1).tolist()
    total = sum(counts)
    mean_of_all = math.fsum(count * mean for count, mean in zip(counts, means, strict=True)) / total
    between = math.fsum(count * (mean - mean_of_all) ** 2 for count, mean in zip(counts, means, strict=True))
    deviation = math.sqrt((math.fsum(squares) + between) / total)
    return Moments(math.ldexp(mean_of_all, exponent), math.ldexp(deviation, exponent))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements in parts."""
    size = _AT_ONCE_ON_GPU if tensor.is_cuda else _AT_ONCE
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(size)
    elif tensor.numel() <= size:
        yield tensor.reshape(-1)
    else:
        for part in tensor:
            yield from _parts(part)


def _rows(part: Tensor) -> Iterator[Tensor]:
    whole = part.numel() // _ROW * _ROW
    if whole:
        yield part[:whole].view(-1, _ROW)
    if whole < part.numel():
        yield part[whole:].view(1, -1)

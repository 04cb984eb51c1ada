"""Programs that run without roastify: `torch.export`, AOTInductor and ONNX record a model's plain operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from roastify.conversion.converted import pools_of, refuse_sharded
from roastify.errors import ConversionError
from roastify.kernels import plain
from roastify.kernels.view import MappingKind
from roastify.pool.pool import RoastPool

_INSTEAD = "export roastify.densify(model), which has the dense model's size"


@contextlib.contextmanager
def plain_operators(model: nn.Module) -> Iterator[None]:
    """Have `torch.export.export` and `torch.onnx.export` record a converted model in PyTorch's own operators.

    The program runs where roastify is not installed. It stores the pool once, and 4 to 8 bytes for each tile of the
    shared weights (21 if each element has a sign). It is for inference: a gradient through it is not divided by Γ.

    Args:
        model: a converted model with its values, on the device where the program will run.

    Raises:
        ConversionError: the model is not converted, is sharded or has no values, its mapping has no slots, or its tiles
            are so small that a program would store more for them than for the pool; the message says what to do.
    """
    refuse_sharded(model)
    for pool in pools_of(model):
        _check_small(pool)
    with torch.no_grad(), plain.recording():
        yield


def _check_small(pool: RoastPool) -> None:
    """Raise `ConversionError` if a program would store more for the pool's tiles than for the pool."""
    if pool.weight.is_meta:
        raise ConversionError(
            "the pool is on the meta device and has no values for a program to store; load the model's values first"
        )
    views = [weight.view for weight in pool.weights]
    if any(view.mapping == MappingKind.UNALIGNED for view in views):
        raise ConversionError(
            f"the mapping 'roast' lets a tile begin at any element of the pool, which plain operators cannot gather in "
            f"whole tiles; convert with another mapping, or {_INSTEAD}"
        )
    index = sum(view.num_tiles * plain.index_itemsize(view) for view in views)
    stored, dense = _nbytes(pool.weight), sum(weight.numel * weight.dtype.itemsize for weight in pool.weights)
    if index > stored and 2 * (index + stored) > dense:
        rows, cols = pool.tile
        raise ConversionError(
            f"a program of plain operators would store {index:,} bytes for the places of tiles of {rows}×{cols} "
            f"elements beside the {stored:,} bytes of the pool, and the dense weights take {dense:,} bytes; convert "
            f'with larger tiles (tile="64x64"), or {_INSTEAD}'
        )


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

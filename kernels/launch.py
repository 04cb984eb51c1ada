"""What launchers decide alike: integer widths, precision, and whether kernels may overlap."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from triton.runtime.driver import driver

from roastify.kernels.hash import interpreted
from roastify.kernels.view import TileView

# Addresses and counts whose values must not make a kernel of their own. Row lengths are not among them: whether they
# are multiples of 16 decides how wide a load may be.
PLAIN_ARGUMENTS = [
    "key",
    "num_rows",
    "first_tile",
    "num_tiles",
    "grid_cols",
    "num_slots",
    "first_slot",
    "first_chunk",
    "chunk_begin",
    "num_chunks",
    "chunk_end",
    "begin_tile",
    "end_tile",
    "tiles_each",
    "num_lookups",
    "nowhere",
    "steps",
]


def address_type(pool: torch.Tensor, view: TileView, num_rows: int) -> tl.dtype:
    """Return the integers in which a kernel may compute tiles, slots and places: 32 bits wherever they are enough.

    (64-bit remainders made a single-pass kernel take 10 µs where 32-bit ones take 6.)
    """
    largest = max(_largest_address(view), pool.numel(), num_rows * view.grid_cols * view.tile_cols)
    return tl.int32 if largest < 1 << 31 else tl.int64


@functools.lru_cache(maxsize=1 << 12)
def _largest_address(view: TileView) -> int:
    return max(view.num_slots**2, view.first_tile + view.num_tiles + view.num_slots)


def precision() -> str:
    """Return how a float32 product is computed, following torch's own setting."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def dependent_launch(x: torch.Tensor) -> dict[str, Any]:
    """Return the arguments that let a kernel start before the one ahead of it ends (Hopper and later)."""
    return {"DEPENDENT": True, "launch_pdl": True} if _may_overlap(x.device) else {"DEPENDENT": False}


@functools.cache
def _may_overlap(device: torch.device) -> bool:
    return not interpreted() and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may take on a device, as Triton itself checks them."""
    if interpreted():
        return 227 << 10
    return _shared_memory(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _shared_memory(index: int) -> int:
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])

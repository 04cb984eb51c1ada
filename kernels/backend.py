"""What runs the operators on a device, in words for reports; `dispatch` decides, and no Triton is imported."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether a GPU has the tensor-copy engine that `many_rows` needs: NVIDIA's Hopper GPUs have it."""
    # AMD's GPUs report the same capability numbers.
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def backend(device: torch.device) -> str:
    """Return in a few words how the operators run on a device."""
    if device.type != "cuda":
        return "torch, a panel of tile rows at a time"
    above = "the tensor-copy engine" if has_copy_engine(device) else "gathered weights and torch's products"
    return f"Triton kernels that read the pool for few rows of activations, {above} for more"

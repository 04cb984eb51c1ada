"""Digests by which what was saved knows again the model, the conversion or the base that it belongs to."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from roastify.pool.plan import RoastPlan

# About how many elements of each parameter are in the digest by which a checkpoint recognises a model.
_DIGESTED = 256


def digest_of_model(model: nn.Module) -> str:
    """Return a digest of some elements of every parameter and buffer, which is the same on any device."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode() + _some_elements(tensor))
    return digest.hexdigest()[:16]


def digests_of_base(base: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what the base of some adapters is known again by.

    Args:
        base: its Parameters and the buffers of its state dict, by name.

    Returns:
        digests of `names` (with shapes), of the `dtypes`, and of the `values`: some elements of each tensor, which are
        the same in every dtype that holds them.
    """
    parts: dict[str, Callable[[str, Tensor], bytes]] = {
        "names": lambda name, tensor: f"{name} {list(tensor.shape)} ".encode(),
        "dtypes": lambda name, tensor: f"{tensor.dtype} ".encode(),
        "values": lambda name, tensor: _some_elements(tensor),
    }
    return {
        part: hashlib.sha256(b"".join(of(name, tensor) for name, tensor in sorted(base.items()))).hexdigest()[:16]
        for part, of in parts.items()
    }


def _some_elements(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _DIGESTED)]
    some = (some if some.is_complex() else some.double()).cpu().contiguous()
    return some.numpy().tobytes()


def digest_of_plan(plan: RoastPlan) -> str:
    """Return what a conversion is known again by: a digest of its plan without the words that explain it."""
    values = plan.to_dict()
    for tensor in values["tensors"]:
        for words in ("reason", "whole", "op", "through"):
            del tensor[words]
    # What a checkpoint's format 2 does not know.
    del values["init"], values["root"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

"""Digests by which a checkpoint knows again the model and the conversion that it belongs to."""

from __future__ import annotations

import hashlib
import itertools
import json

from torch import nn

from roastify.pool.plan import RoastPlan

# About how many elements of each parameter are in the digest by which a checkpoint recognises a model.
_DIGESTED = 256


def digest_of_model(model: nn.Module) -> str:
    """Return a digest of some elements of every parameter and buffer, which is the same on any device."""
    digest = hashlib.sha256()
    for name, parameter in itertools.chain(model.named_parameters(), model.named_buffers()):
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _DIGESTED)]
        some = (some if some.is_complex() else some.double()).cpu().contiguous()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of_plan(plan: RoastPlan) -> str:
    """Return what a conversion is known again by: a digest of its plan without the words that explain it."""
    values = plan.to_dict()
    for tensor in values["tensors"]:
        for words in ("reason", "whole", "op", "through"):
            del tensor[words]
    # What a checkpoint's format 2 does not know.
    del values["init"], values["root"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

"""Whether two modules look alike to their forward, values apart, so that one trace stands for both."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

# What every module has: tensors and children are looked at by themselves, and a trace runs no hooks.
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)


def structure_of(module: nn.Module) -> Hashable:
    """Return a key that two modules share just if they are alike.

    That is: the same class, attributes, names and kinds of tensors, ties among them, and children that are alike.
    Attributes are compared by value if they are numbers, texts or plain containers of such, else by identity. The key
    holds identities, so it is good only as long as the modules live and stay as they are.
    """
    return _of_module(module, {})


def _of_module(module: nn.Module, seen: dict[int, int]) -> Hashable:
    if id(module) in seen:
        return seen[id(module)]
    seen[id(module)] = len(seen)
    own = tuple((key, _of_value(value)) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE)
    tensors = tuple(
        (name, None if tensor is None else _of_tensor(tensor, seen))
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
    )
    children = tuple(
        (name, None if child is None else _of_module(child, seen)) for name, child in module._modules.items()
    )
    return type(module), own, tensors, len(module._parameters), children


def _of_tensor(tensor: Tensor, seen: dict[int, int]) -> Hashable:
    place = seen.setdefault(id(tensor), len(seen))
    return place, type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad


def _of_value(value: Any) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
        # The type, because 1 equals True and 1.0; the text of a float, because 0.0 equals -0.0.
        return kind, repr(value) if kind in (float, complex) else value
    if kind in (list, tuple):
        return kind, tuple(map(_of_value, value))
    if kind in (set, frozenset):
        return kind, frozenset(map(_of_value, value))
    if kind is dict:
        return kind, tuple((_of_value(key), _of_value(item)) for key, item in value.items())
    return id(value)

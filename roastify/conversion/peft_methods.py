"""PEFT's own saving and loading, on a model whose adapters lie in a pool: the files hold dense adapters, as PEFT's do.

Without this, PEFT would look for the factors in the state dict, find none, and save or load an adapter without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from roastify.conversion.converted import pool_of, pooled_weight, readers_of
from roastify.conversion.initial_values import project_into
from roastify.errors import RoastError

_SAVE, _LOAD = "save_pretrained", "load_adapter"
# How far a factor that is loaded may be from what the pool can hold, relative to its own size.
_NEAR = 1e-3


class _Save:
    """Replaces `save_pretrained`: PEFT is given a state dict that has the factors."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        values = dict(kwargs.pop("state_dict", None) or self.model.state_dict())
        with torch.no_grad():
            for pool in [pool_of(self.model)]:
                for weight, places in zip(pool.weights, readers_of(self.model, pool), strict=True):
                    values |= {place.name: weight.dense() for place in places}
        return getattr(type(self.model), _SAVE)(self.model, save_directory, *args, state_dict=values, **kwargs)


class _Load:
    """Replaces `load_adapter`: an adapter of the pool's name is loaded into a dense copy, and from there into the pool.

    Args:
        model: the PEFT model.
        dense_copy: returns a dense copy of it on the same base.
    """

    def __init__(self, model: Any, dense_copy: Callable[[Any], Any]) -> None:
        self.model, self.dense_copy = model, dense_copy

    def __call__(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        own = getattr(type(model), _LOAD)
        if adapter_name not in model.peft_config:
            return own(model, model_id, adapter_name, *args, **kwargs)
        dense = self.dense_copy(model)
        result = own(dense, model_id, adapter_name, *args, **kwargs)
        pool = pool_of(model)
        before = pool.weight.detach().clone()
        project_into(pool, dense, pool.plan)
        for tensor in pool.plan.shared:
            wanted = dense.get_parameter(tensor.name).detach()
            found = pooled_weight(pool, tensor).dense().detach()
            if not torch.linalg.vector_norm(found - wanted) <= _NEAR * torch.linalg.vector_norm(wanted):
                with torch.no_grad():
                    pool.weight.copy_(before)
                raise RoastError(
                    f"{tensor.name} in {model_id} was not saved from a model with this pool, and the pool cannot hold "
                    f'it; load it into a PEFT model, and convert that: roastify.convert(model, ratio, include="adapters'
                    f'", init="project")'
                )
        loaded = dict(dense.named_parameters())
        with torch.no_grad():
            for tensor in pool.plan.kept:
                parameter = model.get_parameter(tensor.name)
                parameter.copy_(loaded[tensor.name])
                parameter.requires_grad_(loaded[tensor.name].requires_grad)
        pool.requires_grad_(any(loaded[tensor.name].requires_grad for tensor in pool.plan.shared))
        return result


def replace_peft_methods(model: nn.Module, dense_copy: Callable[[Any], Any]) -> None:
    """Let a PEFT model's own methods save and load the adapters that lie in its pool."""
    for module in _peft_models(model):
        module.__dict__[_SAVE] = _Save(module)
        if hasattr(type(module), _LOAD):
            module.__dict__[_LOAD] = _Load(module, dense_copy)


def restore_peft_methods(model: nn.Module) -> None:
    """Undo `replace_peft_methods`."""
    for module in _peft_models(model):
        for name, kind in ((_SAVE, _Save), (_LOAD, _Load)):
            if isinstance(module.__dict__.get(name), kind):
                del module.__dict__[name]


def _peft_models(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the models with PEFT's configuration and a method that saves them; inside a PEFT model there are none."""
    found = (each for each in model.modules() if hasattr(each, "peft_config") and hasattr(type(each), _SAVE))
    first = next(found, None)
    if first is not None:
        yield first

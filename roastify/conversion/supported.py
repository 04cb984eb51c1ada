"""Checks whether a model can be converted; each error says what was found and what to do."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from roastify.conversion.converted import find_pool, refuse_wrapped
from roastify.errors import ConversionError
from roastify.pool.members import POOL_NAME


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def checked_module(model: object) -> nn.Module:
    """Return a model; raise `ConversionError` for anything else."""
    if not isinstance(model, nn.Module):
        hint = f" {model.__name__}; call it to build a model" if isinstance(model, type) else ""
        raise ConversionError(f"expected a torch.nn.Module; found {type(model).__name__}{hint}")
    return model


def check_convertible(model: object) -> None:
    """Raise `ConversionError` unless this is a dense, initialised, eager model on one device."""
    model = checked_module(model)
    _check_depth(model)
    refuse_wrapped(model)
    if find_pool(model) is not None:
        raise ConversionError(
            "the model is already converted; convert the dense model, or go back with roastify.densify(model) first"
        )
    for name, module in model.named_modules():
        if hasattr(module, POOL_NAME):
            raise ConversionError(
                f"{name or 'the model'} has an attribute {POOL_NAME!r} of its own; rename it: the pool is registered "
                f"under that name"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"{name or 'the model'} is a TorchScript module, whose code cannot be rewritten; convert the eager "
                f"model, and script or export it afterwards"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ConversionError(
                f"{name} is not initialised yet (a lazy module); run one forward pass on real inputs first"
            )
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ConversionError(
            f"the weights are on several devices ({found}), but they share one pool; move the model to one of them"
        )


def _check_depth(model: nn.Module) -> None:
    # A module's call takes three of Python's frames, so the forward of a deeper model cannot run either.
    limit = sys.getrecursionlimit()
    most = (limit - 100) // 3
    depth = _depth(model)
    if depth > most:
        raise ConversionError(
            f"its modules are nested {depth:,} levels deep, and Python's recursion limit of {limit:,} is enough for "
            f"{most:,}; flatten the model, or raise the limit first with sys.setrecursionlimit"
        )


def _depth(model: nn.Module) -> int:
    """Return how many modules are inside each other, without recursion."""
    seen, level, depth = {id(model)}, [model], 0
    while level:
        depth += 1
        below = [child for module in level for child in module.children()]
        level = [child for child in below if id(child) not in seen]
        seen |= set(map(id, level))
    return depth


def check_has_values(model: nn.Module) -> None:
    """Raise `ConversionError` for a model on the meta device."""
    if device_of(model).type == "meta":
        raise ConversionError(
            "the model is on the meta device and has no values to start a pool from; build it on a real device, or use "
            "roastify.plan (shapes are enough) or roastify.load (values come from an artifact)"
        )


def find_plain_meta(model: nn.Module) -> str | None:
    """Return the name of a meta tensor that is neither parameter nor buffer, so that no file of weights fills it."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules") and _holds_meta(value):
                return f"{name}.{attribute}" if name else attribute
    return None


def _holds_meta(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_meta, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_meta, value))
    return isinstance(value, torch.Tensor) and value.is_meta

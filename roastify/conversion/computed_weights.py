"""Weights that are computed from others: whether they keep their spread when what they are computed from is shared.

A shared tensor starts with the mean and the spread of the dense one (`initial_values`), so a layer that multiplies by
it starts as its author meant. A weight that is computed from it need not: a parametrization may want values that a pool
does not hold (signs, integers), and give zeros or infinities instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from roastify.isolation import modes_kept, state_kept
from roastify.kernels.torch_internals import is_spectral_norm

# By how much the spread may change. A pool's random numbers change the spread of a small weight by a few per cent.
_LARGEST_CHANGE = 4.0


class ComputedWeight(NamedTuple):
    """A computed weight: its standard deviation, and the names of the Parameters that it is computed from."""

    deviation: float
    sources: tuple[str, ...]


def computed_weights(model: nn.Module) -> dict[str, ComputedWeight]:
    """Return all weights that parametrizations compute, by name."""
    if not any(map(parametrize.is_parametrized, model.modules())):
        return {}
    with state_kept(model), torch.no_grad():
        model.eval()
        return dict(_computed_weights(model))


def _computed_weights(model: nn.Module) -> Iterator[tuple[str, ComputedWeight]]:
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        parts: Any = module.parametrizations
        for attribute, parametrizations in parts.items():
            name = f"{path}.{attribute}" if path else attribute
            prefix = f"{path}.parametrizations.{attribute}" if path else f"parametrizations.{attribute}"
            sources = [key for key in vars(parametrizations)["_parameters"] if key.startswith("original")]
            weight = getattr(module, attribute)
            if weight.is_floating_point() and weight.numel() > 1:
                deviation = float(weight.float().std(correction=0))
                yield name, ComputedWeight(deviation, tuple(f"{prefix}.{source}" for source in sources))


# As many as torch makes when it adds the norm to a layer.
_POWER_ITERATIONS = 15


def estimate_norms(model: nn.Module) -> Callable[[], None]:
    """Have every `spectral_norm` of a model estimate the norm of the weight that it has now, in its buffers.

    Returns:
        a function that restores the buffers.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), modes_kept(model):
        for module in model.modules():
            hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
            parts: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
            parametrized = [name for name, chain in parts.items() if any(map(is_spectral_norm, chain))]
            if hooks or parametrized:
                before += [(buffer, buffer.clone()) for buffer in module.buffers()]
                module.train()
            for _ in range(_POWER_ITERATIONS):
                for name in parametrized:
                    getattr(module, name)
                for hook in hooks:
                    hook.compute_weight(module, do_power_iteration=True)

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)

    return restore


def changed_sources(before: dict[str, ComputedWeight], model: nn.Module, init: str) -> dict[str, str]:
    """Return the Parameters that must stay dense for a model's computed weights to keep their spread, with the reason.

    The fit of pretrained weights may shrink a spread, but not to nothing.
    """
    reasons: dict[str, str] = {}
    after = computed_weights(model) if before else {}
    for name, (deviation, sources) in before.items():
        found = after[name].deviation
        least = 0.0 if init == "project" else deviation / _LARGEST_CHANGE
        if deviation > 0 and not (math.isfinite(found) and least < found <= _LARGEST_CHANGE * deviation):
            reason = (
                f"computed from it, {name} would have a standard deviation of {found:.3g} instead of {deviation:.3g}"
            )
            reasons |= dict.fromkeys(sources, reason)
    return reasons

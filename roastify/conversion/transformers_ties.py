"""Keeps the names of tied weights for transformers' own methods, which a converted model must support."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_METHOD = "get_expanded_tied_weights_keys"


class _TiedNames:
    """Replaces the method of a transformers model that looks up the names of tied weights among its parameters.

    Shared weights are not among a converted model's parameters, so this object returns the names from before the
    conversion. Weights that are tied in the pool may be tied again without effect. Weights that left the pool (a
    resized vocabulary) are tied by the same names.
    """

    def __init__(self, model: Any) -> None:
        self.names = {every: getattr(model, _METHOD)(all_submodels=every) for every in (False, True)}

    def __call__(self, all_submodels: bool = False) -> dict[str, str]:
        return dict(self.names[all_submodels])


def remember_ties(model: nn.Module) -> None:
    """Store the names of tied weights in every transformers model inside a model, before it is converted."""
    # All names are looked up before the first method is replaced.
    named = [(module, _TiedNames(module)) for module in _pretrained_models(model)]
    for module, names in named:
        module.__dict__[_METHOD] = names


def forget_ties(model: nn.Module) -> None:
    """Undo `remember_ties`."""
    for module in _pretrained_models(model):
        module.__dict__.pop(_METHOD, None)


def _pretrained_models(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformers models inside a model. If transformers is not loaded, there are none."""
    pretrained = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if pretrained is not None and hasattr(pretrained, _METHOD):
        yield from (module for module in model.modules() if isinstance(module, pretrained))

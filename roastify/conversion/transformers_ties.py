"""What transformers' models must be told, so that their own methods work on a converted model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_METHOD = "get_expanded_tied_weights_keys"


class _TiedNames:
    """Stands for a model's method that looks the names of tied weights up among its parameters.

    Shared weights are not among the parameters, so the names are those that were found before the conversion. Tying
    what is tied in the pool changes nothing; what left the pool (a resized vocabulary) is tied by the same names.
    """

    def __init__(self, model: Any) -> None:
        self.names = {every: getattr(model, _METHOD)(all_submodels=every) for every in (False, True)}

    def __call__(self, all_submodels: bool = False) -> dict[str, str]:
        return dict(self.names[all_submodels])


def remember_ties(model: nn.Module) -> None:
    """Have transformers' models in a model that is about to be converted remember which of their weights are tied."""
    found = [(module, _TiedNames(module)) for module in _pretrained_models(model)]
    for module, names in found:
        module.__dict__[_METHOD] = names


def forget_ties(model: nn.Module) -> None:
    """Take `remember_ties` back."""
    for module in _pretrained_models(model):
        module.__dict__.pop(_METHOD, None)


def _pretrained_models(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformers models in a model: if it has one, transformers is loaded."""
    pretrained = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if pretrained is not None and hasattr(pretrained, _METHOD):
        yield from (module for module in model.modules() if isinstance(module, pretrained))

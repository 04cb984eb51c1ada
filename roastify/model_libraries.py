"""Models of installed libraries: timm's and torchvision's by name, how their names are written, what a library lacks.

A model is written as `NAME,key=value,key=value`, which needs no quotes in a shell.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from roastify.errors import SourceError, closest
from roastify.files import reason_of

Library = Literal["hf", "timm", "torchvision"]

_PACKAGES = {"hf": "transformers", "timm": "timm", "torchvision": "torchvision"}
_EXTRAS = {"hf": "integrations", "timm": "vision", "torchvision": "vision"}
# Arguments about weights and where they come from: they say nothing about a model's architecture.
OF_WEIGHTS = ("pretrained", "checkpoint_path", "cache_dir", "weights", "weights_backbone", "progress")


def library(kind: Library, who: str) -> ModuleType:
    """Return transformers, timm or torchvision.

    Args:
        kind: which.
        who: what needs it, for the message.

    Raises:
        SourceError: it is not installed, or does not import.
    """
    package = _PACKAGES[kind]
    how = f"install it with: pip install 'roastify[{_EXTRAS[kind]}]'"
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if error.name in (package, None):
            raise SourceError(f"{who} needs {package}; {how}") from None
        raise SourceError(f"{who} needs {package}, which does not import ({reason_of(error)}); {how}") from error
    except Exception as error:  # a torchvision that was compiled for another torch raises RuntimeError
        raise SourceError(
            f"{who} needs {package}, which does not import ({type(error).__name__}: {reason_of(error)}); install torch "
            f"{torch.__version__} and the torchvision that belongs to it from one index"
        ) from error


def create_model(kind: Library, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return a new model of timm's or torchvision's.

    Args:
        kind: `timm` or `torchvision`.
        name: the model's name in that library.
        arguments: keyword arguments of the library's own function. `pretrained` is one for torchvision too: true stands
            for its default weights.

    Raises:
        SourceError: the library is missing, does not know the model, or cannot build it.
    """
    who = f"{kind}:{name}"
    package = library(kind, who)
    # timm's names may lead to the hub or to a folder.
    elsewhere = kind == "timm" and ":" in name
    known = [] if elsewhere else package.list_models() if kind == "timm" else package.models.list_models()
    if not elsewhere and name.partition(".")[0] not in known:
        raise SourceError(
            f"{who}: {kind} {package.__version__} has no model {name!r}{closest(name, known)}; its list is "
            f"{kind}{'.models' if kind == 'torchvision' else ''}.list_models()"
        )
    create: Callable[..., nn.Module] = package.create_model if kind == "timm" else package.models.get_model
    given = dict(arguments) if kind == "timm" else _with_weights(package, who, arguments)
    if kind == "torchvision" and "weights_backbone" in _parameters(package, name):
        # Otherwise a model without weights downloads those of its backbone.
        given = {"weights_backbone": None, **given}
    try:
        return create(name, **given)
    except SourceError:
        raise
    except Exception as error:  # whatever the library raises: arguments, downloads, files
        raise SourceError(f"{who} cannot be built: {type(error).__name__}: {reason_of(error)}") from error


def _with_weights(torchvision: ModuleType, who: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    given = {"weights": None, **arguments}
    pretrained = given.pop("pretrained", False)
    if not isinstance(pretrained, bool) or (pretrained and arguments.get("weights")):
        raise SourceError(f"{who}: expected pretrained=true or false, or the weights' name as weights=IMAGENET1K_V2")
    return given | ({"weights": "DEFAULT"} if pretrained else {})


def _parameters(torchvision: ModuleType, name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(torchvision.models.get_model_builder(name)).parameters


def has_weights(arguments: Mapping[str, Any]) -> bool:
    """Return whether arguments of `create_model` ask for weights from files."""
    return any(arguments.get(key) for key in ("pretrained", "checkpoint_path", "weights", "weights_backbone"))


def example_input_of(model: nn.Module, kind: Library, name: str, arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Return a batch of two random images, or films, of the size that a model of timm's or torchvision's is made for.

    None stands for a model of which the library does not say that.
    """
    package: Any = library(kind, name)
    if kind == "timm":
        channels, *sides = package.data.resolve_model_data_config(model)["input_size"]
        size = (arguments.get("in_chans", channels), *_pair(arguments.get("img_size", sides)))
    else:
        try:
            made_for = package.models.get_model_weights(name).DEFAULT
        except (AttributeError, ValueError):  # models without any weights
            return None
        # Models of detection, segmentation and flow have transforms that cut nothing: their images are of any size.
        side = arguments.get("image_size", getattr(made_for.transforms, "keywords", {}).get("crop_size"))
        if side is None:
            return None
        is_video = package.models.get_model_builder(name).__module__.startswith("torchvision.models.video")
        frames = [made_for.meta.get("min_temporal_size", 16)] if is_video else []
        size = (3, *frames, *_pair(side))
    return torch.randn((2, *size), generator=torch.Generator().manual_seed(0))


def _pair(side: int | Sequence[int]) -> Sequence[int]:
    return (side, side) if isinstance(side, int) else side


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a model that is written as `NAME,key=value,key=value`.

    A value is JSON (`10`, `0.1`, `true`, `null`, `[1,2]`, `"a word"`), or else a word. Python's `True`, `False` and
    `None` are understood too.

    Raises:
        SourceError: a part is no `key=value`, or a key is there twice.
    """
    name, *parts = re.split(r",(?![^\[]*\])", text)
    arguments: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in arguments:
            what = "given twice" if key in arguments else "not key=value"
            raise SourceError(
                f"{text}: {part!r} is {what}; expected NAME,key=value,key=value, as in "
                f"resnet18,num_classes=10,pretrained=true"
            )
        arguments[key] = _value(value)
    return name, arguments


def _value(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return text

"""What builds an artifact's model, named in plain data: a model of the installed transformers, timm or torchvision.

An artifact may come from somebody else. Its builder can name a class or a model of the installed library and give it
plain values. It cannot name code, files or places of the network, and it cannot make the library look for any.
"""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from roastify.conversion.supported import find_plain_meta
from roastify.errors import SourceError
from roastify.files import reason_of
from roastify.isolation import random_states_kept, without_warnings
from roastify.model_libraries import OF_WEIGHTS, Library, create_model, library, parse_model
from roastify.pool.pool import RoastPool

# Arguments that would name files or addresses. An artifact has none of them.
_REFUSED = (*OF_WEIGHTS, "pretrained_cfg", "pretrained_cfg_overlay")
# Keys of a config by which transformers fetches code, kernels, quantizers or weights.
_REFUSED_IN_CONFIG = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "quantization_config",
    "transformers_weights",
)
# These pass names and arguments on to timm, which may take them for files.
_REFUSED_TYPES = ("timm_backbone", "timm_wrapper")
_NAME = {"hf": re.compile(r"[A-Z]\w{0,199}", re.ASCII)}
_MODEL_NAME = re.compile(r"\w{1,200}(\.\w{1,200})?", re.ASCII)
_TEXT = re.compile(r"[\w.+-]{0,200}", re.ASCII)
# Attributes that training changes, and no architecture has.
_OF_TRAINING = ("training", "grad_checkpointing", "gradient_checkpointing")
# What may be registered while an artifact's model is built, for each tensor or element that the artifact names.
_MORE = 4
_MODULES_A_TENSOR = 100


@dataclass(frozen=True)
class Builder:
    """What builds a model.

    Args:
        kind: the library, by the name that its sources have.
        name: the class (`hf`) or the model's name.
        arguments: keyword arguments; for `hf` the values of `config`, and of `generation_config` if there is one.
    """

    kind: Library
    name: str
    arguments: Mapping[str, Any]

    def describe(self) -> str:
        """Return what this is, in words."""
        if self.kind == "hf":
            return f"{self.name} of transformers, from its config"
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.name} of {self.kind}" + (f", with {given}" if given else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the builder as JSON-ready values."""
        return {"kind": self.kind, "name": self.name, "arguments": dict(self.arguments)}

    @classmethod
    def from_dict(cls, values: Any) -> Builder:
        """Return the builder that plain values name; no library is asked.

        Raises:
            ValueError: the values are not those of a builder, or would name code, files or places of the network.
        """
        if not isinstance(values, dict) or values.keys() != {"kind", "name", "arguments"}:
            raise ValueError("its builder is not an object with kind, name and arguments")
        kind, name, arguments = values["kind"], values["name"], values["arguments"]
        if kind not in get_args(Library):
            raise ValueError(f"its builder is of the unknown kind {reprlib.repr(kind)}")
        if not isinstance(name, str) or not _NAME.get(kind, _MODEL_NAME).fullmatch(name):
            raise ValueError(f"its builder has the name {reprlib.repr(name)}, which is none of a model")
        if not isinstance(arguments, dict):
            raise ValueError("the arguments of its builder are no object")
        (_check_config if kind == "hf" else _check_arguments)(arguments)
        return cls(kind, name, arguments)

    def build(self, names: int, elements: int) -> nn.Module:
        """Return the dense model with values of no meaning: on the meta device, or on the CPU if it cannot be there.

        Random generators stay as they are, and warnings about the initial values are suppressed.

        Args:
            names: how many Parameters the model should have. The build ends if it registers many more.
            elements: how many elements they should have together.

        Raises:
            SourceError: the library is not installed, does not know the model, or cannot build it.
        """
        with random_states_kept(), without_warnings(), _limited(names, elements):
            try:
                with torch.device("meta"):
                    model = self._create()
                # All models of transformers can be on the meta device: its own loading begins there.
                if self.kind == "hf" or find_plain_meta(model) is None:
                    return model
            except Exception as error:  # code that reads values raises whatever it likes on the meta device
                if self.kind == "hf" or isinstance(error, _TooLarge):
                    raise
            return self._create()

    def _create(self) -> nn.Module:
        if self.kind == "hf":
            return _from_config(self.name, self.arguments)
        return create_model(self.kind, self.name, self.arguments)


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for key, value in arguments.items():
        if not key.isidentifier() or key in _REFUSED:
            raise ValueError(f"its builder has the argument {reprlib.repr(key)}, which an artifact cannot have")
        for each in value if isinstance(value, list) else [value]:
            if not (each is None or type(each) in (bool, int, float) or (type(each) is str and _TEXT.fullmatch(each))):
                raise ValueError(
                    f"the argument {reprlib.repr(key)} of its builder is not a number, a word, or a list of these"
                )


def _check_config(arguments: Mapping[str, Any]) -> None:
    if not {"config"} <= arguments.keys() <= {"config", "generation_config"}:
        raise ValueError("its builder has other arguments than config and generation_config")
    for part in arguments.values():
        if not isinstance(part, dict):
            raise ValueError("the config of its builder is no object")
        for key, value in _entries(part):
            if key in _REFUSED_IN_CONFIG or (key == "use_pretrained_backbone" and value):
                raise ValueError(f"the config of its builder has the key {key!r}, which an artifact cannot have")
            if key == "model_type" and value in _REFUSED_TYPES:
                raise ValueError(f"the config of its builder has the model type {value!r}, which timm would build")


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth of objects and lists."""
    if isinstance(values, dict):
        yield from values.items()
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _entries(value)


class _TooLarge(SourceError):
    """What is built is far larger than the artifact, so it is another model."""


@contextlib.contextmanager
def _limited(names: int, elements: int) -> Iterator[None]:
    """End this thread's building of a model that is far larger than the one that was announced."""
    thread = threading.get_ident()
    left = {
        "parameters": _MORE * (names + 100),
        "elements": _MORE * (elements + 10**6),
        "modules": _MODULES_A_TENSOR * (names + 100),
    }

    def count(what: str, number: int) -> None:
        if threading.get_ident() == thread:
            left[what] -= number
            if left[what] < 0:
                raise _TooLarge(f"what its builder names has far more {what} than the artifact")

    def on_parameter(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is not None:
            count("parameters", 1)
            count("elements", parameter.numel())

    hooks = [
        torch_module.register_module_parameter_registration_hook(on_parameter),
        torch_module.register_module_module_registration_hook(lambda *_: count("modules", 1)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def builder_from(source: str) -> Builder:
    """Return the builder that a source names: `timm:NAME` or `torchvision:NAME`, with keyword arguments.

    Raises:
        SourceError: it names none that an artifact can name.
    """
    kind, _, rest = source.partition(":")
    if kind not in ("timm", "torchvision"):
        raise SourceError(
            f"{source}: expected timm:NAME or torchvision:NAME; models of transformers name their code without a "
            f"source, and an artifact cannot name other code"
        )
    name, arguments = parse_model(rest)
    try:
        rest_of = {key: value for key, value in arguments.items() if key not in OF_WEIGHTS}
        return Builder.from_dict({"kind": kind, "name": name, "arguments": rest_of})
    except ValueError as error:
        raise SourceError(f"{source} cannot be named in an artifact: {error}") from error


def builder_of(model: nn.Module, kind: Library, name: str, arguments: Mapping[str, Any]) -> Builder | None:
    """Return what builds a model of timm's or torchvision's again, without its weights; or None.

    None stands for a model that an artifact cannot name.

    Args:
        model: what `create_model` returned.
        kind: `timm` or `torchvision`.
        name: the model's name in that library.
        arguments: the arguments that `create_model` got.
    """
    rest = {key: value for key, value in arguments.items() if key not in OF_WEIGHTS}
    if kind == "torchvision" and arguments.get("weights", arguments.get("pretrained")):
        # Weights choose these, and no shape tells.
        rest |= {key: getattr(model, key) for key in ("transform_input", "aux_logits") if hasattr(model, key)}
        rest |= {"aux_loss": model.aux_classifier is not None} if hasattr(model, "aux_classifier") else {}
    try:
        return Builder.from_dict({"kind": kind, "name": name, "arguments": json.loads(json.dumps(rest))})
    except (TypeError, ValueError):
        return None


def builder_of_transformers(model: nn.Module) -> Builder | None:
    """Return what builds a model of transformers, converted or not; None for other models."""
    transformers = sys.modules.get("transformers")
    pretrained = getattr(transformers, "PreTrainedModel", None)
    own = _own_class(model)
    if pretrained is None or not issubclass(own, pretrained):
        return None
    is_known = getattr(transformers, own.__name__, None) is own
    found: Any = own
    either: Any = model
    if not is_known or type(either.config) is not found.config_class:
        return None
    arguments = {"config": either.config.to_dict()}
    if getattr(model, "generation_config", None) is not None and found.can_generate():
        arguments["generation_config"] = either.generation_config.to_dict()
    try:
        plain = {key: _plain_config(json.loads(json.dumps(value))) for key, value in arguments.items()}
        return Builder.from_dict({"kind": "hf", "name": found.__name__, "arguments": plain})
    except (TypeError, ValueError):  # a config that holds objects, or names code
        return None


def _own_class(module: nn.Module) -> type:
    """Return the class that a module had before it was converted, and before its tensors were sharded."""
    kind = type(module)
    if kind.__bases__[0].__name__ == "FSDPModule":
        kind = kind.__bases__[1]
    # A class on the pool names the one that it stands for.
    original: type = getattr(kind, "_roast_original", kind)
    return original


def difference_of(model: nn.Module, twin: nn.Module, values: bool) -> str:
    """Return in words how a module of a converted model differs from its namesake in a dense one, or an empty string.

    Args:
        model: a converted model.
        twin: a dense one.
        values: whether attributes that are numbers, texts or flags are compared, beside classes.
    """
    twins = dict(twin.named_modules())
    found = {name: module for name, module in model.named_modules() if not isinstance(module, RoastPool)}
    for name in dict.fromkeys([*found, *twins]):
        module, other = found.get(name), twins.get(name)
        if module is None or other is None or _own_class(module) is not type(other):
            names = " and ".join("nothing" if each is None else type(each).__name__ for each in (module, other))
            return f"{name or 'the model'} is {names}"
        for key, value in vars(module).items() if values else ():
            plain = isinstance(value, bool | int | float | str) and not key.startswith("_")
            if plain and key not in _OF_TRAINING and vars(other).get(key) != value:
                return f"{name}.{key} is {value!r} and {vars(other).get(key)!r}"
    return ""


def _plain_config(values: Any) -> Any:
    """Return a config's values without what names code or files: a build without weights needs none of it."""
    if isinstance(values, list):
        return [_plain_config(value) for value in values]
    if not isinstance(values, dict):
        return values
    plain = {key: _plain_config(value) for key, value in values.items()}
    for key in (*_REFUSED_IN_CONFIG, "_name_or_path"):
        plain.pop(key, None)
    return plain | ({"use_pretrained_backbone": False} if plain.get("use_pretrained_backbone") else {})


def _from_config(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    who = f"the artifact's model {name}"
    transformers = library("hf", who)
    found: Any = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or not found.__module__.startswith("transformers.models."):
        raise SourceError(
            f"{who} is unknown to transformers {transformers.__version__}; install the version that has it"
        )
    # A copy, because a config may keep the lists that it is given.
    values, config_class = json.loads(json.dumps(arguments)), found.config_class
    if values["config"].get("model_type") != config_class.model_type:
        raise SourceError(
            f"{who} has a config of the type {reprlib.repr(values['config'].get('model_type'))}; expected "
            f"{config_class.model_type!r}"
        )
    try:
        model: nn.Module = found._from_config(config_class.from_dict(values["config"]))
        if "generation_config" in values and found.can_generate():
            generation = transformers.GenerationConfig.from_dict(values["generation_config"])
            model.generation_config = generation
        return model
    except _TooLarge:
        raise
    except Exception as error:  # transformers raises many kinds of errors for values that do not fit
        raise SourceError(
            f"{who} cannot be built from its config: {type(error).__name__}: {reason_of(error)}"
        ) from error

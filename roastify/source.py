"""Loads the model that a `SOURCE` names, and the batches that a `DATA` names.

A source is `file.py`, `file.py:NAME`, `hf:` with a local directory, a config file or a hub name, `timm:NAME` or
`torchvision:NAME`, the folder of an artifact, or one that `save_pretrained` of a converted model wrote. NAME may have
keyword arguments after commas. Data is `file.py` or `file.py:NAME`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import inspect
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from roastify import api
from roastify.artifact import MANIFEST
from roastify.builders import Builder, builder_of
from roastify.companions import companions_of
from roastify.conversion.converted import pools_in
from roastify.errors import ConfigError, SourceError, closest
from roastify.integrations.pretrained_folder import PLAN_FILE
from roastify.model_libraries import Library, create_model, example_input_of, has_weights, library, parse_model

# A function with such a name and without required arguments counts as the file's model builder.
_BUILDER = re.compile(r"(build|make|create|get|load)?_?(model|net|network)", re.IGNORECASE)
# A file, a name in it, and arguments for what has that name.
_NAMED = re.compile(r"(.*?\.py):([^\W\d]\w*(?:,.*)?)")
_EXAMPLE_INPUTS = "example_inputs"
_DATA = "data"


@dataclass(frozen=True)
class Source:
    """A model and where it came from.

    Args:
        name: what the user typed.
        model: the dense model, or a converted one.
        example_inputs: the file's `example_inputs` (a value, or a function without arguments), transformers' dummy
            inputs, an image of the size that timm or torchvision names, or None.
        build: builds the model again.
        pretrained: whether the model has weights that were loaded from files.
        builder: what builds the model in an artifact; None if the model itself says it, or an artifact cannot name it.
        files: returns names and contents of the files that belong to the model: config, tokenizer.
    """

    name: str
    model: nn.Module
    example_inputs: Any
    build: Callable[[], nn.Module]
    pretrained: bool = False
    builder: Builder | None = None
    files: Callable[[], Mapping[str, bytes]] = field(default=dict)

    @property
    def converted(self) -> bool:
        """Whether the model is converted already."""
        return bool(pools_in(self.model))


@dataclass(frozen=True)
class DataSource:
    """Batches to recover a model on, and the functions that their file defines for them.

    Args:
        name: what the user typed.
        data: an iterable of batches, or a function that returns one.
        inputs: the file's function from a batch to forward's arguments, or None.
        loss_fn: the file's function from outputs and batch to the task's loss, the name of an output, or None.
        evaluate: the file's function from a model to a result to report, or None.
    """

    name: str
    data: Any
    inputs: Any
    loss_fn: Any
    evaluate: Any


def load_data(name: str) -> DataSource:
    """Return the batches that a file defines as `data` or NAME, with its `inputs`, `loss_fn` and `evaluate`.

    Raises:
        SourceError: the file does not exist, does not import, or has no such name.
    """
    _check_name(name)
    path, attribute, arguments = _split_name(name)
    if path.suffix != ".py" or not path.is_file():
        raise SourceError(
            f"{name}: there is no Python file {path}; expected file.py or file.py:NAME{_meant(name, path)}"
        )
    if arguments:
        raise SourceError(f"{name}: batches take no arguments; define a name for what you want, as {path}:NAME")
    with _beside(path):
        module = _import(path)
    attribute = attribute or _DATA
    if not hasattr(module, attribute):
        hint = closest(attribute, (key for key in vars(module) if not key.startswith("_")))
        raise SourceError(
            f"{path} has no name {attribute!r}{hint}; expected an iterable of batches, or a function that returns one; "
            f"name another with {path}:NAME"
        )
    others = (getattr(module, key, None) for key in ("inputs", "loss_fn", "evaluate"))
    return DataSource(name, getattr(module, attribute), *others)


def load_source(name: str, *, dense: str | None = None, digest: str | None = None) -> Source:
    """Build the model that a `SOURCE` names.

    Args:
        name: the source.
        dense: for an artifact, the source of its dense model, which is needed if the artifact does not name its code.
        digest: for an artifact, the SHA-256 that its `roast.json` must have.

    Raises:
        SourceError: the source does not exist, does not import, or does not hold just one model.
        ConfigError: `dense` or `digest` is given, and the source is no artifact.
        CheckpointError: the artifact cannot be loaded.
    """
    _check_name(name)
    if is_artifact(name):
        return _from_artifact(name, dense, digest)
    for option, value in (("--dense", dense), ("--digest", digest)):
        if value is not None:
            raise ConfigError(f"{option} belongs to an artifact, and {name} is none; leave it out")
    scheme, _, rest = name.partition(":")
    if scheme == "hf" and name != scheme:
        return _from_transformers(name, rest)
    if pretrained_folder(name) is not None:
        return _from_transformers(name, name)
    if scheme in ("timm", "torchvision") and name != scheme:
        return _from_library(name, cast(Library, scheme), rest)
    return _from_file(name, *_split_name(name))


def is_artifact(name: str) -> bool:
    """Return whether a source is the folder of an artifact."""
    return (Path(name) / MANIFEST).exists()


def pretrained_folder(name: str) -> Path | None:
    """Return the folder that a source names, with or without `hf:`, if a converted model was saved there."""
    folder = Path(name.removeprefix("hf:"))
    return folder if (folder / PLAN_FILE).is_file() and not is_artifact(str(folder)) else None


def _from_artifact(name: str, dense: str | None, digest: str | None) -> Source:
    found = None if dense is None else load_source(dense)

    def build() -> nn.Module:
        return api.load(name, digest=digest) if found is None else api.load(name, found.model, digest=digest)

    model = build()
    inputs = _dummy_inputs(model) if found is None else found.example_inputs
    builder: Builder | None = pools_in(model)[0].builder
    if inputs is None and builder is not None and builder.kind != "hf":
        inputs = example_input_of(model, builder.kind, builder.name, builder.arguments)
    return Source(name, model, inputs, build, pretrained=True)


def _from_library(name: str, kind: Library, rest: str) -> Source:
    title, arguments = parse_model(rest)
    if not title:
        raise SourceError(
            f"{name}: expected {kind}:NAME or {kind}:NAME,key=value, as in {kind}:resnet18,pretrained=true"
        )

    def build() -> nn.Module:
        return create_model(kind, title, arguments)

    model = build()
    inputs = example_input_of(model, kind, title, arguments)
    builder = builder_of(model, kind, title, arguments)
    return Source(name, model, inputs, build, pretrained=has_weights(arguments), builder=builder)


def _check_name(name: str) -> None:
    """Raise `SourceError` for a name that no file can have: each question about such a file raises an error."""
    try:
        os.stat(name)
    except ValueError as error:
        raise SourceError(f"{reprlib.repr(name)} cannot be the name of a file: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SourceError(f"{reprlib.repr(name)} cannot be the name of a file: {error.strerror}") from error


def _split_name(name: str) -> tuple[Path, str | None, dict[str, Any]]:
    named = _NAMED.fullmatch(name)
    return (Path(name), None, {}) if named is None else (Path(named[1]), *parse_model(named[2]))


def _meant(name: str, path: Path) -> str:
    """Return the file that may have been meant: its suffix was left out, or its name is nearly that of another."""
    head, colon, tail = name.rpartition(":")
    for file, rest in ((name, ""), (head, colon + tail)):
        if file and Path(f"{file}.py").is_file():
            return f"; did you mean {file}.py{rest}?"
    return closest(path.name, (each.name for each in path.parent.glob("*.py"))) if path.suffix == ".py" else ""


def _from_file(name: str, path: Path, attribute: str | None, arguments: Mapping[str, Any]) -> Source:
    if path.suffix != ".py":
        found = " (the file exists, but is not a Python file)" if path.is_file() else ""
        if name and path.is_dir():
            is_hf = (path / "config.json").is_file()
            found = f" (the folder has a config.json: hf:{name})" if is_hf else f" (the folder has no {MANIFEST})"
        raise SourceError(
            f"{name}: expected file.py, file.py:NAME, hf:DIRECTORY, timm:NAME, torchvision:NAME or an artifact's folder"
            + (found or _meant(name, path))
        )
    if not path.is_file():
        raise SourceError(f"{name}: there is no file {path}{_meant(name, path)}")
    with _beside(path):
        module = _import(path)
    if attribute is None:
        attribute = _only_candidate(path, module)
    elif not hasattr(module, attribute):
        hint = closest(attribute, (key for key in vars(module) if not key.startswith("_")))
        raise SourceError(f"{path} has no name {attribute!r}{hint}")

    def build() -> nn.Module:
        with _beside(path):
            return _build(path, attribute, getattr(module, attribute), arguments)

    model = build()
    with _beside(path):
        return Source(name, model, _example_inputs(path, module), build)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let Python look for imports in the file's own folder first, as it does for a script."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import(path: Path) -> ModuleType:
    path = path.resolve()
    module_name = f"_roastify_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The module is registered under its name, because dataclasses and pickling in the file need that.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        del sys.modules[module_name]
        line = _line_in(path, error)
        raise SourceError(f"{path} does not import: {type(error).__name__}: {error}{line}") from error
    return module


def _line_in(path: Path, error: BaseException) -> str:
    """Return where in the file an error arose, for example ``" (line 3)"``."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f" (line {error.lineno})" if error.lineno else ""
    lines = []
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]})" if lines else ""


def _only_candidate(path: Path, module: ModuleType) -> str:
    """Return the one name in a file that is a model: an instance, else a builder function, else a class."""
    public = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    instances = [key for key, value in public.items() if isinstance(value, nn.Module)]
    builders = [
        key
        for key, value in public.items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and _callable_without_arguments(value)
        and (_BUILDER.fullmatch(key) or _returns_module(value))
    ]
    classes = [
        key
        for key, value in public.items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and _callable_without_arguments(value)
    ]
    for candidates in (instances, builders, classes):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise SourceError(
                f"{path} holds several models ({', '.join(candidates)}); name one: {path}:{candidates[0]}"
            )
    others = [key for key, value in public.items() if inspect.isfunction(value) and value.__module__ == module.__name__]
    if unclear := [key for key in others if _callable_without_arguments(public[key])]:
        raise SourceError(
            f"{path} has the function {unclear[0]}(), but neither its name nor its annotation says that it returns a "
            f"model; if it does, name it: {path}:{unclear[0]}"
        )
    raise SourceError(
        f"{path} holds no model; expected a torch.nn.Module, a function without required arguments (for example "
        f"build_model()), or an nn.Module class without required arguments. Name another with {path}:NAME"
    )


def _callable_without_arguments(value: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return False
    # A function of *args builds something from these arguments; **kwargs alone are options.
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)


def _returns_module(function: Callable[..., Any]) -> bool:
    try:
        returned = inspect.signature(function, eval_str=True).return_annotation
    except Exception:  # an annotation that only a type checker can resolve
        return False
    return isinstance(returned, type) and issubclass(returned, nn.Module)


def _build(path: Path, attribute: str, value: Any, arguments: Mapping[str, Any]) -> nn.Module:
    if isinstance(value, nn.Module):
        if arguments:
            raise SourceError(
                f"{path}:{attribute} is a model already and takes no arguments; name a function or a class, or leave "
                f"them out"
            )
        return value
    if not callable(value):
        raise SourceError(
            f"{path}:{attribute} is a {type(value).__name__}; expected a torch.nn.Module, a class of one, or a "
            f"function that returns one"
        )
    call = f"{path}:{attribute}({', '.join(f'{key}={given!r}' for key, given in arguments.items())})"
    if (wrong := _misfit(value, arguments)) is not None:
        raise SourceError(f"{call}: {wrong}; arguments come after commas, as {path}:{attribute},key=value,key=value")
    try:
        model = value(**arguments)
    except Exception as error:  # whatever the user's code raises
        raise SourceError(f"{call} fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{call} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _misfit(value: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    """Return why a function does not take these arguments, or None if it does, or does not say what it takes."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(**arguments)
    except TypeError as error:
        return str(error)
    return None


def _example_inputs(path: Path, module: ModuleType) -> Any:
    value = getattr(module, _EXAMPLE_INPUTS, None)
    if not callable(value):
        return value
    try:
        return value()
    except Exception as error:  # whatever the user's code raises
        raise SourceError(f"{path}:{_EXAMPLE_INPUTS}() fails: {type(error).__name__}: {error}") from error


def _from_transformers(name: str, rest: str) -> Source:
    transformers = library("hf", name)
    if not rest:
        raise SourceError(f"{name}: expected hf:DIRECTORY, hf:CONFIG.json or hf:HUB-NAME")
    if is_artifact(rest):
        raise SourceError(f"{name} is the folder of an artifact; name it without hf:, as {rest}")
    try:
        # Otherwise transformers asks on the terminal whether to run code from the hub.
        config = transformers.AutoConfig.from_pretrained(rest, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError and hub errors alike
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{name}: transformers finds no config there: {first}") from error
    model_class = _architecture(name, transformers, config)
    with_weights = Path(rest).is_dir() and any(
        any(Path(rest).glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    )
    local = Path(rest).exists()

    def build() -> nn.Module:
        try:
            if local and not with_weights:
                return model_class._from_config(config)
            return model_class.from_pretrained(rest)
        except Exception as error:  # transformers raises OSError, ValueError, RuntimeError and hub errors alike
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise SourceError(f"{name}: {model_class.__name__} cannot be built: {first}") from error

    model = build()
    return Source(
        name,
        model,
        _dummy_inputs(model),
        build,
        pretrained=with_weights or not local,
        files=functools.partial(companions_of, rest),
    )


def _architecture(name: str, transformers: ModuleType, config: Any) -> Any:
    """Return the class that the config names, or else the base model of its type."""
    named = config.architectures or ()
    if not isinstance(named, list | tuple) or not all(isinstance(each, str) for each in named):
        raise SourceError(f"{name}: architectures in the config is {reprlib.repr(named)}; expected a list of names")
    for architecture in named:
        found = getattr(transformers, architecture, None)
        if not hasattr(found, "from_pretrained") or not hasattr(found, "_from_config"):
            raise SourceError(f"{name}: the config names the architecture {architecture!r}, unknown to transformers")
        return found
    try:
        return transformers.AutoModel._model_mapping[type(config)]
    except KeyError:
        raise SourceError(
            f"{name}: the config names no architecture, and transformers has no base model for {type(config).__name__}"
        ) from None


def _dummy_inputs(model: Any) -> Any:
    """Return transformers' dummy inputs if the model takes them and its vocabulary holds them; otherwise None."""
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, dict):
        return None
    accepted = inspect.signature(model.forward).parameters
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    fits = all(
        key in accepted and (vocabulary is None or value.is_floating_point() or int(value.max()) < vocabulary)
        for key, value in inputs.items()
    )
    return inputs if fits else None

"""The model of a command: loaded from its source, compared with its converted form, saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

import roastify
from roastify import api
from roastify.artifact import write_artifact
from roastify.checks.example_inputs import find_inputs, how_to_give
from roastify.commands.output import Output
from roastify.conversion.converted import pools_in
from roastify.errors import ConfigError
from roastify.progress import working
from roastify.source import Source, is_artifact, load_source


def loaded(source: str, dense: str | None = None, digest: str | None = None) -> Source:
    """Load a model, and say so if it takes long."""
    with working(f"loading {source}"):
        return load_source(source, dense=dense, digest=digest)


def loaded_dense(source: str) -> Source:
    """Load a model that is to be converted.

    Raises:
        ConfigError: it is converted already.
    """
    found = None if is_artifact(source) else loaded(source)
    if found is None or found.converted:
        raise ConfigError(
            f"{source} is converted already, and a conversion begins with a dense model; roastify show {source} shows "
            f"what is in it"
        )
    return found


def compared(
    found: Source, converted: nn.Module, out: Output, original: nn.Module | None = None
) -> roastify.VerifyReport:
    """Verify with the source's example inputs or, where it has none, with guessed ones; show and return the report."""
    original = found.model if original is None else original
    inputs = found.example_inputs if found.example_inputs is not None else find_inputs(original)
    with working("comparing both models"):
        verified = api.verify(original, converted, inputs)
    out.show(verified)
    if inputs is None:
        out.say(how_to_give(found.name))
    return verified


def saved(converted: nn.Module, output: str, found: Source, files: Mapping[str, bytes], out: Output) -> None:
    """Write the artifact with the source's config and tokenizer, and say how it is loaded."""
    for pool in pools_in(converted):
        pool.builder = pool.builder or found.builder
    replaced = " in the place of the artifact that was there" if is_artifact(output) else ""
    builder = write_artifact(converted, Path(output), files=files)
    copied = f", with {', '.join(files)}" if files else ""
    out.say(f"written to {output}{replaced}{copied}")
    model = "" if builder else ", model=…"
    out.say(f'load it with roastify.load("{output}"{model})')

"""Guessed example inputs for a model that has none.

Guesses come from the model's signature, its config and its first layer. A guess is returned only if the model runs on
it, so a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from roastify.calls import describe_call, run_model, split_inputs

_BATCH = 2
_LENGTH = 8
_SIDE = 32
# Long enough for the convolutions at the front of speech models.
_SAMPLES = 4096
_SEED = 1


def find_inputs(model: nn.Module) -> Any:
    """Return inputs that the model runs on, as a tuple or a mapping; None if no guess fits."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    for candidate in _candidates(model):
        args, kwargs = split_inputs(candidate)
        try:
            run_model(model, args, kwargs, "eval")
        except Exception:  # whatever a model raises on inputs that do not fit it
            continue
        return candidate
    return None


def how_to_give(source: str) -> str:
    """Return a message for a model whose inputs could not be guessed: what the user can do."""
    return (
        f"no example inputs, and none could be guessed, so outputs are not compared; define `example_inputs` in "
        f"{source} (a tensor, a tuple of positional or a dict of keyword arguments, or a function that returns one)"
    )


def how_to_time(source: str, model: nn.Module) -> str:
    """Return a message for a model that is to be timed without inputs, with those that were found to fit it."""
    guess = find_inputs(model)
    fitting = "" if guess is None else f"; the model takes for example {describe_call(*split_inputs(guess))}"
    return (
        f"timing needs example inputs, and {source} has none; define example_inputs in the file.py with the model (for "
        f"an artifact, the one that --dense names), as example_inputs = torch.randn(8, 64): a tensor, a tuple of "
        f"positional or a dict of keyword arguments, or a function that returns one{fitting}"
    )


def _candidates(model: nn.Module) -> Iterator[Any]:
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        yield from _for_transformers(model, config, parameters)
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind in (0, 1)
    ]
    if not required and not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        yield ()
        required = [name for name, parameter in parameters.items() if parameter.kind in (0, 1)][:1]
    for count in sorted({max(1, len(required)), 1}, reverse=True):
        for tensor in _for_first_layer(model):
            yield (tensor,) * count


def _for_transformers(model: nn.Module, config: Any, parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the main input alone, with the decoder's input, and with the other inputs of a multimodal model."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    guesses = {name: _named_input(name, config) for name in parameters}
    known = {name: value for name, value in guesses.items() if value is not None}
    decoder = {name: known[name] for name in ("decoder_input_ids",) if name in known}
    firsts = [name for name in (main, "input_ids", "pixel_values", "input_values", "input_features") if name in known]
    firsts = list(dict.fromkeys(firsts))
    if len(firsts) > 1 and _is_multimodal(config):
        yield {**{name: known[name] for name in firsts}, **decoder}
    for first in firsts:
        if decoder and getattr(config, "is_encoder_decoder", False):
            yield {first: known[first], **decoder}
        yield {first: known[first]}
    for one, other in itertools.combinations(firsts, 2):
        yield {one: known[one], other: known[other], **decoder}
    yield known


def _is_multimodal(config: Any) -> bool:
    return sum(hasattr(config, name) for name in ("text_config", "vision_config", "audio_config")) > 1


def _number_of(config: Any, *names: str, default: int) -> int:
    """Return the first of several settings for which a config, or a part of it, has a positive integer."""
    parts = [config, *(getattr(config, f"{part}_config", None) for part in ("vision", "audio", "text", "encoder"))]
    for name, part in itertools.product(names, parts):
        value = getattr(part, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def _named_input(name: str, config: Any) -> Tensor | None:
    generator = torch.Generator().manual_seed(_SEED)
    if name in ("input_ids", "decoder_input_ids", "inputs") and hasattr(config, "get_text_config"):
        words = _number_of(config, "vocab_size", default=32)
        words = _number_of(config.get_text_config(), "vocab_size", default=words)
        return torch.randint(min(3, words - 1), min(words, 90), (_BATCH, _LENGTH), generator=generator)
    shapes: dict[str, tuple[int, ...]] = {
        "pixel_values": (
            _BATCH,
            _number_of(config, "num_channels", "in_channels", "in_chans", default=3),
            *(_number_of(config, "image_size", "img_size", default=_SIDE),) * 2,
        ),
        "pixel_values_videos": (
            _BATCH,
            _number_of(config, "num_frames", "frames_per_clip", default=4),
            _number_of(config, "num_channels", "in_chans", default=3),
            *(_number_of(config, "image_size", "crop_size", default=_SIDE),) * 2,
        ),
        "input_values": (
            (
                _BATCH,
                _number_of(config, "max_length", default=64),
                _number_of(config, "num_mel_bins", default=16),
            )
            if hasattr(config, "num_mel_bins")
            else (_BATCH, _SAMPLES)
        ),
        "input_features": (
            _BATCH,
            _number_of(config, "num_mel_bins", "feature_projection_input_dim", default=80),
            2 * _number_of(config, "max_source_positions", default=32),
        ),
        "past_values": (
            _BATCH,
            _number_of(config, "context_length", "input_size", default=32),
            _number_of(config, "num_input_channels", default=1),
        ),
    }
    return torch.randn(shapes[name], generator=generator) if name in shapes else None


def _for_first_layer(model: nn.Module) -> Iterator[Tensor]:
    """Yield tensors that the model's first layer takes, in a few usual shapes."""
    generator = torch.Generator().manual_seed(_SEED)
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    layer = next((module for module in model.modules() if _input_shapes(module)), None)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        for size in ((_BATCH, _LENGTH), (_LENGTH,)):
            yield torch.randint(layer.num_embeddings, size, generator=generator).to(device)
    elif layer is not None:
        for shape in _input_shapes(layer):
            yield floats(*shape)


def _input_shapes(layer: nn.Module) -> list[tuple[int, ...]]:
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return [(_BATCH, _LENGTH)]
    if isinstance(layer, nn.Linear):
        return [(_BATCH, layer.in_features), (_BATCH, _LENGTH, layer.in_features)]
    if isinstance(layer, nn.modules.conv._ConvNd):
        dims = len(layer.kernel_size)
        return [(_BATCH, layer.in_channels, *(side,) * dims) for side in (_SIDE, 2 * _SIDE, 7 * _SIDE)]
    if isinstance(layer, nn.RNNBase):
        return [(_BATCH, _LENGTH, layer.input_size)]
    if isinstance(layer, nn.RNNCellBase):
        return [(_BATCH, layer.input_size)]
    if isinstance(layer, nn.MultiheadAttention):
        return [(_BATCH, _LENGTH, layer.embed_dim)]
    return []

"""Which tensors of a PEFT model belong to its adapters, and whether the adapters are where training starts."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from roastify.errors import ConversionError, PlanError

# The word for `include` that means a PEFT model's adapters.
WORD = "adapters"
# What of a configuration does not change how trained adapters compute.
_NO_MATTER = re.compile(
    r"base_model_name_or_path|revision|inference_mode|peft_version|task_type|auto_mapping|runtime_config|init_.*|.*dropout"
)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT's layers are in a model."""
    return next(_holders(model), None) is not None


def adapter_tensors(model: nn.Module) -> dict[int, str]:
    """Return the ids of all Parameters and buffers of a PEFT model's adapters.

    Returns:
        for each id why the tensor must stay dense, or an empty string. Copies of whole layers that are trained beside
        the adapters (`modules_to_save`), prompts and biases stay dense.

    Raises:
        PlanError: there are several adapters, of which one pool would train all, or they are AdaLoRA's.
    """
    configs = _all_configs(model)
    if len(configs) > 1:
        raise PlanError(
            f"the model has the adapters {', '.join(configs)}, and a pool holds one; delete the others, or give each "
            f"adapter a PEFT model of its own on the same base"
        )
    if any(config.peft_type == "ADALORA" for config in configs.values()):
        raise PlanError(
            "AdaLoRA drops ranks by the gradient of each factor, and a factor in a pool has none of its own; use LoRA"
        )
    found: dict[int, str] = {}
    for holder, low_rank in _holders(model):
        why = "" if low_rank else "a whole layer or a prompt beside low-rank factors"
        for tensor in [*holder.parameters(), *holder.buffers()] if isinstance(holder, nn.Module) else [holder]:
            found.setdefault(id(tensor), why or ("a vector" if tensor.dim() < 2 else ""))
    for parameter in model.parameters():
        if parameter.requires_grad:
            found.setdefault(id(parameter), "trained beside the adapters")
    return found


def base_of(model: nn.Module, of_adapters: Collection[int]) -> dict[str, torch.Tensor]:
    """Return the Parameters of a model that are not its adapters', and the buffers that its state dict has."""
    in_state_dict = model.state_dict().keys()
    tensors = [
        *model.named_parameters(),
        *((name, each) for name, each in model.named_buffers() if name in in_state_dict),
    ]
    return {name: tensor for name, tensor in tensors if id(tensor) not in of_adapters}


def check_at_start(model: nn.Module) -> None:
    """Raise `ConversionError` if an adapter already changes its layer, or begins from values that were chosen for it.

    These values would be lost.
    """
    for config in _all_configs(model).values():
        chosen = getattr(config, "init_lora_weights", True)
        if isinstance(chosen, str) and chosen != "gaussian":
            raise ConversionError(
                f"init_lora_weights={chosen!r} chooses the factors' first values, and a pool starts from random ones; "
                f'leave it at its default, or train the adapters first and convert them with init="project"'
            )
    for path, layer in model.named_modules():
        if not _is_tuner(layer):
            continue
        factors = [
            parameter
            for holder in _attributes(layer)
            for parameter in (holder.parameters() if isinstance(holder, nn.Module) else [holder])
            if parameter.dim() > 1
        ]
        if factors and not any(_is_zero(parameter) for parameter in factors):
            raise ConversionError(
                f"the adapter of {path} was trained, or was initialised to values that matter: none of its factors is "
                f'zero, and a pool with init="match" starts anew. Pass init="project" to fit the pool to these values, '
                f"or convert the adapters before their training, with PEFT's default initialisation"
            )


def _all_configs(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's configurations of all adapters in a model, by name."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    return {name: each for configs in found if isinstance(configs, dict) for name, each in configs.items()}


def _is_zero(tensor: torch.Tensor) -> bool:
    return not bool(tensor.detach().any())


def _holders(model: nn.Module) -> Iterator[tuple[Any, bool]]:
    """Yield what holds the adapters' tensors, each with whether these are low-rank factors or the like."""
    auxiliary = getattr(sys.modules.get("peft.utils.other"), "AuxiliaryTrainingWrapper", ())
    for module in model.modules():
        if _is_tuner(module):
            yield from ((holder, True) for holder in _attributes(module))
        elif isinstance(module, auxiliary):
            yield from ((holder, False) for holder in _attributes(module))
        prompts = module._modules.get("prompt_encoder")
        if prompts is not None and hasattr(module, "peft_config"):
            yield prompts, False


def _is_tuner(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers around a layer of the base. If PEFT is not loaded, none is."""
    return isinstance(module, getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ()))


def _attributes(layer: nn.Module) -> Iterator[Any]:
    for name in layer.adapter_layer_names:  # type: ignore[union-attr]
        holder: Any = layer
        for part in str(name).split("."):
            holder = getattr(holder, part, None)
        if isinstance(holder, nn.Module | torch.Tensor):
            yield holder


def peft_settings(model: nn.Module) -> dict[str, Any]:
    """Return what a PEFT model's configuration says of how its adapters compute, as values that JSON can hold."""
    config = next(iter(configs.values())).to_dict() if (configs := _all_configs(model)) else {}
    plain = json.loads(
        json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
    settings = {key: value for key, value in plain.items() if not _NO_MATTER.fullmatch(key)}
    if isinstance(names := settings.get("modules_to_save"), list):
        # For a task with a head, PEFT adds the head's names each time that a model is built from the configuration.
        settings["modules_to_save"] = list(dict.fromkeys(names))
    return settings


def peft_config_file(model: nn.Module) -> dict[str, bytes]:
    """Return name and content of the file by which PEFT builds the model again, as PEFT writes it; empty: none."""
    with tempfile.TemporaryDirectory() as folder:
        for config in _all_configs(model).values():
            config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

"""roastify as a quantization method of transformers: `from_pretrained` and `save_pretrained` of converted models.

Imported once transformers is; `on_import` sees to that. It replaces `PreTrainedModel.save_pretrained`, because whatever
transformers writes of a converted model without a plan would be loaded with random weights, and
`_upload_modified_files`, because transformers replaces the model card just before that.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, build_glob_alternation
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from roastify import api
from roastify.config import RoastConfig
from roastify.conversion.converted import current_plans, pools_in, refuse_sharded
from roastify.conversion.rewrite import apply_plan, build_pool
from roastify.errors import CheckpointError, ConfigError
from roastify.files import replace_file
from roastify.integrations.mapped_tensor import in_file
from roastify.integrations.model_card import write_card
from roastify.integrations.pretrained_folder import (
    PLAN_FILE,
    check_weights,
    check_written,
    fit_plans,
    placeholders,
    read_plan_file,
    with_dtypes,
    write_plan_file,
)
from roastify.layers.base import RoastModule
from roastify.manifest import pool_prefix
from roastify.pool.plan import RoastPlan
from roastify.tensor_file import TensorFile

METHOD = "roastify"
# The name of a file that does not exist. transformers takes the file of weights from config.json, where this name is;
# the quantizer removes it. So a process that has not imported roastify ends with an error that says so.
NOT_IMPORTED = "import-roastify-to-load-this-model.safetensors"
_EXPLICIT_WEIGHTS = "transformers_weights"


@register_quantization_config(METHOD)
class RoastifyConfig(QuantizationConfigMixin):
    """Settings with which `from_pretrained` converts a model while it loads.

    Args:
        ratio: parameters of the whole model ÷ parameters stored, at least 1.
        init: `auto` and `project`: the pool starts as the fit of the loaded weights; `match`: at random.
        settings: the other settings of `roastify.RoastConfig`.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range.
    """

    def __init__(self, ratio: float = 10.0, init: str = "auto", **settings: Any) -> None:
        method = settings.pop("quant_method", METHOD)
        if method != METHOD:
            raise ConfigError(f"quant_method must be {METHOD!r}; found {method!r}")
        checked = RoastConfig.from_dict({"ratio": ratio, "init": init, **settings}, "RoastifyConfig")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.__dict__.update(checked.to_dict())

    def settings(self) -> RoastConfig:
        """Return the settings as `roastify.convert` takes them."""
        values = {key: value for key, value in self.__dict__.items() if key != "quant_method"}
        settings = RoastConfig.from_dict(values, "RoastifyConfig")
        return settings.replace(init="project") if settings.init == "auto" else settings

    @classmethod
    def of_plan(cls, plan: RoastPlan) -> RoastifyConfig:
        """Return the settings that a plan shows, for a model that `roastify.convert` made."""
        names = ("ratio", "init", "seed", "share", "sign", "mapping", "sharing", "precondition")
        return cls(tile=f"{plan.tile[0]}x{plan.tile[1]}", **{name: getattr(plan, name) for name in names})


@register_quantizer(METHOD)
class RoastifyQuantizer(HfQuantizer):
    """Converts a model after its weights were mapped, or puts a converted model's pool in place before they are read.

    A model to be converted is loaded on the CPU, where its weights stay in their files until the pool is made of them.
    The result goes to the device that was asked for.
    """

    requires_calibration = False
    quantization_config: RoastifyConfig

    def __init__(self, quantization_config: RoastifyConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype: torch.dtype | None = None
        self._as_saved = False
        self._device: Any = None
        self._ties: dict[str, str] = {}
        # The dtypes in the files of a model that is to be converted, and the tensors that have been loaded.
        self._stored: dict[str, torch.dtype | None] = {}
        self._loaded: set[str] = set()

    # What transformers asks.

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes a converted model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the pool is trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: the whole model is trained, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: converted models compile."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise `ConfigError` if a device map would spread the model over several devices."""
        devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if len(devices) > 1 or "disk" in devices:
            raise ConfigError(
                f"device_map spreads the model over {', '.join(sorted(devices))}, and its weights lie in one pool; "
                f'pass one device, as device_map="cuda:0" or device_map={{"": 0}}'
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Choose one device where transformers would spread a model, and load on the CPU what is to be converted."""
        if isinstance(device_map, str):
            # "auto" and the like; transformers has made a map of the name of a device.
            device_map = {"": _best_device()}
        if self.pre_quantized or device_map is None:
            return device_map
        self._device = next(iter(device_map.values()))
        return {"": "cpu"}

    def update_attn_implementation(self, config: Any) -> Any:
        """Let transformers find the weights: called with the config before it looks for them."""
        if getattr(config, _EXPLICIT_WEIGHTS, None) == NOT_IMPORTED:
            delattr(config, _EXPLICIT_WEIGHTS)
        return config

    # The name of the same occasion in versions before 5.20.
    update_tp_plan = update_attn_implementation

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note the dtype that was asked for."""
        self._dtype = dtype
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return None, for no cast, if the model is loaded in the dtypes in which it was saved."""
        return None if self._as_saved else dtype

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return no conversions for a saved converted model: its files have the names that the model has."""
        return [] if self.pre_quantized else weight_conversions

    # A model that is to be converted stays in its files. What transformers casts or merges goes to temporary ones.

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether `_ToFile` gets a tensor; asked before it is loaded, and again afterwards to excuse its shape."""
        if self.pre_quantized or param_name in self._loaded:
            return False
        tensor = model.get_parameter_or_buffer(param_name)
        # Others have a dtype of their own, which transformers would not look at.
        return tensor.dtype == self._dtype

    def get_quantize_ops(self) -> Any:
        """Return the operation that transformers applies to every tensor that it has cast and merged."""
        return _ToFile(self._stored, self._loaded)

    # Before and after the weights.

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            files = [Path(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
            self._stored = {name: each.dtype for file in files for name, each in TensorFile(file).stored().items()}
            return
        # transformers builds models on the meta device, in the default dtype that was asked for.
        with torch.device("cpu"), _default_dtype(torch.float32):
            self._put_pools_in_place(model, _safetensors(model, checkpoint_files))

    def _put_pools_in_place(self, model: Any, files: list[Path]) -> None:
        saved = read_plan_file(_plan_path(model, files[0]))
        stored = check_weights(saved, files)
        plans = fit_plans(saved, model, model.base_model_prefix)
        shared = {alias for plan in plans for tensor in plan.shared for alias in tensor.aliases}
        self._as_saved = self._dtype == saved.dtype
        if not self._as_saved:
            dtypes = {name: dtype for name, dtype in _dtypes(model, self._dtype).items() if name in shared}
            plans = [with_dtypes(plan, dtypes) for plan in plans]
        for plan in plans:
            apply_plan(model, plan, build_pool(plan, "meta"))
        if self._as_saved:
            _expect(model, stored)
        # These are tied in the pool.
        self._ties = dict(model.all_tied_weights_keys)
        ties = {one: other for one, other in self._ties.items() if not {one, other} & shared}
        model.all_tied_weights_keys = ties
        for module in model.modules():
            # Otherwise transformers would read every weight to see whether it has been initialised.
            if isinstance(module, RoastModule) and not module._buffers:
                module._is_hf_initialized = True
        start = f"{model.base_model_prefix}."
        # Whatever head the saved model had: placeholders are no weights.
        ignored = {
            f"^{re.escape(name)}$"
            for found in placeholders(saved.plans, model.base_model_prefix)
            for name in (found, found.removeprefix(start), start + found)
        }
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            model.all_tied_weights_keys = self._ties
            # Saved again as a dense model, it gets the names of its own kind of checkpoint.
            model._weight_conversions = None
        else:
            api.convert(model, config=self.quantization_config.settings(), inplace=True)
        _leave_files(model, but=() if self.pre_quantized else pools_in(model))
        if not self.pre_quantized and self._device is not None:
            model.to(self._device)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dense = api.densify(model, inplace=True)
        return dense if dtype in (None, model.config.dtype) else dense.to(dtype)


class _ToFile(ConversionOps):
    def __init__(self, stored: Mapping[str, torch.dtype | None], loaded: set[str]) -> None:
        self.stored = stored
        self.loaded = loaded

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the tensors, in files."""
        self.loaded |= input_dict.keys()
        values = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        # A tensor that was only renamed and not cast is still in its own file.
        own = self.stored.get(source_patterns[0]) if len(source_patterns) == 1 else None
        return {name: value if value.dtype == own else in_file(value) for name, value in values.items()}


def _best_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _safetensors(model: Any, files: Any) -> list[Path]:
    found = [Path(file) for file in files or ()]
    if not found or any(file.suffix != ".safetensors" for file in found):
        raise CheckpointError(
            f"{model.config.name_or_path} has no safetensors files with the weights of a converted model; load the "
            f"folder that save_pretrained wrote"
        )
    return found


def _plan_path(model: Any, weights: Path) -> Path:
    """Return the plan file beside the weights; if they came from the hub, it is fetched to the same place."""
    path, name = weights.parent / PLAN_FILE, str(model.config.name_or_path)
    snapshots = [each for each in weights.parents if each.parent.name == "snapshots"]
    if path.exists() or not snapshots or Path(name).is_dir():
        return path
    snapshot = snapshots[-1]
    fetched = cached_file(
        name,
        PLAN_FILE,
        # …/models--owner--name/snapshots/revision
        cache_dir=snapshot.parents[2],
        revision=snapshot.name,
        subfolder=str(weights.parent.relative_to(snapshot)).removeprefix("."),
        _raise_exceptions_for_missing_entries=False,
    )
    return path if fetched is None else Path(fetched)


def _dtypes(model: Any, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtypes in which transformers would load a model's Parameters, some of which may stay in float32."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    exceptions = model._get_dtype_plan(dtype)
    if exceptions:
        pattern, by_group, _ = build_glob_alternation(list(exceptions))
        for name in dtypes:
            if (match := pattern.search(name)) is not None and match.lastgroup is not None:
                dtypes[name] = exceptions[by_group[match.lastgroup]]
    return dtypes


def _expect(model: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
    """Give a model's meta tensors the dtypes of the stored ones: transformers casts what it loads to the model's."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and stored.get(name, tensor.dtype) != tensor.dtype and tensor.is_floating_point():
            tensor.data = tensor.data.to(stored[name])


def _leave_files(model: nn.Module, but: Sequence[nn.Module]) -> None:
    """Copy what transformers has loaded: it is mapped to files, which a later save may overwrite."""
    others = {id(parameter) for module in but for parameter in module.parameters()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.device.type == "cpu" and id(tensor) not in others:
                tensor.data = tensor.data.clone()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Saving.

_save_pretrained = PreTrainedModel.save_pretrained
_upload = PreTrainedModel._upload_modified_files


@functools.wraps(_save_pretrained)
def _save(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not pools_in(self):
        if isinstance(getattr(self, "hf_quantizer", None), RoastifyQuantizer):
            # It was made dense by roastify.densify.
            self.hf_quantizer.remove_quantization_config(self)
        return _save_pretrained(self, *args, **kwargs)
    if getattr(self, "_hf_peft_config_loaded", False):
        # Only adapters are saved.
        return _save_pretrained(self, *args, **kwargs)
    given = inspect.signature(_save_pretrained).bind(self, *args, **kwargs)
    values = given.arguments
    if values.get("distributed_checkpoint"):
        raise CheckpointError(
            "save_pretrained(distributed_checkpoint=True) cannot write a converted model; leave it out, or pass the "
            "gathered values as state_dict="
        )
    state = values.get("state_dict")
    if state is None:
        refuse_sharded(self)
        state = self.state_dict()
    plans = current_plans(self)
    _check_is_own(self, state, plans)
    state = {**state, **placeholders(plans, self.base_model_prefix)}
    # The names in the files are those of the model, whatever other checkpoints of its kind have.
    values |= {"state_dict": dict(state), "save_original_format": False}
    with _described(self, plans):
        result = _save_pretrained(*given.args, **given.kwargs)
    if values.get("is_main_process", True):
        _complete(self, Path(values["save_directory"]), state, plans, values.get("variant"))
    return result


def _check_is_own(model: nn.Module, state: Mapping[str, Tensor], plans: list[RoastPlan]) -> None:
    """Raise `CheckpointError` if a state dict that was given has no pool of the model's."""
    own = model.state_dict()
    for plan in plans:
        for key in (f"{pool_prefix(plan)}weight", f"{pool_prefix(plan)}_extra_state"):
            if key not in state or (key.endswith("state") and not torch.equal(state[key].cpu(), own[key].cpu())):
                raise CheckpointError(
                    f"the state dict that save_pretrained was given lacks the model's {key}, or has another model's; "
                    f"pass the whole state dict of this model, or none"
                )


@contextlib.contextmanager
def _described(model: Any, plans: list[RoastPlan]) -> Iterator[None]:
    """Let the config name the quantization method while it is saved, and no quantizer replace the state dict."""
    config, quantizer = model.config, model.__dict__.pop("hf_quantizer", None)
    has_own = isinstance(getattr(config, "quantization_config", None), RoastifyConfig)
    if not has_own:
        config.quantization_config = RoastifyConfig.of_plan(plans[0])
    try:
        yield
    finally:
        if not has_own:
            del config.quantization_config
        if quantizer is not None:
            model.hf_quantizer = quantizer


def _complete(
    model: Any, folder: Path, state: Mapping[str, Tensor], plans: list[RoastPlan], variant: str | None
) -> None:
    """Check what transformers wrote, and write what it does not: the plan, the name of what is missing, the card."""
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values[_EXPLICIT_WEIGHTS] = NOT_IMPORTED
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    replace_file(config, lambda part: part.write_text(text, encoding="utf-8"))
    names = check_written(_written(folder, variant), state)
    write_plan_file(folder, plans, names, model.dtype)
    write_card(folder, type(model).__name__, plans)


def _written(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of weights that transformers has just written."""
    end = "" if variant is None else f".{variant}"
    whole, index = folder / f"model{end}.safetensors", folder / f"model.safetensors.index{end}.json"
    if not index.exists() or (whole.exists() and whole.stat().st_mtime_ns >= index.stat().st_mtime_ns):
        return [whole]
    # transformers would load it before the index that it has written now.
    whole.unlink(missing_ok=True)
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in dict.fromkeys(weight_map.values())]


@functools.wraps(_upload)
def _upload_with_card(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(self, PreTrainedModel) and pools_in(self) and (Path(working_dir) / "config.json").exists():
        write_card(Path(working_dir), type(self).__name__, current_plans(self))
    return _upload(self, working_dir, *args, **kwargs)


PreTrainedModel.save_pretrained = _save  # type: ignore[method-assign]
PreTrainedModel._upload_modified_files = _upload_with_card  # type: ignore[method-assign]

"""The artifact folder: `roast.json` (versions, plan, digests) and `model.safetensors` (all tensors).

Beside them may lie copies of a model's config and tokenizer, for other programs; what builds the model is in
`roast.json`.

Nothing is pickled. A save first writes both files in a staging folder of its own, then renames the weights, then the
manifest, while it holds the folder's lock. If a save is killed between the two renames, the new manifest is complete in
the staging folder, and `read_artifact` uses it. At every other moment the folder holds either the old artifact or the
new one. A reader takes no lock: it opens both files once, and begins again if a save came in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import nn

from roastify.builders import Builder, builder_of_transformers, difference_of
from roastify.conversion.adapters import base_of, has_adapters, peft_config_file, peft_settings
from roastify.conversion.converted import current_plans, owners, pools_in, tensors_of_adapters
from roastify.conversion.digests import digests_of_base
from roastify.conversion.rewrite import build_pool
from roastify.conversion.supported import find_plain_meta
from roastify.errors import CheckpointError, ConfigError, SourceError, closest
from roastify.files import (
    Staging,
    abandoned,
    digest_of_file,
    locked,
    read_again_if_replaced,
    reason_of,
    regular_or_missing,
    remove_abandoned,
    stagings,
    write_tensors,
)
from roastify.layers.kinds import refusal_of
from roastify.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    builder_in,
    check_manifest,
    files_in,
    parse_manifest,
    plans_of,
    pool_prefix,
)
from roastify.plain_json import read_limited
from roastify.pool.members import is_sharded
from roastify.pool.plan import RoastPlan, TensorPlan
from roastify.pool.pool import RoastPool
from roastify.pool.state import plan_with
from roastify.tensor_file import Stored, TensorFile
from roastify.tensor_values import is_finite

# The word in the names of an artifact's staging folders.
_STAGED = "artifact"
# Weights that transformers would no longer find in a folder with a model.safetensors.
_OTHER_WEIGHTS = ("model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest was read and whose weights match their digest."""

    folder: Path
    manifest: dict[str, Any]
    plans: tuple[RoastPlan, ...]
    weights: TensorFile

    @property
    def tensors(self) -> list[TensorPlan]:
        """The tensors of all plans."""
        return [tensor for plan in self.plans for tensor in plan.tensors]


def write_artifact(
    model: nn.Module,
    folder: Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    *,
    allow_nonfinite: bool = False,
    builder: Builder | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Builder | None:
    """Write a converted model; see `roastify.save`. Return what builds its model, as far as the artifact names it.

    Args:
        model: see there.
        folder: see there.
        state_dict: see there.
        allow_nonfinite: see there.
        builder: what builds the dense model. None: what is known of it, if it builds this model.
        files: names and contents of other files to write beside the two.

    Raises:
        CheckpointError: see there; or the builder that is given builds another model.
    """
    plans = current_plans(model)
    in_state_dict = model.state_dict().keys()
    prefixes = tuple(map(pool_prefix, plans))
    extra = [key for key in in_state_dict if key.endswith("_extra_state") and not key.startswith(prefixes)]
    if extra:
        raise CheckpointError(
            f"{extra[0]} is state that is not a tensor (get_extra_state), and an artifact holds only tensors; save the "
            f"model with torch.save, or remove that state"
        )
    if state_dict is not None:
        _check_values(state_dict, model.state_dict(), plans)
        pools = pools_in(model)
        plans = [_plan_of_values(state_dict, plan, pool) for plan, pool in zip(plans, pools, strict=True)]
    tensors, ties = _stored_tensors(model, plans, state_dict or {})
    base: dict[str, Any] = {}
    if plans[0].of_adapters:
        digests = digests_of_base(base_of(model, tensors_of_adapters(model, plans)))
        base = {"base": digests, "peft": peft_settings(model)}
        files = {**(files or {}), **peft_config_file(model)}
    if not allow_nonfinite:
        _check_finite(model, plans, tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _finish_interrupted_saves(folder)
        remove_abandoned(folder)
        check_replaceable(folder, files)
        with Staging(folder, _STAGED) as stage:
            write_tensors(tensors, stage.path / WEIGHTS)
            manifest: dict[str, Any] = {
                "format_version": FORMAT_VERSION,
                "mapping_version": max(plan.mapping_version for plan in plans),
                "weights": {"file": WEIGHTS, "sha256": digest_of_file(stage.path / WEIGHTS)},
                "ties": ties,
                "buffers": {name: list(buffer.shape) for name, buffer in _named_buffers(model, plans)},
                "state_dict": [name for name in [*tensors, *ties] if name in in_state_dict],
                "plan": plans[0].to_dict(),
                "other_plans": [plan.to_dict() for plan in plans[1:]],
                "builder": None,
                "files": _files_after(folder, files or {}),
                **base,
            }
            written = Artifact(folder, manifest, tuple(plans), TensorFile(stage.path / WEIGHTS))
            # Adapters are loaded onto a PEFT model of their base, which no builder makes.
            found = None if base and builder is None else _checked_builder(written, model, builder)
            manifest["builder"] = None if found is None else found.to_dict()
            # The same values as `load` will see, so that what is written can be read.
            manifest = parse_manifest(json.dumps(seal(manifest)).encode(), folder / MANIFEST)
            stored = {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            check_manifest(manifest, plans_of(manifest, folder / MANIFEST), stored, folder / MANIFEST)
            # Adapters are small, and a manifest with a value a line would be larger than their values.
            text = json.dumps(manifest, indent=None if base else 1, ensure_ascii=False)
            (stage.path / MANIFEST).write_text(text + "\n", encoding="utf-8")
            for name, content in (files or {}).items():
                (stage.path / name).write_bytes(content)
            # The other files first: readers look at the last two.
            moves = {name: folder / name for name in (*(files or {}), WEIGHTS, MANIFEST)}
            stage.make_durable(moves)
            with locked(folder):
                # Another save may have been killed since the first look, or another program may have written.
                _finish_interrupted_saves(folder)
                check_replaceable(folder, files)
                stage.put_in_place(moves)
            return found
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # ValueError: NUL in a name
        raise CheckpointError(f"cannot write the artifact {folder}: {reason_of(error)}") from error


def _check_finite(model: nn.Module, plans: Sequence[RoastPlan], tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    in_pools = tuple(map(pool_prefix, plans))
    for name, tensor in tensors.items():
        # A kept Parameter may be infinite by design, as scores of what is impossible are, and a buffer hold anything.
        of_pool = name.startswith(in_pools)
        if (of_pool or name in parameters) and not is_finite(tensor, or_infinite=not of_pool):
            raise CheckpointError(
                f"{name} holds NaN{' or infinite values' if of_pool else ''}, as after a training that diverged; save "
                f"an earlier state, or pass allow_nonfinite=True to save it as it is"
            )


def _files_after(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Return names and digests of the other files that will be roastify's: the new ones, and the old ones that stay."""
    before = {name: digest for name, digest in _files_before(folder).items() if _digest_there(folder / name) == digest}
    return before | {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _files_before(folder: Path) -> dict[str, str]:
    with contextlib.suppress(CheckpointError, ValueError):
        return files_in(_parse(folder / MANIFEST))
    return {}


def _digest_there(path: Path) -> str | None:
    return None if regular_or_missing(path) is None else digest_of_file(path)


def check_replaceable(folder: Path, files: Mapping[str, bytes] | None = None) -> None:
    """Raise `CheckpointError` if a save to this folder would overwrite or hide what roastify did not write there.

    Weights, and the other files that are to be written, are roastify's if a manifest beside them has their digest. The
    command line asks before work that takes long.
    """
    read_again_if_replaced([folder / WEIGHTS, folder / MANIFEST], lambda: _check_is_ours(folder))
    ours = _files_before(folder)
    for name, content in (files or {}).items():
        found = _digest_there(folder / name)
        if found not in (None, ours.get(name), hashlib.sha256(content).hexdigest()):
            raise CheckpointError(
                f"{folder / name} was not written by roastify, or was changed since, so it is not overwritten; move "
                f"it, or name another folder"
            )


def _checked_builder(artifact: Artifact, model: nn.Module, given: Builder | None) -> Builder | None:
    """Return what builds a model just as this one was before its conversion.

    Raises:
        CheckpointError: a builder was given, and it builds another model.
    """
    builder = given or pools_in(model)[0].builder or builder_of_transformers(model)
    if builder is None:
        return None
    try:
        twin = dense_model_of(artifact, builder)
        check_architecture(artifact, twin)
        # A config of transformers has all that its model depends on, and models of transformers count while they run.
        difference = difference_of(model, twin, values=builder.kind != "hf")
        if difference:
            raise CheckpointError(f"{builder.describe()} is another model than this one: {difference}")
    except CheckpointError as error:
        if given is not None:
            raise CheckpointError(f"the source that was given does not build this model: {error}") from error
        return None
    return builder


def dense_model_of(artifact: Artifact, builder: Builder | None = None) -> nn.Module:
    """Return the dense model that an artifact's builder builds, with values of no meaning.

    Args:
        artifact: the artifact.
        builder: a builder instead of the artifact's own.

    Raises:
        CheckpointError: the artifact names none, or it does not build a model here.
    """
    builder = builder or builder_in(artifact.manifest)
    if builder is None:
        raise CheckpointError(
            f"{artifact.folder} does not name the code that builds its model; pass the dense model: "
            f"roastify.load(path, model), or --dense model.py on the command line (artifacts name it for models of "
            f"transformers, timm and torchvision)"
        )
    elements = sum(tensor.numel * len(tensor.aliases) for tensor in artifact.tensors)
    try:
        return builder.build(sum(len(tensor.aliases) for tensor in artifact.tensors), elements)
    except SourceError as error:
        raise CheckpointError(f"{artifact.folder} names {builder.describe()}, but {error}") from error


def _check_is_ours(folder: Path) -> None:
    weights, manifest = folder / WEIGHTS, folder / MANIFEST
    has_weights, has_manifest = regular_or_missing(weights) is not None, regular_or_missing(manifest) is not None
    if has_manifest:
        try:
            _parse(manifest)
        except CheckpointError as error:
            raise CheckpointError(
                f"{manifest} is not overwritten, because this roastify did not write it or it is damaged ({error}); "
                f"move it, or name another folder"
            ) from error
    if has_weights:
        if TensorFile(weights).digest() not in _digests(folder):
            raise CheckpointError(
                f"{weights} was not written by roastify, or was changed since (no {MANIFEST} beside it has its "
                f"digest), so it is not overwritten; move it, or name another folder"
            )
    elif not has_manifest and folder.is_dir():
        other = next((path for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)), None)
        if other is not None:
            raise CheckpointError(
                f"{folder} holds {other.name}, which is not of roastify, and transformers would read {WEIGHTS} in its "
                f"place; name another folder"
            )


def _digests(folder: Path) -> set[str]:
    """Return the digests of weights that readable manifests of the folder name."""
    digests = set()
    for path in _manifests(folder):
        with contextlib.suppress(CheckpointError):
            digests.add(_parse(path)["weights"]["sha256"])
    return digests


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the digest of all its other entries, under `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _finish_interrupted_saves(folder: Path) -> None:
    """Complete a save that was killed between its renames; remove the staging folders of all that were killed."""
    for stage in abandoned(folder, _STAGED):
        with contextlib.suppress(CheckpointError):
            finished = _checked(stage / MANIFEST, None)[0]
            if finished["weights"]["sha256"] == TensorFile(folder / WEIGHTS).digest():
                regular_or_missing(folder / MANIFEST)
                os.replace(stage / MANIFEST, folder / MANIFEST)


def read_artifact(folder: Path, digest: str | None = None) -> Artifact:
    """Read an artifact's manifest, check all of it, and check its weights' digest.

    Args:
        folder: the artifact's folder.
        digest: the SHA-256 that its manifest must have, as `sha256sum roast.json` prints it; None accepts any.

    Raises:
        CheckpointError: it is missing, damaged, newer than this version, or has another digest.
        ConfigError: the digest is not one.
    """
    if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", str(digest)):
        raise ConfigError(f"digest must be a SHA-256 of 64 hexadecimal digits; found {digest!r}")
    try:
        # `is_dir` takes a name that no folder can have for one that does not exist, or raises.
        if not folder.is_dir():
            raise CheckpointError(f"there is no artifact folder {folder}; expected one that roastify.save wrote")
        paths = [folder / WEIGHTS, folder / MANIFEST]
        return read_again_if_replaced(paths, lambda: _open_together(folder, digest))
    except OSError as error:
        raise CheckpointError(f"cannot read the artifact {folder}: {reason_of(error)}") from error


def _open_together(folder: Path, digest: str | None) -> Artifact:
    """Open the weights and find the manifest that has their digest; check that manifest as a whole."""
    weights_path = folder / WEIGHTS
    weights = TensorFile(weights_path) if weights_path.is_file() else None
    manifests = _manifests(folder)
    for path, is_there in ((folder / MANIFEST, bool(manifests)), (weights_path, weights is not None)):
        if not is_there:
            has_config = "; if save_pretrained of transformers wrote it, from_pretrained loads it"
            hint = has_config if (folder / "config.json").is_file() else ""
            raise CheckpointError(f"{folder} is not a roastify artifact: {path.name} is missing{hint}")
    assert weights is not None
    stored, of_weights, first = weights.stored(), "", None
    for path in manifests:
        try:
            manifest, plans = _checked(path, digest)
            # Before the weights are read, which may be large.
            check_manifest(manifest, plans, stored, path)
            of_weights = of_weights or weights.digest()
            if manifest["weights"]["sha256"] == of_weights:
                return Artifact(folder, manifest, plans, weights)
            raise CheckpointError(
                f"{weights_path} is not the file its manifest describes: its SHA-256 is {of_weights}, expected "
                f"{manifest['weights']['sha256']}; it is truncated or was changed, so restore both files from one save"
            )
        except CheckpointError as error:
            first = first or error
    assert first is not None
    raise first


def _manifests(folder: Path) -> list[Path]:
    """Return the manifests that may describe the weights: the artifact's, and those of saves in between."""
    places = [folder, *stagings(folder, _STAGED)]
    return [place / MANIFEST for place in places if (place / MANIFEST).is_file()]


def _checked(path: Path, digest: str | None) -> tuple[dict[str, Any], tuple[RoastPlan, ...]]:
    """Return a manifest and its plans if the manifest has the digest that is expected, and the one that it names."""
    content = _content(path)
    found = hashlib.sha256(content).hexdigest()
    if digest is not None and found != digest.lower():
        raise CheckpointError(
            f"{path} is not the file that was expected: its SHA-256 is {found}, expected {digest.lower()}; restore the "
            f"artifact that was published with that digest"
        )
    manifest = parse_manifest(content, path)
    plans = plans_of(manifest, path)
    if manifest.get("sha256") != seal(manifest)["sha256"]:
        raise CheckpointError(f"{path} was changed after it was saved (its digest is wrong); restore the file")
    return manifest, plans


def _parse(path: Path) -> dict[str, Any]:
    return parse_manifest(_content(path), path)


def _content(path: Path) -> bytes:
    try:
        return read_limited(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}; restore it from a whole copy") from error


def check_architecture(artifact: Artifact, model: nn.Module) -> None:
    """Raise `CheckpointError` unless the dense model has the architecture that the artifact was saved from.

    Names, shapes and ties of the parameters, names and shapes of the buffers, the kinds of their dtypes, the places of
    the pools, and the kinds of the shared layers are compared.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if artifact.plans[0].of_adapters:
        check_base(artifact, model)
        stored = tensors_of_adapters(model, artifact.plans)
        parameters = {name: each for name, each in parameters.items() if id(each) in stored}
        buffers = {name: each for name, each in buffers.items() if id(each) in stored}
    expected = {alias: tensor.shape for tensor in artifact.tensors for alias in tensor.aliases}
    shapes = {name: tuple(shape) for name, shape in artifact.manifest["buffers"].items()}
    swapped = [*(expected.keys() & buffers.keys()), *(shapes.keys() & parameters.keys())]
    expected |= shapes
    found = {name: tuple(tensor.shape) for name, tensor in [*parameters.items(), *buffers.items()]}
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not in the artifact" for name in found if name not in expected]
    differences += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    differences += [f"{name} is a {'buffer' if name in buffers else 'parameter'}" for name in sorted(swapped)]
    if not differences:
        differences = [
            *_tie_differences(artifact.tensors, parameters),
            *_place_differences(artifact.plans, model),
            *_dtype_differences(artifact, model),
            *_kind_differences(artifact.tensors, model),
        ]
    if differences:
        count = "1 difference" if len(differences) == 1 else f"{len(differences)} differences"
        raise CheckpointError(
            f"{artifact.folder} was saved from another architecture than this {type(model).__name__} "
            f"({count}): "
            f"{'; '.join(differences[:3])}; build the model as it was when it was converted"
        )


def check_base(artifact: Artifact, model: nn.Module) -> None:
    """Raise `CheckpointError` unless adapters fit a PEFT model, and its base is the one that they were trained on."""
    if not has_adapters(model):
        raise CheckpointError(
            f"{artifact.folder} holds adapters, and this {type(model).__name__} has none; pass a PEFT model: "
            f'peft.get_peft_model(base, peft.PeftConfig.from_pretrained("{artifact.folder}"))'
        )
    expected = artifact.manifest["base"]
    found = digests_of_base(base_of(model, tensors_of_adapters(model, artifact.plans)))
    if found["names"] != expected["names"]:
        raise CheckpointError(
            f"the adapters in {artifact.folder} were trained on another base than this {type(model).__name__} has: "
            f"names or shapes of its tensors differ; build the PEFT model on the same base, with the same configuration"
        )
    settings = peft_settings(model)
    for key, value in artifact.manifest["peft"].items():
        if settings.get(key, value) != value:
            raise CheckpointError(
                f"the adapters in {artifact.folder} were trained with {key}={value!r}, and this PEFT model has {key}="
                f'{settings[key]!r}; build it with peft.PeftConfig.from_pretrained("{artifact.folder}")'
            )
    if found["values"] == expected["values"]:
        return
    if found["dtypes"] == expected["dtypes"]:
        raise CheckpointError(
            f"the adapters in {artifact.folder} were trained on another base than this {type(model).__name__} has: "
            f"its tensors hold other values; load the weights of the base that the adapters were trained on"
        )
    warnings.warn(
        f"the base has other dtypes than when the adapters in {artifact.folder} were saved, and other values: it was "
        f"not checked that it is the same base",
        stacklevel=3,
    )


def _tie_differences(tensors: Iterable[TensorPlan], parameters: dict[str, nn.Parameter]) -> Iterator[str]:
    owner: dict[int, str] = {}
    for tensor in tensors:
        for alias in tensor.aliases:
            if parameters[alias] is not parameters[tensor.name]:
                yield f"{alias} is not tied to {tensor.name}"
            elif owner.setdefault(id(parameters[alias]), tensor.name) != tensor.name:
                yield f"{alias} is tied to {owner[id(parameters[alias])]}"


def _place_differences(plans: Iterable[RoastPlan], model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for plan in plans:
        for path in dict.fromkeys((plan.owner, plan.root)):
            if path not in modules:
                yield f"there is no module {path!r}, which the plan names"
        # Such modules take all their children for layers, unless they have weights of their own, as parametrizations.
        has_weights = any(alias.rpartition(".")[0] == plan.owner for each in plan.shared for alias in each.aliases)
        if isinstance(modules.get(plan.owner), nn.Sequential | nn.ModuleList | nn.ModuleDict) and not has_weights:
            yield f"the module {plan.owner!r} is a {type(modules[plan.owner]).__name__}, which cannot hold the pool"


def _dtype_differences(artifact: Artifact, model: nn.Module) -> Iterator[str]:
    """Yield what no cast of a model does: it keeps what kind of numbers a tensor holds, and casts whole modules."""
    dtypes = {alias: getattr(torch, tensor.dtype) for tensor in artifact.tensors for alias in tensor.aliases}
    ties = artifact.manifest["ties"]
    buffers, stored = artifact.manifest["buffers"], artifact.weights.stored()
    dtypes |= {name: cast(torch.dtype, stored[ties.get(name, name)].dtype) for name in buffers}
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        cast_to: dict[torch.dtype, torch.dtype] = {}
        for attribute, tensor in own.items():
            if tensor is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            if name not in dtypes and artifact.plans[0].of_adapters:
                continue
            dtype = dtypes[name]
            if _kind_of_number(dtype) != _kind_of_number(tensor.dtype):
                yield f"{name} has dtype {tensor.dtype}, expected {dtype}"
            elif isinstance(tensor, nn.Parameter) and cast_to.setdefault(tensor.dtype, dtype) != dtype:
                yield f"{name} is {tensor.dtype} as others of its module are, expected {dtype}, unlike theirs"


def _kind_of_number(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


def _kind_differences(tensors: Iterable[TensorPlan], model: nn.Module) -> Iterator[str]:
    for tensor in (each for each in tensors if each.shared):
        for module, attribute in owners(model, tensor):
            refusal = refusal_of(module, attribute)
            if refusal:
                yield f"{tensor.name} belongs to a {type(module).__name__} that must keep it: {refusal}"


def fill_from(artifact: Artifact, model: nn.Module, device: torch.device) -> None:
    """Load the artifact's values into a converted model whose tensors are all on the meta device.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the model has a tensor on the meta device that is
            neither parameter nor buffer.
    """
    wanted = dict(_named_tensors(model, [pool.plan for pool in pools_in(model)]))
    ties: dict[str, str] = artifact.manifest["ties"]
    stored = _read_tensors(artifact, {ties.get(name, name) for name in wanted})
    loaded: dict[str, torch.Tensor] = {}
    for name, like in wanted.items():
        key = ties.get(name, name)
        if key not in loaded:
            # What is beside the adapters' factors computes in the dtype of the base that there is.
            value = stored[key].to(like.dtype) if artifact.plans[0].of_adapters else stored[key]
            loaded[key] = _as_tensor(key, value, like, device)
        _assign(model, name, loaded[key])
    _check_no_meta_left(model)


def companions_in(artifact: Artifact) -> dict[str, bytes]:
    """Return names and contents of the other files that roastify wrote to an artifact's folder.

    A file that is gone, or was changed since, is left out.
    """
    there = {name: artifact.folder / name for name in files_in(artifact.manifest)}
    contents = {name: read_limited(path) for name, path in there.items() if regular_or_missing(path) is not None}
    digests = files_in(artifact.manifest)
    return {name: text for name, text in contents.items() if hashlib.sha256(text).hexdigest() == digests[name]}


def check_no_part(path: Path) -> None:
    """Raise `CheckpointError` if a file to be written would replace one of an artifact's own."""
    if path.name.casefold() in (WEIGHTS, MANIFEST) and (path.parent / MANIFEST).exists():
        raise CheckpointError(f"{path} is part of the artifact {path.parent}, which would be lost; name another file")


def pool_of_values(artifact: Artifact, plan: RoastPlan) -> RoastPool:
    """Return the pool of one of the artifact's plans, on the CPU, with its values.

    Raises:
        CheckpointError: a Parameter of it is missing or has another shape.
    """
    pool = build_pool(plan, "cpu")
    parameters = {pool_prefix(plan) + name: parameter for name, parameter in pool.named_parameters()}
    stored = _read_tensors(artifact, set(parameters))
    for key, parameter in parameters.items():
        # In place of memory that was not touched: a copy would need it.
        parameter.data = _as_tensor(key, stored[key], parameter, torch.device("cpu")).data
    return pool


def _read_tensors(artifact: Artifact, names: set[str]) -> dict[str, torch.Tensor]:
    file = artifact.weights
    missing = sorted(names - file.stored().keys())
    if missing:
        raise CheckpointError(
            f"{file.path} lacks {len(missing)} of the tensors it should hold: {', '.join(missing[:3])}; restore both "
            f"files from one save"
        )
    return {name: file.read(name) for name in names}


def _as_tensor(name: str, value: torch.Tensor, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    if value.shape != like.shape:
        raise CheckpointError(f"{name} has shape {tuple(value.shape)} in the artifact; expected {tuple(like.shape)}")
    value = value.to(device)
    return nn.Parameter(value, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else value


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(value, nn.Parameter):
        module._parameters[attribute] = value
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    else:
        module._buffers[attribute] = value
    if isinstance(module, RoastPool):
        module.register_parameter(attribute, cast(nn.Parameter, value))


def _check_no_meta_left(model: nn.Module) -> None:
    place = find_plain_meta(model)
    if place is not None:
        raise CheckpointError(
            f"{place} is a plain tensor, neither parameter nor buffer, so its value is not in the artifact, and on the "
            f"meta device it has none; build the model on a real device, or register the tensor as a buffer"
        )


def _named_tensors(model: nn.Module, plans: Sequence[RoastPlan]) -> list[tuple[str, torch.Tensor]]:
    """Return all parameters and buffers under all names, the Parameters of a pool only under its own.

    Buffers that are not in a state dict are among them: they have no value on the meta device.
    """
    pools = pools_in(model)
    of_pools = {
        id(parameter): pool_prefix(plan) + name
        for plan, pool in zip(plans, pools, strict=True)
        for name, parameter in pool.named_parameters()
    }
    named: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named[of_pools.get(id(parameter), name)] = parameter
    if plans[0].of_adapters:
        stored = tensors_of_adapters(model, plans)
        named = {name: tensor for name, tensor in named.items() if id(tensor) in stored}
    return [*named.items(), *_named_buffers(model, plans)]


def _named_buffers(model: nn.Module, plans: Sequence[RoastPlan]) -> list[tuple[str, torch.Tensor]]:
    """Return the buffers that an artifact holds, under all names."""
    named = list(model.named_buffers(remove_duplicate=False))
    if not plans[0].of_adapters:
        return named
    stored = tensors_of_adapters(model, plans)
    return [(name, buffer) for name, buffer in named if id(buffer) in stored]


def _check_values(
    given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], plans: Sequence[RoastPlan]
) -> None:
    # Values that were gathered by hand have no state.
    states = set(map(_state_key, plans))
    for name in expected.keys() - given.keys() - states:
        raise CheckpointError(
            f"the state dict lacks {name}, which the model has; pass the state dict of the whole model: gather it in "
            f"every process and save in the first (the others get an empty one)"
        )
    for name in given.keys() - expected.keys():
        raise CheckpointError(f"the state dict has {name}, which the model does not have{closest(name, expected)}")
    for name, value in given.items():
        if name not in states and value.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(value.shape)} in the state dict; expected {tuple(expected[name].shape)}, as "
                f"in the model"
            )


def _plan_of_values(values: Mapping[str, torch.Tensor], plan: RoastPlan, pool: RoastPool) -> RoastPlan:
    """Return the plan with λ of the values, which a model of the same plan and other values may have given."""
    if _state_key(plan) not in values:
        return plan
    try:
        return plan_with(plan, pool.present_names(), values[_state_key(plan)])
    except ValueError as error:
        raise CheckpointError(f"the values cannot be saved with this model: {error}") from error


def _state_key(plan: RoastPlan) -> str:
    return f"{pool_prefix(plan)}_extra_state"


def _stored_tensors(
    model: nn.Module, plans: Sequence[RoastPlan], values: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors to write, tied tensors once, and the stored name for each of their other names."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in _named_tensors(model, plans):
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        value = values.get(name, tensor).detach().to(tensor.dtype)
        if is_sharded(value):
            raise CheckpointError(
                f"{name} is sharded over processes (FSDP2), so this process holds only a part of its values. With "
                f"torch.distributed.checkpoint.state_dict, gather them in all processes: values = get_model_state_dict("
                f"model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)). Then save in the first "
                f"process: roastify.save(model, path, state_dict=values)"
            )
        value = value.cpu().contiguous()
        # A view of a larger storage is copied, so that only its own elements are written.
        tensors[name] = value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
    return _own_storages(tensors), ties


def _own_storages(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen and tensor.numel():
            tensors[name] = tensor.clone()
        seen.add(pointer)
    return tensors

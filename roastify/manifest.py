"""An artifact's manifest as it is read: every value is checked before anything is allocated from it.

A manifest may be damaged or forged, with right digests. What passes here describes one model, and just the tensors that
the file of weights holds.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from roastify.builders import Builder
from roastify.errors import CheckpointError
from roastify.plain_json import parse_limited
from roastify.pool.mapping import MAPPING_VERSION
from roastify.pool.members import POOL_NAME
from roastify.pool.plan import RoastPlan
from roastify.pool.plan_checks import check_names, check_plan
from roastify.pool.pool import basis_name
from roastify.tensor_file import Stored

FORMAT_VERSION = 6
MANIFEST = "roast.json"
WEIGHTS = "model.safetensors"
_REQUIRED = ("weights", "ties", "buffers", "state_dict", "plan")
_KNOWN = {"format_version", "mapping_version", "other_plans", "builder", "files", "base", "peft", "sha256", *_REQUIRED}
_OF_BASE = {"names", "dtypes", "values"}
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")


def parse_manifest(content: bytes, path: Path) -> dict[str, Any]:
    """Return the values of a manifest whose version this roastify reads.

    Raises:
        CheckpointError: it is no manifest, or a newer one.
    """
    try:
        manifest = parse_limited(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); restore it from a whole copy") from error
    if not isinstance(manifest, dict) or type(manifest.get("format_version")) is not int:
        raise CheckpointError(f"{path} has no format version, so it is not a roastify manifest")
    for key, supported in (("format_version", FORMAT_VERSION), ("mapping_version", MAPPING_VERSION)):
        if type(manifest.get(key)) is not int or manifest[key] < 1:
            raise CheckpointError(f"{path} has no {key.replace('_', ' ')}; restore it from a whole copy")
        if manifest[key] > supported:
            found = str(manifest[key]) if manifest[key] < 1 << 63 else "a huge number"
            raise CheckpointError(
                f"{path} has {key.replace('_', ' ')} {found}, and this roastify reads up to {supported}; "
                f"install a newer roastify"
            )
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing or not isinstance(manifest["weights"], dict) or not isinstance(manifest["weights"].get("sha256"), str):
        raise CheckpointError(f"{path} lacks {', '.join(missing) or 'the digest'}; restore it from a whole copy")
    return manifest


def plans_of(manifest: dict[str, Any], path: Path) -> tuple[RoastPlan, ...]:
    """Return the plans of a manifest, each value of its type.

    Raises:
        CheckpointError: a key is missing or unknown, or a value is of another type.
    """
    try:
        # Up to format 4, an artifact has one plan.
        others = manifest.get("other_plans", [])
        if not isinstance(others, list):
            raise ValueError("other_plans is no list")
        return tuple(map(RoastPlan.from_dict, [manifest["plan"], *others]))
    except ValueError as error:
        raise CheckpointError(f"the plan in {path} is damaged ({error}); restore the file") from error


def builder_in(manifest: Mapping[str, Any]) -> Builder | None:
    """Return what builds the dense model; None if the manifest names nothing, as up to format 5.

    Raises:
        ValueError: what it names is none.
    """
    return None if manifest.get("builder") is None else Builder.from_dict(manifest["builder"])


def files_in(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the other files that roastify wrote to the artifact's folder, and the digest of each.

    Raises:
        ValueError: they are no such names and digests.
    """
    files = manifest.get("files", {})
    if not isinstance(files, dict):
        raise ValueError("files are no object")
    for name, digest in files.items():
        if not _FILE_NAME.fullmatch(name) or name.casefold() in (MANIFEST, WEIGHTS):
            raise ValueError(f"files have the name {reprlib.repr(name)}")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"the file {name!r} has no SHA-256")
    return files


def check_manifest(
    manifest: dict[str, Any], plans: tuple[RoastPlan, ...], stored: Mapping[str, Stored], path: Path
) -> None:
    """Check that everything in a manifest fits together, and describes just the tensors that are stored.

    Args:
        manifest: the manifest.
        plans: its plans.
        stored: shape and dtype of every tensor in the file of weights.
        path: the manifest's file, for messages.

    Raises:
        CheckpointError: something does not fit.
    """
    try:
        for plan in plans:
            check_plan(plan)
        check_names(plans)
        if any(plan.kept for plan in plans[1:]):
            raise ValueError("other_plans have tensors that are not shared")
        _check_rest(manifest, plans)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore the file") from error
    expected = _expected(manifest, plans)
    weights = path.parent / WEIGHTS
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(
            f"{weights} lacks {len(missing)} of the tensors it should hold: {', '.join(missing[:3])}; restore both "
            f"files from one save"
        )
    surplus = [name for name in stored if name not in expected]
    if surplus:
        raise CheckpointError(
            f"{weights} holds {len(surplus)} tensors that its manifest does not name: {', '.join(surplus[:3])}; "
            f"restore both files from one save"
        )
    for name, (shape, dtype) in expected.items():
        found = stored[name]
        if found.shape != shape:
            raise CheckpointError(f"{name} has shape {found.shape} in the artifact; expected {shape}")
        if dtype not in (None, found.dtype):
            raise CheckpointError(f"{name} has dtype {found.dtype} in the artifact; expected {dtype}")


def _check_rest(manifest: dict[str, Any], plans: tuple[RoastPlan, ...]) -> None:
    if unknown := manifest.keys() - _KNOWN:
        raise ValueError(f"the unknown key {min(unknown)!r}")
    if manifest["mapping_version"] != max(plan.mapping_version for plan in plans):
        raise ValueError("its mapping_version is not that of its plan")
    base = manifest.get("base")
    if (base is not None) != plans[0].of_adapters or any(plan.of_adapters != plans[0].of_adapters for plan in plans):
        raise ValueError("base is there without a plan of adapters, or missing for one")
    if (base is None) != (manifest.get("peft") is None) or not isinstance(manifest.get("peft", {}), dict):
        raise ValueError("peft is no object, or not there with base alone")
    if base is not None:
        if not isinstance(base, dict) or base.keys() != _OF_BASE:
            raise ValueError(f"base is not the digests of its {', '.join(sorted(_OF_BASE))}")
        _texts("base", list(base.values()))
    weights = manifest["weights"]
    if weights.keys() != {"file", "sha256"} or weights["file"] != WEIGHTS:
        raise ValueError(f"weights are not the file {WEIGHTS} and its sha256")
    builder_in(manifest)
    files_in(manifest)
    _texts("state_dict", manifest["state_dict"])
    if len(set(manifest["state_dict"])) < len(manifest["state_dict"]):
        raise ValueError("state_dict has a name twice")
    ties, buffers = manifest["ties"], manifest["buffers"]
    for key, value in (("ties", ties), ("buffers", buffers)):
        if not isinstance(value, dict):
            raise ValueError(f"{key} are no object")
    _texts("ties", list(ties.values()))
    for name, shape in buffers.items():
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
            raise ValueError(f"the shape of the buffer {name!r} is no list of sizes")
    named = _named(manifest, plans)
    for tensor in (each for plan in plans for each in plan.shared):
        if not named.keys().isdisjoint(tensor.aliases):
            raise ValueError(f"two tensors have the name {tensor.name!r}")
    for name in manifest["state_dict"]:
        if name not in named:
            raise ValueError(f"state_dict names {name!r}, which is no tensor of the model")
    for name, first in ties.items():
        if name not in named or first not in named or first in ties or name == first:
            raise ValueError(f"ties name {name!r} and {first!r}, and one of them is not stored so")
        if named[name].shape != named[first].shape:
            raise ValueError(f"{name!r} is tied to {first!r}, which has another shape")
        if None not in (dtypes := (named[name].dtype, named[first].dtype)) and dtypes[0] != dtypes[1]:
            raise ValueError(f"{name!r} is tied to {first!r}, which has another dtype")


def _texts(key: str, values: Any) -> None:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} are no names")


def pool_prefix(plan: RoastPlan) -> str:
    """Return what the names of a pool's Parameters begin with in an artifact."""
    return f"{plan.owner}.{POOL_NAME}." if plan.owner else f"{POOL_NAME}."


def _named(manifest: dict[str, Any], plans: tuple[RoastPlan, ...]) -> dict[str, Stored]:
    """Return every tensor of the model that is not shared, tied ones under all their names."""
    named: dict[str, Stored] = {}

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        if name in named:
            raise ValueError(f"two tensors have the name {name!r}")
        named[name] = Stored(shape, dtype)

    for plan in plans:
        dtype = getattr(torch, plan.dtype)
        add(pool_prefix(plan) + "weight", (plan.pool_numel // plan.tile[1], plan.tile[1]), dtype)
        for index, tensor in enumerate(plan.with_basis):
            add(pool_prefix(plan) + basis_name(index), tensor.basis_shape, dtype)
        for tensor in plan.kept:
            for alias in tensor.aliases:
                add(alias, tensor.shape, getattr(torch, tensor.dtype))
    for name, shape in manifest["buffers"].items():
        add(name, tuple(shape), None)
    return named


def _expected(manifest: dict[str, Any], plans: tuple[RoastPlan, ...]) -> dict[str, Stored]:
    """Return the tensors that the file of weights should hold."""
    return {name: each for name, each in _named(manifest, plans).items() if name not in manifest["ties"]}

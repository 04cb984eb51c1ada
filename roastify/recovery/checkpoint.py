"""Checkpoints of a recovery or a conversion: one file of tensors and one JSON file of everything else, without pickle.

`recovery.json` names its file of tensors and holds that file's digest. A save writes the new tensors under a new name,
then replaces the JSON file in one step, then deletes the old tensors. Whenever a save is killed, the JSON file and the
tensors that it names are complete. A file of tensors is named by its digest, and only a file that its name describes is
deleted.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from roastify.errors import CheckpointError
from roastify.files import (
    Staging,
    digest_of_file,
    locked,
    read_again_if_replaced,
    reason_of,
    regular_or_missing,
    remove_abandoned,
    write_tensors,
)
from roastify.plain_json import parse_limited, read_limited
from roastify.tensor_file import TensorFile

# Version 1 knew a conversion by a digest of its plan's words too, and those are written better now.
FORMAT_VERSION = 2
MANIFEST = "recovery.json"
_WEIGHTS = re.compile(r"state-([0-9a-f]{16})\.safetensors")


def holds_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint.

    Raises:
        CheckpointError: something else than a file has the checkpoint's name.
    """
    return regular_or_missing(folder / MANIFEST) is not None


def write_checkpoint(folder: Path, made_by: dict[str, Any], state: Any) -> None:
    """Write a checkpoint.

    Args:
        folder: the folder, which is created if missing.
        made_by: a description of the run, as JSON-ready values; `read_checkpoint` compares it.
        state: numbers, strings, None, tensors and arrays, nested in dicts, lists and tuples.

    Raises:
        CheckpointError: the state holds something else, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encode(state, tensors, "state")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_manifest_is_ours(folder / MANIFEST)
        remove_abandoned(folder)
        with Staging(folder) as stage:
            write_tensors(tensors, stage.path / "tensors")
            digest = digest_of_file(stage.path / "tensors")
            # The name depends on the content, so that a save never changes the file that the old manifest names.
            weights = folder / f"state-{digest[:16]}.safetensors"
            manifest = {
                "format_version": FORMAT_VERSION,
                "made_by": made_by,
                "tensors": {"file": weights.name, "sha256": digest},
                "state": encoded,
            }
            (stage.path / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
            moves = {"tensors": weights, MANIFEST: folder / MANIFEST}
            stage.make_durable(moves)
            with locked(folder):
                stage.put_in_place(moves)
                _remove_others(folder, weights)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {reason_of(error)}") from error


def remove_checkpoint(folder: Path) -> None:
    """Delete a folder's checkpoint, and the folder if nothing else is in it."""
    if holds_checkpoint(folder):
        _check_manifest_is_ours(folder / MANIFEST)
        (folder / MANIFEST).unlink()
        _remove_others(folder, folder / MANIFEST)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _check_manifest_is_ours(path: Path) -> None:
    if regular_or_missing(path) is None:
        return
    try:
        json.loads(path.read_text(encoding="utf-8"))["tensors"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that roastify wrote, so it is not overwritten; move it, or give another folder"
        ) from error


def _remove_others(folder: Path, kept: Path) -> None:
    """Delete the tensors of earlier checkpoints, and of saves that were killed before they wrote their JSON file."""
    for path in folder.iterdir():
        match = _WEIGHTS.fullmatch(path.name)
        if match and path != kept and path.is_file() and not path.is_symlink():
            if digest_of_file(path).startswith(match[1]):
                path.unlink()


def read_checkpoint(folder: Path, made_by: dict[str, Any]) -> Any:
    """Return the state of a checkpoint.

    Raises:
        CheckpointError: it is damaged, newer than this version, or of another run.
    """
    return read_again_if_replaced([folder / MANIFEST], lambda: _read(folder, made_by))


def _read(folder: Path, made_by: dict[str, Any]) -> Any:
    path = folder / MANIFEST
    try:
        manifest = parse_limited(read_limited(path))
        version, theirs, encoded = manifest["format_version"], manifest["made_by"], manifest["state"]
        name, digest = manifest["tensors"]["file"], manifest["tensors"]["sha256"]
        if type(version) is not int or not isinstance(theirs, dict):
            raise ValueError("its version or its description of the run is of another type")
        if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
            raise ValueError(f"it names {name!r} as its file of tensors, expected state-DIGEST.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({error}); remove the folder to start anew"
        ) from error
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(f"{path} has format version {version}, and this roastify reads up to {FORMAT_VERSION}")
    if version == 1 and "conversion" in made_by:
        theirs = {**theirs, "conversion": made_by["conversion"]}
        warnings.warn(
            f"{path} was written by an older roastify, and it cannot be checked whether the student was converted by "
            f"the same plan; if it was not, remove the folder and start anew",
            stacklevel=2,
        )
    differences = [
        f"{name} was {theirs.get(name)!r}, now {made_by.get(name)!r}"
        for name in dict.fromkeys([*made_by, *theirs])
        if theirs.get(name) != made_by.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint {folder} belongs to another run: {'; '.join(differences[:3])}; resume with the same "
            f"models and settings, or give another folder"
        )
    weights = folder / name
    try:
        file = TensorFile(weights) if weights.is_file() else None
        if file is None or file.digest() != digest:
            raise CheckpointError(f"{weights} is missing or was changed; remove the folder to start anew")
        tensors = {each: file.read(each) for each in file.stored()}
        state = _decode(encoded, tensors)
        if tensors:
            raise ValueError(f"its state does not name the tensor {min(tensors)!r}")
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({error}); remove the folder to start anew"
        ) from error


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Return a value as JSON-ready values; copies of its tensors are added to `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[where] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": where}
    if isinstance(value, np.ndarray):
        tensors[where] = torch.from_numpy(value.astype(np.int64) if value.dtype == np.uint32 else value.copy())
        return {"array": [where, value.dtype.name]}
    if isinstance(value, dict):
        pairs = (
            [_encode(key, tensors, where), _encode(each, tensors, f"{where}.{key}")] for key, each in value.items()
        )
        return {"dict": list(pairs)}
    if isinstance(value, list | tuple):
        items = [_encode(each, tensors, f"{where}.{index}") for index, each in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold; expected numbers, strings and tensors "
        f"in dicts and lists"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `_encode` was given; each tensor is taken from `tensors`.

    Raises:
        ValueError: the value is not what `_encode` returns.
        KeyError: a tensor is missing, or named twice.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("its state holds a list that is marked neither as list nor as tuple")
        return value
    if len(value) != 1:
        raise ValueError("its state holds an object of several keys")
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors.pop(content)
    if kind == "array":
        where, dtype = content
        if np.dtype(dtype).kind not in "iufb":
            raise ValueError(f"its state holds an array of dtype {dtype!r}")
        return tensors.pop(where).numpy().astype(dtype)
    if kind == "dict":
        return {_decode(key, tensors): _decode(each, tensors) for key, each in content}
    if kind not in ("list", "tuple") or not isinstance(content, list):
        raise ValueError(f"its state holds an object of kind {kind!r}")
    items = [_decode(each, tensors) for each in content]
    return tuple(items) if kind == "tuple" else items

"""An artifact as a dense state dict in safetensors files, written a tensor at a time and without the model's code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from roastify.artifact import Artifact, check_no_part, companions_in, pool_of_values
from roastify.companions import for_dense
from roastify.conversion.converted import pooled_weight
from roastify.errors import CheckpointError
from roastify.files import Staging, reason_of, regular_or_missing, remove_abandoned, replace_file
from roastify.manifest import pool_prefix
from roastify.pool.plan import TensorPlan
from roastify.pool.pool import RoastPool
from roastify.tensor_file import Stored, write_one_by_one

INDEX = "model.safetensors.index.json"
# Elements of a tensor that are made at once.
_PART = 1 << 22


class DenseTensor(NamedTuple):
    """A tensor of the dense model, which is made when it is needed: whole, or in parts along its first dimension."""

    stored: Stored
    make: Callable[[], Iterable[Tensor]]


def dense_tensors(artifact: Artifact) -> dict[str, DenseTensor]:
    """Return the tensors of the dense model's state dict, in its order; a tied tensor is there under all its names.

    The pools are read from the artifact now, and every other tensor when it is made.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    pools = [pool_of_values(artifact, plan) for plan in artifact.plans]
    ties, stored = artifact.manifest["ties"], artifact.weights.stored()
    prefixes = tuple(map(pool_prefix, artifact.plans))
    # A manifest's list of names may lack a parameter, and none may be lost.
    kept = [alias for tensor in artifact.tensors if not tensor.shared for alias in tensor.aliases]
    found: dict[str, DenseTensor] = {}
    for name in dict.fromkeys([*artifact.manifest["state_dict"], *kept]):
        if not name.startswith(prefixes):
            found[name] = _as_stored(artifact, ties.get(name, name), stored)
    for pool in pools:
        for tensor in pool.plan.shared:
            found |= dict.fromkeys(tensor.aliases, _from_pool(pool, tensor))
    in_order = [alias for tensor in artifact.tensors for alias in tensor.aliases]
    return {name: found[name] for name in dict.fromkeys([*in_order, *found])}


def _as_stored(artifact: Artifact, key: str, stored: Mapping[str, Stored]) -> DenseTensor:
    return DenseTensor(stored[key], lambda: [artifact.weights.read(key)])


def _from_pool(pool: RoastPool, tensor: TensorPlan) -> DenseTensor:
    def make() -> Iterator[Tensor]:
        with torch.no_grad():
            for part in pooled_weight(pool, tensor).split(_PART):
                yield part.dense()

    return DenseTensor(Stored(tuple(tensor.shape), getattr(torch, tensor.dtype)), make)


def dense_state_dict(artifact: Artifact) -> dict[str, Tensor]:
    """Return the dense model's state dict; every name has memory of its own, also of tied tensors."""
    return {
        name: torch.cat([part.reshape(-1) for part in tensor.make()]).view(tensor.stored.shape)
        for name, tensor in dense_tensors(artifact).items()
    }


def write_dense(artifact: Artifact, path: Path, shard_size: int | None = None) -> int:
    """Write the dense state dict, completely or not at all; return the number of tensors.

    At any time, memory holds the pool and one dense tensor, or a part of one.

    Args:
        artifact: the artifact.
        path: a file, which is replaced if it exists; with `shard_size`, a folder.
        shard_size: bytes of tensors in a file at most, unless a tensor alone has more. The files have the names and the
            index that transformers reads.

    Raises:
        CheckpointError: it cannot be written, or would replace a part of an artifact or, with `shard_size`, any file.
    """
    if shard_size is None:
        check_no_part(path)
        regular_or_missing(path)
    else:
        _check_empty(path)
    _check_room(artifact, path)
    tensors = dense_tensors(artifact)
    try:
        if shard_size is None:
            replace_file(path, lambda part: _write(tensors, part, tensors, "writing tensors"))
        else:
            _write_shards(tensors, path, shard_size, for_dense(companions_in(artifact)))
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise CheckpointError(f"cannot write {path}: {reason_of(error)}") from error
    return len(tensors)


def _write_shards(
    tensors: Mapping[str, DenseTensor], folder: Path, shard_size: int, companions: Mapping[str, bytes]
) -> None:
    shards = _shards(tensors, shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    with Staging(folder) as stage:
        written: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = _shard_name(number, len(shards))
            _write(tensors, stage.path / file, names, f"writing {file}")
            written |= dict.fromkeys(names, file)
        files = list(dict.fromkeys(written.values()))
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(each.stored.nbytes for each in tensors.values())},
                "weight_map": written,
            }
            (stage.path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            files.append(INDEX)
        for name, content in companions.items():
            # What is there already is somebody else's.
            if not (folder / name).exists():
                (stage.path / name).write_bytes(content)
                files.append(name)
        moves = {file: folder / file for file in files}
        stage.make_durable(moves)
        _check_empty(folder)
        stage.put_in_place(moves)


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _shards(tensors: Mapping[str, DenseTensor], shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.stored.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.stored.nbytes
    return shards


def _write(tensors: Mapping[str, DenseTensor], path: Path, names: Iterable[str], description: str) -> None:
    # A tied tensor is made once for each of its names: to keep it would take more memory.
    entries = {name: tensors[name].stored for name in names}
    write_one_by_one(path, entries, lambda name: tensors[name].make(), description)


def _check_empty(folder: Path) -> None:
    """Raise `CheckpointError` if a folder holds files that shards would replace, or that would be read with them."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, and shards are written to one; name a folder")
    found = sorted([*folder.glob("model*.safetensors"), *folder.glob(INDEX)])
    if found:
        raise CheckpointError(f"{folder} holds {found[0].name} already; name another folder for the shards")


def _check_room(artifact: Artifact, path: Path) -> None:
    """Raise `CheckpointError` unless the disk has room: a small artifact, perhaps forged, may name huge tensors."""
    needed = sum(tensor.nbytes * len(tensor.aliases) for tensor in artifact.tensors)
    try:
        free = shutil.disk_usage(next(each for each in path.absolute().parents if each.is_dir())).free
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise CheckpointError(f"cannot write {path}: {reason_of(error)}") from error
    if needed > free:
        raise CheckpointError(
            f"cannot write {path}: the dense tensors take {needed:,} bytes, and its disk has {free:,} free; name a "
            f"file on another disk"
        )

"""Files that appear whole or not at all, digests by which they are recognised, and plain JSON files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from roastify.errors import ConfigError

_PENDING = ".pending"


def pending(path: Path) -> Path:
    """Return the path under which a file is written before it replaces the old one: beside it, with another name."""
    return path.with_name(path.name + _PENDING)


def put_in_place(moves: Mapping[Path, Path]) -> None:
    """Make files durable, then rename each to where it belongs, in this order.

    A run that is killed in between leaves every target with its old file or its new one.
    """
    for source in moves:
        _flush(source)
    for source, target in moves.items():
        os.replace(source, target)
    for folder in dict.fromkeys(target.parent for target in moves.values()):
        _flush(folder)


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions that the user's umask gives; `save_file` alone makes it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason_of(error: BaseException) -> str:
    """Return an error's message in one line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def check_writable(path: str | Path) -> None:
    """Raise `ConfigError` unless a file can be written there; commands call this before work that takes long."""
    folder = Path(path).parent
    try:
        is_there = folder.is_dir()
        Path(path).exists()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {reason_of(error)}; name another file") from error
    if not is_there:
        raise ConfigError(f"cannot write {path}: there is no folder {folder}; create it first")
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise ConfigError(f"cannot write {path}: no permission; name another file")


def write_json(values: dict[str, Any], path: str | Path) -> None:
    """Write plain values as a JSON file; an existing file is replaced."""
    Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

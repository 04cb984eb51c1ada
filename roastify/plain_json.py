"""JSON that others may have written: a regular file of limited size and depth, in which no key is repeated."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

# A plan takes about 600 bytes for each tensor of a model, so this is enough for 400,000 tensors.
LARGEST_FILE = 1 << 28
# Our own files are at most 30 levels deep.
_DEEPEST = 100
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NESTING = re.compile(r"[\[\]{}]")


def read_limited(path: Path) -> bytes:
    """Return the content of a small file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, too large, or its name is not one that a file can have.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > LARGEST_FILE:
            raise ValueError(f"it has {status.st_size:,} bytes, and at most {LARGEST_FILE:,} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(LARGEST_FILE)
    finally:
        os.close(descriptor)


def parse_limited(content: bytes) -> Any:
    """Return the values that JSON text holds.

    Raises:
        ValueError: it is no JSON in UTF-8, nested too deeply, or an object has a key twice.
    """
    text = content.decode("utf-8")
    depth = deepest = 0
    for bracket in _NESTING.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise ValueError(f"it is nested {deepest} levels deep, and at most {_DEEPEST} are read")
    return json.loads(text, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated!r} is there twice")
    return values

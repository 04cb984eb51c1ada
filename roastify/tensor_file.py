"""A safetensors file that is opened once, so that what is hashed is what is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roastify.errors import CheckpointError
from roastify.files import reason_of
from roastify.plain_json import parse_limited
from roastify.progress import track

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's own limit of the header's size.
_MAX_HEADER = 100_000_000


class Stored(NamedTuple):
    """Shape and dtype of a tensor; the dtype is None where it is not known."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in a file."""
        return math.prod(self.shape) * (self.dtype or torch.uint8).itemsize


class TensorFile:
    """A safetensors file. Its digest and its tensors come from one open file, whatever happens to the file's name.

    The safetensors package opens a file by its name, so another file may lie there by then; and it maps the file, so
    tensors change if the file is written to, and the process is killed if the file is cut. Here tensors are read into
    memory of their own.

    Args:
        path: the file's path, for opening and for messages.

    Raises:
        CheckpointError: there is no regular file, or it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without O_NONBLOCK, to open a FIFO is to wait for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {reason_of(error)}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._opened = os.fstat(self._descriptor)
        if not stat.S_ISREG(self._opened.st_mode):
            raise CheckpointError(f"{path} is not a regular file; restore it from a whole copy")
        self._entries: dict[str, tuple[torch.dtype, list[int], int, int]] | None = None

    def digest(self) -> str:
        """Return the file's SHA-256.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            with self._file() as file:
                file.seek(0)
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {reason_of(error)}") from error

    def stored(self) -> dict[str, Stored]:
        """Return shape and dtype of every tensor, from the file's header alone.

        Raises:
            CheckpointError: the file's header is damaged.
        """
        return {name: Stored(tuple(shape), dtype) for name, (dtype, shape, _, _) in self._header().items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own.

        Raises:
            CheckpointError: the file is damaged, or was changed since it was opened.
        """
        dtype, shape, begin, size = self._header()[name]
        content = torch.empty(size, dtype=torch.uint8)
        self._read_into(content.numpy().data, begin)
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise CheckpointError(f"{self.path} was changed while it was read; read it again when it is complete")
        return content.view(dtype).view(shape)

    def _header(self) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
        """Return dtype, shape, first byte and number of bytes of each tensor."""
        if self._entries is None:
            try:
                self._entries = self._parsed()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = f"its header is not one of safetensors: {error}"
                raise CheckpointError(f"{self.path} is damaged ({reason}); restore both files from one save") from error
        return self._entries

    def _parsed(self) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
        head = bytearray(8)
        self._read_into(memoryview(head), 0)
        length, size = int.from_bytes(head, "little"), self._opened.st_size
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"it claims to have {length} bytes")
        text = bytearray(length)
        self._read_into(memoryview(text), 8)
        header: dict[str, Any] = parse_limited(bytes(text))
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, after) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, after)):
                raise ValueError(f"shape {shape} and place {begin}, {after} of {name} should be sizes")
            if begin != end or after - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} of shape {shape} lies at {begin} to {after}")
            entries[name] = dtype, shape, 8 + length + begin, after - begin
            end = after
        if 8 + length + end != size:
            raise ValueError(f"its tensors end at byte {8 + length + end} of {size}")
        return entries

    def _read_into(self, memory: memoryview, begin: int) -> None:
        try:
            with self._file() as file:
                file.seek(begin)
                done = 0
                while done < len(memory):
                    count = file.readinto(memory[done:])
                    if not count:
                        raise CheckpointError(
                            f"{self.path} is damaged (it ends too soon); restore both files from one save"
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {reason_of(error)}") from error

    def _file(self) -> FileIO:
        return FileIO(self._descriptor, closefd=False)


def write_one_by_one(
    path: Path,
    entries: Mapping[str, Stored],
    make: Callable[[str], Iterable[Tensor]],
    description: str = "writing tensors",
) -> None:
    """Write a safetensors file whose tensors are made one after another, so that memory holds one of them at a time.

    The safetensors package takes all tensors at once.

    Args:
        path: the file; outside a staging folder, a killed process may leave a part of it.
        entries: shape and dtype of every tensor.
        make: a function that returns the tensor of a name, or its parts along the first dimension, one after another.
        description: what the progress bar says.

    Raises:
        OSError: the file cannot be written.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    # Wide dtypes first, so that every tensor begins at a multiple of its elements' size.
    names = sorted(entries, key=lambda name: -_dtype_of(entries[name]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        entry, begin = entries[name], end
        end += entry.nbytes
        header[name] = {"dtype": codes[_dtype_of(entry)], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in track(names, description, size=lambda name: entries[name].nbytes, unit="B"):
            entry, missing = entries[name], entries[name].nbytes
            for part in make(name):
                assert part.dtype == entry.dtype, f"{name} has dtype {part.dtype}, expected {entry.dtype}"
                flat = part.detach().cpu().contiguous().view(-1).view(torch.uint8)
                file.write(flat.numpy().data)
                missing -= flat.numel()
            assert missing == 0, f"{name} lacks {missing} bytes"


def _dtype_of(entry: Stored) -> torch.dtype:
    assert entry.dtype is not None
    return entry.dtype

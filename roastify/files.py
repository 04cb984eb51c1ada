"""Files that appear whole or not at all, digests by which they are recognised, and plain JSON files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from roastify.errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_T = TypeVar("_T")
_STAGING = re.compile(r"\.roastify-(?P<kind>[a-z]+)-[0-9a-f]{32}")
_OWNER = "owner"
# A second reading is needed once in hundreds of loads while another process saves without a pause.
_READINGS = 20
# A lock is held for two renames, so this is long.
_LOCK_SECONDS = 60.0


class Staging:
    """A new folder in which files are written before they replace others: beside them, on the same file system.

    Its name is unique, so two processes never write one file. It holds a file that its owner keeps locked while it
    lives: `abandoned` finds the folders of dead owners by that. The folder is removed at the end, unless an error comes
    after the first rename: then the files that were not renamed are still needed.

    Args:
        folder: where the files will be.
        kind: a word in the folder's name, for those who need what a dead process left; other folders are removed.
    """

    def __init__(self, folder: Path, kind: str = "file") -> None:
        self.path, self._descriptor = _new_staging(folder, kind)
        self._moving = False

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self._moving and error):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)

    def make_durable(self, moves: Mapping[str, Path]) -> None:
        """Give each file the permissions of the file that it replaces, or those of the umask, and flush it to the disk.

        Args:
            moves: the name of each staged file, and the path at which it belongs.

        Raises:
            CheckpointError: a path is that of something else than a regular file.
        """
        # The owner's file was created with the umask, which cannot be read without changing it.
        default = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        for name, target in moves.items():
            replaced = regular_or_missing(target)
            os.chmod(self.path / name, stat.S_IMODE(replaced.st_mode) if replaced else default)
            _flush(self.path / name)
        # Whoever may read the artifact may read the manifest of an interrupted save.
        os.chmod(self.path, stat.S_IMODE(self.path.parent.stat().st_mode) & 0o755 | 0o700)
        _flush(self.path)

    def put_in_place(self, moves: Mapping[str, Path]) -> None:
        """Rename staged files that are durable to the paths at which they belong, in this order.

        A process that is killed in between leaves every path with its old file or its new one.

        Raises:
            CheckpointError: a path is that of something else than a regular file.
        """
        for target in moves.values():
            regular_or_missing(target)
        for name, target in moves.items():
            os.replace(self.path / name, target)
            self._moving = True
        for folder in dict.fromkeys(target.parent for target in moves.values()):
            _flush(folder)
        self._moving = False


def _new_staging(folder: Path, kind: str) -> tuple[Path, int]:
    while True:
        path = folder / f".roastify-{kind}-{uuid.uuid4().hex}"
        path.mkdir(mode=0o700)
        # Another process may take this folder for an abandoned one until its file is locked.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(path / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _lock(descriptor)
                os.stat(path / _OWNER)
            except BaseException:
                os.close(descriptor)
                raise
            return path, descriptor


def _lock(descriptor: int) -> bool:
    """Lock an open file or folder; return whether its file system knows locks.

    Raises:
        BlockingIOError: another process, or another place in this one, holds the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def abandoned(folder: Path, kind: str = "file") -> Iterator[Path]:
    """Yield the staging folders that dead processes left in a folder, and remove each afterwards.

    A folder without a lock on its owner's file has no living owner. Where the file system has no locks, nothing is
    known about owners, so nothing is removed.
    """
    for path in stagings(folder, kind):
        try:
            descriptor = os.open(path / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            # Its owner died, or is about to create the file and finds a new name if the folder is gone.
            with contextlib.suppress(OSError):
                path.rmdir()
            continue
        except OSError:
            continue
        try:
            with contextlib.suppress(BlockingIOError):
                if _lock(descriptor):
                    yield path
                    shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove the staging folders that dead processes left in a folder, except those of a kind of their own."""
    for _ in abandoned(folder):
        pass


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write one file, completely or not at all.

    Args:
        path: the file to write; a regular file there is replaced.
        write: a function that writes to the path that it is given.

    Raises:
        CheckpointError: there is something else than a regular file.
        OSError: the file cannot be written.
    """
    regular_or_missing(path)
    remove_abandoned(path.parent)
    with Staging(path.parent) as stage:
        write(stage.path / "content")
        stage.make_durable({"content": path})
        stage.put_in_place({"content": path})


def read_again_if_replaced(paths: Sequence[Path], read: Callable[[], _T]) -> _T:
    """Return what `read` returns; it is called again if it fails while another process replaces files that it reads.

    Args:
        paths: the files.
        read: a function that opens and reads them, and raises `CheckpointError` if they do not belong together.

    Raises:
        CheckpointError: the function raised it, and the files are still the same.
    """
    for _ in range(_READINGS):
        before = [_identity(path) for path in paths]
        try:
            return read()
        except CheckpointError:
            if [_identity(path) for path in paths] == before:
                raise
    return read()


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced or written to; None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def stagings(folder: Path, kind: str) -> list[Path]:
    """Return the staging folders in a folder, of living and of dead processes."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _STAGING.fullmatch(entry.name)
            if match and match["kind"] == kind and entry.is_dir(follow_symlinks=False):
                found.append(Path(entry.path))
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change the files of a folder.

    On a network file system this holds among the processes of one machine. Where the file system has no locks, nothing
    is locked.

    Raises:
        CheckpointError: another process holds the lock for a minute.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                _lock(descriptor)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise CheckpointError(
                        f"another process has kept {folder} locked for {_LOCK_SECONDS:.0f} s; wait until it is done, "
                        f"or name another folder"
                    ) from None
                time.sleep(0.002)
        yield
    finally:
        os.close(descriptor)


def regular_or_missing(path: Path) -> os.stat_result | None:
    """Return the status of a regular file, or None if there is nothing.

    Raises:
        CheckpointError: there is something else; to replace it would lose it.
    """
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot look at {path}: {reason_of(error)}; name another path") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{path} is a {_kind_of(found.st_mode)}, and only a regular file is replaced; remove it, or name another "
            f"path"
        )
    return found


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "folder",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "device")


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file; outside a staging folder, a killed process may leave a part of it."""
    save_file(tensors, path, metadata={"format": "pt"})


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason_of(error: BaseException) -> str:
    """Return an error's message in one line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def check_writable(path: str | Path, inputs: Sequence[str | None] = ()) -> None:
    """Raise an error unless a file can be written there; commands call this before work that takes long.

    Args:
        path: the file.
        inputs: what the command reads, as the user named it: files, `file.py:NAME`, `hf:DIRECTORY`. None of these files
            is replaced, and no file that is there already in one of these folders.

    Raises:
        ConfigError: the file cannot be written, or belongs to the inputs.
        CheckpointError: there is something else than a regular file, a FIFO or a device.
    """
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
    if is_special(Path(path)) or regular_or_missing(Path(path)) is None:
        return
    for name in filter(None, inputs):
        for each in (Path(name), Path(name.partition(":")[2]), Path(name.rpartition(":")[0])):
            # An empty part of the name is the working folder.
            if each.name and each.exists() and each.samefile(folder if each.is_dir() else path):
                raise ConfigError(f"cannot write {path}: it belongs to {name}, which is read; name another file")


def write_json(values: dict[str, Any], path: str | Path) -> None:
    """Write plain values as a JSON file, completely or not at all; a FIFO or a device is written to."""
    text, path = json.dumps(values, indent=1) + "\n", Path(path)
    if is_special(path):
        path.write_text(text, encoding="utf-8")
    else:
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def is_special(path: Path) -> bool:
    """Return whether a path, or what it links to, is a FIFO, a device or a socket, as `/dev/stdout` often is."""
    return path.exists() and not path.is_file() and not path.is_dir()

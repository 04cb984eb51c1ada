"""CIFAR-10 and IMDB as arrays, from a folder that has them packed or as they are distributed.

Images are any one of `cifar10_jpeg.npz` (all files' bytes, offsets and labels), `cifar-10-batches-py/` (torchvision's
download) and `train/CLASS/*.png|jpg` beside `test/` or `val/`. Reviews are `imdb.jsonl.xz` (one JSON object a line) or
`aclImdb/` (the authors' folders). Nothing here imports torch, and no pickle may name more than an array's parts.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import lzma
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np

SIDE = 32
SPLITS = ("train", "test")
_WORD = re.compile(r"[a-z']+|[0-9]+|[!?]")
_SUFFIXES = {".png", ".jpg", ".jpeg"}
_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}

Images = dict[str, tuple[np.ndarray, np.ndarray]]
Reviews = dict[str, tuple[list[str], np.ndarray]]


def shuffled(total: int, count: int | None = None) -> np.ndarray:
    """Return `count` of `total` indices (default: all) in an order of their own: files may be sorted by label."""
    return np.random.default_rng(0).permutation(total)[:count]


def words_of(text: str) -> Iterator[str]:
    return (match[0] for match in _WORD.finditer(text.lower().replace("<br />", " ")))


def vocabulary(texts: Iterable[str], size: int) -> dict[str, int]:
    """Return the `size - 1` most frequent words, numbered by frequency from 1; 0 stands for all others."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words_of(text))
    return {word: number for number, (word, _) in enumerate(counts.most_common(size - 1), 1)}


def encode(text: str, known: Mapping[str, int], length: int) -> np.ndarray:
    """Return the first `length` words as numbers; a shorter text is repeated, so that nothing is padded or masked."""
    numbers = [known.get(word, 0) for word in islice(words_of(text), length)]
    return np.resize(np.array(numbers or [0], dtype=np.int32), length)


def read_reviews(data: Path) -> Reviews:
    """Return texts and labels (1: positive) of both splits.

    Raises:
        click.ClickException: the folder has no reviews.
    """
    return _read("reviews", data, {"imdb.jsonl.xz": _packed_reviews, "aclImdb": _review_folders})


def read_images(data: Path, counts: Mapping[str, int] | None = None) -> Images:
    """Return images, `uint8 [n, 32, 32, 3]`, and labels of both splits, shuffled; `counts` says how many at most.

    Raises:
        click.ClickException: the folder has no images, or they have another size.
    """
    readers = {
        "cifar10_jpeg.npz": _packed_images,
        "cifar-10-batches-py": _image_batches,
        "train": lambda path, counts: _image_folders(path.parent, counts),
    }
    return _read("images", data, readers, counts or {})


def source(data: Path, what: str) -> Path:
    """Return the file or folder that `read_images` ("images") or `read_reviews` ("reviews") would read."""
    names = {"images": ("cifar10_jpeg.npz", "cifar-10-batches-py", "train"), "reviews": ("imdb.jsonl.xz", "aclImdb")}
    found = next((data / name for name in names[what] if (data / name).exists()), None)
    if found is None:
        raise click.ClickException(
            f"no {what} in {data}: expected one of {', '.join(names[what])}; found "
            f"{', '.join(sorted(path.name for path in data.iterdir())) or 'nothing'}"
        )
    return found


def digest(data: Path, what: str) -> str:
    """Return what tells the data that `source` names from other data, or from itself before a change.

    Of a file it is the content's, so that it stays when the file is copied; of a folder that of all files' names, sizes
    and times of change.
    """
    path = source(data, what)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    # Images for tests lie beside those for training.
    folders = [path, data / "test", data / "val"] if path.name == "train" else [path]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    seen = [[str(file.relative_to(data)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _read(what: str, data: Path, readers: Mapping[str, Callable[..., Any]], *arguments: Any) -> Any:
    path = source(data, what)
    try:
        return readers[path.name](path, *arguments)
    except click.ClickException:
        raise
    except Exception as error:  # whatever readers of a damaged file raise
        raise click.ClickException(
            f"{path} cannot be read as {what} ({type(error).__name__}: {error}); it may be cut off or damaged: fetch "
            f"it again"
        ) from error


def _packed_reviews(path: Path) -> Reviews:
    found: dict[str, tuple[list[str], list[int]]] = {split: ([], []) for split in SPLITS}
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            review = json.loads(line)
            texts, labels = found[review["split"]]
            texts.append(review["text"])
            labels.append(review["label"])
    return {split: (texts, np.array(labels, dtype=np.int64)) for split, (texts, labels) in found.items()}


def _review_folders(path: Path) -> Reviews:
    found = {}
    for split in SPLITS:
        files = [(file, label) for label, name in enumerate(("neg", "pos"))
                 for file in sorted((path / split / name).glob("*.txt"))]  # fmt: skip
        if len({label for _, label in files}) < 2:
            raise click.ClickException(
                f"{len(files)} reviews of one kind or none in {path / split}: expected pos/*.txt and neg/*.txt"
            )
        texts = [file.read_text(encoding="utf-8") for file, _ in files]
        found[split] = (texts, np.array([label for _, label in files], dtype=np.int64))
    return found


def decode(file: bytes) -> np.ndarray:
    """Return one PNG or JPEG file as `uint8 [height, width, 3]`."""
    try:
        from PIL import Image
    except ImportError:
        raise click.ClickException("the images are JPEG or PNG files; decoding takes: pip install pillow") from None
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def _decode_file(path: Path) -> np.ndarray:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read as an image: {error}") from error


def _decode_all(files: Sequence[bytes]) -> np.ndarray:
    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(decode, files, chunksize=256)))


def _packed_images(path: Path, counts: Mapping[str, int]) -> Images:
    found = {}
    # Opened here: numpy leaves a damaged file open.
    with path.open("rb") as file, np.load(file) as stored:
        for split in SPLITS:
            content, offset, label = (stored[f"{split}_{part}"] for part in ("jpeg", "offset", "label"))
            chosen = shuffled(len(label), counts.get(split))
            files = [content[offset[index] : offset[index + 1]].tobytes() for index in chosen]
            found[split] = (_decode_all(files), label[chosen].astype(np.int64))
    return found


class _ArraysOnly(pickle.Unpickler):
    """Reads what the CIFAR-10 batches are made of, and refuses to name anything else."""

    _KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch holds arrays, and this one names {module}.{name}: refused")
        return self._KNOWN[module, name]


def _image_batches(path: Path, counts: Mapping[str, int]) -> Images:
    found = {}
    for split in SPLITS:
        batches = []
        for name in _BATCHES[split]:
            with (path / name).open("rb") as file:
                batches.append(_ArraysOnly(file, encoding="bytes").load())
        pixels = np.concatenate([np.asarray(batch[b"data"], dtype=np.uint8) for batch in batches])
        labels = np.concatenate([np.asarray(batch[b"labels"], dtype=np.int64) for batch in batches])
        chosen = shuffled(len(labels), counts.get(split))
        images = pixels[chosen].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        found[split] = (np.ascontiguousarray(images), labels[chosen])
    return found


def _image_folders(path: Path, counts: Mapping[str, int]) -> Images:
    inside = (folder for folder in (path / "train").iterdir() if folder.is_dir())
    classes = sorted(folder.name for folder in inside if not folder.name.startswith("."))
    test = "test" if (path / "test").is_dir() else "val"
    found = {}
    beside = {file.parent.name for file in (path / test).glob("*/*") if file.suffix.lower() in _SUFFIXES}
    if not beside <= set(classes):
        raise click.ClickException(
            f"{path / test} has the classes {', '.join(sorted(beside - set(classes)))}, that {path / 'train'} lacks"
        )
    for split, name in zip(SPLITS, ("train", test), strict=True):
        files = [(file, label) for label, kind in enumerate(classes)
                 for file in sorted((path / name / kind).glob("*")) if file.suffix.lower() in _SUFFIXES]  # fmt: skip
        if not files:
            raise click.ClickException(f"no images in {path / name}: expected CLASS/*.png or CLASS/*.jpg")
        chosen = shuffled(len(files), counts.get(split))
        images = [_decode_file(files[index][0]) for index in chosen]
        odd = next((index for index, image in zip(chosen, images, strict=True) if image.shape != (SIDE, SIDE, 3)), None)
        if odd is not None:
            raise click.ClickException(f"{files[odd][0]} is not an image of {SIDE}×{SIDE}: resize the images first")
        found[split] = (np.stack(images), np.array([files[index][1] for index in chosen], dtype=np.int64))
    return found

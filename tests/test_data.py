"""The benchmarks' data sets in every format they are read from, made here in miniature."""

from __future__ import annotations

import io
import json
import lzma
import os
import pickle
from pathlib import Path

import click
import numpy as np
import pytest

from benchmarks import data

PIL = pytest.importorskip("PIL.Image", reason="the data is made of image files, which Pillow writes")
COUNTS = {"train": 10, "test": 4}


def pictures(count: int) -> np.ndarray:
    """Return images of one colour each; the blue channel says which image it is."""
    images = np.zeros((count, 32, 32, 3), dtype=np.uint8)
    images[..., 0], images[..., 1] = 200, 100
    images[..., 2] = np.arange(count)[:, None, None] * 10
    return images


def as_file(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    PIL.fromarray(pixels).save(file, kind)
    return file.getvalue()


def check(found: data.Images, exact: bool) -> None:
    """Check that every image is there once, and that its label is its number modulo 3."""
    for split, count in COUNTS.items():
        images, labels = found[split]
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
        number = np.rint(images[:, 16, 16, 2].astype(float) / 10).astype(int)
        assert sorted(number) == list(range(count)) and (labels == number % 3).all()
        assert not (number == np.arange(count)).all(), "files may be sorted by label"
        order = pictures(count)[number].astype(int)
        assert np.abs(images.astype(int) - order).max() <= (0 if exact else 4)


def write_packed(folder: Path) -> None:
    arrays = {}
    for split, count in COUNTS.items():
        files = [as_file(pixels, "JPEG") for pixels in pictures(count)]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_label"] = (np.arange(count) % 3).astype(np.uint8)
    np.savez(folder / "cifar10_jpeg.npz", **arrays)


def write_batches(folder: Path) -> None:
    """Write files as the public ones are: pickle protocol 2, bytes for keys, pixels by channel."""
    (folder / "cifar-10-batches-py").mkdir()
    parts = {f"data_batch_{number}": ("train", range(2 * number - 2, 2 * number)) for number in range(1, 6)}
    for name, (split, chosen) in {**parts, "test_batch": ("test", range(4))}.items():
        pixels = pictures(COUNTS[split])[list(chosen)].transpose(0, 3, 1, 2).reshape(len(chosen), -1)
        content = {b"data": pixels, b"labels": [index % 3 for index in chosen], b"batch_label": name.encode()}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content, protocol=2))


def write_folders(folder: Path) -> None:
    for split, count in COUNTS.items():
        for index, pixels in enumerate(pictures(count)):
            path = folder / split / f"class{index % 3}"
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{index}.png").write_bytes(as_file(pixels, "PNG"))
            (path / "notes.txt").write_text("no image")


@pytest.mark.parametrize(
    ("write", "exact"),
    [(write_packed, False), (write_batches, True), (write_folders, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_images_in_every_format(tmp_path: Path, write, exact: bool) -> None:
    write(tmp_path)
    check(data.read_images(tmp_path), exact)
    few = data.read_images(tmp_path, {"train": 3})
    assert len(few["train"][1]) == 3 and len(few["test"][1]) == 4
    assert (few["train"][0] == data.read_images(tmp_path)["train"][0][:3]).all()


def test_a_batch_with_anything_but_arrays_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    write_batches(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Attack()}, protocol=2))
    with pytest.raises(click.ClickException, match=r"holds arrays, and this one names posix.mkdir: refused"):
        data.read_images(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_the_error_names_images_of_another_size(tmp_path: Path) -> None:
    write_folders(tmp_path)
    odd = tmp_path / "train" / "class1" / "odd.jpg"
    odd.write_bytes(as_file(np.zeros((40, 32, 3), dtype=np.uint8), "JPEG"))
    with pytest.raises(click.ClickException, match=r"odd\.jpg is not an image of 32×32"):
        data.read_images(tmp_path)


def test_reviews_in_both_formats(tmp_path: Path) -> None:
    packed, folders = tmp_path / "packed", tmp_path / "folders"
    packed.mkdir()
    with lzma.open(packed / "imdb.jsonl.xz", "wt", encoding="utf-8") as lines:
        for split, count in COUNTS.items():
            for label, name in enumerate(("neg", "pos")):
                path = folders / "aclImdb" / split / name
                path.mkdir(parents=True)
                for index in range(count):
                    text = f"{name} “{index}”"
                    (path / f"{index}_1.txt").write_text(text, encoding="utf-8")
                    lines.write(json.dumps({"split": split, "label": label, "text": text}) + "\n")
    for found in (data.read_reviews(packed), data.read_reviews(folders)):
        for split, count in COUNTS.items():
            texts, labels = found[split]
            assert len(texts) == 2 * count and set(texts) == {
                f"{n} “{i}”" for n in ("neg", "pos") for i in range(count)
            }
            assert [text.startswith("pos") for text in texts] == [label == 1 for label in labels]


@pytest.mark.parametrize("write", [write_packed, write_batches], ids=lambda write: write.__name__)
def test_the_error_names_damaged_images(tmp_path: Path, write) -> None:
    write(tmp_path)
    path = data.source(tmp_path, "images")
    path = path / "data_batch_2" if path.is_dir() else path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(click.ClickException, match=r"cannot be read as images \(.*may be cut off or damaged"):
        data.read_images(tmp_path)
    if write is write_batches:
        path.unlink()
        with pytest.raises(click.ClickException, match=r"cannot be read as images \(FileNotFoundError: .*data_batch_2"):
            data.read_images(tmp_path)


def test_the_error_names_a_damaged_picture(tmp_path: Path) -> None:
    write_folders(tmp_path)
    path = tmp_path / "train" / "class0" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(click.ClickException, match=r"class0/0\.png cannot be read as an image"):
        data.read_images(tmp_path)


def test_the_error_names_damaged_reviews(tmp_path: Path) -> None:
    with lzma.open(tmp_path / "imdb.jsonl.xz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"split": "train", "label": 1, "text": str(n)}) + "\n" for n in range(1000))
    path = tmp_path / "imdb.jsonl.xz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(click.ClickException, match=r"imdb\.jsonl\.xz cannot be read as reviews \(EOFError"):
        data.read_reviews(tmp_path)


def test_reviews_with_one_label_only_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "aclImdb" / split / "neg"
        folder.mkdir(parents=True)
        (folder / "1_1.txt").write_text("dull")
    with pytest.raises(click.ClickException, match=r"1 reviews of one kind or none in .*expected pos/\*\.txt and neg"):
        data.read_reviews(tmp_path)


def test_a_test_class_that_training_data_lacks_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for name in (".ipynb_checkpoints", "zebra"):
        (tmp_path / "test" / name).mkdir()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    check(data.read_images(tmp_path), True)
    (tmp_path / "test" / "zebra" / "1.png").write_bytes(as_file(pictures(1)[0], "PNG"))
    with pytest.raises(click.ClickException, match=r"test has the classes zebra, that .*train lacks"):
        data.read_images(tmp_path)


def test_a_folder_without_data_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "something.txt").write_text("")
    with pytest.raises(click.ClickException, match=r"no reviews in .*imdb\.jsonl\.xz, aclImdb; found something\.txt"):
        data.read_reviews(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(click.ClickException, match=r"no images in .*train: expected CLASS/\*\.png"):
        data.read_images(tmp_path)


def test_words_are_numbered_by_frequency_and_short_texts_repeated() -> None:
    known = data.vocabulary(["b a b c<br />c b", "A!"], 4)
    assert known == {"b": 1, "a": 2, "c": 3}
    assert data.encode("C b, zebra", known, 7).tolist() == [3, 1, 0, 3, 1, 0, 3]
    assert data.encode("", known, 3).tolist() == [0, 0, 0]

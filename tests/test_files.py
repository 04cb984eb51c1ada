"""Users' files: what races, kills and outputs leave alone, how files appear, and what is cleaned up."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trust import races

import roastify
from roastify import api, artifact, files
from roastify.cli import main
from roastify.dense_artifact import dense_state_dict
from roastify.errors import CheckpointError, RoastError
from roastify.recovery import checkpoint
from roastify.tensor_file import TensorFile

MANIFEST, WEIGHTS = artifact.MANIFEST, artifact.WEIGHTS


def _dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def _converted(seed: int = 1) -> nn.Module:
    return roastify.convert(_dense(), 3, seed=seed)


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    """Two models of the same shapes, with other values and another mapping."""
    return [_converted(1), _converted(2)]


def _is(model: nn.Module, found: dict[str, Tensor]) -> bool:
    whole = roastify.densify(model).state_dict()
    return whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _run(*arguments: object) -> tuple[int, str]:
    result = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


# Two processes, one folder


@pytest.mark.parametrize("kind", races.KINDS)
@pytest.mark.parametrize("race", races.RACES)
def test_no_race_mixes_or_loses_anything(tmp_path: Path, race: str, kind: str) -> None:
    seen = races.RACES[race](kind, tmp_path / "folder", 2 if race == "kills" else 16)
    assert seen.keys() <= races.FINE, seen


def test_what_was_opened_is_read_whatever_replaces_it(tmp_path: Path, models: list[nn.Module]) -> None:
    roastify.save(models[0], tmp_path)
    opened = artifact.read_artifact(tmp_path)
    roastify.save(models[1], tmp_path)
    assert _is(models[0], dense_state_dict(opened))
    assert _is(models[1], dense_state_dict(artifact.read_artifact(tmp_path)))


def test_a_save_between_the_two_openings_is_noticed(
    tmp_path: Path, models: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    roastify.save(models[0], tmp_path)
    saves, real = iter(models[1:]), artifact._manifests

    def late(folder: Path) -> Any:
        for model in saves:
            roastify.save(model, folder)
        return real(folder)

    # The old weights are open; both files are replaced; then the manifest is read.
    monkeypatch.setattr(artifact, "_manifests", late)
    assert _is(models[1], dense_state_dict(artifact.read_artifact(tmp_path)))


@pytest.mark.parametrize("change", ["written to", "cut"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, models: list[nn.Module], change: str) -> None:
    """A mapped file would give other values, or end the process with SIGBUS."""
    roastify.save(models[0], tmp_path)
    opened = artifact.read_artifact(tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        if change == "cut":
            file.truncate(5000)
        else:
            file.seek(-9, os.SEEK_END)
            file.write(b"x")
    os.utime(tmp_path / WEIGHTS, (1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors (was changed while it was read|is damaged)"):
        dense_state_dict(opened)


def test_nothing_that_was_loaded_stays_mapped_to_the_file(tmp_path: Path, models: list[nn.Module]) -> None:
    roastify.save(models[0], tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", _dense())
    checkpoint.write_checkpoint(tmp_path / "c", {}, {"values": torch.ones(9999)})
    state = checkpoint.read_checkpoint(tmp_path / "c", {})
    expected = copy.deepcopy(loaded.state_dict())
    for path in (tmp_path / "a" / WEIGHTS, *(tmp_path / "c").glob("state-*")):
        with path.open("r+b") as file:
            file.seek(500)
            file.write(b"\xff" * (path.stat().st_size - 500))
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items() if name in expected)
    assert torch.equal(state["values"], torch.ones(9999))
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_held_lock_is_reported_after_a_while(
    tmp_path: Path, models: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    roastify.save(models[0], tmp_path)
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.1)
    with files.locked(tmp_path), pytest.raises(CheckpointError, match=r"another process has kept .* locked for"):
        roastify.save(models[1], tmp_path)
    roastify.save(models[1], tmp_path)
    assert _names(tmp_path) == [WEIGHTS, MANIFEST]


def test_threads_that_save_to_one_folder_leave_a_whole_artifact(tmp_path: Path, models: list[nn.Module]) -> None:
    threads = [
        threading.Thread(target=lambda model=model: [roastify.save(model, tmp_path) for _ in range(10)])
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = dense_state_dict(artifact.read_artifact(tmp_path))
    assert sum(_is(model, found) for model in models) == 1
    assert _names(tmp_path) == [WEIGHTS, MANIFEST]


# The reader of safetensors files


def test_a_tensor_file_gives_what_was_written(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "small": torch.arange(5, dtype=torch.int8),
        "half": torch.randn(3, 7).half(),
        "brain": torch.randn(5).bfloat16(),
        "eighth": torch.randn(11).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, dtype=torch.complex64),
        "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
    }
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x")
    assert sorted(file.stored()) == sorted(tensors)
    for name, value in tensors.items():
        found = file.read(name)
        assert found.dtype == value.dtype and found.shape == value.shape, name
        assert torch.equal(found.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
    assert file.digest() == files.digest_of_file(tmp_path / "x")


def _entry(dtype: Any = "F32", shape: Any = (2,), place: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": place}}


@pytest.mark.parametrize(
    "header",
    [
        [],
        3,
        "text",
        {"a": []},
        {"a": None},
        _entry(dtype="F31"),
        _entry(dtype=[]),
        _entry(shape=None),
        _entry(shape=[2.0]),
        _entry(shape=[-2]),
        _entry(shape=[True, 2]),
        _entry(shape=[10**30, 10**30]),
        _entry(place=[0]),
        _entry(place=[0, 9]),
        _entry(place=[4, 12]),
        _entry(place=[8, 0]),
        _entry(place=["0", "8"]),
        _entry() | {"b": _entry()["a"]},
        {},
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match="is damaged"):
        TensorFile(tmp_path / "x").stored()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"\xff" * 16,
        (2**40).to_bytes(8, "little") + b"{}",
        b"\x02" + bytes(7) + b"\xff\xff",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_a_file_that_is_no_tensor_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        TensorFile(tmp_path / "x").stored()


# Files that roastify did not write


def _pretrained(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=99, n_positions=24, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def test_the_folder_of_the_source_is_refused_as_output(tmp_path: Path) -> None:
    _pretrained(tmp_path / "model")
    before = _contents(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    data = tmp_path / "data.py"
    data.write_text("data = []", encoding="utf-8")
    for output in (tmp_path / "model", tmp_path / "link", tmp_path / "model" / ".." / "model"):
        for command in (["convert"], ["recover", "--data", data]):
            code, text = _run(*command, f"hf:{tmp_path / 'model'}", "--ratio", 2, "-o", output)
            assert code == 2 and "whose weights would be lost; name another folder" in text.replace("\n", " ")
    # Without the source's name, its weights are recognised too.
    with pytest.raises(CheckpointError, match=r"model\.safetensors was not written by roastify, or was changed since"):
        roastify.save(_converted(), tmp_path / "model")
    data.unlink()
    assert _contents(tmp_path) == before


FOREIGN: dict[str, tuple[dict[str, str], str]] = {
    "weights": ({WEIGHTS: "mine"}, r"model\.safetensors was not written by roastify"),
    "shards": ({"model.safetensors.index.json": "{}"}, "transformers would read model.safetensors in its place"),
    "pickled weights": ({"pytorch_model.bin": "x"}, r"holds pytorch_model\.bin, which is not of roastify"),
    "a manifest": ({MANIFEST: '{"coffee": "dark"}'}, r"roast\.json is not overwritten"),
    "a manifest that is no JSON": ({MANIFEST: "dark"}, r"roast\.json is not overwritten"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_in_the_output_folder_are_not_overwritten(
    tmp_path: Path, models: list[nn.Module], name: str
) -> None:
    contents, message = FOREIGN[name]
    for file, content in contents.items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    before = _contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        roastify.save(models[0], tmp_path)
    assert _contents(tmp_path) == before


def test_weights_that_another_program_put_into_an_artifact_are_not_overwritten(
    tmp_path: Path, models: list[nn.Module]
) -> None:
    roastify.save(models[0], tmp_path)
    save_file({"weight": torch.ones(3)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="was not written by roastify, or was changed since"):
        roastify.save(models[1], tmp_path)
    assert load_file(tmp_path / WEIGHTS).keys() == {"weight"}


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST, "Model.SafeTensors"])
@pytest.mark.parametrize("other", [False, True])
def test_densify_never_writes_over_an_artifact(tmp_path: Path, models: list[nn.Module], name: str, other: bool) -> None:
    for folder in ("a", "b"):
        roastify.save(models[0], tmp_path / folder)
    before = _contents(tmp_path)
    code, text = _run("densify", tmp_path / "a", "-o", tmp_path / ("b" if other else "a") / name)
    assert code == 1 and "which would be lost; name another file" in text.replace("\n", " ")
    assert _contents(tmp_path) == before


def _make(kind: str, path: Path) -> None:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "symbolic link":
        path.with_name("precious").write_text("mine", encoding="utf-8")
        path.symlink_to(path.with_name("precious"))
    elif kind == "dangling symbolic link":
        path.symlink_to(path.with_name("nothing"))
    elif os.geteuid() == 0:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    else:
        pytest.skip("only root makes devices")


def _identity(path: Path) -> tuple[int, ...]:
    """What is there, without the time at which it was last read."""
    found = path.lstat()
    return found.st_ino, found.st_dev, found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns


def _save(folder: Path) -> None:
    roastify.save(_converted(), folder)


def _densify(folder: Path) -> None:
    roastify.save(_converted(), folder.parent / "other")
    api.densify_artifact(folder.parent / "other", folder / "dense.safetensors")


def _checkpoint(folder: Path) -> None:
    checkpoint.write_checkpoint(folder, {}, {"values": torch.ones(3)})


def _report(folder: Path) -> None:
    files.write_json({}, folder / "report.json")


@pytest.mark.parametrize("kind", ["FIFO", "folder", "symbolic link", "dangling symbolic link", "device"])
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (_save, WEIGHTS),
        (_save, MANIFEST),
        (_densify, "dense.safetensors"),
        (_checkpoint, checkpoint.MANIFEST),
    ],
)
def test_only_regular_files_are_replaced(tmp_path: Path, write: Callable[[Path], None], name: str, kind: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    _make(kind, folder / name)
    before = _identity(folder / name)
    names = _names(folder)
    with pytest.raises(CheckpointError, match=f"is a {kind.removeprefix('dangling ')}, and only a regular file"):
        write(folder)
    assert _identity(folder / name) == before and _names(folder) == names
    if kind == "symbolic link":
        assert (folder / "precious").read_text(encoding="utf-8") == "mine"


def test_a_report_goes_through_a_fifo_and_replaces_no_input(
    tmp_path: Path, models: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    files.check_writable("fifo")
    reader = subprocess.Popen(["cat", "fifo"], stdout=subprocess.PIPE, text=True)
    files.write_json({"a": 1}, "fifo")
    assert json.loads(reader.communicate()[0]) == {"a": 1} and stat.S_ISFIFO(os.stat("fifo").st_mode)
    Path("model.py").write_text("from torch import nn\nmodel = nn.Linear(64, 64)\n", encoding="utf-8")
    Path("config.toml").write_text("ratio = 3\n", encoding="utf-8")
    roastify.save(models[0], "out")
    before = _contents(tmp_path)
    for json_file in ("model.py", "config.toml", "out/roast.json"):
        code, text = _run("bench", "model.py:model", "--config", "config.toml", "--json", json_file)
        assert code and "name another file" in text.replace("\n", " "), json_file
    assert _contents(tmp_path) == before


def test_a_recovery_deletes_only_its_own_files(tmp_path: Path) -> None:
    strangers = ["state-mine.safetensors", "state-0123456789abcdef.safetensors", "state-.safetensors"]
    for name in strangers:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    (tmp_path / "state-fedcba9876543210.safetensors").symlink_to(tmp_path / strangers[0])
    for step in range(3):
        checkpoint.write_checkpoint(tmp_path, {}, {"step": step, "values": torch.full((3,), float(step))})
    left = set(_names(tmp_path)) - {*strangers, "state-fedcba9876543210.safetensors", checkpoint.MANIFEST}
    assert len(left) == 1
    assert all((tmp_path / name).read_text(encoding="utf-8") == "mine" for name in strangers)


def test_a_foreign_recovery_json_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / checkpoint.MANIFEST).write_text('{"patient": 7}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a checkpoint that roastify wrote, so it is not overwritten"):
        _checkpoint(tmp_path)
    assert (tmp_path / checkpoint.MANIFEST).read_text(encoding="utf-8") == '{"patient": 7}'


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "other.safetensors", 3, None, ["x"], "a\0b"])
def test_a_checkpoint_never_leaves_its_folder(tmp_path: Path, name: Any) -> None:
    _checkpoint(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    other = tmp_path / "other.safetensors"
    (tmp_path / "c" / manifest["tensors"]["file"]).rename(other)
    manifest["tensors"]["file"] = name
    (tmp_path / "c" / checkpoint.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError, match="as its file of tensors, expected state-DIGEST"):
        checkpoint.read_checkpoint(tmp_path / "c", {})
    _checkpoint(tmp_path / "c")
    assert other.exists()


# Permissions


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


WRITES = [
    (_save, [WEIGHTS, MANIFEST]),
    (_densify, ["dense.safetensors"]),
    (_checkpoint, [checkpoint.MANIFEST]),
    (_report, ["report.json"]),
]


@pytest.mark.parametrize(("write", "names"), WRITES)
def test_permissions_follow_the_umask_or_the_file_that_is_replaced(
    tmp_path: Path, umask: None, write: Callable[[Path], None], names: list[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    for mode in (0o600, 0o644, 0o664):
        for name in names:
            (folder / name).chmod(mode)
        write(folder)
        assert {stat.S_IMODE((folder / name).stat().st_mode) for name in names} == {mode}


# What killed runs leave behind

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from roastify import files
import roastify
from roastify.recovery import checkpoint

def die(tensors, path):
    real(tensors, path)
    if sys.argv[3] == "wait":
        print("ready", flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)

folder, what = Path(sys.argv[1]), sys.argv[2]
real, files.save_file = files.save_file, lambda tensors, path, metadata: die(tensors, path)
real = lambda tensors, path, save=real: save(tensors, path)
if what == "artifact":
    torch.manual_seed(0)
    roastify.save(roastify.convert(nn.Linear(64, 64), 3), folder)
elif what == "checkpoint":
    checkpoint.write_checkpoint(folder, {}, {"values": torch.ones(1000)})
else:
    files.replace_file(folder / "x", lambda path: files.write_tensors({"values": torch.ones(1000)}, path))
"""


def _write(what: str, folder: Path) -> None:
    if what == "artifact":
        _save(folder)
    elif what == "checkpoint":
        _checkpoint(folder)
    else:
        files.replace_file(folder / "x", lambda path: path.write_text("x"))


@pytest.mark.parametrize(
    "what", ["artifact", *(pytest.param(what, marks=pytest.mark.long) for what in ("checkpoint", "file"))]
)
def test_temporary_files_of_killed_runs_are_removed_and_those_of_living_ones_stay(tmp_path: Path, what: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), what]
    assert subprocess.run([*command, "die"], capture_output=True).returncode == -signal.SIGKILL
    (dead,) = _names(tmp_path)
    assert sum(len(content) for content in _contents(tmp_path).values()) > 1000
    # What only looks like a temporary folder stays.
    kind = "artifact" if what == "artifact" else "file"
    (tmp_path / f".roastify-{kind}-notes").mkdir()
    (tmp_path / f".roastify-{kind}-{'0' * 32}").symlink_to(tmp_path)
    with subprocess.Popen([*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as alive:
        try:
            assert alive.stdout is not None and alive.stdout.readline() == b"ready\n"
            looks = {name for name in _names(tmp_path) if name.endswith("notes") or name.endswith("0" * 32)}
            (living,) = {name for name in _names(tmp_path) if name.startswith(".roastify")} - looks - {dead}
            _write(what, tmp_path)
            assert dead not in _names(tmp_path) and living in _names(tmp_path) and len(looks) == 2
        finally:
            alive.kill()
    _write(what, tmp_path)
    assert {name for name in _names(tmp_path) if name.startswith(".roastify")} == looks


def test_tensors_of_a_checkpoint_that_was_killed_before_its_manifest_are_removed(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    save_file({"x": torch.zeros(9)}, tmp_path / "x")
    orphan = tmp_path / f"state-{files.digest_of_file(tmp_path / 'x')[:16]}.safetensors"
    (tmp_path / "x").rename(orphan)
    checkpoint.write_checkpoint(tmp_path, {}, {"values": torch.zeros(2)})
    assert not orphan.exists() and len(_names(tmp_path)) == 2


def test_an_error_leaves_no_temporary_file(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RoastError("on purpose")

    with pytest.raises(RoastError, match="on purpose"):
        files.replace_file(tmp_path / "x", fail)
    assert not _names(tmp_path)

"""Forged and damaged files, and names that others have written: one clear line, and nothing raw on the terminal."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trust import mutations

import roastify
from roastify import api, plain_json, report
from roastify.cli import main
from roastify.conversion.converted import pool_of
from roastify.errors import CheckpointError, ConfigError, ConversionError, RoastError, SourceError
from roastify.pool.plan_checks import check_plan
from roastify.printable import printable
from roastify.recovery import checkpoint
from roastify.source import load_data, load_source
from roastify.typed_values import typed

MANIFEST, WEIGHTS = "roast.json", "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "a"
    roastify.save(mutations.KINDS["plain"][1](), folder)
    return folder


@pytest.fixture
def artifact(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "a"))


def _forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and make all digests right again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["weights"]["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    mutations.seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _shared(manifest: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = [tensor for tensor in manifest["plan"]["tensors"] if tensor["shared"]][index]
    return found


def _kept(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(tensor for tensor in manifest["plan"]["tensors"] if not tensor["shared"])
    return found


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "tiles without end": (
        lambda m: m["plan"]["regions"][0].update(num_tiles=10**12),
        r"region 0: num_tiles, first_slot and first_chunk are 1000000000000, 0, 0; expected",
    ),
    "slots without end": (
        lambda m: (m["plan"].update(num_slots=2**31), m["plan"]["regions"][0].update(num_slots=2**31)),
        r"roast_pool\.weight has shape .* in the artifact; expected",
    ),
    "true is no number": (lambda m: m["plan"].update(seed=True), r"plan\.seed is True; expected an integer"),
    "infinite": (lambda m: _shared(m).update(scale=float("inf")), r"scale is inf; expected a finite number"),
    "λ of which squares overflow": (lambda m: _shared(m).update(scale=1e200), "its scale is not in range"),
    "a huge integer": (lambda m: _shared(m).update(center=10**400), r"center is 1000.*; expected a finite number"),
    "rows for columns": (
        lambda m: _shared(m, 1).update(rows=_shared(m, 1)["cols"], cols=_shared(m, 1)["rows"]),
        "its rows and cols do not fit its shape",
    ),
    "a place twice": (lambda m: _shared(m, 1).update(base=0), "its base is 0; expected"),
    "unknown region": (lambda m: _shared(m).update(region=4), "its region is not one of the plan's"),
    "padding row outside": (lambda m: _shared(m).update(zero_row=48), "its zero_row is not one of its rows"),
    "unknown fold": (lambda m: _shared(m).update(fold=0), "its fold is not one of the plan's"),
    "a kept tensor with a basis": (
        lambda m: _kept(m).update(basis_count=3),
        "not shared and has the value basis_count",
    ),
    "a function for a dtype": (lambda m: m["plan"].update(dtype="relu"), "its dtype is not one that a pool can have"),
    "another dtype": (lambda m: _kept(m).update(dtype="float64"), "has dtype torch.float32 in the artifact; expected"),
    "a lost tensor": (lambda m: m["plan"]["tensors"].remove(_kept(m)), r"state_dict names .*, which is no tensor"),
    "a lost tensor, everywhere": (
        lambda m: (m["state_dict"].remove(_kept(m)["name"]), m["plan"]["tensors"].remove(_kept(m))),
        "holds 1 tensors that its manifest does not name",
    ),
    "a lost buffer": (
        lambda m: m["buffers"].pop("shift"),
        "holds 1 tensors that its manifest does not name: shift; restore both files",
    ),
    "a tie to nothing": (lambda m: m["ties"].update({"other.weight": "nowhere"}), "one of them is not stored so"),
    "tied to itself": (lambda m: m["ties"].update({"other.weight": "other.weight"}), "not stored so"),
    "tied to another shape": (lambda m: m["ties"].update({"other.weight": "head.bias"}), "which has another shape"),
    "an unknown key": (lambda m: m.update(run="me"), "the unknown key 'run'"),
    "another file": (lambda m: m["weights"].update(file="../../etc/passwd"), "weights are not the file"),
    "a name twice": (lambda m: m["plan"]["tensors"].append(_kept(m)), "two tensors have the name"),
    "a pool in no module": (
        lambda m: m["plan"].update(owner="nowhere"),
        r"state_dict names 'roast_pool\.weight', which is no tensor of the model",
    ),
    "a root in no module": (lambda m: m["plan"].update(root="nowhere"), "there is no module 'nowhere'"),
    "an endless name": (lambda m: _shared(m).update(name="a" * 70_000), "its name is empty or too long"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_manifest_is_refused(artifact: Path, name: str) -> None:
    change, message = FORGED[name]
    _forge(artifact, change)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        roastify.load(artifact, mutations.Many())
    assert time.monotonic() - began < 5


def test_a_parameter_that_the_list_of_names_lacks_is_not_lost(artifact: Path, tmp_path: Path) -> None:
    _forge(artifact, lambda m: m["state_dict"].remove("head.bias"))
    api.densify_artifact(artifact, tmp_path / "dense.safetensors")
    assert "head.bias" in load_file(tmp_path / "dense.safetensors")


def test_tensors_that_no_disk_holds_are_not_written(tmp_path: Path) -> None:
    """A pool of one tile can stand for any number of weights, in a manifest whose figures all fit."""
    converted = roastify.convert(mutations.Linears(64, 1), 8, config=roastify.RoastConfig(tile="8x8"))
    roastify.save(converted, tmp_path / "a")

    def enlarge(manifest: dict[str, Any]) -> None:
        tensor, (region,) = _shared(manifest), manifest["plan"]["regions"]
        tensor.update(shape=[4096, 8192], rows=4096, cols=8192, num_tiles=1 << 19)
        region.update(num_tiles=1 << 19)

    _forge(tmp_path / "a", enlarge)
    usage = SimpleNamespace(free=1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(
            CheckpointError, match=r"the dense tensors take 134,\d+,\d+ bytes, and its disk has 1,048,576 free"
        ):
            api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")


def test_weights_of_another_dtype_are_refused(artifact: Path) -> None:
    for name, dtype in (("head.bias", torch.float64), ("norm.running_mean", torch.int64)):
        tensors = load_file(artifact / WEIGHTS)
        before, tensors[name] = tensors[name], tensors[name].to(dtype)
        save_file(tensors, artifact / WEIGHTS)
        _forge(artifact, lambda m: None)
        with pytest.raises(CheckpointError, match=f"{name} has dtype"):
            roastify.load(artifact, mutations.Many())
        save_file(tensors | {name: before}, artifact / WEIGHTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, r"nested 100000 levels deep, and at most 100 are read"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", r"is not readable as JSON"),
        (b'{"format_version": ' + b"9" * 400 + b', "mapping_version": 1}', r"has format version a huge number"),
        (b'{"format_version": true, "mapping_version": 1}', r"has no format version"),
        (b'{"plan": 1, "plan": 2}', r"the key 'plan' is there twice"),
        (b'{"format_version": 1e400}', r"has no format version"),
    ],
)
def test_json_of_others_is_limited(artifact: Path, content: bytes, message: str) -> None:
    (artifact / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        roastify.load(artifact, mutations.Many())


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_special_files_are_refused_at_once(artifact: Path, name: str) -> None:
    """A FIFO has no end until somebody writes, and /dev/zero none at all."""
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        (artifact / name).unlink() if not (artifact / name).is_dir() else (artifact / name).rmdir()
        make(artifact / name)
        with pytest.raises(CheckpointError, match=f"is not a roastify artifact: {name} is missing"):
            roastify.load(artifact, mutations.Many())


def test_sparse_files_are_refused_at_once(artifact: Path) -> None:
    size = (artifact / WEIGHTS).stat().st_size
    os.truncate(artifact / WEIGHTS, 1 << 40)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        roastify.load(artifact, mutations.Many())
    os.truncate(artifact / WEIGHTS, size)
    os.truncate(artifact / MANIFEST, 1 << 40)
    with pytest.raises(CheckpointError, match=r"it has 1,099,511,627,776 bytes, and at most .* are read"):
        roastify.load(artifact, mutations.Many())
    with pytest.raises(ValueError, match="not a regular file"):
        plain_json.read_limited(artifact)


def test_a_file_that_cannot_be_read_is_reported(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("roastify.tensor_file.os.open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: Permission denied"):
        roastify.load(artifact, mutations.Many())


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000])
def test_names_that_no_file_can_have_are_reported(artifact: Path, tmp_path: Path, name: str) -> None:
    actions: list[Callable[[], object]] = [
        lambda: roastify.load(tmp_path / name, mutations.Many()),
        lambda: roastify.save(roastify.load(artifact, mutations.Many()), tmp_path / name),
        lambda: api.densify_artifact(artifact, tmp_path / name),
        lambda: load_source(name),
        lambda: load_source(f"hf:{name}"),
        lambda: load_data(name),
        lambda: roastify.RoastConfig.from_toml(name),
    ]
    for action in actions:
        with pytest.raises(RoastError) as raised:
            action()
        assert str(raised.value).isprintable()


@pytest.mark.parametrize("architectures", ["BertModel", 3, [3], {"a": 1}, ["PreTrainedTokenizerFast"], ["logging"]])
def test_architectures_of_the_wrong_type_are_reported(tmp_path: Path, architectures: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": architectures}))
    with pytest.raises(SourceError):
        load_source(f"hf:{tmp_path}")
    result = CliRunner().invoke(main, ["plan", f"hf:{tmp_path}"])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_load_takes_the_digest_that_the_manifest_must_have(artifact: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((artifact / MANIFEST).read_bytes()).hexdigest()
    roastify.load(artifact, mutations.Many(), digest=digest.upper())
    output = str(tmp_path / "dense.safetensors")
    assert CliRunner().invoke(main, ["densify", str(artifact), "-o", output, "--digest", digest]).exit_code == 0
    # A whole artifact that somebody else made, with digests of its own.
    roastify.save(mutations.KINDS["plain"][1](), artifact)
    with pytest.raises(CheckpointError, match=f"its SHA-256 is [0-9a-f]{{64}}, expected {digest}"):
        roastify.load(artifact, mutations.Many(), digest=digest)
    result = CliRunner().invoke(main, ["densify", str(artifact), "-o", output, "--digest", digest])
    assert result.exit_code == 1 and "is not the file that was expected" in result.stderr
    for wrong in ("", "x" * 64, digest[:-1]):
        with pytest.raises(ConfigError, match="digest must be a SHA-256 of 64 hexadecimal digits"):
            roastify.load(artifact, mutations.Many(), digest=wrong)


def test_what_cannot_be_read_again_is_not_written(tmp_path: Path) -> None:
    converted = roastify.convert(mutations.Linears(), 4)
    roastify.save(converted, tmp_path / "a")
    before = (tmp_path / "a" / MANIFEST).read_bytes()
    pool_of(converted).weight = nn.Parameter(torch.zeros(3, pool_of(converted).weight.shape[1]))
    with pytest.raises(RoastError):
        roastify.save(converted, tmp_path / "a")
    assert (tmp_path / "a" / MANIFEST).read_bytes() == before


def test_values_have_the_types_of_their_fields() -> None:
    plan = roastify.plan(mutations.Linears(), 4)
    check_plan(plan)
    values = json.loads(json.dumps(plan.to_dict()))
    assert typed(roastify.RoastPlan, {key: values[key] for key in values if key != "summary"}, "plan") == plan
    with pytest.raises(ValueError, match=r"plan\.tile has 3 items; expected 2"):
        roastify.RoastPlan.from_dict(values | {"tile": [8, 8, 8]})


def test_mutated_artifacts_end_well(tmp_path: Path) -> None:
    wrong: list[str] = []
    ends = mutations.run(160, 7, tmp_path, lambda what, details: wrong.append(f"{what}\n{details}"))
    assert not wrong, "\n".join(wrong)
    assert ends["refused"] > 80 and ends["equal"], ends


# Recovery


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_forged_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = Teacher()
    batches = [torch.randn(8, 32) for _ in range(4)]

    def recover(folder: Path, resume: bool) -> None:
        student = roastify.convert(teacher, 4, init="project")
        roastify.recover(student, teacher, batches, 2, folder=folder, resume=resume, align=0)

    recover(tmp_path / "r", resume=False)
    original = json.loads((tmp_path / "r" / checkpoint.MANIFEST).read_text())
    names = [key for key, _ in original["state"]["dict"]]

    def forged(change: Callable[[dict[str, Any]], object]) -> None:
        manifest = json.loads(json.dumps(original))
        change(manifest)
        (tmp_path / "r" / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError) as raised:
            recover(tmp_path / "r", resume=True)
        assert str(raised.value).isprintable()

    for index, name in enumerate(names):
        numbers = name in ("seconds", "align_seconds")
        for value in ("x", {"what": 1}, *([] if numbers else [-1]), [1]):
            forged(lambda m, i=index, v=value: m["state"]["dict"][i].__setitem__(1, v))
    forged(lambda m: m["state"]["dict"].pop())
    for file in ("../a.safetensors", "state-\0.safetensors", 3, None, "x" * 5000, "recovery.json"):
        forged(lambda m, name=file: m["tensors"].update(file=name))
    for part in ("made_by", "tensors", "state", "format_version"):
        forged(lambda m, key=part: m.pop(key))
        forged(lambda m, key=part: m.update({key: [[]]}))
    (tmp_path / "r" / checkpoint.MANIFEST).write_text(json.dumps(original))
    recover(tmp_path / "r", resume=True)


# Terminal

HOSTILE = "a[/]b\x1b[31m\n\u202egnp.\x9b2J\ud800:smile:"
RAW = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_printable_text_keeps_what_is_visible() -> None:
    assert printable("λ [/] “x” 名前") == "λ [/] “x” 名前"
    assert printable("a\x1b[0m\n\u202e\ud800\x9b") == r"a\x1b[0m\n\u202e\ud800\x9b"


def test_errors_are_one_printable_line() -> None:
    for kind in (RoastError, CheckpointError, ConversionError):
        assert str(kind(HOSTILE)).isprintable() and "[/]" in str(kind(HOSTILE))


@pytest.mark.parametrize(
    "command",
    [
        [HOSTILE[:-8]],
        ["plan", HOSTILE[:-8] + ".py"],
        ["densify", HOSTILE[:-8], "-o", "x"],
        ["plan", "x.py", "--config", HOSTILE[:-8]],
        ["plan", "x.py", f"--{HOSTILE}"],
        [f"--{HOSTILE}"],
        ["plan", "x.py", "--ratio", HOSTILE[:-8]],
        ["bench", "x.py", "--json", f"{HOSTILE[:-8]}/x"],
        ["recover", "x.py", "--data", HOSTILE[:-8], "-o", "x"],
    ],
)
def test_hostile_paths_are_reported_in_printable_lines(command: list[str]) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code in (1, 2) and not isinstance(result.exception, RoastError)
    assert not RAW.search(result.output), result.output


def test_hostile_names_in_a_model_and_its_path_are_printed_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "[bold]x[ \x1b[31m"
    folder.mkdir()
    name = "w[/]\x1b[31m:smile:"
    (folder / "m.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.add_module({name!r}, nn.Linear(64, 64))\n"
        "    def forward(self, x):\n"
        f"        return getattr(self, {name!r})(x)\n"
        "model = Net()\nexample_inputs = torch.zeros(1, 64)\n"
    )
    for arguments in (["plan", "--all"], ["convert", "-o", str(folder / "out")], ["check"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(main, [arguments[0], str(folder / "m.py"), "--ratio", "2", *arguments[1:]])
        assert result.exit_code == 0, result.output
        assert not RAW.search(result.output)
    assert (folder / "out" / MANIFEST).is_file()


def test_hostile_words_of_a_plan_are_no_markup() -> None:
    plan = roastify.plan(mutations.Linears(), 4)
    values = plan.to_dict()
    for tensor in values["tensors"]:
        tensor["op"] = tensor["reason"] = tensor["whole"] = HOSTILE
    console = Console(width=400, force_terminal=False)
    with console.capture() as shown:
        console.print(report.plan_table(roastify.RoastPlan.from_dict(values), full=True))
    assert "[/]" in shown.get() and not RAW.search(shown.get())

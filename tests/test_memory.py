"""Memory of work on large tables: a table that is most of a model is never copied as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import roastify
from roastify import api, dense_artifact
from roastify.artifact import read_artifact
from roastify.cli import main
from roastify.conversion import initial_values, progress_kept
from roastify.conversion.converted import pool_of, pooled_weight
from roastify.dense_artifact import INDEX, dense_state_dict
from roastify.errors import CheckpointError, ConfigError
from roastify.tensor_file import Stored, TensorFile, write_one_by_one

# Converts a table in place, saves it and densifies the artifact; prints how much memory each took at most, as a part of
# the table, beside what was there before (for the conversion, that is the table itself).
MEASURE = """
import json, sys, torch
from pathlib import Path
from torch import nn
import roastify
from roastify import api

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1_000_000, 64, padding_idx=0).to(getattr(torch, sys.argv[2]))
        with torch.no_grad():
            self.table.weight += float(sys.argv[3])

    def forward(self, index):
        return self.table(index)

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = work()
    return (resident("VmHWM") - before) / size, result

small = roastify.convert(nn.Linear(64, 64), 2, init="project")
model = Table()
size = model.table.weight.nbytes
folder = Path(sys.argv[1])
converting, model = peak(lambda: roastify.convert(model, 50, inplace=True, init=sys.argv[4]))
roastify.save(model, folder / "out")
roastify.save(small, folder / "small")
api.densify_artifact(folder / "small", folder / "small.safetensors")
densifying, _ = peak(lambda: api.densify_artifact(folder / "out", folder / "dense.safetensors"))
print(json.dumps([converting, densifying]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
@pytest.mark.parametrize(("dtype", "center", "init"), [("bfloat16", 0, "match"), ("float32", 3, "project")])
@pytest.mark.long
def test_a_huge_table_is_converted_and_densified_without_a_copy(
    tmp_path: Path, dtype: str, center: float, init: str
) -> None:
    arguments = [str(tmp_path), dtype, str(center), init]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    converting, densifying = json.loads(done.stdout)
    # A part of 2^22 elements is a sixteenth of this table, and a few copies are made of it; of larger ones it is less.
    assert converting <= 0.4 and densifying <= 0.4, (converting, densifying)


class Several(nn.Module):
    """Tied and padded tables, layers of odd sizes, a transposed and a folded one, vectors, buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(301, 64, padding_idx=17)
        self.head = nn.Linear(64, 301)
        self.tied = nn.Linear(64, 301, bias=False)
        self.tied.weight = self.head.weight
        self.conv = nn.Conv2d(16, 64, 3)
        self.up = nn.ConvTranspose2d(16, 64, 3)
        self.norm = nn.BatchNorm1d(64)
        self.narrow = nn.Linear(64, 70).bfloat16()
        self.wide = nn.Linear(256, 512)
        with torch.no_grad():
            self.wide.weight += 4 * self.wide.weight.std()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x)))


def _saved(tmp_path: Path) -> nn.Module:
    model = roastify.convert(Several(), 4, config=roastify.RoastConfig(fold=2, share="all"))
    roastify.save(model, tmp_path / "out")
    return roastify.densify(model)


@pytest.fixture(params=[None, 700])
def _part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(dense_artifact, "_PART", request.param)


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.usefixtures("_part")
def test_an_artifact_is_densified_a_part_after_another(tmp_path: Path) -> None:
    dense = _saved(tmp_path)
    expected = dict(dense.state_dict())
    assert _equal(dense_state_dict(read_artifact(tmp_path / "out")), expected)
    assert api.densify_artifact(tmp_path / "out", tmp_path / "dense.safetensors") == len(expected)
    assert _equal(load_file(tmp_path / "dense.safetensors"), expected)
    with safe_open(tmp_path / "dense.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    Several().load_state_dict(load_file(tmp_path / "dense.safetensors"))


@pytest.mark.usefixtures("_part")
@pytest.mark.parametrize("size", ["1", "100kB", "0.3 MB", "1GB"])
def test_shards_have_the_tensors_and_an_index(tmp_path: Path, size: str) -> None:
    dense = _saved(tmp_path)
    expected = dict(dense.state_dict())
    folder = tmp_path / "new" / "shards"
    arguments = ["densify", str(tmp_path / "out"), "-o", str(folder), "--shard-size", size]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in folder.iterdir())
    if size == "1GB":
        assert files == ["model.safetensors"]
        assert _equal(load_file(folder / "model.safetensors"), expected)
        return
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in expected.values())}
    assert sorted({*index["weight_map"].values(), INDEX}) == files
    assert files[0] == f"model-00001-of-{len(files) - 1:05}.safetensors"
    found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert _equal(found, expected)
    limit = {"1": 1, "100kB": 100_000, "0.3 MB": 300_000}[size]
    for file in files[:-1]:
        tensors = load_file(folder / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit


def test_transformers_reads_the_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    torch.manual_seed(0)
    model = roastify.convert(transformers.LlamaForCausalLM(config), 4)
    roastify.save(model, tmp_path / "out")
    api.densify_artifact(tmp_path / "out", tmp_path / "dense", shard_size=50_000)
    config.save_pretrained(tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert _equal(dict(again.state_dict()), dict(roastify.densify(model).state_dict()))


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", INDEX])
def test_shards_never_replace_a_file(tmp_path: Path, name: str) -> None:
    _saved(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"holds {name} already; name another folder for the shards"):
        api.densify_artifact(tmp_path / "out", folder, shard_size=1000)
    assert [(path.name, path.read_text(encoding="utf-8")) for path in folder.iterdir()] == [(name, "mine")]
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors already"):
        api.densify_artifact(tmp_path / "out", tmp_path / "out", shard_size=1000)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        api.densify_artifact(tmp_path / "out", tmp_path / "file", shard_size=1000)


@pytest.mark.parametrize("size", ["", "5 XB", "-1", "many"])
def test_a_wrong_size_of_shards_is_reported(tmp_path: Path, size: str) -> None:
    result = CliRunner().invoke(main, ["densify", str(tmp_path), "-o", str(tmp_path / "x"), "--shard-size", size])
    assert result.exit_code == 2 and "--shard-size must be a size as 500MB or 5GB" in result.output
    with pytest.raises(ConfigError, match="shard_size must be at least 1 byte"):
        api.densify_artifact(tmp_path, tmp_path / "x", shard_size=0)


@pytest.mark.parametrize("numel", [1, 64, 700, 5000, 1 << 24])
@pytest.mark.parametrize("sharing", ["global", "local"])
def test_parts_of_a_weight_are_the_weight(numel: int, sharing: str) -> None:
    settings = roastify.RoastConfig(ratio=3, share="all", sharing=sharing, tile="8x16")  # type: ignore[arg-type]
    model = roastify.convert(Several(), config=settings)
    pool = pool_of(model)
    split = 0
    for tensor in pool.plan.shared:
        weight = pooled_weight(pool, tensor)
        parts = list(weight.split(numel))
        split += len(parts) > 1
        together = torch.cat([part.dense().reshape(-1) for part in parts])
        assert torch.equal(together, weight.dense().reshape(-1)), tensor.name
    assert split if numel < 5001 else not split


def test_a_projection_in_parts_is_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool() -> Tensor:
        settings = roastify.RoastConfig(ratio=4, share="all", init="project")
        return pool_of(roastify.convert(Several(), config=settings)).weight.detach()

    whole = pool()
    monkeypatch.setattr(initial_values, "_PART", 700)
    assert torch.equal(pool(), whole)


EVERY_DTYPE: list[tuple[str, Callable[[], Tensor]]] = [
    ("empty", lambda: torch.empty(0, 5)),
    ("number", lambda: torch.tensor(3.5, dtype=torch.float64)),
    ("bool", lambda: torch.tensor([True, False, True])),
    ("bytes", lambda: torch.arange(5, dtype=torch.uint8)),
    ("half", lambda: torch.randn(3, 5).half()),
    ("complex", lambda: torch.randn(3, dtype=torch.complex64)),
    ("float8", lambda: torch.randn(3, 4).to(torch.float8_e4m3fn)),
    ("int64", lambda: torch.arange(7)),
]


def test_a_file_written_one_by_one_is_read_by_others(tmp_path: Path) -> None:
    tensors = {name: make() for name, make in EVERY_DTYPE}
    tensors['ünï "quoted"'] = torch.randn(4, 4)
    path = tmp_path / "x.safetensors"
    entries = {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_one_by_one(path, entries, lambda name: [tensors[name]])
    ours = TensorFile(path)
    assert ours.stored() == entries
    for found in (load_file(path), {name: ours.read(name) for name in entries}):
        for name, tensor in tensors.items():
            as_bytes = [each.reshape(-1).view(torch.uint8) for each in (found[name], tensor)]
            assert torch.equal(*as_bytes) and found[name].shape == tensor.shape, name


def test_a_checkpoint_in_shards_is_converted_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="100kB")
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 2

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was run")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaModel, "forward", refuse)
        arguments = ["--ratio", "4", "--init", "project", "--signature-only", "-o", str(tmp_path / "out")]
        result = CliRunner().invoke(main, [f"hf:{tmp_path / 'dense'}", *arguments])
    assert result.exit_code == 0, result.output
    assert "signature" in result.output and "not compared: the models were not run" in result.output
    roastify.save(roastify.convert(dense.eval(), 4, init="project"), tmp_path / "in memory")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "in memory")]
    assert weights[0] == weights[1]


class Interrupted(BaseException):
    pass


@pytest.fixture
def _kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_kept, "_SECONDS", 0.0)


@pytest.mark.usefixtures("_kept_at_once")
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16], ids=str)
def test_a_conversion_that_is_interrupted_at_any_tensor_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    settings = roastify.RoastConfig(ratio=4, share="all", init="project", kernel_basis=4)
    model = Several().to(dtype)
    expected = [each.detach() for each in pool_of(roastify.convert(model, config=settings)).parameters()]
    shared = len(roastify.plan(model, config=settings).shared)
    passes = {"moments": 0, "_target_matrix": 0}

    def counted(name: str, until: int) -> None:
        original = getattr(initial_values, name)

        def call(*arguments: Any) -> Any:
            passes[name] += 1
            if passes[name] > until:
                raise Interrupted
            return original(*arguments)

        monkeypatch.setattr(initial_values, name, call)

    for name in passes:
        for until in (0, 1, shared // 2, shared - 1, 10 * shared):
            folder = tmp_path / f"{name} {until}"
            passes = dict.fromkeys(passes, 0)
            counted(name, until)
            try:
                found = roastify.convert(model, config=settings, resume=folder)
                assert until >= shared
            except Interrupted:
                passes = dict.fromkeys(passes, 0)
                monkeypatch.undo()
                monkeypatch.setattr(progress_kept, "_SECONDS", 0.0)
                counted(name, 10 * shared)
                found = roastify.convert(model, config=settings, resume=folder)
                # What was done before is not done again.
                assert passes[name] == shared - until
            assert all(map(torch.equal, expected, pool_of(found).parameters())), (name, until)
            monkeypatch.undo()
            monkeypatch.setattr(progress_kept, "_SECONDS", 0.0)


@pytest.mark.usefixtures("_kept_at_once")
def test_a_conversion_goes_on_only_from_its_own_progress(tmp_path: Path) -> None:
    model, folder = Several(), tmp_path / "progress"
    settings = roastify.RoastConfig(ratio=4, init="project")
    roastify.convert(model, config=settings, resume=folder)
    for other, changed in ((Several(), settings.replace(ratio=5)), (Several().double(), settings)):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            roastify.convert(other, config=changed, resume=folder)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(CheckpointError, match=r"belongs to another run: model was"):
        roastify.convert(model, config=settings, resume=folder)
    with pytest.raises(ConfigError, match='only a conversion with init="project" can be resumed'):
        roastify.convert(model, 4, resume=folder)


@pytest.mark.usefixtures("_kept_at_once")
def test_the_command_line_removes_progress_when_the_artifact_is_written(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("import torch\ntorch.manual_seed(0)\nmodel = torch.nn.Linear(64, 64)\n")
    arguments = [str(tmp_path / "m.py"), "--ratio", "2", "--init", "project", "--resume", str(tmp_path / "progress")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (tmp_path / "progress" / "recovery.json").exists()
    (tmp_path / "progress" / "mine").touch()
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "progress").iterdir()] == ["mine"]

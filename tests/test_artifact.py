"""Artifacts: what is written, what comes back, what a killed save leaves, what is refused, and the way back."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import roastify
from roastify import api, files
from roastify.conversion.converted import pool_of
from roastify.errors import CheckpointError, ConversionError, RoastError

MANIFEST = "roast.json"
WEIGHTS = "model.safetensors"


class Mixed(nn.Module):
    """Every kind of state at once: strips, tiles, tied weights, BatchNorm, both kinds of buffer, kept parameters."""

    def __init__(self, words: int = 123, width: int = 40) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 3, padding=1)
        self.norm = nn.BatchNorm2d(48)
        self.embed = nn.Embedding(words, width)
        self.mix = nn.Linear(width + 48, width)
        self.small = nn.Linear(width, 5)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        # The values are random, so that a load that keeps the fresh model's values is noticed.
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("slope", torch.randn(width), persistent=False)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.norm(self.conv(image)).mean(dim=(2, 3))
        mixed = self.mix(torch.cat([self.embed(tokens).mean(1), seen], 1)) * self.slope + self.shift
        return self.head(mixed), self.small(mixed)


class Stack(nn.Module):
    """Three layers, the middle one in a container that users replace whole."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.last = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 7, 7, generator=generator), torch.randint(0, 123, (4, 6), generator=generator)


def _vectors(width: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(4)).to(dtype)


def _mixed(seed: int = 0, ratio: float = 4, **arguments: Any) -> nn.Module:
    """Return a converted model whose BatchNorm statistics are not the initial ones."""
    torch.manual_seed(seed)
    model = Mixed()
    model(*_inputs())
    return roastify.convert(model, ratio, **arguments)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, non-persistent ones too, under every name."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


class _Frozen:
    """Records a model, to check later that nothing in it has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = self._modules()
        self.tensors = _tensors(model)
        self.values = _state(model)

    def _modules(self) -> list[tuple[str, nn.Module, type, bool, list[str]]]:
        return [
            (name, module, type(module), module.training, list(vars(module)))
            for name, module in self.model.named_modules(remove_duplicate=False)
        ]

    def assert_unchanged(self) -> None:
        assert self._modules() == self.modules
        tensors = _tensors(self.model)
        assert list(tensors) == list(self.tensors)
        for name, tensor in tensors.items():
            assert tensor is self.tensors[name], name
            assert tensor.device == self.values[name].device, name
            if not tensor.is_meta:
                assert torch.equal(tensor, self.values[name]), name


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = _manifest(folder)
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _redigest(folder: Path) -> None:
    """Make both digests right again: that of the weights, and the manifest's own, over everything else in it."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["weights"]["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        manifest.pop("sha256", None)
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()

    _edit(folder, change)


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fresh_on", ["cpu", "meta"])
@pytest.mark.parametrize("init", ["match", "project"])
def test_a_loaded_model_is_the_saved_one_bit_for_bit(tmp_path: Path, fresh_on: str, init: str) -> None:
    saved = _mixed(init=init)
    roastify.save(saved, tmp_path / "a")
    torch.manual_seed(99)
    fresh = _on_meta(Mixed) if fresh_on == "meta" else Mixed()
    before = _Frozen(fresh)

    loaded = roastify.load(tmp_path / "a", fresh)

    before.assert_unchanged()
    assert type(loaded) is Mixed
    assert _same_bits(_state(saved), _state(loaded))
    assert list(saved.state_dict()) == list(loaded.state_dict())
    assert loaded.roast_pool.plan == saved.roast_pool.plan
    for mode in (False, True):
        for expected, found in zip(saved.train(mode)(*_inputs()), loaded.train(mode)(*_inputs()), strict=True):
            assert torch.equal(expected, found)


@pytest.mark.parametrize("length", [1, 4])
def test_loaded_tensors_begin_where_torchs_own_do(tmp_path: Path, length: int) -> None:
    """A file's tensors begin at any multiple of 8 bytes, and products of such memory round otherwise."""
    model, fresh = Stack(), Stack()
    for each in (model, fresh):
        each.register_buffer("n" * length, torch.zeros(3))
    converted = roastify.convert(model, 4)
    roastify.save(converted, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", fresh)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_loaded_and_fresh_models_share_no_memory(tmp_path: Path) -> None:
    roastify.save(_mixed(), tmp_path / "a")
    fresh = Mixed()
    before = _Frozen(fresh)
    loaded = roastify.load(tmp_path / "a", fresh)
    with torch.no_grad():
        for tensor in _tensors(loaded).values():
            tensor.zero_()
    before.assert_unchanged()


def test_gradients_of_a_loaded_model_are_the_saved_ones(tmp_path: Path) -> None:
    saved = _mixed()
    roastify.save(saved, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", _on_meta(Mixed))
    for model in (saved, loaded):
        sum(output.square().sum() for output in model(*_inputs())).backward()
    expected = {name: parameter.grad for name, parameter in saved.named_parameters()}
    found = {name: parameter.grad for name, parameter in loaded.named_parameters()}
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(gradient, found[name]), name


def test_a_trained_model_survives_the_round_trip(tmp_path: Path) -> None:
    model = _mixed()
    initial = _state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        sum(output.square().mean() for output in model(*_inputs())).backward()
        optimizer.step()
    assert not torch.equal(initial["roast_pool.weight"], model.roast_pool.weight)
    roastify.save(model, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", _on_meta(Mixed))
    assert _same_bits(_state(model), _state(loaded))
    dense = roastify.densify(loaded)
    for layer in ("conv", "mix", "head"):
        assert torch.equal(dense.get_submodule(layer).weight, model.get_submodule(layer).weight)


def test_a_frozen_model_is_loaded_frozen(tmp_path: Path) -> None:
    roastify.save(roastify.convert(Stack().requires_grad_(False), 3), tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", Stack().requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_mode_of_the_fresh_model_is_kept(tmp_path: Path) -> None:
    roastify.save(_mixed().eval(), tmp_path / "a")
    fresh = Mixed()
    fresh.norm.eval()
    loaded = roastify.load(tmp_path / "a", fresh)
    assert loaded.training and not loaded.norm.training


def test_saving_and_loading_leave_the_random_generators_alone(tmp_path: Path) -> None:
    model, fresh = _mixed(), Mixed()
    before = torch.get_rng_state()
    roastify.save(model, tmp_path / "a")
    roastify.load(tmp_path / "a", fresh)
    assert torch.equal(before, torch.get_rng_state())


def test_a_sequential_root_whose_child_has_the_pool_survives_the_round_trip(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 9))

    torch.manual_seed(0)
    dense = build()
    saved = roastify.convert(dense, 3)
    roastify.save(saved, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", _on_meta(build))
    assert torch.equal(saved(_vectors()), loaded(_vectors()))
    assert list(roastify.densify(loaded).state_dict()) == list(dense.state_dict())
    api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")
    build().load_state_dict(load_file(tmp_path / "dense.safetensors"), strict=True)


def test_buffers_that_share_or_repeat_memory_come_back(tmp_path: Path) -> None:
    class Views(Stack):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(2, 64)
            self.register_buffer("top", whole[0])
            self.register_buffer("bottom", whole[1])
            self.register_buffer("repeated", torch.randn(1).expand(64))
            self.register_buffer("same", self.top)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.top + self.bottom * self.repeated + self.same

    saved = roastify.convert(Views(), 3)
    roastify.save(saved, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", Views())
    assert torch.equal(saved(_vectors()), loaded(_vectors()))
    assert loaded.same is loaded.top


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_survives_the_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    saved = roastify.convert(Stack().to(dtype), 3)
    roastify.save(saved, tmp_path / "a")
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / WEIGHTS).values()} == {dtype}
    loaded = roastify.load(tmp_path / "a", _on_meta(Stack))
    output = loaded(_vectors(dtype=dtype))
    assert output.dtype is dtype
    assert torch.equal(saved(_vectors(dtype=dtype)), output)
    api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "dense.safetensors").values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_cast_after_conversion_survives_the_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = roastify.convert(Stack(), 3).to(dtype)
    expected = saved(_vectors(dtype=dtype))
    roastify.save(saved, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", Stack())
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert loaded.roast_pool.plan.stored_nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert torch.equal(expected, loaded(_vectors(dtype=dtype)))


def test_the_dense_state_dict_of_a_model_cast_after_conversion_has_one_dtype(tmp_path: Path) -> None:
    roastify.save(roastify.convert(Stack(), 3).half(), tmp_path / "a")
    api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "dense.safetensors").values()} == {torch.float16}


def test_a_loaded_model_can_be_cast_to_half(tmp_path: Path) -> None:
    saved = roastify.convert(Stack(), 3)
    roastify.save(saved, tmp_path / "a")
    half = roastify.load(tmp_path / "a", Stack()).half()
    x = _vectors(dtype=torch.float16)
    assert half(x).dtype is torch.float16
    assert torch.equal(saved.half()(x), half(x))


def test_the_artifact_decides_the_dtype_not_the_fresh_model(tmp_path: Path) -> None:
    saved = roastify.convert(Stack(), 3)
    roastify.save(saved, tmp_path / "a")
    fresh = Stack().half()
    before = _Frozen(fresh)
    loaded = roastify.load(tmp_path / "a", fresh)
    assert torch.equal(saved(_vectors()), loaded(_vectors()))
    before.assert_unchanged()


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=72,
        max_position_embeddings=24,
    )
    return transformers.BertForMaskedLM(config).eval()


def _gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=99, n_positions=24, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("build", [_bert, _gpt2])
@pytest.mark.parametrize("fresh_on", ["cpu", "meta"])
def test_transformers_models_come_back_bit_for_bit(
    tmp_path: Path, build: Callable[[], nn.Module], fresh_on: str
) -> None:
    torch.manual_seed(0)
    dense = build()
    saved = roastify.convert(dense, 5, init="project")
    roastify.save(saved, tmp_path / "a")
    fresh = _on_meta(build) if fresh_on == "meta" else build()
    before = _Frozen(fresh)
    loaded = roastify.load(tmp_path / "a", fresh)
    before.assert_unchanged()
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(saved(tokens).logits, loaded(tokens).logits)
    assert _same_bits(_state(saved), _state(loaded))
    restored = roastify.densify(loaded)
    assert list(restored.state_dict()) == list(dense.state_dict())
    assert type(restored) is type(dense)
    assert all(parameter.is_contiguous() for parameter in restored.parameters())
    tied = restored.get_output_embeddings().weight
    assert tied is restored.get_input_embeddings().weight

    assert api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors") == len(dense.state_dict())
    again = build()
    again.load_state_dict(load_file(tmp_path / "dense.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(restored(tokens).logits, again(tokens).logits)
        torch.testing.assert_close(again(tokens).logits, saved(tokens).logits, rtol=1e-4, atol=1e-5)


def test_an_artifact_is_two_files_and_holds_exactly_what_the_plan_says(tmp_path: Path) -> None:
    model = _mixed()
    roastify.save(model, tmp_path / "a")
    assert _files(tmp_path / "a") == [WEIGHTS, MANIFEST]
    stored = load_file(tmp_path / "a" / WEIGHTS)
    plan = model.roast_pool.plan
    buffers = sum(buffer.numel() for buffer in Mixed().buffers())
    assert sum(tensor.numel() for tensor in stored.values()) == plan.stored_numel + buffers
    assert plan.stored_numel < plan.total_numel / 4 + 1
    # Shared tensors are stored in the pool alone, tied tensors once.
    assert not {"embed.weight", "head.weight", "conv.weight", "mix.weight"} & stored.keys()
    assert {"roast_pool.weight", "slope", "shift", "norm.running_mean"} <= stored.keys()
    manifest = _manifest(tmp_path / "a")
    assert manifest["format_version"] == 6 and manifest["mapping_version"] == 1
    assert manifest["weights"]["sha256"] == hashlib.sha256((tmp_path / "a" / WEIGHTS).read_bytes()).hexdigest()


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fresh = _mixed(), Mixed()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    for owner, names in (
        (pickle, ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")),
        (torch, ("save", "load")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    roastify.save(model, tmp_path / "a")
    roastify.load(tmp_path / "a", fresh)
    api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    model = _mixed()
    for name in "ab":
        roastify.save(model, tmp_path / name)
    for name in (WEIGHTS, MANIFEST):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# Sign bits of tiles 1, 2 and 3 of the artifact below, a word for each row, first column first, 1 for minus.
GOLDEN_SIGNS = [
    [133, 216, 48, 254, 189, 122, 248, 3],
    [109, 30, 27, 64, 141, 99, 185, 98],
    [201, 80, 46, 7, 5, 206, 23, 78],
]


def test_an_artifact_of_format_1_loads_with_its_golden_values(tmp_path: Path) -> None:
    # Golden values: what this format's first version wrote for one 16×16 layer at ratio 2. If this test fails, users'
    # artifacts are read differently: restore the old reading, or raise the format version.
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

    save_file(
        {"roast_pool.weight": torch.arange(1.0, 65.0).view(8, 8), "fc.bias": torch.arange(16.0)}, tmp_path / WEIGHTS
    )
    kept = {"name": "fc.bias", "aliases": ["fc.bias"], "shape": [16], "dtype": "float32", "op": "Linear"}
    weight = {"name": "fc.weight", "aliases": ["fc.weight"], "shape": [16, 16], "dtype": "float32", "op": "linear"}
    plan = {
        "model": "Tiny",
        "ratio": 2.0,
        "seed": 0,
        "tile": [8, 8],
        "sign": "element",
        "mapping": "permutation",
        "mapping_version": 1,
        "sharing": "global",
        "precondition": True,
        "num_slots": 1,
        "dtype": "float32",
        "trainable": True,
        "owner": "",
        "regions": [{"num_tiles": 4, "num_slots": 1, "first_slot": 0, "first_chunk": 0}],
        "tensors": [
            weight | {"shared": True, "reason": "eligible", "rows": 16, "cols": 16, "num_tiles": 4, "scale": 0.5},
            kept | {"shared": False, "reason": "vector of Linear"},
        ],
        "pool_std": 1.0,
    }
    manifest = {
        "format_version": 1,
        "mapping_version": 1,
        "weights": {"file": WEIGHTS, "sha256": ""},
        "ties": {},
        "buffers": {},
        "state_dict": ["fc.bias", "roast_pool.weight"],
        "plan": plan,
    }
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _redigest(tmp_path)
    dense = roastify.load(tmp_path, _on_meta(Tiny)).fc.weight.detach()
    tile = torch.arange(1.0, 65.0).view(8, 8) / 2
    assert torch.equal(dense.abs(), tile.repeat(2, 2))
    # Tile 0 is chunk 0, whose signs are all +1; each later tile is a chunk of its own.
    assert torch.equal(dense[:8, :8], tile)
    signs = (dense < 0).int()
    words = [
        [int("".join(map(str, row.tolist())), 2) for row in signs[r : r + 8, c : c + 8]]
        for r, c in ((0, 8), (8, 0), (8, 8))
    ]
    assert words == GOLDEN_SIGNS
    api.densify_artifact(tmp_path, tmp_path / "dense.safetensors")
    assert torch.equal(load_file(tmp_path / "dense.safetensors")["fc.weight"], dense)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_files_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        roastify.save(_mixed(), tmp_path / "a")
    finally:
        os.umask(before)
    assert [_mode(tmp_path / "a" / name) for name in (MANIFEST, WEIGHTS)] == [0o640, 0o640]


def test_a_dense_files_permissions_follow_the_umask(tmp_path: Path) -> None:
    roastify.save(_mixed(), tmp_path / "a")
    before = os.umask(0o027)
    try:
        api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")
    finally:
        os.umask(before)
    assert _mode(tmp_path / "dense.safetensors") == 0o640


def test_saving_over_an_artifact_replaces_it_and_leaves_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    roastify.save(_mixed(seed=1), folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "runs").mkdir()
    new = _mixed(seed=2, ratio=3)
    roastify.save(new, folder)
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert _files(folder) == sorted([WEIGHTS, MANIFEST, "notes.txt", "runs"])
    assert _same_bits(_state(new), _state(roastify.load(folder, Mixed())))


def test_save_creates_the_folder_and_its_parents(tmp_path: Path) -> None:
    roastify.save(_mixed(), tmp_path / "x" / "y")
    roastify.load(str(tmp_path / "x" / "y"), Mixed())


class _Killed(BaseException):
    """Stands for the end of the process: no `except Exception` stops it."""


def _save_dying_at(step: int, model: nn.Module, folder: Path) -> bool:
    """Save, but die at the given change to the file system, with a file half written; return whether it finished."""
    taken = itertools.count(1)

    def dying(operation: Callable[..., Any], halve: Callable[..., None] | None = None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(taken) == step:
                if halve is not None:
                    halve(*args)
                raise _Killed
            return operation(*args, **kwargs)

        return run

    def half_of_tensors(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    def half_of_text(path: Path, text: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "save_file", dying(save_file, half_of_tensors))
        patch.setattr(Path, "write_text", dying(Path.write_text, half_of_text))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(os, "fsync", dying(os.fsync))
        try:
            roastify.save(model, folder)
        except _Killed:
            return False
    return True


def _which(folder: Path, models: dict[str, nn.Module]) -> str:
    """Return which model's values and plan a folder holds; both must be of one model."""
    loaded = roastify.load(folder, Stack())
    matches = [
        name
        for name, model in models.items()
        if _same_bits(_state(loaded), _state(model)) and loaded.roast_pool.plan == model.roast_pool.plan
    ]
    assert len(matches) == 1, f"{folder} holds a mixture"
    return matches[0]


def _stacks() -> dict[str, nn.Module]:
    """Return three models that differ in values, mapping and pool size, so that a mixture of two is noticed."""
    torch.manual_seed(0)
    return {
        "old": roastify.convert(Stack(), 3, seed=1),
        "new": roastify.convert(Stack(), 4, seed=2),
        "newest": roastify.convert(Stack(), 5, seed=3),
    }


def test_a_save_killed_at_any_point_leaves_the_old_artifact_or_the_new_one(tmp_path: Path) -> None:
    models = _stacks()
    found = []
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        roastify.save(models["old"], folder)
        if _save_dying_at(step, models["new"], folder):
            break
        found.append(_which(folder, models))
        # The next save succeeds, and removes what the killed save left behind.
        roastify.save(models["newest"], folder)
        assert _which(folder, models) == "newest"
        assert _files(folder) == [WEIGHTS, MANIFEST]
    # A save has two writes, two renames and the calls that make them durable. Once the new artifact is there, it stays.
    assert len(found) >= 6
    assert found[0] == "old" and found[-1] == "new"
    assert found == sorted(found, key=["old", "new"].index)


def test_a_second_killed_save_leaves_a_whole_artifact_too(tmp_path: Path) -> None:
    models = _stacks()
    for first, second in itertools.product(range(1, 10), range(1, 10)):
        folder = tmp_path / f"{first}-{second}"
        roastify.save(models["old"], folder)
        _save_dying_at(first, models["new"], folder)
        left = _which(folder, models)
        _save_dying_at(second, models["newest"], folder)
        assert _which(folder, models) in (left, "newest")


def test_a_first_save_killed_at_any_point_leaves_a_whole_artifact_or_a_clear_refusal(tmp_path: Path) -> None:
    models = _stacks()
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        if _save_dying_at(step, models["new"], folder):
            break
        try:
            assert _which(folder, models) == "new"
        except CheckpointError as error:
            assert "is not a roastify artifact" in str(error)
        roastify.save(models["newest"], folder)
        assert _which(folder, models) == "newest"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_process_killed_at_a_rename_leaves_a_whole_artifact(tmp_path: Path, stage: int) -> None:
    # A real process is killed, before the first rename and between the two: SIGKILL runs no handler and flushes no
    # file.
    script = textwrap.dedent(
        """
        import os, signal, sys
        import torch
        from torch import nn
        import roastify

        torch.manual_seed(0)
        class Stack(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(64, 64)
                self.block = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
                self.last = nn.Linear(64, 64)

            def forward(self, x):
                return self.last(self.block(self.first(x)))

        folder, stage = sys.argv[1], int(sys.argv[2])
        roastify.save(roastify.convert(Stack(), 3, seed=1), folder)
        model = roastify.convert(Stack(), 4, seed=2)
        replace, calls = os.replace, []

        def killed(*paths):
            calls.append(paths)
            if len(calls) == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = killed
        roastify.save(model, folder)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a"), str(stage)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    loaded = roastify.load(tmp_path / "a", Stack())
    assert loaded.roast_pool.plan.seed == stage
    assert torch.isfinite(loaded(_vectors())).all()


@pytest.mark.parametrize("operation", ["weights", "manifest", "first rename", "second rename"])
def test_a_full_disk_is_reported_and_leaves_a_whole_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    models = _stacks()
    roastify.save(models["old"], tmp_path / "a")
    renames = itertools.count(1)
    rename = os.replace

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def replace(*paths: Any) -> None:
        if next(renames) == ("first rename", "second rename").index(operation) + 1:
            full()
        rename(*paths)

    with monkeypatch.context() as patch:
        if operation == "weights":
            patch.setattr(files, "save_file", full)
        elif operation == "manifest":
            patch.setattr(Path, "write_text", full)
        else:
            patch.setattr(os, "replace", replace)
        with pytest.raises(CheckpointError, match=r"cannot write the artifact .*: No space left on device"):
            roastify.save(models["new"], tmp_path / "a")
    assert _which(tmp_path / "a", models) == ("new" if operation == "second rename" else "old")


def test_a_path_that_cannot_be_a_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot write the artifact"):
            roastify.save(_mixed(), path)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("what", ["save", "densify_artifact"])
def test_a_failed_write_of_safetensors_is_reported(tmp_path: Path, what: str) -> None:
    """The system refuses files of more than a kilobyte, in the middle of the write."""
    models = _stacks()
    roastify.save(models["old"], tmp_path / "a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            if what == "save":
                roastify.save(models["new"], tmp_path / "a")
            else:
                api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert _which(tmp_path / "a", models) == "old"
    # Nothing half written stays, under no name.
    assert _files(tmp_path) == ["a"] and sorted(os.listdir(tmp_path / "a")) == [WEIGHTS, MANIFEST]


def test_a_dense_file_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    roastify.save(_mixed(), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"cannot write .*dense\.safetensors"):
        api.densify_artifact(tmp_path / "a", tmp_path / "missing" / "dense.safetensors")


def _without_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-7] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def _truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 40)


def _truncate_and_redigest(folder: Path) -> None:
    _truncate(folder)
    _redigest(folder)


def _restore_without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[name]
        save_file(tensors, folder / WEIGHTS)
        _redigest(folder)

    return damage


def _other_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["small.bias"] = torch.zeros(6)
    save_file(tensors, folder / WEIGHTS)
    _redigest(folder)


def _set(*path: str | int, to: Any) -> Callable[[Path], None]:
    """Return a function that damages an artifact: it changes one value of the manifest."""

    def damage(folder: Path) -> None:
        def change(manifest: Any) -> None:
            for key in path[:-1]:
                manifest = manifest[key]
            manifest[path[-1]] = to

        _edit(folder, change)

    return damage


def _without(*path: str | int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        def change(manifest: Any) -> None:
            for key in path[:-1]:
                manifest = manifest[key]
            del manifest[path[-1]]

        _edit(folder, change)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (_without_folder, r"there is no artifact folder .*/a; expected one that roastify\.save wrote"),
    "no manifest": (lambda a: (a / MANIFEST).unlink(), r"/a is not a roastify artifact: roast\.json is missing"),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), r"/a is not a roastify artifact: model\.safetensors is missing"),
    "newer format": (
        _set("format_version", to=7),
        r"roast\.json has format version 7, and this roastify reads up to 6; install a newer roastify",
    ),
    "newer mapping": (
        _set("mapping_version", to=7),
        r"roast\.json has mapping version 7, and this roastify reads up to 2; install a newer roastify",
    ),
    "no format version": (_without("format_version"), r"roast\.json has no format version"),
    "not an object": (lambda a: (a / MANIFEST).write_text("[1, 2]"), r"roast\.json has no format version"),
    "empty manifest": (lambda a: (a / MANIFEST).write_text(""), r"roast\.json is not readable as JSON"),
    "half a manifest": (
        lambda a: os.truncate(a / MANIFEST, (a / MANIFEST).stat().st_size // 2),
        r"roast\.json is not readable as JSON .*; restore it from a whole copy",
    ),
    "not text": (lambda a: (a / MANIFEST).write_bytes(b"\xff\xfe\x00{"), r"roast\.json is not readable as JSON"),
    "no plan": (_without("plan"), r"roast\.json lacks plan; restore it from a whole copy"),
    "no ties": (_without("ties"), r"roast\.json lacks ties"),
    "no digest": (_without("weights", "sha256"), r"roast\.json lacks the digest"),
    "flipped byte": (
        _flip_a_byte,
        r"model\.safetensors is not the file its manifest describes: its SHA-256 is [0-9a-f]{64}, expected",
    ),
    "truncated": (
        _truncate,
        r"model\.safetensors is damaged .*its tensors end at byte .* of .*; restore both files from one save",
    ),
    "truncated, digest right": (_truncate_and_redigest, r"model\.safetensors is damaged"),
    "a parameter lost": (
        _restore_without("mix.bias"),
        r"model\.safetensors lacks 1 of the tensors it should hold: mix\.bias; restore both files from one save",
    ),
    "a buffer lost": (_restore_without("norm.running_var"), r"lacks 1 of the tensors .*: norm\.running_var"),
    "the pool lost": (_restore_without("roast_pool.weight"), r"lacks 1 of the tensors .*: roast_pool\.weight"),
    "plan is null": (_set("plan", to=None), r"the plan in .*roast\.json is damaged"),
    "plan is a list": (_set("plan", to=[]), r"the plan in .*roast\.json is damaged"),
    "plan lacks a key": (_without("plan", "num_slots"), r"the plan in .*is damaged .*num_slots.*; restore the file"),
    "plan has a key too many": (_set("plan", "extra", to=1), r"the plan in .*is damaged .*extra"),
    "a tensor of the plan lacks a key": (_without("plan", "tensors", 0, "dtype"), r"the plan in .*is damaged .*dtype"),
    "tensors are text": (_set("plan", "tensors", to="abc"), r"the plan in .*roast\.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("fresh_on", ["cpu", "meta"])
def test_a_damaged_artifact_is_refused_and_the_model_left_alone(tmp_path: Path, name: str, fresh_on: str) -> None:
    damage, message = DAMAGES[name]
    roastify.save(_mixed(), tmp_path / "a")
    damage(tmp_path / "a")
    fresh = _on_meta(Mixed) if fresh_on == "meta" else Mixed()
    before = _Frozen(fresh)
    with pytest.raises(CheckpointError, match=message):
        roastify.load(tmp_path / "a", fresh)
    before.assert_unchanged()


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "a parameter lost"])
def test_a_damaged_artifact_is_not_densified(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    roastify.save(_mixed(), tmp_path / "a")
    damage(tmp_path / "a")
    (tmp_path / "dense.safetensors").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")
    assert (tmp_path / "dense.safetensors").read_text(encoding="utf-8") == "mine"


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    roastify.save(_mixed(), tmp_path / "a")
    _other_shape(tmp_path / "a")
    fresh = Mixed()
    before = _Frozen(fresh)
    with pytest.raises(CheckpointError, match=r"small\.bias has shape \(6,\) in the artifact; expected \(5,\)"):
        roastify.load(tmp_path / "a", fresh)
    before.assert_unchanged()


# Values that stand under the right name but make no sense, or mean another mapping.
SENSELESS: dict[str, Callable[[Path], object]] = {
    "tile of one number": _set("plan", "tile", to=[8]),
    "num_slots is text": _set("plan", "num_slots", to="x"),
    "num_slots unlike the regions": _set("plan", "num_slots", to=7),
    "unknown dtype": _set("plan", "dtype", to="float33"),
    "unknown owner": _set("plan", "owner", to="nowhere"),
    "unknown mapping": _set("plan", "mapping", to="other"),
    "unknown sign": _set("plan", "sign", to="other"),
    "no regions": _set("plan", "regions", to=[]),
    "no scale": _set("plan", "tensors", 0, "scale", to=None),
    "scale is text": _set("plan", "tensors", 0, "scale", to="x"),
    "base outside the pool": _set("plan", "tensors", 0, "base", to=10**9),
    "unknown region": _set("plan", "tensors", 0, "region", to=4),
    "rows unlike the shape": _set("plan", "tensors", 0, "rows", to=32),
    "newer mapping in the plan only": _set("plan", "mapping_version", to=7),
    "ties are null": _set("ties", to=None),
    "weights are a number": _set("weights", to=3),
    "mapping version is text": _set("mapping_version", to="1"),
    # One digit is changed, so the mapping and every weight differ.
    "another seed": _set("plan", "seed", to=5),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_manifest_with_senseless_values_is_refused(tmp_path: Path, name: str) -> None:
    roastify.save(roastify.convert(Stack(), 3), tmp_path / "a")
    SENSELESS[name](tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"roast\.json .*restore"):
        roastify.load(tmp_path / "a", Stack())


@pytest.mark.parametrize("name", SENSELESS)
def test_a_manifest_with_senseless_values_leaves_the_model_alone(tmp_path: Path, name: str) -> None:
    roastify.save(roastify.convert(Stack(), 3), tmp_path / "a")
    SENSELESS[name](tmp_path / "a")
    fresh = Stack()
    before = _Frozen(fresh)
    with contextlib.suppress(Exception):
        roastify.load(tmp_path / "a", fresh)
    before.assert_unchanged()


def _renamed() -> nn.Module:
    model = Mixed()
    model.tiny = model.small
    del model.small
    return model


def _with_more() -> nn.Module:
    model = Mixed()
    model.more = nn.Linear(3, 2)
    return model


def _without_layer() -> nn.Module:
    model = Mixed()
    del model.small
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mixed(words=124), r"embed\.weight has shape \(124, 40\), expected \(123, 40\)"),
        (_with_more, r"this Mixed \(2 differences\): more\.weight is not in the artifact; more\.bias is not in"),
        (_without_layer, r"this Mixed \(2 differences\): small\.weight is missing; small\.bias is missing; build the"),
        (_renamed, r"\(4 differences\): small\.weight is missing; small\.bias is missing; tiny\.weight is not in"),
        (Stack, r"/a was saved from another architecture than this Stack"),
    ],
)
def test_another_architecture_is_refused_and_left_alone(
    tmp_path: Path, build: Callable[[], nn.Module], message: str
) -> None:
    roastify.save(_mixed(), tmp_path / "a")
    fresh = build()
    before = _Frozen(fresh)
    with pytest.raises(CheckpointError, match=message):
        roastify.load(tmp_path / "a", fresh)
    before.assert_unchanged()


def test_a_model_with_another_buffer_is_refused_and_the_buffer_named(tmp_path: Path) -> None:
    roastify.save(_mixed(), tmp_path / "a")
    more, longer = Mixed(), Mixed()
    more.register_buffer("extra", torch.zeros(3))
    longer.register_buffer("shift", torch.zeros(41))
    for fresh, message in (
        (more, r"\(1 difference\): extra is not in the artifact"),
        (longer, r"\(1 difference\): shift has shape \(41,\), expected \(40,\)"),
    ):
        before = _Frozen(fresh)
        with pytest.raises(CheckpointError, match=message):
            roastify.load(tmp_path / "a", fresh)
        before.assert_unchanged()


class _Pair(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        if tied:
            self.second.weight = self.first.weight


def test_a_model_with_other_ties_is_refused(tmp_path: Path) -> None:
    for tied, message in (
        (True, r"second\.weight is not tied to first\.weight"),
        (False, r"second\.weight is tied to fir"),
    ):
        roastify.save(roastify.convert(_Pair(tied), 1.5), tmp_path / "a")
        roastify.load(tmp_path / "a", _Pair(tied))
        fresh = _Pair(not tied)
        before = _Frozen(fresh)
        with pytest.raises(CheckpointError, match=message):
            roastify.load(tmp_path / "a", fresh)
        before.assert_unchanged()


def test_a_model_that_lacks_buffers_is_refused(tmp_path: Path) -> None:
    saved = _mixed()
    roastify.save(saved, tmp_path / "a")
    fresh = Mixed()
    fresh.norm = nn.BatchNorm2d(48, track_running_stats=False)
    with pytest.raises(CheckpointError, match=r"norm\.running_mean"):
        roastify.load(tmp_path / "a", fresh)


class _Custom(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(64, 64, max_norm=1.0)
        self.bias = nn.Parameter(torch.randn(64))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            lambda model: _Custom(),
            r"last\.weight belongs to a _Custom that must keep it: max_norm rewrites rows in place",
        ),
        (lambda model: model.first, r"last\.weight is tied to first\.weight"),
    ],
)
def test_a_model_whose_layers_cannot_take_the_pool_is_refused(
    tmp_path: Path, last: Callable[[nn.Module], nn.Module], message: str
) -> None:
    roastify.save(roastify.convert(Stack(), 3), tmp_path / "a")
    fresh = Stack()
    fresh.last = last(fresh)
    before = _Frozen(fresh)
    with pytest.raises(CheckpointError, match=message):
        roastify.load(tmp_path / "a", fresh)
    before.assert_unchanged()


def test_a_converted_model_is_refused_as_the_fresh_one(tmp_path: Path) -> None:
    model = _mixed()
    roastify.save(model, tmp_path / "a")
    before = _Frozen(model)
    with pytest.raises(ConversionError, match="already converted"):
        roastify.load(tmp_path / "a", model)
    before.assert_unchanged()


def test_a_class_is_refused_as_the_fresh_model(tmp_path: Path) -> None:
    roastify.save(_mixed(), tmp_path / "a")
    with pytest.raises(ConversionError, match=r"expected a torch\.nn\.Module; found type"):
        roastify.load(tmp_path / "a", Mixed)


class _Gridded(Stack):
    def __init__(self, place: str) -> None:
        super().__init__()
        grid = torch.arange(64.0)
        if place == "root":
            self.grid = grid
        elif place == "child":
            self.block[1].grid = grid
        else:
            self.grids = [grid]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("root", "grid"),
        ("child", r"block\.1\.grid"),
        ("list", "grids"),
    ],
)
def test_a_plain_tensor_on_the_meta_device_is_refused_by_name(tmp_path: Path, place: str, name: str) -> None:
    roastify.save(roastify.convert(_Gridded(place), 3), tmp_path / "a")
    fresh = _on_meta(lambda: _Gridded(place))
    before = _Frozen(fresh)
    with pytest.raises(CheckpointError, match=rf"^{name} is a plain tensor, .*build the model on a real device"):
        roastify.load(tmp_path / "a", fresh)
    before.assert_unchanged()
    roastify.load(tmp_path / "a", _Gridded(place))


class _Wrapper(nn.Module):
    """Holds the model as `.module`, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def _sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def _compiled() -> nn.Module:
    return cast(nn.Module, torch.compile(roastify.convert(Stack(), 3), backend="eager"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            Stack,
            r"this Stack holds no roastify pool; expected a model that roastify\.convert or roastify\.load returned",
        ),
        (lambda: nn.DataParallel(roastify.convert(Stack(), 3)), r"is the wrapper DataParallel; .*\(its \.module\)"),
        (_compiled, r"is torch\.compile's wrapper; pass the model inside it \(its \._orig_mod\)"),
    ],
    ids=["dense", "data parallel", "compiled"],
)
@pytest.mark.parametrize("action", ["save", "densify", "densify in place"])
def test_a_dense_model_and_wrappers_that_run_a_model_are_refused(
    tmp_path: Path, build: Callable[[], nn.Module], message: str, action: str
) -> None:
    model = build()
    before = _Frozen(model)
    with pytest.raises(ConversionError, match=message):
        if action == "save":
            roastify.save(model, tmp_path / "a")
        else:
            roastify.densify(model, inplace=action.endswith("place"))
    assert _files(tmp_path) == []
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("part", "dense"),
    [
        (lambda: roastify.convert(Stack(), 3).block, lambda: Stack().block),
        (lambda: roastify.convert(Stack(), 3).first, lambda: Stack().first),
        (lambda: _Wrapper(roastify.convert(_sequential(), 3)), lambda: _Wrapper(_sequential())),
        (lambda: nn.Sequential(roastify.convert(_sequential(), 3)), lambda: nn.Sequential(_sequential())),
        (lambda: roastify.convert(_sequential(), 3)[0], lambda: _sequential()[0]),
        (lambda: roastify.convert(_sequential(), 3)[1], lambda: _sequential()[1]),
        (lambda: roastify.convert(_sequential(), 3)[1:], lambda: _sequential()[1:]),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_part_of_a_model_and_a_model_around_one_save_load_and_densify(
    tmp_path: Path, part: Callable[[], nn.Module], dense: Callable[[], nn.Module], inplace: bool
) -> None:
    model = part()
    expected = model(_vectors())
    roastify.save(model, tmp_path / "a")
    assert torch.equal(roastify.load(tmp_path / "a", dense())(_vectors()), expected)
    back = roastify.densify(model, inplace=inplace)
    torch.testing.assert_close(back(_vectors()), expected)
    assert list(back.state_dict()) == list(dense().state_dict())


def test_the_model_inside_a_wrapper_can_be_saved(tmp_path: Path) -> None:
    wrapper = _Wrapper(roastify.convert(Stack(), 3))
    roastify.save(wrapper.module, tmp_path / "a")
    assert torch.equal(wrapper(_vectors()), roastify.load(tmp_path / "a", Stack())(_vectors()))


@pytest.mark.parametrize(
    "action", [lambda model, path: roastify.save(model, path), lambda model, _: roastify.densify(model)]
)
def test_an_object_that_is_no_module_is_refused(tmp_path: Path, action: Callable[[Any, Path], object]) -> None:
    with pytest.raises(RoastError, match=r"expected a torch\.nn\.Module"):
        action({"weight": torch.zeros(3)}, tmp_path / "a")


def test_state_that_is_not_a_tensor_is_refused(tmp_path: Path) -> None:
    class Counting(Stack):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    with pytest.raises(CheckpointError, match="_extra_state is state that is not a tensor"):
        roastify.save(roastify.convert(Counting(), 3), tmp_path / "a")
    assert _files(tmp_path) == []


def _replace_layer(model: nn.Module) -> None:
    model.last = nn.Linear(64, 32)


def _replace_container(model: nn.Module) -> None:
    model.block = nn.Identity()


def _add_layer(model: nn.Module) -> None:
    model.more = nn.Linear(64, 3)


def _reshape_kept(model: nn.Module) -> None:
    model.last.bias = nn.Parameter(torch.zeros(1))


def _remove_kept(model: nn.Module) -> None:
    model.last.bias = None


@pytest.mark.parametrize("change", [_replace_layer, _replace_container, _reshape_kept, _remove_kept, _add_layer])
def test_a_model_that_was_changed_since_its_conversion_is_saved_as_it_is_now(
    tmp_path: Path, change: Callable[[nn.Module], None]
) -> None:
    model, dense = roastify.convert(Stack(), 3), Stack()
    change(model)
    change(dense)
    expected = model(_vectors())
    roastify.save(model, tmp_path / "a")
    loaded = roastify.load(tmp_path / "a", dense)
    assert torch.equal(loaded(_vectors()), expected)
    assert list(loaded.state_dict()) == list(model.state_dict())
    kept = {tensor.name for tensor in pool_of(loaded).plan.kept}
    assert kept == {name for name, _ in loaded.named_parameters() if "roast_pool" not in name}
    with pytest.raises(CheckpointError, match="another architecture"):
        roastify.load(tmp_path / "a", Stack())
    roastify.save(roastify.convert(roastify.densify(model), 2), tmp_path / "a")


def test_new_values_for_a_kept_parameter_are_saved(tmp_path: Path) -> None:
    model = roastify.convert(Stack(), 3)
    model.last.bias = nn.Parameter(torch.arange(64.0))
    roastify.save(model, tmp_path / "a")
    assert torch.equal(model(_vectors()), roastify.load(tmp_path / "a", Stack())(_vectors()))


@pytest.mark.parametrize("inplace", [False, True])
def test_densify_gives_the_original_classes_keys_and_outputs(inplace: bool) -> None:
    torch.manual_seed(0)
    original = Mixed()
    converted = roastify.convert(original, 4).eval()
    expected = converted(*_inputs())
    weights = {name: converted.get_submodule(name).weight.detach() for name in ("conv", "embed", "mix", "head")}
    buffers = {name: buffer.clone() for name, buffer in converted.named_buffers() if not name.startswith("roast_pool")}
    before = None if inplace else _Frozen(converted)

    dense = roastify.densify(converted, inplace=inplace)

    assert (dense is converted) is inplace
    if before is not None:
        before.assert_unchanged()
    assert [type(module) for module in dense.modules()] == [type(module) for module in original.modules()]
    assert list(dense.state_dict()) == list(original.state_dict())
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert dense.head.weight is dense.embed.weight
    for name, weight in weights.items():
        found = dense.get_submodule(name).weight
        assert type(found) is nn.Parameter and found.requires_grad and found.is_contiguous()
        assert torch.equal(found, weight)
    assert {name: buffer.tolist() for name, buffer in dense.named_buffers()} == {
        name: buffer.tolist() for name, buffer in buffers.items()
    }
    assert not dense.training
    for wanted, found in zip(expected, dense(*_inputs()), strict=True):
        # The dense layers sum in another order than the pool's operators.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_sharing_densify_gives_the_original_back_bit_for_bit() -> None:
    original = Mixed()
    dense = roastify.densify(roastify.convert(original, 1, init="project"))
    assert _same_bits(_state(original), _state(dense))


def test_a_densified_model_is_free_of_the_pool_and_can_be_converted_again() -> None:
    converted = _mixed()
    dense = roastify.densify(converted)
    pool = converted.roast_pool.weight.detach().clone()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(1.0)
    assert torch.equal(converted.roast_pool.weight, pool)
    assert type(roastify.convert(dense, 4)) is Mixed


def test_densify_leaves_a_layer_that_the_user_replaced() -> None:
    converted = roastify.convert(Stack(), 3)
    mine = nn.Linear(64, 9)
    converted.last = mine
    expected = converted(_vectors())
    dense = roastify.densify(converted, inplace=True)
    assert dense.last is mine
    assert type(dense.first) is nn.Linear and not hasattr(dense, "roast_pool")
    torch.testing.assert_close(dense(_vectors()), expected, rtol=1e-5, atol=1e-5)


def test_densify_leaves_a_container_that_the_user_replaced() -> None:
    converted = roastify.convert(Stack(), 3)
    converted.block = nn.Identity()
    expected = converted(_vectors())
    dense = roastify.densify(converted)
    torch.testing.assert_close(dense(_vectors()), expected, rtol=1e-5, atol=1e-5)


def test_densify_gives_a_tied_weight_to_the_remaining_owner() -> None:
    converted = _mixed()
    expected = converted.embed.weight.detach()
    converted.head = nn.Linear(40, 7)
    dense = roastify.densify(converted)
    assert torch.equal(dense.embed.weight, expected)
    assert dense.head.weight.shape == (7, 40)


def test_the_dense_state_dict_of_an_artifact_loads_strictly_and_computes_the_same(tmp_path: Path) -> None:
    converted = _mixed().eval()
    roastify.save(converted, tmp_path / "a")
    count = api.densify_artifact(tmp_path / "a", tmp_path / "dense.safetensors")
    state = load_file(tmp_path / "dense.safetensors")
    expected = roastify.densify(converted)
    assert count == len(state)
    assert _same_bits(dict(sorted(expected.state_dict().items())), dict(sorted(state.items())))
    fresh = Mixed().eval()
    fresh.load_state_dict(state, strict=True)
    fresh.slope.copy_(expected.slope)  # not persistent, so not in any state dict
    for wanted, found in zip(expected(*_inputs()), fresh(*_inputs()), strict=True):
        assert torch.equal(wanted, found)
    assert _files(tmp_path) == ["a", "dense.safetensors"]


def test_a_dense_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roastify.save(_mixed(), tmp_path / "a")
    target = tmp_path / "dense.safetensors"
    target.write_text("old", encoding="utf-8")

    def killed(*paths: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(_Killed):
            api.densify_artifact(tmp_path / "a", target)
    assert target.read_text(encoding="utf-8") == "old"
    api.densify_artifact(tmp_path / "a", target)
    assert "conv.weight" in load_file(target)
    assert _files(tmp_path) == ["a", "dense.safetensors"]

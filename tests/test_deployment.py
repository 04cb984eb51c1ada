"""Converted models as programs that run without roastify: `torch.export`, AOTInductor, ONNX; `densify` for servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import roastify
from roastify import ConversionError, RoastConfig
from roastify.cli import main
from roastify.conversion.converted import pools_of

# Torch says these of its own exporters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BATCH = torch.export.Dim("batch", min=2, max=64)


class Tokens(nn.Module):
    """A table with a padding row tied to the head, a convolution, products of both orientations, biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(640, 64, padding_idx=3)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.up = nn.Linear(64, 256)
        self.down = Conv1D(64, 256)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 640, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.down(self.up(x).relu())))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2)),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Logits(nn.Module):
    """A transformers model as a server calls it: one tensor in, one out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, **({"use_cache": False} if hasattr(self.model, "lm_head") else {})).logits


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Logits(LlamaForCausalLM(config))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    return Logits(BertForSequenceClassification(config))


def words(batch: int) -> Tensor:
    return torch.randint(0, 640, (batch, 9), generator=torch.Generator().manual_seed(batch))


def pictures(batch: int) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "tokens": (Tokens, words),
    "pictures": (Pictures, pictures),
    "llama": (llama, words),
    "bert": (bert, words),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "row": {"sign": "row"},
    "element": {"sign": "element"},
    "folded": {"fold": 4, "fold_hashes": 2, "learned_scales": True},
    "all": {"share": "all", "sign": "tile", "ratio": 8},
    "local": {"sharing": "local", "sign": "none"},
    "unmoved": {"ratio": 1, "fold": "none"},
}


def converted(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().to(dtype)
    return roastify.convert(model, config=RoastConfig(**{"ratio": 4, **settings})).eval()


def program_of(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    with roastify.plain_operators(model):
        return torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def sizes_in(path: Path) -> dict[str, int]:
    """Return the sizes of a program's tensors by their files, without the descriptions beside them."""
    with zipfile.ZipFile(path) as archive:
        return {
            each.filename.split("/", 1)[1]: each.file_size
            for each in archive.infolist()
            if "/data/weights/weight_" in each.filename or "/data/constants/tensor_" in each.filename
        }


def assert_pool_once_with_little_beside_it(path: Path, model: nn.Module) -> None:
    sizes = sizes_in(path)
    weights = sum(size for name, size in sizes.items() if "/weights/" in name)
    # A buffer that no operation reads may be left out.
    assert stored_bytes(model.parameters()) <= weights <= stored_bytes([*model.parameters(), *model.buffers()])
    pool = stored_bytes(each.weight for each in pools_of(model))
    assert sum(sizes.values()) - weights <= pool / 4


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {getattr(each, "namespace", "python") for each in called}


CASES = [("tokens", setting) for setting in SETTINGS]
CASES += [(name, setting) for name in ("pictures", "llama", "bert") for setting in ("row", "element")]
CASES += [("llama", "folded"), ("pictures", "all")]


LOADS = """
import sys, torch
program, inputs, expected = sys.argv[1:]
given, wanted = torch.load(inputs), torch.load(expected)
with torch.no_grad():
    found = {load}
torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
assert not [name for name in sys.modules if name.split(".")[0] == "roastify"]
"""
PT2 = LOADS.format(load="torch.export.load(program).module()(given)")
AOTI = LOADS.format(load="torch._inductor.aoti_load_package(program)(given)")
ONNX = LOADS.format(
    load="torch.from_numpy((lambda s: s.run(None, {s.get_inputs()[0].name: given.numpy()})[0])"
    "(__import__('onnxruntime').InferenceSession(program)))"
)


def assert_runs_elsewhere(code: str, program: Path, model: nn.Module, x: Tensor) -> None:
    """Run a saved program in a process in which roastify cannot be imported by accident."""
    inputs, expected = program.with_name("inputs.pt"), program.with_name("expected.pt")
    torch.save(x, inputs)
    torch.save(model(x).detach(), expected)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(program), str(inputs), str(expected)]
    found = subprocess.run(command, cwd=program.parent, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def marked(*quick: tuple[str, str]) -> list[Any]:
    """Return the cases, all but the quick ones of them marked `long`."""
    return [pytest.param(*case, id="-".join(case), marks=() if case in quick else pytest.mark.long) for case in CASES]


@pytest.mark.parametrize(("name", "setting"), marked(("tokens", "element")))
def test_a_program_calls_torchs_operators_alone_and_stores_the_pool_once(
    name: str, setting: str, tmp_path: Path
) -> None:
    model, inputs = converted(name, **SETTINGS[setting]), MODELS[name][1]
    program = program_of(model, inputs(4))
    assert namespaces(program) <= {"aten", "python"}
    for batch in (4, 7):
        torch.testing.assert_close(program.module()(inputs(batch)), model(inputs(batch)))
    torch.export.save(program, tmp_path / "model.pt2")
    assert_pool_once_with_little_beside_it(tmp_path / "model.pt2", model)
    assert_runs_elsewhere(PT2, tmp_path / "model.pt2", model, inputs(7))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_program_computes_in_the_models_dtype(dtype: torch.dtype) -> None:
    for sign in ("row", "element"):
        model = converted("tokens", dtype, sign=sign)
        found, expected = (run(words(7)) for run in (program_of(model, words(4)).module(), model))
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_convolution_with_a_basis_and_a_centred_tensor() -> None:
    model = converted("pictures", kernel_basis=3, share="all", ratio=3)
    assert any(weight.basis_index is not None for pool in pools_of(model) for weight in pool.weights)
    program = program_of(model, pictures(4))
    torch.testing.assert_close(program.module()(pictures(7)), model(pictures(7)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "setting"), marked(("tokens", "row")))
def test_onnx_runtime_computes_the_same_from_one_pool(name: str, setting: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model, inputs = converted(name, **SETTINGS[setting]), MODELS[name][1]
    with roastify.plain_operators(model):
        program = torch.onnx.export(model, (inputs(4),), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    path = tmp_path / "model.onnx"
    program.save(path)
    loaded = onnx.load(path)
    assert {node.domain for node in loaded.graph.node} == {""} and not loaded.functions
    initializers = {each.name: each.ByteSize() for each in loaded.graph.initializer}
    stored, pool = (stored_bytes(each) for each in (model.state_dict().values(), (p.weight for p in pools_of(model))))
    assert sum(initializers.values()) <= stored + pool / 4 + 64 * len(initializers)
    session = onnxruntime.InferenceSession(path)
    for batch in (4, 7):
        x = inputs(batch)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=1e-4, rtol=1e-4)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(compiler() is None, reason="AOTInductor needs a C++ compiler: found neither g++ nor $CXX")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "setting"), [("tokens", "element"), ("llama", "folded"), ("pictures", "row")])
def test_aot_inductor_compiles_a_program(name: str, setting: str, tmp_path: Path) -> None:
    model, inputs = converted(name, **SETTINGS[setting]), MODELS[name][1]
    path = tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(program_of(model, inputs(4)), package_path=str(path))
    assert_runs_elsewhere(AOTI, path, model, inputs(7))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(compiler() is None, reason="AOTInductor needs a C++ compiler: found neither g++ nor $CXX")
def test_aot_inductor_stores_the_pool_once(tmp_path: Path) -> None:
    """A compiled program without weights has about 1.6 MB, so the pool must be larger to tell."""
    torch.manual_seed(0)
    model = roastify.convert(nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048)), 4).eval()
    x = torch.randn(4, 2048)
    path = tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(program_of(model, x), package_path=str(path))
    assert 8_000_000 < stored_bytes(model.parameters()) < path.stat().st_size < 11_000_000
    assert_runs_elsewhere(AOTI, path, model, torch.randn(7, 2048))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_runs_where_roastify_was_never_imported(tmp_path: Path) -> None:
    model = converted("tokens")
    with roastify.plain_operators(model):
        torch.onnx.export(model, (words(4),), str(tmp_path / "model.onnx"), dynamo=True, dynamic_shapes=({0: BATCH},))
    assert_runs_elsewhere(ONNX, tmp_path / "model.onnx", model, words(7))


@pytest.mark.parametrize("shard_size", ["1GB", "100kB"])
def test_what_densify_writes_is_what_servers_load(shard_size: str, tmp_path: Path) -> None:
    """vLLM and SGLang read a folder as `from_pretrained` does: config, tokenizer, safetensors."""
    torch.manual_seed(0)
    dense = llama().model
    model = roastify.convert(dense, 4).eval()
    roastify.save(model, tmp_path / "out")
    dense.config.save_pretrained(tmp_path / "served")
    command = ["densify", str(tmp_path / "out"), "--shard-size", shard_size, "-o", str(tmp_path / "served")]
    assert CliRunner().invoke(main, command).exit_code == 0
    served, info = LlamaForCausalLM.from_pretrained(tmp_path / "served", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(served.eval()(words(2)).logits, model(words(2)).logits)


def test_what_a_program_cannot_store_is_refused_with_a_way_out() -> None:
    for mapping, message in (("hashednet", r"tiles of 1×1 elements"), ("roast", r"begin at any element")):
        model = converted("tokens", mapping=mapping)
        with pytest.raises(ConversionError, match=rf"{message}.*roastify\.densify\(model\)"):
            program_of(model, words(4))
    with pytest.raises(ConversionError, match="meta device"):
        program_of(roastify.convert(Tokens().to("meta"), 4), words(4))
    with pytest.raises(ConversionError, match="holds no roastify pool"):
        program_of(Tokens(), words(4))


def test_strict_export_and_gradients_are_refused_by_name() -> None:
    model = converted("tokens")
    with pytest.raises(Exception, match=r"strict=False.*roastify\.densify\(model\)"), roastify.plain_operators(model):
        torch.export.export(model, (words(4),), strict=True)


def test_the_model_is_as_before_outside_and_runs_as_before_inside() -> None:
    model = converted("tokens")
    before = model(words(4))
    with pytest.raises(ZeroDivisionError), roastify.plain_operators(model):
        torch.testing.assert_close(model(words(4)), before, rtol=0, atol=0)
        raise ZeroDivisionError
    assert "roastify.linear" in str(torch.export.export(model, (words(4),)).graph)
    assert torch.is_grad_enabled()

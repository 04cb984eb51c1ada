"""Plans: the budget is exact, every tensor has a verdict, addresses do not overlap, and settings are checked."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import roastify
from roastify.errors import ConfigError, PlanError
from roastify.plan import RoastPlan

ROOT = Path(__file__).parents[1]


class Mixed(nn.Module):
    """Tiled and strip tensors, a tie, vectors, a raw parameter."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, dim)
        self.conv = nn.Conv1d(dim, dim + 5, 3)
        self.encoder = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.up = nn.Linear(dim, 77)
        self.temperature = nn.Parameter(torch.ones(3, 4))
        self.head = nn.Linear(dim, 200)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def total(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    sizes = st.integers(3, 130)
    layers: list[nn.Module] = []
    for kind in draw(st.lists(st.sampled_from(["linear", "embedding", "conv", "norm"]), min_size=1, max_size=6)):
        a, b = draw(sizes), draw(sizes)
        made = {
            "linear": lambda a=a, b=b: nn.Linear(a, b),
            "embedding": lambda a=a, b=b: nn.Embedding(a, b),
            "conv": lambda a=a, b=b: nn.Conv1d(a, b, 3, bias=False),
            "norm": lambda a=a: nn.LayerNorm(a),
        }
        layers.append(made[kind]())
    layers.append(nn.Linear(draw(st.integers(32, 200)), 64))
    return nn.ModuleList(layers)


@settings(deadline=None, max_examples=60)
@given(model=models(), ratio=st.floats(1.01, 60), tile=st.sampled_from(["auto", "8x8", "16x16", "5x7"]))
def test_the_budget_is_exact(model: nn.Module, ratio: float, tile: str) -> None:
    try:
        plan = roastify.plan(model, ratio, config=roastify.RoastConfig(tile=tile, min_numel=64))
    except PlanError as error:
        # What must be kept and one slot really do not fit, and the ratio it names really does.
        assert "unreachable" in str(error)
        largest = float(re.search(r"largest reachable ratio is ([\d.]*\d)", str(error))[1])
        assert largest < ratio
        if largest >= 1:
            reached = roastify.plan(model, largest, config=roastify.RoastConfig(tile=tile, min_numel=64))
            assert reached.achieved_ratio >= largest
        return
    assert plan.total_numel == total(model)
    budget = total(model) / ratio
    shared_tiles = sum(region.num_tiles for region in plan.regions)
    assert plan.stored_numel <= budget
    assert plan.stored_numel > budget - plan.slot_size - 1 or plan.num_slots == shared_tiles
    names = [alias for tensor in plan.tensors for alias in tensor.aliases]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert all(tensor.reason for tensor in plan.tensors)
    assert plan.kept_numel + sum(tensor.numel for tensor in plan.shared) == plan.total_numel


def addresses(tensor: Any, plan: RoastPlan) -> range:
    end = tensor.numel if tensor.strips else tensor.num_tiles * plan.slot_size
    return range(tensor.base, tensor.base + end)


@pytest.mark.parametrize("sharing", ["global", "local"])
@pytest.mark.parametrize("mapping", ["permutation", "cyclic", "roast", "hashednet"])
def test_addresses_do_not_overlap(sharing: str, mapping: str) -> None:
    plan = roastify.plan(Mixed(), 4, config=roastify.RoastConfig(sharing=sharing, mapping=mapping))
    by_region: dict[int, list[Any]] = {}
    for tensor in plan.shared:
        by_region.setdefault(tensor.region, []).append(tensor)
        if not tensor.strips:
            assert tensor.base % plan.slot_size == 0
    for number, tensors in by_region.items():
        tensors.sort(key=lambda tensor: tensor.base)
        for one, following in itertools.pairwise(tensors):
            assert addresses(one, plan).stop <= following.base
            if one.strips:
                assert addresses(one, plan).stop == following.base
        last = addresses(tensors[-1], plan).stop
        assert plan.regions[number].num_tiles == math.ceil(last / plan.slot_size)
    # Regions follow one another and fill the pool.
    position = 0
    for region in plan.regions:
        assert region.first_slot == position and 1 <= region.num_slots <= region.num_tiles
        position += region.num_slots
    assert position == plan.num_slots
    assert len(plan.regions) == (len(plan.shared) if sharing == "local" else 1)


def test_ties_are_counted_once_and_say_so() -> None:
    plan = roastify.plan(Mixed(), 4)
    (embedding,) = (tensor for tensor in plan.tensors if tensor.name == "embed.weight")
    assert embedding.aliases == ("embed.weight", "head.weight")
    assert embedding.shared and "head.weight" in embedding.reason and not embedding.strips
    assert plan.total_numel == total(Mixed())


def test_only_tensors_that_are_wanted_whole_become_strips() -> None:
    strips = {tensor.name for tensor in roastify.plan(Mixed(), 4).shared if tensor.strips}
    assert strips == {"conv.weight"}


def test_ratio_one_shares_nothing() -> None:
    plan = roastify.plan(Mixed(), 1)
    assert plan.no_sharing and plan.num_slots == plan.regions[0].num_tiles
    assert plan.stored_numel >= plan.total_numel


def test_the_meta_device_gives_the_same_plan() -> None:
    torch.manual_seed(0)
    real = roastify.plan(Mixed(), 6)
    with torch.device("meta"):
        meta = roastify.plan(Mixed(), 6)
    assert all(tensor.scale is None for tensor in meta.shared) and meta.pool_std is None
    assert all(tensor.scale for tensor in real.shared)
    # Constant tensors can only be told apart by their values; this model's one raw parameter is kept either way.
    stripped = [dataclasses.replace(tensor, scale=None, zero_row=None) for tensor in real.tensors]
    assert dataclasses.replace(real, tensors=tuple(stripped), pool_std=None) == meta


@pytest.mark.parametrize("sharing", ["global", "local"])
def test_json_round_trip(sharing: str) -> None:
    plan = roastify.plan(Mixed(), 4, config=roastify.RoastConfig(sharing=sharing))
    values = json.loads(json.dumps(plan.to_dict()))
    assert RoastPlan.from_dict(values) == plan
    assert values["summary"]["stored_parameters"] == plan.stored_numel


def test_local_and_global_store_the_same() -> None:
    stored = {
        sharing: roastify.plan(Mixed(), 4, config=roastify.RoastConfig(sharing=sharing, tile="8x8")).stored_numel
        for sharing in ("global", "local")
    }
    assert stored["global"] == stored["local"]


@pytest.mark.parametrize(
    ("size", "ratio", "tile", "sign"),
    [
        (2048, 4, (128, 64), "tile"),
        (512, 8, (32, 32), "element"),
        (512, 2, (128, 64), "element"),
        (64, 2, (8, 8), "element"),
    ],
)
def test_auto_takes_the_largest_tile_that_leaves_slots(
    size: int, ratio: float, tile: tuple[int, int], sign: str
) -> None:
    with torch.device("meta"):
        plan = roastify.plan(nn.Linear(size, size, bias=False), ratio)
    assert plan.tile == tile
    assert plan.sign == sign
    assert plan.num_slots >= 16


def test_auto_avoids_padding() -> None:
    # 33 columns pad a 64-column tile to almost twice their number.
    with torch.device("meta"):
        plan = roastify.plan(nn.Embedding(100_000, 33), 2)
    assert plan.tile == (8, 8)


def names(plan: RoastPlan) -> set[str]:
    return {tensor.name for tensor in plan.shared}


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("up.weight", {"up.weight"}),
        ("up", {"up.weight"}),
        ("encoder", {"encoder.0.weight", "encoder.1.weight", "encoder.2.weight"}),
        ("encoder.*", {"encoder.0.weight", "encoder.1.weight", "encoder.2.weight"}),
        ("encoder.[01]", {"encoder.0.weight", "encoder.1.weight"}),
        (r"re:encoder\.(0|2)", {"encoder.0.weight", "encoder.2.weight"}),
        (r"re:.*\.1\.weight", {"encoder.1.weight"}),
        ("head", {"embed.weight"}),
        ("embed.weight", {"embed.weight"}),
    ],
)
def test_include_and_exclude(pattern: str, matched: set[str]) -> None:
    everything = names(roastify.plan(Mixed(), 1.5))
    assert names(roastify.plan(Mixed(), 1, include=pattern)) == matched
    assert names(roastify.plan(Mixed(), 1, exclude=[pattern])) == everything - matched
    kept = {t.name: t.reason for t in roastify.plan(Mixed(), 1, exclude=pattern).kept}
    assert all(kept[name] == f"excluded by {pattern!r}" for name in matched)


@pytest.mark.parametrize("setting", ["include", "exclude"])
@pytest.mark.parametrize(("pattern", "hint"), [("encoder.7", "encoder."), ("hed", "'head'"), ("re:enc", "re:")])
def test_a_pattern_that_matches_nothing_is_an_error(setting: str, pattern: str, hint: str) -> None:
    with pytest.raises(PlanError, match=rf"{setting} pattern {re.escape(repr(pattern))} matched no") as caught:
        roastify.plan(Mixed(), 2, **{setting: pattern})
    assert hint in str(caught.value)


def test_include_lifts_the_size_threshold() -> None:
    model = nn.ModuleDict({"small": nn.Linear(16, 16), "large": nn.Linear(64, 64)})
    assert names(roastify.plan(model, 1)) == {"large.weight"}
    assert names(roastify.plan(model, 1, include=["small", "large"])) == {"small.weight", "large.weight"}


def test_kept_tensors_have_their_reason() -> None:
    model = Mixed()
    nn.init.zeros_(model.up.weight)
    model.encoder[0].weight.requires_grad_(False)
    reasons = {tensor.name: tensor.reason for tensor in roastify.plan(model, 1.5).kept}
    assert reasons["up.weight"].startswith("constant")
    assert reasons["encoder.0.weight"].startswith("frozen")
    assert reasons["temperature"].startswith("raw parameter of Mixed")
    assert reasons["up.bias"] == "vector of Linear"


def test_an_unreachable_ratio_names_the_largest_and_what_is_in_the_way() -> None:
    with pytest.raises(PlanError, match="largest reachable ratio is") as caught:
        roastify.plan(Mixed(), 5000)
    assert "head.bias 200 (vector of Linear)" in str(caught.value)


@pytest.mark.parametrize("model", [nn.LayerNorm(64), nn.Identity(), nn.Linear(4, 4)])
def test_nothing_eligible(model: nn.Module) -> None:
    with pytest.raises(PlanError, match=r"no weight of the model is eligible|no parameters"):
        roastify.plan(model, 2)


def test_the_toml_file_holds_every_default() -> None:
    path = ROOT / "configs" / "default.toml"
    assert roastify.RoastConfig.from_toml(path) == roastify.RoastConfig()
    assert list(tomllib.loads(path.read_text())) == [field.name for field in dataclasses.fields(roastify.RoastConfig)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratoi": 3}, "unknown setting 'ratoi'; closest: 'ratio'"),
        ({"ratio": "3"}, "ratio must be a finite number"),
        ({"init": "matches"}, "init must be one of match, project; found 'matches'; closest: 'match'"),
        ({"seed": 1.5}, "seed must be an integer; found 1.5"),
        ({"min_numel": -1}, "min_numel must be an integer of at least 0"),
        ({"tile": "8"}, "tile must be 'auto' or ROWSxCOLS"),
        ({"tile": [8, 8]}, "tile must be 'auto' or ROWSxCOLS"),
        ({"sign": "row"}, "sign must be one of"),
        ({"mapping": "hash"}, "mapping must be one of"),
        ({"sharing": "some"}, "sharing must be one of"),
        ({"precondition": 1}, "precondition must be true or false"),
        ({"include": [3]}, "include must be a pattern or a list of patterns"),
        ({"exclude": ["re:("]}, "not a valid regular expression"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        roastify.RoastConfig.from_dict(values, "settings")


def test_toml_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        roastify.RoastConfig.from_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("ratio = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        roastify.RoastConfig.from_toml(tmp_path / "bad.toml")
    (tmp_path / "unknown.toml").write_text("ratoi = 3")
    with pytest.raises(ConfigError, match=r"unknown\.toml: unknown setting 'ratoi'"):
        roastify.plan(Mixed(), config=tmp_path / "unknown.toml")


def test_arguments_go_before_the_config() -> None:
    config = roastify.RoastConfig(ratio=2, seed=3)
    plan = roastify.plan(Mixed(), 5, config=config)
    assert (plan.ratio, plan.seed) == (5.0, 3)
    assert roastify.plan(Mixed(), config=config).ratio == 2.0
    assert roastify.plan(Mixed()).ratio == 10.0

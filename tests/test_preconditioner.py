"""1/Γ is counted a tile at a time, and equals bit for bit what adding λ² for every weight gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roastify
from roastify.conversion.converted import pool_of
from roastify.pool import preconditioner as module


def models() -> dict[str, Callable[[], nn.Module]]:
    return {
        "even": lambda: nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))),
        "padded": lambda: nn.Sequential(nn.Linear(77, 123), nn.Linear(123, 201), nn.Linear(201, 130)),
        "strips": lambda: nn.Sequential(nn.Conv2d(9, 21, 3), nn.Conv2d(21, 37, 3), nn.Linear(37, 99)),
        "padding row": lambda: nn.Sequential(nn.Embedding(301, 70, padding_idx=5), nn.Linear(70, 90)),
        "padding row of one": lambda: nn.Sequential(nn.Embedding(301, 128, padding_idx=300)),
        "recurrent": lambda: nn.LSTM(31, 53),
    }


def by_every_weight(pool: Any) -> Tensor:
    """Return 1/Γ of every element, by adding one λ² for every weight."""
    plan = pool.plan
    shared = [(plan.view(tensor), tensor.scale) for tensor in plan.shared]
    rows = [(plan.view(tensor), tensor.scale, tensor.zero_row) for tensor in plan.shared if tensor.zero_row is not None]
    gamma = module._of_every_element(pool.num_slots, pool.slot_size, pool.table, shared, rows)
    largest = gamma.amax(1, keepdim=True)
    gamma = torch.where(gamma == 0, torch.where(largest == 0, 1.0, largest), gamma)
    return gamma.reciprocal().float()


@pytest.mark.parametrize(
    "settings", [{}, {"mapping": "hashednet"}, {"mapping": "roast"}, {"sharing": "local"}], ids=str
)
@pytest.mark.parametrize("ratio", [1.5, 4, 20])
@pytest.mark.parametrize("name", list(models()))
def test_counting_by_tile_equals_adding_weight_by_weight(name: str, ratio: float, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = roastify.RoastConfig(share="all", **settings)
    pool = pool_of(roastify.convert(models()[name](), ratio, config=config))
    found = pool.per_slot[:, None].repeat(1, pool.slot_size)
    found[pool.uneven_slots] = pool.uneven
    expected = by_every_weight(pool)
    assert torch.equal(found, expected)
    if name in ("padded", "padding row") and ratio == 4 and not settings:
        assert pool.uneven_slots.numel() > 0
    # A slot whose elements have one Γ stores one number.
    assert torch.equal(pool.uneven_slots, (expected != expected[:, :1]).any(1).nonzero().flatten())


def test_a_large_model_is_counted_within_a_second() -> None:
    # 1.07 G weights in tiles of 128×64, at ratio 50: reading each weight took seconds.
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(64)))
    plan = roastify.plan(model, 50)
    shared = [(plan.view(tensor), 1.0 + index / 64) for index, tensor in enumerate(plan.shared)]
    table = torch.tensor([row for tile_map in plan.maps() for row in tile_map.chunk_table()])
    begun = time.process_time()
    found = module.inverse_gamma(plan.num_slots, plan.tile, table, shared, [])
    assert time.process_time() - begun < 1.0
    assert found["uneven_slots"].numel() == 0
    # Every reader is counted once.
    weights = sum(scale**2 * view.num_tiles for view, scale in shared)
    assert float(found["per_slot"].double().reciprocal().sum()) == pytest.approx(weights, rel=1e-6)


def test_many_tensors_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small tensors take a few operations; a batch for each tensor gives the same bits."""
    model = nn.Sequential(nn.Embedding(77, 33, padding_idx=3), *[nn.Linear(33, 33) for _ in range(40)])
    nn.init.zeros_(model[0].weight[3])
    batches: list[int] = []
    together = module._together
    monkeypatch.setattr(module, "_together", lambda parts: (batches.append(len(parts)), together(parts))[1])
    config = roastify.RoastConfig(ratio=3, share="all")
    found = pool_of(roastify.convert(model, config=config))._masters
    assert len(batches) <= 8 and max(batches) >= 40
    count = len(batches)
    monkeypatch.setattr(module, "_AT_ONCE", 0)
    expected = pool_of(roastify.convert(model, config=config))._masters
    assert set(batches[count:]) == {1} and len(batches) > 2 * 80
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

"""Looking up rows, and the pool's gradient from them: the Triton kernels against the plain-torch reference."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import roastify
from roastify.conversion.converted import pool_of
from roastify.kernels import ops, reference
from roastify.kernels.view import TileView
from roastify.pool.mapping import TileMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

triton = pytest.importorskip("triton")

from roastify.kernels.gpu import embedding, tuning  # noqa: E402

# The interpreter computes with NumPy, whose integers warn where a hash wraps on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}
SCALE = 0.7


@dataclass(frozen=True)
class Case:
    rows: int
    cols: int
    tile: tuple[int, int]
    num_slots: int
    first_tile: int = 0
    offset: int = 0
    mapping: str = "permutation"
    sign: str = "tile"
    strips: bool = False
    first_slot: int = 0
    first_chunk: int = 0

    def build(self) -> tuple[Tensor, TileView, list[int]]:
        size = self.tile[0] * self.tile[1]
        tile_map = TileMap(
            5000, self.num_slots, self.tile, 11, self.mapping, self.sign, self.first_slot, self.first_chunk
        )
        rows = [(0, 0, 0)] * self.first_chunk + tile_map.chunk_table()
        table = torch.tensor(rows, dtype=torch.int64, device=DEVICE).view(-1, 3)
        view = tile_map.view(self.rows, self.cols, self.first_tile * size + self.offset, self.strips)
        # One slot after the region belongs to another region.
        return table, view, [(self.first_slot + self.num_slots + 1) * self.tile[0], self.tile[1]]


CASES = {
    "padded": Case(77, 40, (16, 16), 7, first_tile=5),
    "whole tiles": Case(64, 64, (16, 16), 40),
    "one slot": Case(50, 40, (16, 16), 1),
    "sign per element": Case(77, 43, (16, 32), 5, first_tile=2, sign="element"),
    "no sign": Case(33, 70, (32, 16), 9, sign="none"),
    "odd tiles": Case(21, 30, (5, 7), 6, sign="element"),
    "one column of tiles": Case(300, 9, (8, 16), 5),
    "one row of a tile": Case(90, 20, (1, 8), 30),
    "a region": Case(40, 50, (16, 16), 6, first_slot=3, first_chunk=2),
    "rotation": Case(40, 50, (16, 16), 6, mapping="cyclic"),
    "element by element": Case(21, 12, (1, 1), 97, mapping="hashednet"),
    "hashed tiles": Case(40, 50, (8, 8), 11, mapping="hashednet", sign="element"),
    "unaligned tiles": Case(21, 30, (8, 8), 11, mapping="roast"),
    "strips": Case(19, 37, (8, 8), 5, first_tile=2, offset=13, strips=True),
}
each_case = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def indices(rows: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return random indices, a third of which are one row, as padding is."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, rows, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.3, rows // 2, index).to(DEVICE, dtype)


def expected_sum(grad: Tensor, index: Tensor, name: str) -> Tensor:
    table, view, shape = CASES[name].build()
    return reference.embedding_reduce(grad.double(), index, table, view, SCALE, shape)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    atol = DTYPES[dtype] * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=atol)


@each_dtype
@each_case
def test_sums_of_looked_up_rows(name: str, dtype: torch.dtype) -> None:
    table, view, shape = CASES[name].build()
    for index_dtype in (torch.int64, torch.int32):
        index = indices(view.rows, 4, 9, dtype=index_dtype)
        grad = randn(4, 9, view.cols, dtype=dtype)
        found = embedding.embedding_reduce(grad, index, table, view, SCALE, shape)
        assert_near(found, expected_sum(grad, index, name), dtype)
        assert torch.equal(found, embedding.embedding_reduce(grad, index, table, view, SCALE, shape))


@each_dtype
@each_case
def test_adding_looked_up_rows_to_a_sum(name: str, dtype: torch.dtype) -> None:
    """Sums are in float32 whatever the gradient's dtype; elements that no row reads stay unchanged."""
    table, view, shape = CASES[name].build()
    index, grad, before = indices(view.rows, 4, 9), randn(4, 9, view.cols, dtype=dtype), randn(*shape, seed=2)
    results = []
    for _ in range(2):
        total = before.clone()
        embedding.embedding_reduce_(total, grad, index, table, view, SCALE)
        results.append(total)
    assert_near(total, expected_sum(grad, index, name) + before.double(), torch.float32)
    assert torch.equal(*results)
    marks = torch.ones(4, 9, view.cols, device=DEVICE, dtype=torch.float64)
    unread = reference.embedding_reduce(marks, index, table, view._replace(sign=0), 1.0, shape) == 0
    assert torch.equal(total[unread], before[unread])


@pytest.mark.parametrize("steps", [1, 2, 16])
@pytest.mark.parametrize("elements", [pytest.param(1, marks=pytest.mark.long), 64, 1024])
@pytest.mark.parametrize("name", ["padded", "one slot", "one column of tiles", "element by element"])
def test_runs_are_summed_whatever_the_chunk_size(
    monkeypatch: pytest.MonkeyPatch, name: str, elements: int, steps: int
) -> None:
    """With one lookup a chunk, a run of two is joined from two parts, and a long run from many."""
    table, view, shape = CASES[name].build()
    index = indices(view.rows, 23)
    grad = randn(23, view.cols)
    monkeypatch.setattr(embedding, "_steps", lambda num_tokens: steps)
    monkeypatch.setattr(tuning, "RUN_ELEMENTS", elements)
    monkeypatch.setattr(tuning, "PLACE_LOOKUPS", 8)
    found = embedding.embedding_reduce(grad, index, table, view, SCALE, shape)
    assert_near(found, expected_sum(grad, index, name), torch.float32)
    before = randn(*shape, seed=2)
    total = before.clone()
    embedding.embedding_reduce_(total, grad, index, table, view, SCALE)
    assert_near(total, expected_sum(grad, index, name) + before.double(), torch.float32)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 32, 33, 64])
def test_one_row_looked_up_again_and_again(count: int) -> None:
    """All tokens are one run; its length is below, at and above that of one chunk and of several chunks."""
    name = "one column of tiles"
    table, view, shape = CASES[name].build()
    index = torch.full((count,), 7, device=DEVICE)
    grad = randn(count, view.cols)
    found = embedding.embedding_reduce(grad, index, table, view, SCALE, shape)
    assert_near(found, expected_sum(grad, index, name), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_are_added_in_float32(dtype: torch.dtype) -> None:
    """The gradients are 4096 and then 64 times 1; in a narrow dtype each 1 would vanish."""
    table, view, shape = CASES["one column of tiles"].build()
    grad = torch.ones(65, view.cols, dtype=dtype, device=DEVICE)
    grad[0] = 4096
    found = embedding.embedding_reduce(grad, torch.zeros(65, dtype=torch.int64, device=DEVICE), table, view, 1.0, shape)
    assert float(found.abs().max()) == 4160


@each_case
def test_an_empty_lookup(name: str) -> None:
    table, view, shape = CASES[name].build()
    for index_shape in ((0,), (2, 0)):
        index = torch.empty(index_shape, dtype=torch.int64, device=DEVICE)
        grad = torch.empty(*index_shape, view.cols, device=DEVICE)
        found = embedding.embedding_reduce(grad, index, table, view, SCALE, shape)
        assert list(found.shape) == shape and not found.any()
        assert embedding.embedding(index, randn(*shape), table, view, SCALE).shape == (*index_shape, view.cols)


@pytest.mark.parametrize("name", ["padded", "sign per element", "element by element"])
def test_an_index_outside_the_table_adds_nothing(name: str) -> None:
    """A GPU kernel cannot raise; the tiles of such an index would belong to another tensor, or to none."""
    table, view, shape = CASES[name].build()
    index = torch.tensor([3, -1, view.rows, 3, 2**31 + 5, -(2**40), view.rows - 1], device=DEVICE)
    known = torch.tensor([0, 3, 6], device=DEVICE)
    grad = randn(7, view.cols)
    found = embedding.embedding_reduce(grad, index, table, view, SCALE, shape)
    assert_near(found, expected_sum(grad[known], index[known], name), torch.float32)
    rows = embedding.embedding(index, randn(*shape), table, view, SCALE)
    assert rows.isnan().all(1).tolist() == [False, True, True, False, True, True, False]
    assert rows.isnan().any(1).tolist() == rows.isnan().all(1).tolist()


@pytest.mark.parametrize("name", ["padded", "hashed tiles"])
def test_strided_and_expanded_arguments(name: str) -> None:
    table, view, shape = CASES[name].build()
    index = indices(view.rows, 5, 3).t()
    grad = randn(view.cols, 3, 5).permute(1, 2, 0)
    assert not index.is_contiguous() and not grad.is_contiguous()
    for value in (grad, torch.ones((), device=DEVICE).expand(3, 5, view.cols)):
        found = embedding.embedding_reduce(value, index, table, view, SCALE, shape)
        assert_near(found, expected_sum(value.contiguous(), index.contiguous(), name), torch.float32)


def test_infinite_gradients_reach_only_their_own_sums() -> None:
    """Loss scaling in float16 gives infinite gradients; every other sum must be right."""
    table, view, shape = CASES["whole tiles"].build()
    index = torch.arange(40, device=DEVICE).repeat(2)
    grad = randn(80, view.cols)
    clean = embedding.embedding_reduce(grad, index, table, view, SCALE, shape)
    grad[5] = float("inf")
    found = embedding.embedding_reduce(grad, index, table, view, SCALE, shape)
    hit = torch.zeros_like(grad)
    hit[5] = 1.0
    places = reference.embedding_reduce(hit, index, table, view._replace(sign=0), 1.0, shape) > 0
    assert places.sum() == view.cols and not found[places].isfinite().any()
    assert torch.equal(found[~places], clean[~places])


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_a_graph_captures_lookups_and_their_sums(name: str, dtype: torch.dtype) -> None:
    """A capture fails if anything waits for the GPU; a replay gives the sums of the current indices."""
    table, view, shape = CASES[name].build()
    pool = randn(*shape, dtype=dtype).requires_grad_()
    index = indices(view.rows, 4, 9)

    def run() -> tuple[Tensor, Tensor]:
        rows = ops.embedding(index, pool, table, view, SCALE)
        return rows, torch.autograd.grad(rows.square().sum(), pool)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    index.copy_(index.flip(0) // 2)
    graph.replay()
    for found, expected in zip(captured, run(), strict=True):
        assert found.any() and torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_many_tokens_are_the_same_bits_every_time(dtype: torch.dtype) -> None:
    """The lookup is as large as in training: 16384 tokens of a table of 50000 × 768, a third of them padding."""
    case = Case(50000, 768, (128, 64), 100)
    tile_map = TileMap(-(-50000 // 128) * 12, 100, (128, 64), 3)
    table = torch.tensor(tile_map.chunk_table(), device=DEVICE).view(-1, 3)
    view = tile_map.view(case.rows, case.cols, 0, False)
    index, grad = indices(view.rows, 16384), randn(16384, 768, dtype=dtype)
    shape = [100 * 128, 64]
    found = [embedding.embedding_reduce(grad, index, table, view, SCALE, shape) for _ in range(5)]
    assert all(torch.equal(other, found[0]) for other in found)
    expected = reference.embedding_reduce(grad.double(), index, table, view, SCALE, shape)
    assert_near(found[0], expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_bags_on_a_gpu(mode: str, padding_idx: int | None) -> None:
    """Bits repeat, results are the dense layer's, and nothing waits for the GPU."""
    torch.manual_seed(0)
    model = roastify.convert(
        nn.Sequential(nn.EmbeddingBag(500, 96, mode=mode, padding_idx=padding_idx), nn.Linear(96, 64)), 4
    ).cuda()
    dense, weight = roastify.densify(model), pool_of(model).weight
    index = indices(500, 64, 20)
    torch.testing.assert_close(model(index), dense(index), rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(model(index).square().sum(), weight)[0] for _ in range(3)]
    assert gradients[0].any() and all(torch.equal(other, gradients[0]) for other in gradients)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    torch.autograd.grad(model(index).square().sum(), weight)

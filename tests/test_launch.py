"""Launches that cache their compiled kernels: which arguments they check, and when they compile another kernel."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from roastify.kernels import ops, reference
from roastify.kernels.view import TileView
from roastify.pool.mapping import TileMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

triton = pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from roastify.kernels.gpu import embedding, few_rows, gather, launch, linear, many_rows, parts, reduce, tuning  # noqa: E402
from roastify.kernels.gpu.launch import Launch  # noqa: E402
from roastify.kernels.gpu.mapping import view_arguments  # noqa: E402

# The interpreter computes with NumPy, whose integers warn where a hash wraps on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

SCALE = 0.7
NUM_SLOTS, TILE = 5, (64, 32)
POOL_SHAPE = NUM_SLOTS * TILE[0], TILE[1]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def mapped(device: str = DEVICE, key: int = 11) -> tuple[TileView, Tensor]:
    tile_map = TileMap(5000, NUM_SLOTS, TILE, key, sign="row")
    return tile_map.view(150, 192, 0), torch.tensor(tile_map.chunk_table(), dtype=torch.int64, device=device)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Return contiguous numbers that begin `offset` elements behind an address that is a multiple of 16."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    memory = torch.empty(values.numel() + 16, dtype=dtype, device=DEVICE)
    found = memory[offset : offset + values.numel()].view(shape)
    found.copy_(values)
    return found


def assert_near(actual: Tensor, expected: Tensor) -> None:
    atol = TOLERANCE[actual.dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=atol)


def gather_arguments(view: TileView) -> dict[str, Any]:
    """Return the arguments that `gather` fixes for its kernel; a test leaves some out or adds one."""
    return {"base": 0, "num_tiles": view.num_tiles, "BE": 2048, "BT": 1, "STRIPS": 0, **view_arguments(view)}


def test_names_of_kernel_arguments_are_checked() -> None:
    view, table = mapped()
    fixed = gather_arguments(view)
    with pytest.raises(TypeError, match="_gather_kernel has no parameters BLOCK; it has p_pool, p_table, p_out, scale"):
        Launch(gather._gather_kernel, (1,), **fixed, BLOCK=1)
    with pytest.raises(TypeError, match="_gather_kernel needs fixed values of rows, BT, because key before them is"):
        Launch(gather._gather_kernel, (1,), **{name: fixed[name] for name in fixed if name not in ("rows", "BT")})
    pool, out = randn(*POOL_SHAPE), randn(view.rows, view.cols)
    good = {"p_pool": pool, "p_table": table, "p_out": out, "scale": SCALE}
    for names in (("p_pool", "p_table", "scale"), ("p_table", "p_pool", "p_out", "scale")):
        with pytest.raises(TypeError, match=r"called with .*; it takes p_pool, p_table, p_out, scale"):
            Launch(gather._gather_kernel, (1,), **fixed)(**{name: good[name] for name in names})
    with pytest.raises(TypeError, match=r"called with .*p_x; it takes"):
        Launch(gather._gather_kernel, (1,), **fixed)(**good, p_x=pool)


def test_arguments_that_need_other_kernels_have_other_kinds() -> None:
    """A kind depends on the dtype, whether the address is a multiple of 16, and the box; not on values or sizes."""
    pool = randn(*POOL_SHAPE)
    assert launch._kind(pool) == launch._kind(pool[1:]) == launch._kind(pool.clone()[:3, 0])
    kinds = [
        launch._kind(each) for each in (pool, randn(8, offset=1), pool.half(), randn(8, dtype=torch.half, offset=3))
    ]
    boxes = [TensorDescriptor.from_tensor(each, box) for each in (pool, pool.half()) for box in ([64, 32], [32, 32])]
    kinds += map(launch._kind, boxes)
    kinds.append(launch._kind(SCALE))
    assert all(one != other for one, other in itertools.combinations(kinds, 2))
    assert launch._kind(SCALE) == launch._kind(1.0)
    for number in (1, True, None):
        with pytest.raises(TypeError, match=f"floats; found {number}; pass it to Launch"):
            launch._kind(number)


def computations(view: TileView, table: Tensor, dtype: torch.dtype, offset: int = 0) -> dict[str, tuple[Any, Any]]:
    """Return, by name, a computation by each kernel and the same computation by the reference in float64."""
    pool = randn(*POOL_SHAPE, dtype=dtype, offset=offset)
    bias = randn(view.rows, seed=2, dtype=dtype, offset=offset)
    weight = randn(view.rows, view.cols, seed=3, dtype=dtype, offset=offset)
    rows = randn(4, view.cols, seed=4, dtype=dtype, offset=offset)
    index = torch.tensor([3, 140, 3, 0], device=DEVICE)
    shape = list(POOL_SHAPE)

    def added(home: Any, name: str, *tensors: Tensor) -> Tensor:
        total = torch.ones(shape, dtype=torch.float64 if home is reference else torch.float32, device=DEVICE)
        getattr(home, name)(total, *tensors, table, view, SCALE)
        return total

    found: dict[str, tuple[Any, Any]] = {
        "gather": (
            lambda: gather.gather(pool, table, view, SCALE),
            lambda: reference.gather(pool.double(), table, view, SCALE),
        ),
        "reduce": (
            lambda: reduce.reduce(weight, table, view, SCALE, shape),
            lambda: reference.reduce(weight.double(), table, view, SCALE, shape),
        ),
        "reduce_": (
            lambda: added(reduce, "reduce_", weight),
            lambda: added(reference, "reduce_", weight.double()),
        ),
        "embedding": (
            lambda: embedding.embedding(index, pool, table, view, SCALE),
            lambda: reference.embedding(index, pool.double(), table, view, SCALE),
        ),
        "embedding_reduce": (
            lambda: embedding.embedding_reduce(rows, index, table, view, SCALE, shape),
            lambda: reference.embedding_reduce(rows.double(), index, table, view, SCALE, shape),
        ),
        "embedding_reduce_": (
            lambda: added(embedding, "embedding_reduce_", rows, index),
            lambda: added(reference, "embedding_reduce_", rows.double(), index),
        ),
    }
    ways = [(few_rows.one_row, 1), (few_rows.by_slot, 3), (few_rows.split, 3), (linear.linear, 200)]
    for (way, num_rows), b in itertools.product(ways, (None, bias)):
        x = randn(num_rows, view.cols, seed=5, dtype=dtype, offset=offset)
        found[f"{way.__name__}, bias: {b is not None}"] = (
            lambda way=way, x=x, b=b: way(x, pool, b, table, view, SCALE),
            lambda x=x, b=b: reference.linear(
                x.double(), pool.double(), None if b is None else b.double(), table, view, SCALE
            ),
        )
    return found


def assert_all_compute(view: TileView, table: Tensor, dtype: torch.dtype, offset: int = 0) -> None:
    for name, (compute, expect) in computations(view, table, dtype, offset).items():
        try:
            assert_near(compute(), expect())
        except AssertionError as error:
            raise AssertionError(f"{name}, {dtype}, {offset} elements past an aligned address: {error}") from None


def test_launches_keep_no_tensor_alive() -> None:
    view, table = mapped()
    before = [weakref.ref(table)]
    for compute, _ in computations(view, table, torch.bfloat16).values():
        result = compute()
        before.append(weakref.ref(result))
        cells = [cell.cell_contents for cell in compute.__closure__]
        before += [weakref.ref(value) for value in cells if isinstance(value, Tensor)]
    del cells
    del table, compute, result, _
    gc.collect()
    assert len(before) > 30 and [each() for each in before] == [None] * len(before)


REMEMBERED = [
    gather._launch,
    reduce._slots_launch,
    reduce._chunk_launches,
    embedding._embedding_launch,
    embedding._runs,
    few_rows._by_slot,
    few_rows._one_row,
    few_rows._split,
    many_rows._launch,
    parts._launch,
]


def forget() -> None:
    for function in REMEMBERED:
        function.cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return the kernels that are launched, each with its fixed arguments."""
    found: list[tuple[str, dict[str, Any]]] = []

    def record(self: Launch, run: Any = Launch.__call__, **arguments: Any) -> None:
        found.append((self._kernel.fn.__name__, self._fixed))
        run(self, **arguments)

    monkeypatch.setattr(Launch, "__call__", record)
    return found


@pytest.fixture
def precision() -> Iterator[None]:
    """Restore torch's precision of float32 products after the test."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_a_launch_is_compiled_again_for_another_precision(
    launched: list[tuple[str, dict[str, Any]]], precision: None
) -> None:
    view, table = mapped()
    ways = [few_rows.split, few_rows.by_slot]
    if DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9:
        ways.append(many_rows.many_rows)
    for dtype, way, asked in itertools.product((torch.float32, torch.bfloat16), ways, ("ieee", "tf32", "ieee")):
        torch.backends.cuda.matmul.fp32_precision = asked
        way(randn(3, view.cols, dtype=dtype), randn(*POOL_SHAPE, dtype=dtype), None, table, view, SCALE)
        name, fixed = next(entry for entry in reversed(launched) if entry[0] != "_sum_kernel")
        assert name == f"_{way.__name__}_kernel"
        assert fixed["PRECISION"] == (asked if dtype == torch.float32 else "ieee")


@pytest.mark.long
def test_a_launch_is_compiled_again_for_another_bias_or_dtype(launched: list[tuple[str, dict[str, Any]]]) -> None:
    """Dtype and bias change forth and back on one view, and every result is checked."""
    view, table = mapped()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for name, (compute, expect) in computations(view, table, dtype).items():
            launched.clear()
            assert_near(compute(), expect())
            if "bias" in name and not name.startswith("linear"):
                assert launched[-1][1]["BIAS"] == name.endswith("True")


def test_a_launch_is_compiled_again_for_a_pool_that_needs_wide_integers() -> None:
    view, _ = mapped()
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    split = tuning.split_settings(view, 3, 2, 232_448)
    many = tuning.many_rows_settings(view, 300, 2)
    keys = {
        few_rows._by_slot: lambda pool_numel: (3, device, pool_numel, "ieee", tuning.BY_SLOT),
        few_rows._one_row: lambda pool_numel: (device, pool_numel, False, tuning.one_row_settings(view.rows), None),
        few_rows._split: lambda pool_numel: (3, device, pool_numel, False, "ieee", split),
        many_rows._launch: lambda pool_numel: (300, device, pool_numel, False, "ieee", many),
    }
    for function, key in keys.items():

        def of(pool_numel: int, function: Any = function, key: Any = key) -> Launch:
            found = function(view, *key(pool_numel))
            return found if isinstance(found, Launch) else found[0]

        assert of(1000) is of(1000)
        assert of(1000)._fixed["INT"] == triton.language.int32
        assert of(1 << 31)._fixed["INT"] == triton.language.int64


@pytest.mark.gpu
def test_a_second_launch_skips_tritons_search_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    view, table = mapped()
    found = computations(view, table, torch.bfloat16)
    before = {name: compute() for name, (compute, _) in found.items()}
    jit = type(gather._gather_kernel)
    monkeypatch.setattr(jit, "run", lambda *args, **kwargs: pytest.fail("Triton looked for a kernel again"))
    for name, (compute, _) in found.items():
        assert torch.equal(compute(), before[name]), name


@pytest.mark.gpu
def test_launches_of_the_same_shapes_at_other_addresses_and_in_other_dtypes() -> None:
    """A kernel compiled for addresses that are multiples of 16 would fault, or read wrong numbers, at others."""
    view, table = mapped()
    forget()
    for dtype in (*TOLERANCE, *TOLERANCE):
        for offset in (0, 1, 3, 8, 0):
            assert_all_compute(view, table, dtype, offset)


@pytest.mark.gpu
def test_launches_on_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    view, table = mapped("cuda:0")
    pool, x = randn(*POOL_SHAPE, dtype=torch.bfloat16), randn(3, view.cols, seed=1, dtype=torch.bfloat16)
    forget()
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        there = [tensor.to(device) for tensor in (x, pool, table)]
        found = ops.linear(there[0], there[1], None, there[2], view, SCALE)
        weight = ops.gather(there[1], there[2], view, SCALE)
        assert found.device == weight.device == torch.device(device)
        assert_near(found, reference.linear(x.double(), pool.double(), None, table, view, SCALE).to(device))
        assert_near(weight, reference.gather(pool.double(), table, view, SCALE).to(device))


@pytest.fixture
def hooked() -> Iterator[list[dict[str, Any]]]:
    """Return what Triton tells its launch hooks, which profilers set."""
    told: list[dict[str, Any]] = []

    def hook(metadata: Any) -> None:
        told.append(metadata.get())

    triton.knobs.runtime.launch_enter_hook.add(hook)
    yield told
    triton.knobs.runtime.launch_enter_hook.remove(hook)


@pytest.mark.gpu
def test_launch_hooks_and_streams(hooked: list[dict[str, Any]]) -> None:
    """Triton's hooks are told of every launch, first or later, and every launch goes to the current stream."""
    view, table = mapped()
    pool = randn(*POOL_SHAPE, dtype=torch.bfloat16)
    expected = reference.gather(pool.double(), table, view, SCALE)
    forget()
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in (*streams, *streams):
        stream.wait_stream(torch.cuda.current_stream())
        hooked.clear()
        with torch.cuda.stream(stream):
            weight = gather.gather(pool, table, view, SCALE)
        torch.cuda.current_stream().wait_stream(stream)
        assert_near(weight, expected)
        assert [(told["name"], told["stream"]) for told in hooked] == [("_gather_kernel", stream.cuda_stream)]


@pytest.mark.gpu
def test_first_launches_within_a_cuda_graph_capture() -> None:
    """The first launch is cached in a capture; replays, and later calls outside of the graph, compute the same."""
    view, table = mapped()
    for dtype in TOLERANCE:
        pool, x = randn(*POOL_SHAPE, dtype=dtype), randn(3, view.cols, seed=1, dtype=dtype)
        # cuBLAS is not used here: one kernel gathers the weight, and another multiplies the rows.
        forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weight = gather.gather(pool, table, view, SCALE)
            out = few_rows.split(x, pool, None, table, view, SCALE)
        for seed in (7, 8):
            pool.copy_(torch.randn(*POOL_SHAPE, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(weight, gather.gather(pool, table, view, SCALE))
            assert torch.equal(out, few_rows.split(x, pool, None, table, view, SCALE))
            assert_near(weight, reference.gather(pool.double(), table, view, SCALE))
            assert_near(out, reference.linear(x.double(), pool.double(), None, table, view, SCALE))

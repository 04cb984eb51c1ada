"""The benchmarks' own code: the rival's kernels are right, results merge, the page says what the rows say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from benchmarks import (  # noqa: E402
    cases,
    contest,
    convolutions,
    hashednet,
    kernels,
    layers,
    page,
    performance_plots,
    performance_tables_page,
    stats,
    timing,
)
from benchmarks.hashednet import Blocks, Hashed  # noqa: E402
from benchmarks.rows import Cases  # noqa: E402

# The interpreter computes with NumPy, whose integers warn where a hash wraps on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
SHAPES = [(5, 48, 64, 97), (5, 77, 123, 1000), (33, 40, 30, 1)]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.shape
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("batch, rows, cols, size", SHAPES)
def test_hashednets_output_and_every_gradient_equal_the_reference(
    batch: int, rows: int, cols: int, size: int, sign: bool, dtype: torch.dtype
) -> None:
    weight = Hashed(rows, cols, seed=0x9ABCDEF1, sign=sign)
    pool, x, grad = randn(size, dtype=dtype), randn(batch, cols, dtype=dtype, seed=1), randn(batch, rows, dtype=dtype)
    wide = pool.double().requires_grad_()
    dense = hashednet.reference_weight(wide, weight)
    (expected_pool,) = torch.autograd.grad(dense, wide, grad.double().t() @ x.double(), retain_graph=True)
    dense = dense.detach()

    assert_near(hashednet.gather(pool, weight), dense, dtype)
    for blocks in (Blocks(16, 32, 32, 4, 2), Blocks(32, 16, 16, 4, 2, split=3)):
        assert_near(hashednet.forward(x, pool, weight, blocks), x.double() @ dense.t(), dtype)
        assert_near(hashednet.grad_x(grad, pool, weight, blocks), grad.double() @ dense, dtype)
        found = torch.ones(size, device=DEVICE)
        hashednet.add_grad_pool(grad, x, found, weight, blocks)
        assert_near(found - 1, expected_pool, torch.float32)
    found = torch.zeros(size, device=DEVICE)
    hashednet.scatter(grad.float().t() @ x.float(), found, weight)
    assert_near(found, expected_pool, torch.float32)


def test_hashednet_reads_a_float32_pool_beside_bfloat16_activations() -> None:
    weight, blocks = Hashed(20, 30, seed=3), Blocks(16, 16, 16, 4, 2)
    pool, x = randn(50).bfloat16().float(), randn(4, 30, dtype=torch.bfloat16, seed=1)
    expected = x.double() @ hashednet.reference_weight(pool.double(), weight).t()
    assert_near(hashednet.forward(x, pool, weight, blocks), expected, torch.bfloat16)


def test_hashednet_spreads_its_weights_evenly() -> None:
    """A biased hash would make the rival's reads local and flatter it."""
    size, weight = 1000, Hashed(1024, 1024, seed=5)
    index, sign = hashednet.reference_index(size, weight, torch.device("cpu"))
    counts = torch.bincount(index.flatten(), minlength=size).double()
    expected = weight.rows * weight.cols / size
    chi2 = float(((counts - expected).square() / expected).sum())
    assert len(counts) == size and abs(chi2 - size) < 4 * (2 * size) ** 0.5
    assert abs(float(sign.double().mean())) < 0.01
    # Neighbours in a row or a column read one element no more often than by chance, and their signs are independent.
    for step in (index[:, 1:] == index[:, :-1], index[1:] == index[:-1]):
        assert float(step.double().mean()) < 2 / size
    for pair in (sign[:, 1:] * sign[:, :-1], sign[1:] * sign[:-1]):
        assert abs(float(pair.double().mean())) < 0.01


@pytest.mark.parametrize("num_rows", [1, 16, 100, 512])
def test_hashednet_is_tried_with_many_settings(num_rows: int) -> None:
    for found in (hashednet.blocks_to_try(num_rows), hashednet.GRADIENT_BLOCKS):
        assert len(found) >= 8 and len(set(found)) == len(found)


def test_the_bandwidth_kernel_reads_every_element_in_every_pass() -> None:
    data, out = torch.ones(3 * 4096, device=DEVICE), torch.empty(2, device=DEVICE)
    assert timing.read(data, out, passes=4) == 4 * float(out.sum()) == 4 * 4 * data.numel()


def test_hashednet_skips_block_sizes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(sides: Mapping[str, Sequence[Callable[[], Any]]], most: int) -> dict[str, Any]:
        sides["rival"][0]()
        return {"rival": {"median_us": times.pop(0)}}

    def forward(x: Tensor, pool: Tensor, weight: Hashed, blocks: Blocks) -> None:
        if blocks in too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(layers, "l2_bytes", lambda: 1 << 10)
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(hashednet, "forward", forward)
    rival = contest.Rival(layers.Layers((70, 70), 8192, torch.float32, count=2), rows=3)
    too_large = rival.blocks[:2]
    times = [5.0 - place for place in range(4)] + [9.0] * 20
    assert rival.forward_settings == (torch.float32, rival.blocks[5])
    assert rival.tried == {"forward": len(rival.blocks) - 2} and len(rival.refused) == 2
    too_large, times = rival.blocks, []
    with pytest.raises(RuntimeError, match=r"no block setting runs.*shared memory"):
        contest.Rival(layers.Layers((70, 70), 8192, torch.float32, count=2), rows=3).forward()


@pytest.mark.parametrize(
    "shape, itemsize, count",
    [((4096, 4096), 2, 16), ((768, 768), 2, 170), ((10240, 10240), 4, 5), ((10**5, 10**5), 4, 2)],
)
def test_layers_in_a_row_fill_the_cache_four_times(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], itemsize: int, count: int
) -> None:
    monkeypatch.setattr(layers, "l2_bytes", lambda: 50_000_000)
    weight_bytes = shape[0] * shape[1] * itemsize
    assert layers.count_in_a_row(weight_bytes) == count
    assert count * weight_bytes > 4 * 50_000_000


@pytest.mark.parametrize(
    "rows, pool_elements, expected",
    [
        # 512·256 weights of 4 bytes and 16 rows of both sides, at 1 GB/s from the cache; 2 GB/s from memory.
        (16, 8192, ("cache", (512 * 256 * 4 + 16 * 768 * 4) / 1e3, 512 * 256 * 4 / 2e3)),
        # A pool of four caches: three quarters of what is read come from memory, at a tenth of the speed.
        (16, 4 * 50 * 8192, ("memory", 0.75 * 512 * 256 * 4 / 2e3, 512 * 256 * 4 / 2e3)),
        (4096, 8192, ("arithmetic", 2 * 4096 * 512 * 256 / 1e5, 2 * 4096 * 512 * 256 / 1e5)),
    ],
)
def test_the_floor_of_a_product(
    monkeypatch: pytest.MonkeyPatch, rows: int, pool_elements: int, expected: tuple[str, float, float]
) -> None:
    monkeypatch.setattr(layers, "l2_bytes", lambda: 1 << 10)
    found = layers.Layers((512, 256), pool_elements, torch.float32, count=2)
    speed = 1.0 if expected[0] == "cache" else 100.0
    ceilings = {
        "l2_mb": 50 * 8192 * 4 / 1e6,
        "memory_copy_gb_s": 1.5,
        "memory_read_gb_s": 2.0,
        "l2_read_gb_s": speed,
        "float32_tflop_s": 0.1,
    }
    floor = layers.floor_us(found, rows, ceilings)
    assert (floor["bound"], floor["pool_us"], floor["dense_us"]) == pytest.approx(expected)


MACHINE = {"gpu": "a GPU", "torch": "2", "triton": "3", "cuda": "13", "roastify": "0", "date": "today"}
CEILINGS = {
    "l2_mb": 50.0,
    "memory_copy_gb_s": 4000.0,
    "memory_read_gb_s": 4100.0,
    "l2_read_gb_s": 6000.0,
    "bfloat16_tflop_s": 700.0,
    "tf32_tflop_s": 350.0,
    "float32_tflop_s": 50.0,
}
TIMES = {"dense": 12.0, "pool": 10.0, "gathered": 15.0, "hashednet": 400.0, "hashednet_gathered": 200.0, "rival": 1.0}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every regime at a size for a CPU; each call runs once, and its time is made up."""

    def measure(sides: Mapping[str, Sequence[Callable[[], Any]]], most: int, graph: bool = True) -> dict[str, Any]:
        for calls in sides.values():
            for call in calls:
                call()
        return {name: stats.quartiles([TIMES[name]] * most, "us") for name in sides}

    shape = (200, 130)
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(kernels, "machine", lambda *_: dict(MACHINE))
    monkeypatch.setattr(timing, "ceilings", lambda: dict(CEILINGS))
    monkeypatch.setattr(layers, "l2_bytes", lambda: 1 << 10)
    monkeypatch.setattr(layers, "_MOST_IN_A_ROW", 3)
    monkeypatch.setattr(hashednet, "PRODUCT_BLOCKS", hashednet.PRODUCT_BLOCKS[1:3])
    monkeypatch.setattr(hashednet, "GRADIENT_BLOCKS", hashednet.GRADIENT_BLOCKS[:2])
    monkeypatch.setattr(cases, "LINEAR", [(shape, 0.05, {1: 1.0, 16: 2.0})])
    monkeypatch.setattr(cases, "FLOAT32_ROWS", (3,))
    monkeypatch.setattr(cases, "TRAINING", [(shape, 0.05, {5: 0.9})])
    monkeypatch.setattr(cases, "FOLDED", [((256, 256), 4, 0.05, {3: 1.0}, {3: 2.0})])
    monkeypatch.setattr(cases, "HASHEDNET", [(40, (0.05,))])
    monkeypatch.setattr(cases, "HASHEDNET_ROWS", (3,))
    monkeypatch.setattr(cases, "REPEATED_ROWS", (3,))
    monkeypatch.setattr(cases, "VOCABULARY", shape[0])
    monkeypatch.setattr(cases, "WIDTH", shape[1])
    monkeypatch.setattr(cases, "TOKENS", 20)
    monkeypatch.setattr(cases, "MEMORY", [(shape, 0.05)])


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(kernels.main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.long
def test_every_regime_is_measured_and_shown_on_the_page(small: None, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    code, output = run("--output", str(path))
    assert code == 0, output
    results = json.loads(path.read_text())
    by_regime = {name: [row for row in results["rows"] if row["regime"] == name] for name in cases.REGIMES}
    assert all(by_regime.values()) and not any("failed" in row for row in results["rows"])
    assert [row["sign"] for row in by_regime["linear"]] == ["row", "none", "tile", "element"] * 2 + ["row"] * 2
    assert all(row["layers"] == 3 and row["floor"]["pool_us"] > 0 for row in by_regime["linear"])
    assert all(row["forward_equal"] for row in by_regime["repeat"] if row["what"] == "pool")
    for row in by_regime["hashednet"]:
        assert row["hashednet_over_pool"] == 40
        # Narrow activations are tried with a narrow and with a float32 pool.
        assert row["hashednet_blocks_tried"]["forward"] == (4 if row["dtype"] == "bfloat16" else 2)
        assert ("grad_pool" in row["hashednet_blocks"]) == (row["what"] == "training")

    document = performance_tables_page.markdown(results)
    assert "| 200×130 | 0.05 | 16 | row | bfloat16 | 12.00 | 10.00 | 1.20 | 2 missed |" in document
    assert "| 200×130 | 0.05 | 1 | row | bfloat16 | 12.00 | 10.00 | 1.20 | 1 met |" in document
    # The aim for 1 row is met; those for 16 rows and for 16 rows in float16 are not; that for training is met. Of
    # HashedNet's aims 50 is missed and 25 is met, in two dtypes. The folded layer's aim for the forward pass is met.
    assert "| 256×256 | 4 | forward and backward | 3 | 12.00 | 10.00 | 1.20 | 2 missed |" in document
    assert "5 of 10 aims are met" in document
    drawn = performance_plots.draw(results["rows"], [], tmp_path)
    assert [path.name for path in drawn] == ["layers.svg", "hashednet.svg"]
    document = page.markdown(results, {"rows": []}, {"rows": []})
    assert all(f"(images/{path.name})" in document for path in drawn)
    assert "5 of 10 are met" in document and "Whole models" not in document and "On a CPU" not in document


def test_a_case_that_fails_is_a_row_and_the_others_are_measured(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cases.Layers.forward_error

    def fail_for_one_row(self: Any, x: Tensor, view: Any) -> float:
        if x.shape[0] == 1:
            raise RuntimeError("out of | something")
        return original(self, x, view)

    monkeypatch.setattr(cases.Layers, "forward_error", fail_for_one_row)
    path = tmp_path / "kernels.json"
    code, output = run("--regime", "linear", "--output", str(path))
    assert code == 1 and "4 failed" in output
    results = json.loads(path.read_text())
    assert sum("failed" in row for row in results["rows"]) == 4 and len(results["rows"]) == 10
    assert "failed: RuntimeError: out of / something |" in performance_tables_page.markdown(results)


@pytest.mark.parametrize("layout", convolutions.LAYOUTS)
def test_folded_convolutions_are_checked_and_timed(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Tensor] = []

    def measure(sides: Mapping[str, Sequence[Callable[[], Any]]]) -> dict[str, Any]:
        for calls in sides.values():
            for call in calls:
                found = call()
                called.extend([found] if isinstance(found, Tensor) else found)
        return {name: stats.quartiles([TIMES["dense" if name == "dense" else "pool"]] * 3, "us") for name in sides}

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(convolutions, "LAYERS", 2)
    rows, case = Cases(tmp_path / "rows.json", "", 1.0, dict(MACHINE)), convolutions.Case(2, 64, 64, 5)
    convolutions.measure(rows, case, layout, 4, DEVICE)
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["case"] == f"64→64, 2×5×5, {layout}, fold 4" and (row["fold"], row["hashes"]) == (4, 2)
    assert row["dense_over_converted"] == pytest.approx({"forward": 1.2, "with backward": 1.2})
    # Two layers of two sides, forward; then the gradients of input and weight of a dense one, and of input, pool and
    # basis of ours.
    assert 0 < row["error"] < convolutions.LIMIT and len(called) >= 2 * 2 + 2 * 2 + 2 * 2
    assert any(tensor.shape == (64, 64, 3, 3) for tensor in called)
    monkeypatch.setattr(convolutions, "LIMIT", 0.0)
    with pytest.raises(click.ClickException, match="the error is"):
        convolutions.measure(Cases(tmp_path / "others.json", "", 1.0), case, layout, 4, DEVICE)
    assert not (tmp_path / "others.json").exists()


def test_rows_of_other_regimes_are_kept_only_if_the_machine_is_the_same(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels.json"
    run("--regime", "float32,memory", "--output", str(path))
    run("--regime", "float32,training", "--output", str(path))
    regimes = [row["regime"] for row in json.loads(path.read_text())["rows"]]
    assert regimes == ["float32"] * 2 + ["training"] + ["memory"] * 8
    monkeypatch.setattr(kernels, "machine", lambda *_: MACHINE | {"gpu": "another"})
    run("--regime", "training", "--output", str(path))
    assert [row["regime"] for row in json.loads(path.read_text())["rows"]] == ["training"]


def test_a_quick_run_writes_no_file_by_default(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "RESULTS", tmp_path / "kernels.json")
    code, output = run("--quick", "--regime", "linear,memory")
    assert code == 0 and "0 failed" in output and not list(tmp_path.iterdir())


def test_the_error_names_an_unknown_regime(small: None) -> None:
    code, output = run("--regime", "linear,wrong")
    assert code == 2 and "unknown: wrong; there are linear, float32" in output


def test_the_page_shows_whole_models(tmp_path: Path) -> None:
    machine = MACHINE | {"tile": [128, 64]}
    row = {"case": "llama-1.1b/ratio=50/batch=1", "model": "llama", "kind": "decoding step", "batch": 1, "ratio": 50,
           "fold": 8}  # fmt: skip
    dense, converted = ({"time": {"median_ms": ms}, "peak_bytes": size} for ms, size in ((3.0, 2e9), (2.5, 5e7)))
    sides = {"dense": dense, "converted": converted, "dense_over_converted": 1.2, "pool_bytes": 44e6}
    models = [row | sides, row | {"case": "another", "failed": "no memory"}]
    linear = {"regime": "linear", "shape": [2, 2], "pool_mb": 1, "rows": 1, "sign": "row", "dtype": "x", "layers": 16}
    kernels_found = {"machine": machine, "rows": [linear], "notes": ["What a reader must know."]}
    document = performance_tables_page.markdown(kernels_found, {"machine": {"gpu": "a GPU"}, "rows": models})
    assert "| llama | decoding step | 1 | 50 | 44.0 | 3.000 | 2.500 | 1.20 | 1.5 missed | 2000 | 50 |" in document
    assert "failed: no memory" in document and "What a reader must know." in document
    assert [path.name for path in performance_plots.draw([], models, tmp_path)] == ["models.svg"]


def test_the_page_says_where_layers_are_slower_and_which_aims_are_missed() -> None:
    usual = {"dtype": "bfloat16", "sign": "row", "shape": [8, 4], "pool_mb": 1, "layers": 3, "pool": {}}
    linear = [
        usual | {"regime": "linear", "rows": rows, "dense_over_pool": value, "aim": aim}
        for rows, value, aim in ((1, 2.0, 1.5), (512, 0.9, 1), (2048, 0.996, None))
    ]
    folded = usual | {"regime": "folded", "rows": 1, "fold": 8, "backward": False, "dense_over_pool": 3.0, "aim": None}
    element = usual | {"regime": "linear", "rows": 1, "sign": "element", "dense_over_pool": 0.4, "aim": None}
    failed = {key: value for key, value in linear[0].items() if key not in ("pool", "dense_over_pool", "aim")}
    failed |= {"failed": "no memory", "rows": 64}
    found = {"machine": MACHINE | {"tile": [8, 8]}, "rows": [*linear, folded, element, failed]}
    of_cpu = {"case": "linear", "shape": [8, 4], "ratio": 10, "rows": 1, "layers": 1, "fold": 1, "pool_over_dense": 2.0}
    made = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    text = page.markdown(found, {"rows": []}, {"machine": made, "rows": [of_cpu]})
    assert "| not folded, forward | 2.00 | – | – | 0.90 | 1.00 | – |" in text
    assert "| folded 8 times, forward | 3.00 | – | – | – | – | – |" in text
    assert "- Not folded, forward, 1 of 3 cases: 8×4 0.90 at 512 rows." in text and "0.40 times as fast" in text
    assert "| Linear layers | 1 of 2 | 8×4, 512 rows: 0.90 of 1 |" in text and "1 of 2 are met" in text
    assert "- Not folded: 0.50 (8×4, ratio 10, 1 row) times as fast as dense." in text

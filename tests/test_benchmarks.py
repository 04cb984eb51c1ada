"""The benchmarks' own code: the rival's kernels are right, results merge, the page says what the rows say."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton")

# By its path: the repository's root on sys.path would offer the folder kernels/ as a top-level package.
spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
assert spec is not None
sys.modules.setdefault("benchmarks", importlib.util.module_from_spec(spec))

from benchmarks import hashednet  # noqa: E402
from benchmarks.hashednet import Blocks, Hashed  # noqa: E402

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
def test_hashednet_and_every_gradient(
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
    # Neighbours in a row and in a column: neither the same element more often than chance, nor signs in step.
    for step in (index[:, 1:] == index[:, :-1], index[1:] == index[:-1]):
        assert float(step.double().mean()) < 2 / size
    for pair in (sign[:, 1:] * sign[:, :-1], sign[1:] * sign[:-1]):
        assert abs(float(pair.double().mean())) < 0.01


@pytest.mark.parametrize("num_rows", [1, 16, 100, 512])
def test_hashednet_is_tried_with_many_settings(num_rows: int) -> None:
    found = hashednet.blocks_to_try(num_rows)
    assert len(found) >= 8 and len(set(found)) == len(found)

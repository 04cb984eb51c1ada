"""What every test shares: poisoned memory, few threads, no GPU tests without a GPU, two processes, small helpers."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from processes import Processes
from torch import Tensor

# Two threads on every machine, so that a dependence on the number of threads shows. If several test workers run, each
# has one thread: four threads on two cores mostly wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
if "PYTEST_XDIST_WORKER" in os.environ:
    # For the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
# Readline sets it for the processes of pytest-xdist, and tables would be cut to a width that no test asked for.
os.environ.pop("COLUMNS", None)

# Derandomized, so that a failure in CI is a failure here. No deadline: the first example includes torch's start.
hypothesis.settings.register_profile("roastify", derandomize=True, deadline=None)
hypothesis.settings.load_profile("roastify")

# `benchmarks` is imported by its path: with the repository's root on sys.path, kernels/ would be a top-level package.
_BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "__init__.py"
_spec = importlib.util.spec_from_file_location("benchmarks", _BENCHMARKS)
assert _spec is not None
sys.modules.setdefault("benchmarks", importlib.util.module_from_spec(_spec))

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


def _set_deterministic(enabled: bool) -> None:
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new floating-point memory with NaN, so that a test fails if an element is read before it is written."""
    if request.node.get_closest_marker("compiled"):
        # Dynamo cannot trace the replaced allocators, and compiled code does not call them.
        yield
        return
    if request.node.get_closest_marker("gpu"):
        # On a GPU torch's deterministic mode replaces algorithms that users run, and refuses cuBLAS without an
        # environment variable. On a CPU it changes no algorithm that roastify uses.
        for owner, name in _ALLOCATORS:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
        return
    _set_deterministic(True)
    yield
    _set_deterministic(False)


@pytest.fixture(autouse=True)
def synchronization_allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Allow synchronization again after a GPU test that refused it, passed or not: torch keeps that for the process."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.get_sync_debug_mode():
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Turn TensorFloat32 off in cuDNN: it rounds to ten bits, so a difference in a last bit may become a large one."""
    kinds: list[Any] = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    yield
    for kind, precision in zip(kinds, before, strict=True):
        kind.fp32_precision = precision


@pytest.fixture
def shipped_algorithms(poisoned_memory: None) -> None:
    """Turn torch's deterministic mode off, for tests that check whether results repeat without it."""
    _set_deterministic(False)


@pytest.fixture
def chunk_table() -> Callable[..., Tensor]:
    """Return a function that builds a pool's chunk table from the mappings of its regions, in order."""

    def build(*maps: Any) -> Tensor:
        rows: Sequence[tuple[int, int, int]] = [row for tile_map in maps for row in tile_map.chunk_table()]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)

    return build


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two processes, started for all tests of a file."""
    processes = Processes(tmp_path_factory.mktemp("meeting"))
    yield processes
    processes.end()

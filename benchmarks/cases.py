"""What the GPU benchmark of the operators measures, regime by regime, and what is aimed at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import hashednet, timing
from benchmarks.contest import Contest
from benchmarks.hashednet import Hashed
from benchmarks.layers import DEVICE, SCALE, SIGN, Layers, floor_us, randn, relative_error
from benchmarks.rows import Row
from roastify.kernels import ops, reference

Shape = tuple[int, int]
Aims = dict[int, float | None]

# (out, in), the pool's megabytes in bfloat16, rows, and dense ÷ pool that is aimed at.
LINEAR: list[tuple[Shape, float, Aims]] = [
    ((4096, 4096), 11, {1: 2.0, 16: 2.0, 64: 1.4, 128: 0.95, 256: 0.95, 512: 0.95, 1024: 0.95, 2048: 0.93, 8192: 0.97}),
    ((4096, 4096), 54, {1: 1.5, 16: 1.5, 64: None, 512: None}),
    ((768, 768), 5.7, {1: 1.8, 16: 1.8, 512: None}),
    ((1024, 4096), 2.7, {1: 1.8, 16: 1.8, 512: None}),
    ((4096, 1024), 2.7, {1: 1.8, 16: 1.8, 512: None}),
    ((11008, 4096), 11, {1: None, 16: None, 512: None}),
    ((2048, 2048), 11, {1: None, 16: None, 512: None}),
]
ROWS_OF_EVERY_SIGN = (1, 16, 64, 1024)
FLOAT16_ROWS = (16, 1024)
FLOAT32_ROWS = (1, 16, 512, 8192)
TRAINING: list[tuple[Shape, float, Aims]] = [
    ((4096, 4096), 11, {1024: None, 8192: 0.9}),
    ((768, 3072), 5.7, {1024: None, 4096: None}),
]
# (out, in), fold, the pool's megabytes in bfloat16; dense ÷ pool that is aimed at, forward and with backward.
FOLDED_HASHES = 2
FOLDED: list[tuple[Shape, int, float, Aims, Aims]] = [
    (
        (4096, 4096),
        8,
        11,
        {1: 2.8, 16: 2.4, 64: 1.8, 512: 2.0, 2048: 2.3, 8192: 2.5},
        {512: None, 2048: 2.8, 8192: 3.0},
    ),
    ((4096, 4096), 4, 11, {1: None, 16: None, 64: None, 512: None, 2048: None, 8192: None}, {2048: None, 8192: None}),
    (
        (11008, 4096),
        8,
        11,
        {1: 3.8, 16: 2.5, 64: 2.2, 512: 1.8, 2048: 2.2, 8192: 2.2},
        {512: None, 2048: 2.4, 8192: 2.5},
    ),
    ((4096, 11008), 8, 11, {1: None, 16: None, 512: None, 2048: None}, {2048: None}),
    ((2048, 2048), 8, 11, {1: 2.0, 16: 1.6, 64: 1.2, 512: 1.2, 2048: 1.8, 8192: 2.0}, {2048: 2.0, 8192: 2.6}),
    ((1024, 1024), 8, 5.7, {1: None, 16: None, 64: None, 512: None, 2048: None, 8192: None}, {2048: None, 8192: None}),
    ((4096, 1024), 8, 5.7, {1: None, 16: None, 512: None, 2048: None, 8192: None}, {2048: None, 8192: None}),
    ((1024, 4096), 8, 5.7, {1: None, 16: None, 512: None, 2048: None, 8192: None}, {2048: None, 8192: None}),
    ((768, 768), 4, 5.7, {1: 2.2, 16: 1.6, 64: 1.0, 512: 1.0, 2048: 1.0, 8192: 1.1}, {2048: 1.0, 8192: 1.1}),
    ((3072, 768), 4, 5.7, {1: 2.2, 16: 1.6, 64: 1.0, 512: 1.0, 2048: 1.0, 8192: 1.1}, {2048: 1.0, 8192: 1.1}),
    ((768, 3072), 4, 5.7, {1: None, 16: None, 64: None, 512: None, 2048: None, 8192: None}, {2048: None, 8192: None}),
]
# D, and the pool's megabytes in float32.
HASHEDNET: list[tuple[int, tuple[int, ...]]] = [(1024, (4, 32)), (4096, (4, 32)), (10240, (4, 32, 512))]
HASHEDNET_ROWS = (16, 512)
# HashedNet ÷ pool that is aimed at, at the largest size.
HASHEDNET_AIMS = {"inference": 50.0, "training": 25.0}
REPEATED_ROWS = (1, 16, 64, 512, 8192)
VOCABULARY, WIDTH, TOKENS = 30522, 768, 8192
MEMORY: list[tuple[Shape, float]] = [((4096, 4096), 11), ((768, 768), 5.7), ((VOCABULARY, WIDTH), 4.7)]


class Effort(NamedTuple):
    """How much is measured.

    Args:
        most: replays of a graph.
        ceilings: of this machine (`timing.ceilings`).
    """

    most: int
    ceilings: dict[str, float]


class Case(NamedTuple):
    """What one row is about, and how it is measured."""

    facts: Row
    measure: Callable[[], Row]


# One at a time: cases of the same layers follow one another.
@functools.lru_cache(maxsize=1)
def layers_of(shape: Shape, elements: float, dtype: torch.dtype, fold: int = 1, hashes: int = 1) -> Layers:
    return Layers(shape, elements, dtype, fold=fold, hashes=hashes)


@functools.lru_cache(maxsize=1)
def contest_of(shape: Shape, elements: float, dtype: torch.dtype, rows: int) -> Contest:
    return Contest(layers_of(shape, elements, dtype), rows)


def forget() -> None:
    """Free the layers of the cases so far."""
    contest_of.cache_clear()
    layers_of.cache_clear()
    torch.cuda.empty_cache()


def in_bfloat16(megabytes: float) -> float:
    """Return the elements of a pool of so many megabytes in bfloat16; other dtypes get as many elements."""
    return megabytes * 1e6 / 2


def facts(shape: Shape, dtype: torch.dtype, elements: float, rows: int, aim: float | None = None, **extra: Any) -> Row:
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "pool_mb": elements * dtype.itemsize / 1e6,
        "rows": rows,
        "sign": SIGN,
        "aim": aim,
        **extra,
    }


def compared(layers: Layers, times: dict[str, dict[str, float]]) -> Row:
    ratio = times["dense"]["median_us"] / times["pool"]["median_us"]
    return {**layers.facts(), **times, "dense_over_pool": ratio}


def forward(shape: Shape, elements: float, dtype: torch.dtype, rows: int, sign: str, tf32: bool, effort: Effort) -> Row:
    """Time the forward product beside the dense one."""
    with timing.matmul_precision(tf32):
        layers = layers_of(shape, elements, dtype)
        x, _ = layers.activations(rows)
        views = layers.views(sign)
        error = layers.forward_error(x, views[len(views) // 3])
        times = timing.measure({"dense": layers.dense_forward(x), "pool": layers.pool_forward(x, views)}, effort.most)
        return {**compared(layers, times), "floor": floor_us(layers, rows, effort.ceilings), "error": error}


def linear_cases(effort: Effort) -> Iterator[Case]:
    """The forward product in narrow dtypes, with every kind of sign."""

    def case(shape: Shape, elements: float, dtype: torch.dtype, rows: int, sign: str, aim: float | None) -> Case:
        # What is aimed at is the sign that the planner takes; the others are there to compare.
        what = facts(shape, dtype, elements, rows, aim if sign == SIGN else None) | {"sign": sign}
        return Case(what, partial(forward, shape, elements, dtype, rows, sign, False, effort))

    for shape, megabytes, aims in LINEAR:
        for rows, aim in aims.items():
            for sign in (SIGN, "none", "tile", "element") if rows in ROWS_OF_EVERY_SIGN else (SIGN,):
                yield case(shape, in_bfloat16(megabytes), torch.bfloat16, rows, sign, aim)
    shape, megabytes, aims = LINEAR[0]
    for rows in FLOAT16_ROWS:
        yield case(shape, in_bfloat16(megabytes), torch.float16, rows, SIGN, aims.get(rows))


def float32_cases(effort: Effort) -> Iterator[Case]:
    """The forward product of float32 weights, with tf32 and without."""
    shape, megabytes, _ = LINEAR[0]
    elements = in_bfloat16(megabytes)
    for tf32 in (True, False):
        for rows in FLOAT32_ROWS:
            yield Case(
                facts(shape, torch.float32, elements, rows, tf32=tf32),
                partial(forward, shape, elements, torch.float32, rows, SIGN, tf32, effort),
            )


def training_cases(effort: Effort) -> Iterator[Case]:
    """Forward and backward: gradients of the input, and of the weight or the pool."""

    def measure(shape: Shape, elements: float, rows: int) -> Row:
        layers = layers_of(shape, elements, torch.bfloat16)
        x, grad = layers.activations(rows)
        views = layers.views(SIGN)
        view = views[len(views) // 3]
        error = max(layers.forward_error(x, view), layers.backward_error(x, grad, view))
        sides = {"dense": layers.dense_backward(x, grad), "pool": layers.pool_backward(x, grad, views)}
        return {**compared(layers, timing.measure(sides, effort.most)), "error": error}

    for shape, megabytes, aims in TRAINING:
        elements = in_bfloat16(megabytes)
        for rows, aim in aims.items():
            yield Case(facts(shape, torch.bfloat16, elements, rows, aim), partial(measure, shape, elements, rows))


def folded_cases(effort: Effort) -> Iterator[Case]:
    """Folded layers, forward, and forward and backward; every call folds its own input."""

    def measure(shape: Shape, elements: float, fold: int, rows: int, backward: bool) -> Row:
        layers = layers_of(shape, elements, torch.bfloat16, fold, FOLDED_HASHES)
        x, grad = layers.activations(rows)
        views = layers.views(SIGN)
        view = views[len(views) // 3]
        error = layers.forward_error(x, view)
        if backward:
            error = max(error, layers.backward_error(x, grad, view))
            sides = {"dense": layers.dense_backward(x, grad), "pool": layers.pool_backward(x, grad, views)}
        else:
            sides = {"dense": layers.dense_forward(x), "pool": layers.pool_forward(x, views)}
        found = {**compared(layers, timing.measure(sides, effort.most)), "error": error}
        return found if backward else {**found, "floor": floor_us(layers, rows, effort.ceilings)}

    for shape, fold, megabytes, forward_aims, backward_aims in FOLDED:
        elements = in_bfloat16(megabytes)
        for backward, aims in ((False, forward_aims), (True, backward_aims)):
            for rows, aim in aims.items():
                extra = {"fold": fold, "hashes": FOLDED_HASHES, "backward": backward}
                yield Case(
                    facts(shape, torch.bfloat16, elements, rows, aim, **extra),
                    partial(measure, shape, elements, fold, rows, backward),
                )


def hashednet_cases(effort: Effort) -> Iterator[Case]:
    """Against HashedNet, as the ROAST paper compares: square layers, inference and a whole training step."""

    def measure(shape: Shape, elements: float, dtype: torch.dtype, rows: int, what: str) -> Row:
        with timing.matmul_precision(tf32=True):
            contest = contest_of(shape, elements, dtype, rows)
            return contest.inference(effort.most) if what == "inference" else contest.training(effort.most)

    for size, budgets in HASHEDNET:
        for dtype in (torch.float32, torch.bfloat16):
            for budget in budgets:
                for rows in HASHEDNET_ROWS:
                    for what, aim in HASHEDNET_AIMS.items():
                        shape, elements = (size, size), budget * 1e6 / 4
                        aimed = (size, rows) == (HASHEDNET[-1][0], HASHEDNET_ROWS[-1])
                        extra = {"what": what, "budget_mb": budget, "tf32": dtype == torch.float32}
                        yield Case(
                            facts(shape, dtype, elements, rows, aim if aimed else None, **extra),
                            partial(measure, shape, elements, dtype, rows, what),
                        )


def repeat_cases(effort: Effort) -> Iterator[Case]:
    """Whether the same call gives the same bits again; HashedNet's atomics as well."""

    def same(call: Callable[[], Tensor]) -> bool:
        first = call()
        # Other work in between, so that the second call meets another state of the caches and the allocator.
        randn(1 << 24, dtype=torch.float32).square_().sum().item()
        return torch.equal(first, call())

    def pool(shape: Shape, elements: float, dtype: torch.dtype, rows: int, tf32: bool) -> Row:
        with timing.matmul_precision(tf32):
            layers = layers_of(shape, elements, dtype)
            x, grad = layers.activations(rows)
            view = layers.views(SIGN)[layers.count // 3]
            arguments = (layers.pool, None, layers.table, view, SCALE)
            return {
                "forward_equal": same(lambda: ops.linear(x, *arguments)),
                "grad_x_equal": same(lambda: ops.linear_t(grad, *arguments)),
                "grad_pool_equal": same(lambda: layers.grad_pool(grad, x, view)),
            }

    def rival(shape: Shape, elements: float, rows: int) -> Row:
        layers = layers_of(shape, elements, torch.float32)
        x, grad = layers.activations(rows)

        def grad_pool() -> Tensor:
            out = torch.zeros(layers.pool.numel(), device=DEVICE)
            hashednet.add_grad_pool(grad, x, out, Hashed(*shape, seed=1), hashednet.GRADIENT_BLOCKS[0])
            return out

        return {"grad_pool_equal": same(grad_pool)}

    shape, megabytes, _ = LINEAR[0]
    elements = in_bfloat16(megabytes)
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        for rows in REPEATED_ROWS:
            yield Case(
                facts(shape, dtype, elements, rows, what="pool", tf32=tf32),
                partial(pool, shape, elements, dtype, rows, tf32),
            )
    rows = HASHEDNET_ROWS[-1]
    yield Case(
        facts(shape, torch.float32, elements, rows, what="HashedNet", tf32=False), partial(rival, shape, elements, rows)
    )


def memory_cases(effort: Effort) -> Iterator[Case]:
    """Operations that only move data: gather and reduce beside a copy of the dense weight, and embedding."""

    def moved(layers: Layers, times: dict[str, dict[str, float]], least: int) -> Row:
        return {**compared(layers, times), "least_bytes": least, "gb_s": least / times["pool"]["median_us"] / 1e3}

    def against_a_copy(shape: Shape, elements: float, dtype: torch.dtype, what: str) -> Row:
        layers = layers_of(shape, elements, dtype)
        views = layers.views(SIGN)
        if what == "gather":
            calls = [partial(ops.gather, layers.pool, layers.table, view, SCALE) for view in views]
            expected = reference.gather(layers.pool.double(), layers.table, views[-1], SCALE)
        else:
            calls = [
                partial(ops.reduce, grad, layers.table, view, SCALE, list(layers.pool.shape))
                for grad, view in zip(layers.dense, views, strict=True)
            ]
            grad = layers.dense[-1].double()
            expected = reference.reduce(grad, layers.table, views[-1], SCALE, list(layers.pool.shape))
        error = layers.checked(what, relative_error(calls[-1](), expected))
        times = timing.measure({"dense": [weight.clone for weight in layers.dense], "pool": calls}, effort.most)
        # The weight or its gradient once, and what of the pool one layer reaches.
        weight_bytes = layers.dense[0].nbytes
        return moved(layers, times, weight_bytes + min(layers.pool.nbytes, weight_bytes)) | {"error": error}

    def embedding(shape: Shape, elements: float, dtype: torch.dtype, what: str) -> Row:
        layers = layers_of(shape, elements, dtype)
        views, pool_shape = layers.views(SIGN), list(layers.pool.shape)
        index = torch.randint(0, shape[0], (TOKENS,), device=DEVICE)
        grad = randn(TOKENS, shape[1], dtype=dtype)
        if what == "embedding":
            dense = [partial(F.embedding, index, weight) for weight in layers.dense]
            calls = [partial(ops.embedding, index, layers.pool, layers.table, view, SCALE) for view in views]
            expected = reference.embedding(index, layers.pool.double(), layers.table, views[-1], SCALE)
            least = 2 * grad.nbytes
        else:
            dense = [partial(torch.ops.aten.embedding_dense_backward, grad, index, shape[0], -1, False)] * layers.count
            reduce = torch.ops.roastify.embedding_reduce
            calls = [partial(reduce, grad, index, layers.table, view, SCALE, pool_shape) for view in views]
            expected = reference.embedding_reduce(grad.double(), index, layers.table, views[-1], SCALE, pool_shape)
            least = grad.nbytes + layers.pool.nbytes
        error = layers.checked(what, relative_error(calls[-1](), expected))
        # The backward passes sort, with code that a graph may not hold.
        graph = what == "embedding"
        times = timing.measure({"dense": dense, "pool": calls}, effort.most, graph=graph)
        return moved(layers, times, least) | {"error": error, "graph": graph}

    for shape, megabytes in MEMORY:
        elements = in_bfloat16(megabytes)
        for dtype in (torch.bfloat16, torch.float32):
            for what in ("gather", "reduce"):
                yield Case(
                    facts(shape, dtype, elements, 0, what=what), partial(against_a_copy, shape, elements, dtype, what)
                )
            for what in ("embedding", "embedding backward") if shape == (VOCABULARY, WIDTH) else ():
                yield Case(
                    facts(shape, dtype, elements, TOKENS, what=what), partial(embedding, shape, elements, dtype, what)
                )


REGIMES: dict[str, Callable[[Effort], Iterator[Case]]] = {
    "linear": linear_cases,
    "float32": float32_cases,
    "training": training_cases,
    "folded": folded_cases,
    "hashednet": hashednet_cases,
    "repeat": repeat_cases,
    "memory": memory_cases,
}

"""A converted model in training loops: mixed precision, optimizers, weight decay, learning rates, compilers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captured import losses_of_replays_and_of_steps
from naive import MODELS, Naive, cpu_trains_lstm
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import roastify
from roastify.conversion.converted import pool_of

# cuDNN warns if a recurrent layer's weights are not in one piece of memory.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous:UserWarning")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pair(name: str, dtype: torch.dtype, device: str = "cpu", **settings: Any) -> tuple[Any, nn.Module]:
    """Return a converted model and the dense one."""
    torch.manual_seed(0)
    dense = MODELS[name]().to(device, dtype)
    config = roastify.RoastConfig(**{"ratio": 3.0, "min_numel": 512, "tile": "8x8"} | settings)
    return roastify.convert(dense, config=config), dense


def inputs(count: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 40, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def loss(out: Tensor) -> Tensor:
    return out.float().square().mean() if out.dtype != torch.float64 else out.square().mean()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in roastify.densify(model).named_parameters()}


# Which dense step a step on the pool stands for.


@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_sgd_on_the_pool_is_dense_sgd_projected(name: str, precondition: bool) -> None:
    """With momentum and weight decay: Γ divides only gradients, and decay of λ·s·pool projects to decay of the pool.

    After each step the dense twin's weights are projected back onto what the pool can express.
    """
    # With basis kernels a weight is a product of two parameters, so its step is no projection.
    model, dense = pair(name, torch.float64, precondition=precondition, kernel_basis="none")
    naive = Naive(model, dense)
    naive.write(pool_of(model).weight)
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}
    sgd, dense_sgd = (torch.optim.SGD(each.parameters(), **options) for each in (model, dense))
    before = pool_of(model).weight.detach().clone()
    left = 0.0
    for x in inputs(20, torch.float64):
        for run, optimizer in ((model, sgd), (dense, dense_sgd)):
            optimizer.zero_grad()
            loss(run(x)).backward()
            optimizer.step()
        pool = naive.projected()
        stepped = {key: value.detach().clone() for key, value in dense.named_parameters()}
        naive.write(pool)
        left = max(
            left, *(float((stepped[key] - value.detach()).abs().max()) for key, value in dense.named_parameters())
        )
    expected = naive.projected()
    assert left > 1e-4, "the dense steps must leave what the pool can express"
    assert float((expected - before).abs().max()) > 1e-2
    close = torch.allclose(pool_of(model).weight.detach(), expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
    assert close == precondition, "without Γ a step is another one, so the comparison could have failed"
    if precondition:
        kept = dict(dense.named_parameters())
        for key, value in model.named_parameters():
            if key in kept:
                torch.testing.assert_close(value, kept[key], rtol=0, atol=1e-11 * float(value.detach().abs().max()))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 32)
        self.conv = nn.Conv1d(32, 32, 3)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 90)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 1000).long() % 90
        return self.down(self.up(self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)).relu())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda made: made.__name__)
def test_ratio_1_projected_trains_as_the_dense_model(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    dense = Words()
    config = roastify.RoastConfig(ratio=1.0, init="project", tile="8x8", min_numel=512)
    model = roastify.convert(dense, config=config)
    assert all(shared.scale == 1.0 for shared in pool_of(model).plan.shared)
    steppers = [optimizer(each.parameters(), lr=0.01, weight_decay=0.1) for each in (model, dense)]
    for x in inputs(10, torch.float32):
        outs = [each(x) for each in (model, dense)]
        assert torch.equal(*outs)
        for out, stepper in zip(outs, steppers, strict=True):
            stepper.zero_grad()
            loss(out).backward()
            stepper.step()
    after = weights(model)
    for key, value in dense.named_parameters():
        assert torch.equal(after[key], value), key


def test_adamw_shrinks_every_weight_by_the_same_factor() -> None:
    model, _ = pair("transformer", torch.float64)
    before = weights(model)
    weight = pool_of(model).weight
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.3)
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    after = weights(model)
    shared = [entry.name for entry in pool_of(model).plan.shared]
    assert shared
    for key in shared:
        torch.testing.assert_close(after[key], before[key] * 0.97**3, rtol=1e-12, atol=0)


def regression(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Return the loss before the first step and after the last."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    target = x @ torch.randn(64, 8, generator=generator) / 8
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (model(x) - target).square().mean()
        error.backward()
        optimizer.step()
        losses.append(error.item())
    return losses[0], losses[-1]


@pytest.mark.long
def test_learning_rates() -> None:
    """At ratio 50 the pool trains at the dense model's rates; with SGD it is slower, and trains at higher rates too."""
    torch.manual_seed(0)
    widths = (64, 256, 256, 256)
    layers = [part for sizes in itertools.pairwise(widths) for part in (nn.Linear(*sizes), nn.Tanh())]
    dense = nn.Sequential(*layers, nn.Linear(256, 8))
    config = {"ratio": 50.0, "tile": "8x8", "min_numel": 512, "share": "all"}

    def final(kind: Any, precondition: bool | None, **options: Any) -> float:
        model = copy.deepcopy(dense)
        if precondition is not None:
            model = roastify.convert(model, config=roastify.RoastConfig(**config, precondition=precondition))
        first, last = regression(model, kind(model.parameters(), **options))
        return last / first

    sgd = torch.optim.SGD
    # A rate at which the dense model trains well, then one that is too high for it.
    assert final(sgd, None, lr=0.3, momentum=0.9) < 0.02
    assert final(sgd, True, lr=0.3, momentum=0.9) < 0.6
    assert not final(sgd, None, lr=1.0, momentum=0.9) < 1.0
    assert final(sgd, True, lr=1.0, momentum=0.9) < 0.1
    # Without Γ a step is larger by the number of readers.
    assert final(sgd, True, lr=3.0) < 0.5
    assert not final(sgd, False, lr=3.0) < 1.0
    # Adam's steps do not depend on the gradient's scale: the dense rate suits the pool, with Γ or without.
    adam = [final(torch.optim.AdamW, precondition, lr=3e-3) for precondition in (None, True, False)]
    assert max(adam) < 0.1, adam


# Optimizers and gradient clipping.

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, way: str, device: str) -> None:
    """An optimizer's implementations agree, and train the pool as a dense weight with its values and gradients."""
    kind, options = OPTIMIZERS[name]
    if way == "fused" and (name == "rmsprop" or (name == "adagrad" and device == "cuda")):
        pytest.skip(f"torch has no fused {name} on {device}")
    model, _ = pair("transformer", torch.float32, device)
    twin = copy.deepcopy(model)
    naive = Naive(twin, MODELS["transformer"]().to(device))
    naive.dense.load_state_dict(roastify.densify(twin).state_dict())
    optimizer = kind(model.parameters(), **options, **{way: True})
    others = [value for key, value in naive.dense.named_parameters() if key in dict(twin.named_parameters())]
    plain = kind([naive.pool, *others], **options, foreach=False)
    losses = []
    for x in inputs(5, torch.float32, device):
        for run, stepper in ((model, optimizer), (naive, plain)):
            stepper.zero_grad()
            out = loss(run(x))
            out.backward()
            stepper.step()
            losses.append(out.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != losses[2]
    torch.testing.assert_close(losses[::2], losses[1::2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_clipping_counts_the_pool_once(device: str) -> None:
    model, _ = pair("transformer", torch.float32, device)
    (x,) = inputs(1, torch.float32, device)
    (loss(model(x)) * 1000).backward()
    before = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    norm = torch.stack([grad.norm() for grad in before.values()]).norm()
    found = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert float(norm) > 0.5 and "roast_pool.weight" in before
    torch.testing.assert_close(found, norm)
    for key, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, before[key] * (0.5 / norm), rtol=1e-4, atol=1e-8)


# Precision.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_with_a_scaler(name: str, dtype: torch.dtype, device: str) -> None:
    if name == "recurrent" and device == "cpu" and not cpu_trains_lstm(dtype):
        pytest.skip(f"torch has no {dtype} LSTM on this CPU")
    model, dense = pair(name, torch.float32, device)
    naive = Naive(model, dense)
    weight = pool_of(model).weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    (x,) = inputs(1, torch.float32, device)
    with torch.autocast(device, dtype):
        out = loss(model(x))
    scaler.scale(out).backward()
    scaler.unscale_(optimizer)
    loss(naive(x)).backward()
    assert weight.grad is not None and naive.pool.grad is not None and weight.grad.dtype == torch.float32
    error = (weight.grad - naive.pool.grad).norm() / naive.pool.grad.norm()
    assert float(error) < (2e-2 if dtype == torch.float16 else 8e-2)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("device", DEVICES)
def test_a_scaler_skips_the_step_that_overflows(device: str) -> None:
    model, _ = pair("stack", torch.float32, device)
    weight = pool_of(model).weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    before = weight.detach().clone()
    (x,) = inputs(1, torch.float32, device)
    for attempt in range(40):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            out = loss(model(x))
        scaler.scale(out).backward()
        scaler.step(optimizer)
        scaler.update()
        if attempt == 0:
            assert torch.equal(weight, before), "the pool's infinite gradient must be seen"
        if not torch.equal(weight, before):
            break
    assert weight.isfinite().all() and not torch.equal(weight, before) and 0 < attempt < 39


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name == "transformer" else ()) for name in MODELS]
)
def test_pure_bfloat16(name: str, device: str) -> None:
    """Readers' gradients are summed in float32 and rounded once."""
    model, dense = pair(name, torch.float32, device)
    naive = Naive(model, dense)
    model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (x,) = inputs(1, torch.float32, device)
    first = loss(model(x.bfloat16()))
    first.backward()
    grad = pool_of(model).weight.grad
    assert grad is not None and grad.dtype == torch.bfloat16
    loss(naive(x)).backward()
    assert naive.pool.grad is not None
    if name != "transformer":
        assert float((grad - naive.pool.grad).norm() / naive.pool.grad.norm()) < 0.1
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        last = loss(model(x.bfloat16()))
        last.backward()
    assert last.item() < 0.7 * first.item()


# Compilers.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Blocks(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(32, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((x.abs() * 1000).long() % 96)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def blocks(depth: int, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = Blocks(depth).to(device)
    return dense, roastify.convert(dense, config=roastify.RoastConfig(ratio=4.0, tile="8x8"))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(run: Callable[[Tensor], Tensor], model: nn.Module, device: str = "cpu") -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for x in inputs(4, torch.float32, device):
        optimizer.zero_grad()
        out = loss(run(x))
        out.backward()
        optimizer.step()
        losses.append(out.item())
    return losses


@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_breaks_where_the_dense_models_does() -> None:
    """The model alone is one graph; a step with `backward` and the optimizer breaks where torch breaks it."""
    found, losses = [], []
    for model in blocks(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        xs = inputs(3, torch.float32)

        def step(x: Tensor, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            out = loss(model(x))
            out.backward()
            optimizer.step()
            return out

        start = copy.deepcopy(model.state_dict())
        torch.compiler.reset()
        alone = torch._dynamo.explain(model)(xs[0])
        torch.compiler.reset()
        whole = torch._dynamo.explain(step)(xs[0])
        reasons = [reason.reason.split("\n")[0] for reason in whole.break_reasons]
        found.append((alone.graph_count, alone.graph_break_count, reasons))
        for run in (torch.compile(step, backend="aot_eager"), step):
            torch.compiler.reset()
            model.load_state_dict(start)
            losses.append([run(x).item() for x in xs])
    assert found[0] == found[1] and found[0][:2] == (1, 0)
    torch.testing.assert_close(losses[::2], losses[1::2], rtol=1e-4, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_as_the_eager_one() -> None:
    _, model = blocks(3)
    twin = copy.deepcopy(model)
    found = train(torch.compile(model, backend="aot_eager", fullgraph=True), model)
    torch.testing.assert_close(found, train(twin, twin), rtol=1e-4, atol=0)
    assert len(set(found)) == 4


@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_backward_pass_of_an_eager_model() -> None:
    _, model = blocks(3)
    (x,) = inputs(1, torch.float32)
    loss(model(x)).backward()
    weight = pool_of(model).weight
    expected, weight.grad = weight.grad, None
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss(model(x)).backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_blocks_compiled_by_themselves() -> None:
    """A block's place in the pool is a constant of its graph, so torch's limit must allow one graph for each block."""
    _, model = blocks(10)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=16):
        found = train(model, model)
    # torch first takes the number λ for a variable; once it finds that λ is constant, it compiles again.
    assert counter.frame_count in (10, 11)
    torch.testing.assert_close(found, train(twin, twin), rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.compiled
def test_inductor_trains_as_eager() -> None:
    _, model = blocks(3, "cuda")
    twin = copy.deepcopy(model)
    found = train(torch.compile(model, fullgraph=True), model, "cuda")
    torch.testing.assert_close(found, train(twin, twin, "cuda"), rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_a_whole_step_in_a_cuda_graph(way: str, autocast: bool) -> None:
    """Forward, backward, clipping and an optimizer; every replay reads the weights that the last one wrote."""
    _, model = blocks(3, "cuda")
    twin = copy.deepcopy(model)
    xs = inputs(6, torch.float32, "cuda")

    def stepper(model: nn.Module) -> Callable[[Tensor], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True, **{way: True})

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
                out = loss(model(x))
            out.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return out

        return step

    found, expected = losses_of_replays_and_of_steps(stepper, model, twin, xs)
    assert len(set(found)) == 6
    torch.testing.assert_close(found, expected, rtol=3e-2 if autocast else 1e-3, atol=0)

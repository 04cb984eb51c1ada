"""The gradient gate gives the pool naive autograd's gradient, however the graph is used, and takes less memory."""

from __future__ import annotations

import copy
import gc
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from naive import MODELS, Naive, cpu_trains_lstm
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import roastify
from roastify.conversion.converted import pool_of
from roastify.kernels import reference
from roastify.kernels.grad_buffer import GradBuffer
from roastify.pool.pass_cache import passes

# cuDNN warns if a recurrent layer's weights are not in one piece of memory.
pytestmark = [
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous:UserWarning"),
    pytest.mark.usefixtures("full_precision"),
]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def pair(name: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Any, Naive]:
    torch.manual_seed(0)
    dense = MODELS[name]().to(device, dtype)
    model = roastify.convert(dense, config=roastify.RoastConfig(ratio=3.0, min_numel=512, tile="8x8"))
    assert len(pool_of(model).plan.shared) > 1
    return model, Naive(model, dense)


def inputs(count: int, dtype: torch.dtype = torch.float64, device: str = "cpu", grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(3, 40, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(count)]
    return [x.requires_grad_(grad) for x in made]


def loss(out: Tensor) -> Tensor:
    return out.square().sum()


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert one.dtype == other.dtype and other.any()
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.fixture(autouse=True)
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Return, for each run of a gate, whether the gradient buffer held a sum; after the test no buffer may hold one."""
    taken: list[bool] = []
    made: weakref.WeakSet[GradBuffer] = weakref.WeakSet()
    take = GradBuffer.take

    def watched(buffer: GradBuffer) -> Tensor | None:
        made.add(buffer)
        total = take(buffer)
        taken.append(total is not None)
        return total

    monkeypatch.setattr(GradBuffer, "take", watched)
    yield taken
    assert not any(len(buffer._sums) for buffer in made)
    assert not passes.running and not passes.recomputed


# Ways to use a graph. Each function takes a forward, its pool and inputs, and returns gradients of the pool.

Run = Callable[[Tensor], Tensor]


def once(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    loss(run(xs[0])).backward()
    return [pool.grad]


def accumulated(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    for x in xs:
        loss(run(x)).backward()
    return [pool.grad]


def several_forwards(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    sum(loss(run(x)) for x in xs).backward()
    return [pool.grad]


def last_first(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    seen = []
    for out in reversed([run(x) for x in xs]):
        loss(out).backward()
        seen.append(pool.grad.clone())
    return seen


def retained(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    out = run(xs[0])
    loss(out).backward(retain_graph=True)
    first = pool.grad.clone()
    out.sum().backward(retain_graph=True)
    loss(out).backward()
    return [first, pool.grad]


def asked_for(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    out = run(xs[0])
    found = list(torch.autograd.grad(loss(out), [pool], retain_graph=True))
    found += torch.autograd.grad(loss(out), [xs[0], pool])
    return [*found, pool.grad]


def inputs_only(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    out = run(xs[0])
    found = list(torch.autograd.grad(loss(out), xs[:1], retain_graph=True))
    loss(out).backward(inputs=xs[:1])
    return [*found, xs[0].grad, pool.grad]


def pool_only(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    loss(run(xs[0])).backward(inputs=[pool])
    return [pool.grad, xs[0].grad]


def one_output(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(run(xs[0]).flatten()[0], pool))


def second_order(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    first, of_x = torch.autograd.grad(loss(run(xs[0])), [pool, xs[0]], create_graph=True)
    (first.square().sum() + of_x.square().sum()).backward()
    return [first.detach(), pool.grad]


def one_backward_of_each_kind(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    out = run(xs[0])
    with_graph = torch.autograd.grad(loss(out), pool, create_graph=True)[0].detach()
    loss(out).backward()
    return [with_graph, pool.grad]


def batched(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    """The pool gets one gradient through the graph of a gradient, and another through the buffer."""
    out = run(xs[0])
    of_x = torch.autograd.grad(loss(out), xs[0], create_graph=True)[0]
    (loss(out) + of_x.square().sum()).backward()
    return [pool.grad]


def without_gradients_between(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    out = run(xs[0])
    with torch.no_grad():
        run(xs[1])
    with torch.inference_mode():
        run(xs[1])
    loss(out).backward()
    with torch.no_grad():
        assert not run(xs[1]).requires_grad
    return [pool.grad]


def set_to_none_and_zero(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    seen = []
    optimizer = torch.optim.SGD([pool], lr=0.0)
    for set_to_none in (True, False, True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss(run(xs[0])).backward()
        seen.append(pool.grad.clone())
    return seen


def whole_under_checkpoint(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    loss(checkpoint(run, xs[0], use_reentrant=False)).backward()
    loss(checkpoint(run, xs[1], use_reentrant=True)).backward()
    return [pool.grad]


def nested_checkpoints(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(run, x, use_reentrant=False)

    loss(checkpoint(inner, xs[0], use_reentrant=False)).backward()
    return [pool.grad]


def offloaded(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    with save_on_cpu():
        out = run(xs[0])
    loss(out).backward()
    return [pool.grad]


def after_an_error(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    out = run(xs[0])

    def fail(grad: Tensor) -> None:
        raise ValueError

    hook = xs[0].register_hook(fail)
    # The hook on the input runs after layers have added their gradients to the buffer.
    with pytest.raises(ValueError):
        loss(out).backward(retain_graph=True)
    pool.grad = None
    hook.remove()
    loss(out).backward()
    return [pool.grad]


def in_threads(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    """Several threads run backward passes through one graph at once."""
    out = run(xs[0])
    found: dict[int, Tensor] = {}
    meet = threading.Barrier(4, timeout=60)

    def work(number: int) -> None:
        meet.wait()
        for _ in range(3):
            (found[number],) = torch.autograd.grad(loss(out), pool, retain_graph=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(4)]


def backward_within_backward(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    inner: list[Tensor] = []
    out = run(xs[0])
    middle = out * 1.0

    def another(grad: Tensor) -> None:
        with torch.enable_grad():
            inner.extend(torch.autograd.grad(loss(run(xs[1])), pool))

    middle.register_hook(another)
    (loss(middle) + loss(out)).backward()
    return [*inner, pool.grad]


def anomalies(run: Run, pool: Tensor, xs: list[Tensor]) -> list[Tensor | None]:
    with torch.autograd.detect_anomaly(check_nan=True):
        loss(run(xs[0])).backward()
    return [pool.grad]


SITUATIONS = [
    once, accumulated, several_forwards, last_first, retained, asked_for, inputs_only, pool_only, one_output,
    second_order, one_backward_of_each_kind, batched, without_gradients_between, set_to_none_and_zero,
    whole_under_checkpoint, nested_checkpoints, offloaded, after_an_error, in_threads, backward_within_backward,
    anomalies,
]  # fmt: skip
each_situation = pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@each_situation
@each_model
def test_the_gradient_equals_naive_autograds(name: str, situation: Callable[..., Any], sums: list[bool]) -> None:
    check(name, situation, torch.float64, "cpu", sums)


@pytest.mark.parametrize("situation", [accumulated, retained, second_order], ids=lambda situation: situation.__name__)
@each_model
def test_the_gradient_in_float32(name: str, situation: Callable[..., Any], sums: list[bool]) -> None:
    check(name, situation, torch.float32, "cpu", sums)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_situation
@each_model
def test_the_gradient_on_a_gpu(name: str, situation: Callable[..., Any], dtype: torch.dtype, sums: list[bool]) -> None:
    if name == "recurrent" and situation in (second_order, one_backward_of_each_kind, batched):
        pytest.skip("cuDNN's recurrent layers have no second derivative")
    if name == "recurrent" and situation is without_gradients_between:
        pytest.skip("torch's dense recurrent layers flatten their weights in place between forward and backward")
    check(name, situation, dtype, "cuda", sums)


def check(name: str, situation: Callable[..., Any], dtype: torch.dtype, device: str, sums: list[bool]) -> None:
    model, naive = pair(name, dtype, device)
    expected = situation(naive, naive.pool, inputs(3, dtype, device, grad=True))
    found = situation(model, pool_of(model).weight, inputs(3, dtype, device, grad=True))
    assert_same(found, expected, TOLERANCE[dtype])
    if situation is inputs_only:
        assert not sums, "nobody asked for the pool's gradient"
    else:
        assert any(sums) or situation is second_order


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["not reentrant", "reentrant", "nested"])
@each_model
def test_checkpointed_layers(name: str, kind: str, autocast: bool) -> None:
    """Recomputed layers share casts of the pool; reentrant checkpointing runs backward passes within another one."""
    if name == "recurrent" and autocast and not cpu_trains_lstm(torch.bfloat16):
        pytest.skip("torch has no bfloat16 LSTM on this CPU")
    model, naive = pair(name, torch.float32)

    def again(function: Run, x: Tensor) -> Tensor:
        if kind == "nested":
            return checkpoint(lambda x: checkpoint(function, x, use_reentrant=False), x, use_reentrant=False)
        return checkpoint(function, x, use_reentrant=kind == "reentrant")

    def run(model: Any, pool: Tensor) -> list[Tensor | None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(inputs(1, torch.float32, grad=True)[0])
        loss(out.float()).backward()
        return [pool.grad]

    expected = run(naive, naive.pool)
    model.again = again
    assert_same(run(model, pool_of(model).weight), expected, 4e-2 if autocast else 2e-5)


def test_recomputed_layers_cast_the_pool_once() -> None:
    model, _ = pair("stack", torch.float32)
    numel, casts = pool_of(model).weight.numel(), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.numel() == numel and out.dtype == torch.bfloat16:
                casts.append(out.dtype)
            return out

    model.again = lambda function, x: checkpoint(function, x, use_reentrant=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(inputs(1, torch.float32)[0])
    with Casts():
        loss(out.float()).backward()
    assert len(casts) == 1


# Parts of models.


def test_parts_of_a_model_called_by_themselves_share_a_gate(sums: list[bool]) -> None:
    """Many training loops call parts of a model, and never the model itself."""
    model, naive = pair("stack")

    def run(model: Any, x: Tensor) -> Tensor:
        return model.last(model.layers[2](model.layers[0](model.first(x)).tanh()))

    (x,) = inputs(1)
    naive(x)
    loss(run(naive.dense, x)).backward()
    loss(run(model, x)).backward()
    assert_same([pool_of(model).weight.grad], [naive.pool.grad], 1e-11)
    assert sums == [True]


def test_layers_left_out_and_a_loss_in_the_middle() -> None:
    model, naive = pair("stack")

    def run(model: Any, dense: Any, pool: Tensor, x: Tensor) -> list[Tensor | None]:
        seen: list[Tensor] = []
        hook = dense.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
        model(x)
        hook.remove()
        loss(seen[0]).backward()
        return [pool.grad, dense.last.bias.grad]

    (x,) = inputs(1)
    assert_same(run(model, model, pool_of(model).weight, x), run(naive, naive.dense, naive.pool, x), 1e-11)


def test_the_pool_gets_no_gradient_if_nothing_reads_it() -> None:
    model, _ = pair("stack")
    out = model(inputs(1)[0])
    (out.detach() * model.last.bias[0]).sum().backward()
    assert pool_of(model).weight.grad is None

    # A reader that returns no gradient: autograd runs the gate without one.
    class Blocks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    Blocks.apply(model(inputs(1)[0])).sum().backward()
    assert pool_of(model).weight.grad is None


def test_gradients_of_weights_read_as_tensors_add_to_those_of_layers() -> None:
    """The pool itself is read past the operators too, and autograd adds up that gradient."""
    model, naive = pair("stack")
    (x,) = inputs(1)
    naive(x)
    (loss(naive(x)) + naive.dense.layers[1].weight.pow(3).sum() + naive.pool.exp().sum()).backward()
    (loss(model(x)) + model.layers[1].weight.pow(3).sum() + pool_of(model).read().exp().sum()).backward()
    assert_same([pool_of(model).weight.grad], [naive.pool.grad], 1e-11)


def test_a_frozen_pool(sums: list[bool]) -> None:
    model, _ = pair("stack")
    pool_of(model).weight.requires_grad_(False)
    loss(model(inputs(1, grad=True)[0])).backward()
    assert pool_of(model).weight.grad is None and not sums
    pool_of(model).weight.requires_grad_()
    loss(model(inputs(1)[0])).backward()
    assert pool_of(model).weight.grad is not None and len(sums) == 1


@pytest.mark.parametrize("product", ["linear", "linear_t"])
def test_products_keep_only_what_a_gradient_needs(product: str) -> None:
    """As in dense layers: a frozen weight needs no activations, and an input without gradients needs no weight."""
    model, _ = pair("stack")
    shared, weight = model.layers[0]._roast["weight"], pool_of(model).weight
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(getattr(shared, product)(x, None).sum(), weight)
    out = getattr(shared, product)(x.detach(), None)
    with torch.no_grad():
        weight.mul_(2.0)
    assert_same(torch.autograd.grad(out.sum(), weight), [expected], 1e-12)

    weight.requires_grad_(False)
    (expected,) = torch.autograd.grad(getattr(shared, product)(x, None).sum(), x)
    changing = x * 1.0
    out = getattr(shared, product)(changing, None)
    changing.mul_(2.0)
    assert_same(torch.autograd.grad(out.sum(), x), [expected], 1e-12)


class OfAnotherGraph(torch.autograd.Function):
    """Applies a function to a leaf with the weight's values; the leaf's gradient is then the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = weight.detach().requires_grad_()
            ctx.out = [function(ctx.leaf)]
        return ctx.out[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *torch.autograd.grad(ctx.out[0], ctx.leaf, grad), None


def test_a_pool_that_is_not_a_leaf() -> None:
    """Meta-learning has such a pool; its values change between two reads."""
    model, _ = pair("stack")
    (x,) = inputs(1)
    pool = pool_of(model).weight.detach()

    def run(leaf: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        weight = leaf * 1.0
        first = call(weight)
        weight = weight * 2.0
        loss(first + call(weight)).backward()
        return leaf.grad

    def through(weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"roast_pool.weight": weight}, (x,))

    def naive(weight: Tensor) -> Tensor:
        return OfAnotherGraph.apply(weight, through)

    found, expected = (run(pool.clone().requires_grad_(), call) for call in (through, naive))
    assert_same([found], [expected], 1e-11)


# Hooks, copies, several models, threads and streams.


@pytest.mark.parametrize("times", [1, 2])
def test_hooks_run_once_a_backward_pass(times: int) -> None:
    model, naive = pair("transformer")
    (x,) = inputs(1)
    weight, calls = pool_of(model).weight, []
    weight.register_hook(lambda grad: calls.append(("gradient", grad.clone())))
    weight.register_post_accumulate_grad_hook(lambda weight: calls.append(("accumulated", weight.grad.clone())))
    for _ in range(times):
        loss(model(x)).backward()
    loss(naive(x)).backward()
    assert [what for what, _ in calls] == ["gradient", "accumulated"] * times
    expected = [naive.pool.grad * (1 + index // 2 if index % 2 else 1) for index in range(2 * times)]
    assert_same([grad for _, grad in calls], expected, 1e-11)


def test_an_optimizer_that_steps_in_the_hook() -> None:
    """The hook frees the gradient before the backward pass ends; the next forward pass reads the new weights."""
    model, _ = pair("stack")
    twin = copy.deepcopy(model)
    one, other = pool_of(model).weight, pool_of(twin).weight
    inside = torch.optim.SGD([one], lr=0.01, fused=True)
    outside = torch.optim.SGD([other], lr=0.01)

    def step(weight: Tensor) -> None:
        inside.step()
        inside.zero_grad()

    one.register_post_accumulate_grad_hook(step)
    for x in inputs(3):
        loss(model(x)).backward()
        loss(twin(x)).backward()
        outside.step()
        outside.zero_grad()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: AveragedModel(model).module], ids=["copy", "average"])
def test_copies_have_gates_of_their_own(through: Callable[[Any], Any]) -> None:
    model, naive = pair("transformer")
    (x,) = inputs(1)
    held = model(x)
    twin = through(model)
    loss(twin(x)).backward()
    assert pool_of(model).weight.grad is None
    loss(held).backward()
    loss(naive(x)).backward()
    assert_same([pool_of(m).weight.grad for m in (twin, model)], [naive.pool.grad] * 2, 1e-11)


def test_an_average_of_models_follows_the_trained_model() -> None:
    model, _ = pair("stack")
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected = pool_of(model).weight.detach().clone()
    for step, x in enumerate(inputs(3)):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
        average.update_parameters(model)
        now = pool_of(model).weight.detach()
        expected = now.clone() if step == 0 else expected.lerp(now, 0.5)
    torch.testing.assert_close(pool_of(average.module).weight.detach(), expected)


def test_two_models_at_once(sums: list[bool]) -> None:
    """First one model feeds the other; then each runs by itself, in turn."""
    (model, naive), (other, other_naive) = pair("stack"), pair("stack")
    with torch.no_grad():
        for weight in (pool_of(other).weight, other_naive.pool):
            weight.mul_(1.5)
    x, y = inputs(2)

    def run(first: Run, second: Run) -> None:
        loss(second(first(x))).backward()
        one, two = first(y), second(y)
        loss(one).backward()
        loss(two).backward()

    run(model, other)
    assert len(sums) == 4
    run(naive, other_naive)
    found = [pool_of(model).weight.grad, pool_of(other).weight.grad]
    assert_same(found, [naive.pool.grad, other_naive.pool.grad], 1e-11)


def test_models_trained_in_threads() -> None:
    """Each thread trains a model of its own; the first forward passes run in the main thread."""
    pairs = [pair("stack") for _ in range(3)]
    xs = inputs(4)
    meet = threading.Barrier(len(pairs), timeout=60)
    outs = [model(xs[3]) for model, _ in pairs]

    def work(number: int) -> None:
        meet.wait()
        loss(outs[number]).backward()
        for x in xs[:3]:
            loss(pairs[number][0](x)).backward()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, naive in pairs:
        for x in xs:
            loss(naive(x)).backward()
        assert_same([pool_of(model).weight.grad], [naive.pool.grad], 1e-11)


@pytest.mark.gpu
def test_layers_on_several_streams(sums: list[bool]) -> None:
    """Backward runs each layer on the stream of its forward; all layers add to one buffer."""
    torch.manual_seed(0)
    dense = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(6)).cuda()
    model = roastify.convert(dense, 3)
    x = torch.randn(512, 1024, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]

    def run(side: bool) -> Tensor:
        pool_of(model).weight.grad = None
        main, outs = torch.cuda.current_stream(), []
        for number, layer in enumerate(model):
            stream = streams[number % 3] if side else main
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                outs.append(layer(x))
        for stream in streams:
            main.wait_stream(stream)
        torch.stack(outs).square().mean().backward()
        grad = pool_of(model).weight.grad
        assert grad is not None and sums == [True]
        sums.clear()
        return grad.clone()

    expected = run(False)
    for _ in range(20):
        found = run(True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# Memory.


class Deep(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Large(TorchDispatchMode):
    """Counts new tensors of at least a given number of elements; views and tensors written in place do not count."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = not any(value.alias_info for value in func._schema.returns)
        if fresh and isinstance(out, Tensor) and out.numel() >= self.numel:
            self.made.append(func)
        return out


def test_a_backward_pass_makes_one_tensor_of_the_pools_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = roastify.convert(Deep(48, 64), config=roastify.RoastConfig(ratio=4.0, tile="16x16"))
    pool, x = pool_of(model).weight, torch.randn(4, 48)
    for autocast in (False, True):
        pool.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        with Large(pool.numel()) as large:
            loss(out.float()).backward()
        assert large.made == [torch.ops.aten.zeros.default]
    monkeypatch.setattr(GradBuffer, "total", lambda buffer: None)
    out = model(x)
    with Large(pool.numel()) as large:
        loss(out).backward()
    assert len(large.made) > 64, "else the count above proves nothing"


def test_adding_to_the_buffer_makes_no_tensor_of_the_pools_size() -> None:
    """This looks inside the operators; the count above does not."""
    model = roastify.convert(
        nn.Sequential(nn.Embedding(64, 48), nn.Linear(48, 48), *(nn.Linear(48, 48) for _ in range(40))),
        config=roastify.RoastConfig(ratio=4.0, tile="16x16"),
    )
    total, table = torch.zeros_like(pool_of(model).weight), pool_of(model).table
    embedding, linear = (model[number]._roast["weight"] for number in (0, 1))
    with torch.no_grad(), Large(total.numel()) as large:
        reference.reduce_(total, torch.randn(48, 48), table, linear.view, linear.scale)
        reference.linear_reduce_(total, torch.randn(4, 48), torch.randn(4, 48), table, linear.view, linear.scale)
        index = torch.tensor([1, 5])
        reference.embedding_reduce_(total, torch.randn(2, 48), index, table, embedding.view, embedding.scale)
        assert not large.made
        reference.reduce(torch.randn(48, 48), table, linear.view, linear.scale, list(total.shape))
    assert large.made


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_peak_memory_of_a_deep_stack(autocast: bool) -> None:
    model = roastify.convert(Deep(1024, 64).cuda(), 4)
    pool, x = pool_of(model).weight, torch.randn(16, 1024, device="cuda")
    size = pool.numel() * 4

    def step() -> int:
        pool.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = model(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(out.float()).backward()
        return torch.cuda.max_memory_allocated() - before

    step()
    # Memory holds the sum, one layer's weight and its gradient (a sixteenth of the pool each), and activations.
    assert size < step() < 1.35 * size


def test_buffers_live_no_longer_than_their_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds if the backward pass fails, and if the gate's output is freed."""
    from roastify.kernels import grad_buffer

    alive: list[Any] = []

    class Watched(grad_buffer._PassSum):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.append(self)

        def __del__(self) -> None:
            ended.append(self.total is None)

    ended: list[bool] = []
    monkeypatch.setattr(grad_buffer, "_PassSum", Watched)
    model, _ = pair("stack")
    (x,) = inputs(1, grad=True)
    out = model(x)
    hook = x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(out).backward(retain_graph=True)
    alive.clear()
    gc.collect()
    assert ended == [False]
    hook.remove()
    loss(out).backward()
    alive.clear()
    assert ended == [False, True]


def train(model: nn.Module, steps: int, device: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(2, 32, device=device)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model(x)).backward(retain_graph=step % 10 == 0)
        optimizer.step()


@pytest.mark.long
def test_ten_thousand_steps_leak_no_memory() -> None:
    # On small matrices several threads mostly wait for each other.
    torch.set_num_threads(1)
    model = roastify.convert(nn.Linear(32, 32), 2)
    # Python keeps the memory of freed objects for later ones; after a thousand steps or so it grows no more.
    train(model, 2_000, "cpu")
    gc.collect()
    objects = len(gc.get_objects())
    tracemalloc.start()
    try:
        train(model, 100, "cpu")
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        train(model, 100, "cpu")
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    train(model, 7_800, "cpu")
    gc.collect()
    # A step makes over a hundred objects, of 20 kB in all.
    assert grown < 100_000
    assert len(gc.get_objects()) - objects < 500


@pytest.mark.gpu
def test_ten_thousand_steps_leak_no_memory_on_a_gpu() -> None:
    model = roastify.convert(nn.Linear(32, 32).cuda(), 2)
    train(model, 100, "cuda")
    # Memory that other tests left must not be freed between the two measurements.
    gc.collect()
    before = torch.cuda.memory_allocated()
    train(model, 9_900, "cuda")
    gc.collect()
    assert torch.cuda.memory_allocated() == before

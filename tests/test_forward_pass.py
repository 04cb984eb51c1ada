"""One forward pass makes one compute copy of the pool and one gradient gate, and never reads an old copy."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import roastify
from roastify.conversion.converted import pool_of
from roastify.errors import RoastError
from roastify.layers.base import RoastModule
from roastify.pool.forward_pass import RootForward
from roastify.pool.pass_cache import passes
from roastify.pool.pool import RoastPool

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Model(nn.Module):
    """Reads the pool in every way, in some more than once; `between` runs in the middle of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 32)
        self.head = nn.Linear(32, 96, bias=False)
        self.head.weight = self.embed.weight
        self.between: Callable[[], None] = lambda: None

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.block(x)
        self.between()
        return self.head(self.block(x)) * scale


class Checkpointed(Model):
    use_reentrant = False

    def block(self, x: Tensor) -> Tensor:
        return checkpoint(super().block, x, use_reentrant=self.use_reentrant)


def tokens(device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (3, 7), generator=torch.Generator().manual_seed(seed)).to(device)


def converted(device: str = "cpu", kind: type[Model] = Model, **settings: Any) -> Any:
    torch.manual_seed(0)
    return roastify.convert(kind().to(device), config=roastify.RoastConfig(**{"ratio": 3.0} | settings))


class PoolCasts(TorchDispatchMode):
    """Count the operations that read a whole tensor of the pool's size and write it in another dtype."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.numel = pool_of(model).weight.numel()
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # In inference mode the dispatcher sees `to` itself.
        casts = torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype
        if func in (*casts, torch.ops.aten.copy_.default):
            source = args[0] if func in casts else args[1]
            if isinstance(source, Tensor) and source.numel() == self.numel and source.dtype != out.dtype:
                self.dtypes.append((source.dtype, out.dtype))
        return out


def nodes(output: Tensor) -> list[Any]:
    """Return every node of an output's graph."""
    found, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return list(found)


def gates(*outputs: Tensor) -> int:
    """Return how many gates the graphs of these outputs have together."""
    return sum(node.name() == "_GateNodeBackward" for node in nodes(torch.stack([output.sum() for output in outputs])))


def reference_gradient(model: Any, *inputs: Tensor, autocast: bool = False) -> Tensor:
    """Return the pool's gradient outside of a forward pass: every read makes a copy and a gate of its own."""
    pool = pool_of(model)
    losses = []
    for index in inputs:
        with torch.autocast(index.device.type, torch.bfloat16, enabled=autocast):
            losses.append(loss(type(model).forward(model, index)))
    return torch.autograd.grad(sum(losses), pool.weight)[0]


def loss(output: Tensor) -> Tensor:
    return output.float().square().mean()


def assert_same_gradient(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None and found.dtype == expected.dtype and expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.fixture(autouse=True)
def no_pass_is_left() -> Iterator[None]:
    yield
    assert passes.running == {}


# How often the pool is cast.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autocast_casts_the_pool_once_a_forward_pass(mode: Callable[[], Any], device: str) -> None:
    model = converted(device)
    with mode(), torch.autocast(device, torch.bfloat16), PoolCasts(model) as casts:
        model(tokens(device))
    assert casts.dtypes == [(torch.float32, torch.bfloat16)]
    with mode(), torch.autocast(device, torch.bfloat16), PoolCasts(model) as casts:
        type(model).forward(model, tokens(device))
    assert len(casts.dtypes) == 6, "outside of a pass every product casts: else the first count proves nothing"


def test_layers_of_another_dtype_than_the_pools_share_a_cast() -> None:
    class TwoDtypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.last = (nn.Linear(40, 40) for _ in range(3))
            self.wide.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.narrow(self.wide(x).float()))

    model = roastify.convert(TwoDtypes(), 3)
    with PoolCasts(model) as casts:
        out = model(torch.randn(2, 40, dtype=torch.float64))
    assert casts.dtypes == [(torch.float64, torch.float32)] and gates(out) == 1


@pytest.mark.parametrize("autocast", [True, False])
def test_a_training_step_has_one_cast_and_one_gate(autocast: bool) -> None:
    model = converted()
    expected = reference_gradient(model, tokens(), autocast=autocast)
    with PoolCasts(model) as casts:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(tokens())
        assert gates(out) == 1
        forward = len(casts.dtypes)
        loss(out).backward()
    assert forward == autocast
    # Each product's gradient is widened as it is added to the sum; no cast has the pool's size.
    assert casts.dtypes[forward:] == []
    assert_same_gradient(pool_of(model).weight.grad, expected)


# Gradients.


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("precondition", [True, False])
def test_gradients_add_up_over_forward_passes(autocast: bool, precondition: bool) -> None:
    model = converted(precondition=precondition)
    inputs = [tokens(seed=seed) for seed in range(3)]
    expected = reference_gradient(model, *inputs, autocast=autocast)
    weight = pool_of(model).weight

    def run(index: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(index)

    for index in inputs:
        loss(run(index)).backward()
    assert_same_gradient(weight.grad, expected)
    weight.grad = None
    outputs = [run(index) for index in inputs]
    assert gates(*outputs) == 1, "graphs that are there at the same time share one"
    sum(map(loss, outputs)).backward()
    assert_same_gradient(weight.grad, expected)
    weight.grad = None
    outputs = [run(index) for index in inputs]
    for output in reversed(outputs):
        loss(output).backward()
    assert_same_gradient(weight.grad, expected)


def test_gradients_through_one_graph_twice() -> None:
    model = converted()
    expected = reference_gradient(model, tokens())
    out = loss(model(tokens()))
    out.backward(retain_graph=True)
    out.backward()
    assert_same_gradient(pool_of(model).weight.grad, 2 * expected)


def test_a_backward_pass_inside_the_forward() -> None:
    """A first loss is differentiated, and its graph is freed, before later layers are called."""
    model = converted()
    weight = pool_of(model).weight
    early: list[Tensor] = []

    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, index: Tensor) -> Tensor:
            x = loss(model.embed(index))
            early.extend(torch.autograd.grad(x, weight))
            return model.head(model.block(torch.ones(2, 32)))

    outer = Early()
    out = RootForward(outer, pool_of(model))(tokens())
    late = torch.autograd.grad(loss(out), weight)[0]
    assert_same_gradient(early[0], torch.autograd.grad(loss(model.embed(tokens())), weight)[0])
    assert_same_gradient(late, torch.autograd.grad(loss(model.head(model.block(torch.ones(2, 32)))), weight)[0])


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(monkeypatch: pytest.MonkeyPatch, reentrant: bool, autocast: bool) -> None:
    """Backward calls them again, outside of the forward pass; torch checks that they save the same tensors."""
    monkeypatch.setattr(Checkpointed, "use_reentrant", reentrant)
    plain, model = converted(), converted(kind=Checkpointed)
    expected = reference_gradient(plain, tokens(), autocast=autocast)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(tokens())
    loss(out).backward()
    assert_same_gradient(pool_of(model).weight.grad, expected)


def test_a_whole_model_under_checkpointing() -> None:
    model = converted()
    expected = reference_gradient(model, tokens())
    loss(checkpoint(model, tokens(), use_reentrant=False)).backward()
    assert_same_gradient(pool_of(model).weight.grad, expected)


def test_a_second_derivative() -> None:
    model = converted()
    weight = pool_of(model).weight

    def penalty(output: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(loss(output), weight, create_graph=True)
        return first.square().sum()

    expected = torch.autograd.grad(penalty(type(model).forward(model, tokens())), weight)[0]
    assert_same_gradient(torch.autograd.grad(penalty(model(tokens())), weight)[0], expected)


def test_nested_autocast_changes_the_dtype_within_a_forward_pass() -> None:
    model = converted()
    seen = []
    for layer in (model.first, model.second):
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = model.first(x)
                with torch.autocast("cpu", enabled=False):
                    x = model.second(x.float())
                with torch.autocast("cpu", torch.float16):
                    x = model.first(x)
                return model.second(x)

    owner = Mixed()
    with PoolCasts(model) as casts:
        out = RootForward(owner, pool_of(model))(torch.ones(2, 32))
    assert seen == [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    assert [dtype for _, dtype in casts.dtypes] == [torch.bfloat16, torch.float16] and gates(out) == 1
    expected = torch.autograd.grad(loss(owner(torch.ones(2, 32))), pool_of(model).weight)[0]
    assert_same_gradient(torch.autograd.grad(loss(out), pool_of(model).weight)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_pools_gradient_is_summed_in_float32(dtype: torch.dtype) -> None:
    """One gradient of 4096 comes first, then 64 of 1; in a narrow dtype each 1 would vanish."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16, bias=False)

        def forward(self, count: int) -> Tensor:
            x = torch.eye(16, dtype=dtype)
            small = [self.layer(x) for _ in range(count)]
            # Called last, so that its gradient comes first.
            return torch.stack([*small, self.layer(x) * 4096]).float().sum()

    config = roastify.RoastConfig(ratio=1, min_numel=1, tile="16x16", precondition=False)
    model = roastify.convert(Many(), config=config).to(dtype)
    pool = pool_of(model)
    scale = pool.plan.shared[0].scale
    assert scale is not None
    model(64).backward()
    assert pool.weight.grad is not None and pool.weight.grad.dtype == dtype
    expected = torch.full_like(pool.weight, scale * (4096 + 64))
    torch.testing.assert_close(pool.weight.grad, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert not torch.allclose(expected, torch.full_like(expected, scale * 4096), rtol=torch.finfo(dtype).eps, atol=0)


# No old copy is read.


def sgd_step(weight: nn.Parameter, **options: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=1.0, **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = None


def adam_step(weight: nn.Parameter, **options: Any) -> None:
    optimizer = torch.optim.Adam([weight], lr=1.0, **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = None


def in_no_grad(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1.0)


def in_inference_mode(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        weight.add_(1.0)


def through_data(weight: nn.Parameter) -> None:
    weight.data.add_(1.0)


def through_detach(weight: nn.Parameter) -> None:
    weight.detach().add_(1.0)


def through_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] += 1.0


def by_new_data(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1.0


def foreach(weight: nn.Parameter) -> None:
    with torch.no_grad():
        torch._foreach_add_([weight], 1.0)


# Writes that torch counts are seen within a forward pass as well.
TRACED: dict[str, Callable[[nn.Parameter], None]] = {
    "sgd": lambda weight: sgd_step(weight, foreach=False),
    "sgd foreach": lambda weight: sgd_step(weight, foreach=True),
    "adam": lambda weight: adam_step(weight, foreach=False),
    "adam foreach": lambda weight: adam_step(weight, foreach=True),
    "foreach": foreach,
    "no_grad": in_no_grad,
    "inference_mode": in_inference_mode,
    "detach": through_detach,
    "new data": by_new_data,
}
WRITES = {
    **TRACED,
    "sgd fused": lambda weight: sgd_step(weight, fused=True),
    "adam fused": lambda weight: adam_step(weight, fused=True),
    "data": through_data,
    "numpy": through_numpy,
}


def test_writes_that_torch_does_not_count() -> None:
    """These writes change the weights, and torch counts no version: therefore no copy outlives its forward pass."""
    for name, write in WRITES.items():
        weight = nn.Parameter(torch.zeros(3))
        before = weight._version, weight.data_ptr()
        write(weight)
        assert weight.any()
        assert ((weight._version, weight.data_ptr()) != before) == (name in TRACED), name


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_that_trains_itself_in_its_forward(fused: bool) -> None:
    model = converted()
    weight = pool_of(model).weight
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)

    def step() -> None:
        loss(model.block(torch.ones(2, 32))).backward()
        optimizer.step()
        optimizer.zero_grad()

    outputs = []
    start = weight.detach().clone()
    for run in (model, lambda index: type(model).forward(model, index)):
        weight.data.copy_(start)
        model.between = step
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(tokens()))
    assert not torch.equal(weight, start)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-3)
    weight.data.copy_(start)
    model.between = lambda: None
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.allclose(model(tokens()), outputs[0], rtol=0, atol=1e-2)


def assert_reads(model: Any, autocast: bool = True) -> None:
    """Compare an output with that of a new model with the same weights."""
    fresh = converted()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(tokens())
        fresh.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        assert torch.equal(found, fresh(tokens()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_between_two_forward_passes_is_seen(
    write: Callable[[nn.Parameter], None], mode: Callable[[], Any]
) -> None:
    model = converted()
    with torch.autocast("cpu", torch.bfloat16):
        with mode():
            before = model(tokens()).clone()
        write(pool_of(model).weight)
        with mode():
            assert not torch.equal(model(tokens()), before)
    assert_reads(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("write", TRACED.values(), ids=TRACED.keys())
def test_a_write_within_a_forward_pass_is_seen(write: Callable[[nn.Parameter], None], mode: Callable[[], Any]) -> None:
    found: dict[str, Tensor] = {}
    for name in ("in a pass", "outside"):
        model = converted()
        weight = pool_of(model).weight
        model.between = lambda weight=weight: write(weight)
        with mode(), torch.autocast("cpu", torch.bfloat16):
            found[name] = model(tokens()) if name == "in a pass" else type(model).forward(model, tokens())
    assert torch.equal(found["in a pass"], found["outside"])
    assert not torch.equal(found["in a pass"], converted()(tokens()))


def one_more(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of a model with 1 added to all values; what says what they mean stays."""
    state = model.state_dict()
    return {name: value if name == "roast_pool._extra_state" else value + 1 for name, value in state.items()}


def test_a_state_dict_and_a_new_parameter_are_seen() -> None:
    model = converted()
    assert_reads(model)
    model.load_state_dict(one_more(model))
    assert_reads(model)
    model.load_state_dict(one_more(model), assign=True)
    assert_reads(model)
    # Sharding replaces the Parameter like this before, after and within each forward pass.
    model.roast_pool.weight = nn.Parameter(model.roast_pool.weight.detach() + 1)
    assert_reads(model)

    def replace() -> None:
        model.roast_pool.weight = nn.Parameter(model.roast_pool.weight.detach() * 2)

    model.between = replace
    with torch.autocast("cpu", torch.bfloat16):
        before = model.roast_pool.weight.detach().clone()
        found = model(tokens())
        model.roast_pool.weight = nn.Parameter(before)
        assert torch.equal(found, type(model).forward(model, tokens()))


def test_casts_and_moves_are_seen() -> None:
    model = converted()
    out = model(tokens())
    model.to(torch.float64)
    assert model(tokens()).dtype == torch.float64
    model.to(torch.float32)
    assert torch.equal(model(tokens()), out)
    model.to("meta")
    assert model(tokens().to("meta")).is_meta


def test_functional_calls_see_the_tensors_they_are_given() -> None:
    model = converted()
    names = dict(model.named_parameters())
    other = {name: value.detach() + 1 for name, value in names.items()}
    fresh = converted()
    with pytest.warns(UserWarning, match="cannot be checked whether the values were made under this model's seed"):
        fresh.load_state_dict(other)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(tokens())
        assert torch.equal(torch.func.functional_call(model, other, (tokens(),)), fresh(tokens()))
        assert torch.equal(model(tokens()), before)
        loss(
            torch.func.functional_call(
                model, (params := {n: v.clone().requires_grad_() for n, v in other.items()}), (tokens(),)
            )
        ).backward()
        loss(fresh(tokens())).backward()
    assert_same_gradient(params["roast_pool.weight"].grad, fresh.roast_pool.weight.grad)
    assert pool_of(model).weight.grad is None


def test_a_transform_within_a_forward_pass_leaves_nothing_behind() -> None:
    """A tensor computed in a transform may be wrapped, and must not be used after it."""
    model = converted()
    pool, seen = pool_of(model), []

    def objective(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.sum() * pool.read(torch.bfloat16)[0, 0]

    model.between = lambda: torch.func.grad(objective)(torch.ones(2))
    with torch.no_grad():
        RootForward(nn.Identity(), pool, lambda: (model.between(), seen.append(pool.read(torch.bfloat16))))()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(seen[0])


def test_gradient_modes_may_change_within_a_forward_pass() -> None:
    model = converted()
    entered = []

    def other_modes() -> None:
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                entered.append(model.block(torch.ones(2, 32)).requires_grad)

    model.between = other_modes
    expected = reference_gradient(model, tokens(), autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens())
    loss(out).backward()
    assert entered == [False] * 4
    assert_same_gradient(pool_of(model).weight.grad, expected)

    def with_gradients() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            # The forward pass has already made this product's copy of the pool, in inference mode.
            model.block(torch.ones(2, 32)).sum().backward()

    model.between = with_gradients
    pool_of(model).weight.grad = None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(tokens())
    assert pool_of(model).weight.grad is not None


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt: no `except Exception` stops it."""


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_a_forward_pass_is_over_after_any_exception(error: type[BaseException]) -> None:
    model = converted()

    def stop() -> None:
        assert passes.running
        raise error

    model.between = stop
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(error):
            model(tokens())
        assert not passes.running
        before = model.first(torch.ones(2, 32))
        pool_of(model).weight.data.add_(1.0)
        assert not torch.equal(model.first(torch.ones(2, 32)), before)


def test_layers_called_by_themselves_read_the_current_weights() -> None:
    model = converted()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens())
        before = model.first(torch.ones(2, 32))
        pool_of(model).weight.data.add_(1.0)
        assert not torch.equal(model.first(torch.ones(2, 32)), before)


def test_a_forward_pass_within_another_and_one_after_it() -> None:
    model = converted()
    index, depth = tokens(), []

    def again() -> None:
        model.between = lambda: depth.append(len(passes.running))
        with torch.no_grad():
            depth.append(model(index).shape)
        pool_of(model).weight.data.add_(0.0)

    model.between = again
    with torch.autocast("cpu", torch.bfloat16), PoolCasts(model) as casts:
        out = model(index)
    assert depth == [1, out.shape] and len(casts.dtypes) == 2
    model.between = lambda: None
    expected = reference_gradient(model, index, autocast=True)
    assert_same_gradient(torch.autograd.grad(loss(out), pool_of(model).weight)[0], expected)


def test_threads_share_no_forward_pass() -> None:
    """Two threads are inside the forward at once, with different weights."""
    model = converted()
    meet = threading.Barrier(2, timeout=60)
    index = tokens()
    found: dict[int, int] = {}

    def work(number: int) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), PoolCasts(model) as casts:
            model(index)
        found[number] = len(casts.dtypes)

    model.between = meet.wait
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 1, 1: 1}


def test_a_layer_in_another_thread_is_outside_of_the_forward_pass() -> None:
    model = converted()
    found: list[Tensor] = []

    def other() -> None:
        thread = threading.Thread(target=lambda: found.append(model.embed(tokens()).detach()))
        thread.start()
        thread.join()

    model.between = other
    model(tokens())
    assert torch.equal(found[0], model.embed(tokens()))


def test_two_models_in_one_forward_pass() -> None:
    model, other = converted(), converted(seed=5)
    inner: list[Tensor] = []
    model.between = lambda: inner.append(other(tokens()))
    out = model(tokens())
    assert torch.equal(inner[0], other(tokens())) and gates(out, inner[0]) == 2


def test_no_copy_is_kept_after_a_forward_pass() -> None:
    """This holds if the model is idle, copied or saved afterwards."""
    model = converted()
    held: list[weakref.ref[Tensor]] = []
    read = RoastPool.read

    def watched(pool: RoastPool, dtype: torch.dtype | None = None) -> Tensor:
        value = read(pool, dtype)
        if value.dtype == torch.bfloat16:
            held.append(weakref.ref(value))
        return value

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        patch.setattr(RoastPool, "read", watched)
        model(tokens())
    gc.collect()
    assert len(held) == 6 and not any(reference() is not None for reference in held)
    assert set(model.state_dict()) == {*dict(model.named_parameters()), "roast_pool._extra_state"}


# The forward that a conversion sets on the instance.


def test_the_instances_forward_has_the_signature_of_the_class() -> None:
    model = converted()
    assert inspect.signature(model.forward, eval_str=True) == inspect.signature(Model().forward, eval_str=True)
    assert model.forward.__name__ == "forward"
    assert torch.equal(model.forward(tokens(), scale=2.0), model(tokens(), 2.0))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_their_own_forward(through: Callable[[Any], Any]) -> None:
    model = converted()
    del model.between
    Model.between = staticmethod(lambda: None)
    try:
        twin = through(model)
        assert twin.forward.model is twin and twin.forward.pool is twin.roast_pool
        with torch.no_grad():
            twin.roast_pool.weight.zero_()
        with torch.autocast("cpu", torch.bfloat16), PoolCasts(twin) as casts:
            assert not torch.equal(twin(tokens()), model(tokens()))
        assert len(casts.dtypes) == 2
    finally:
        del Model.between


def test_densify_removes_the_instances_forward() -> None:
    model = converted()
    assert "forward" in vars(model) and "forward" not in vars(roastify.densify(model))
    assert "forward" not in vars(roastify.densify(model, inplace=True))


def test_a_forward_that_was_set_on_the_instance_before_stays() -> None:
    dense = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    dense.forward = own = lambda x: dense[1](dense[0](x)) + 5
    model = roastify.convert(dense, 2, inplace=True)
    assert model.forward.inner is own and gates(model(torch.ones(2, 40))) == 1
    assert torch.equal(model(torch.ones(2, 40)), own(torch.ones(2, 40)))
    assert vars(roastify.densify(model, inplace=True))["forward"] is own


def test_a_forward_that_is_wrapped_around_it_later_stays() -> None:
    model = converted()
    inner = model.forward
    model.forward = lambda *args: inner(*args) + 5
    assert torch.equal(model(tokens()), inner(tokens()) + 5)
    dense = roastify.densify(model, inplace=True)
    torch.testing.assert_close(dense(tokens()), Model.forward(dense, tokens()) + 5)


def test_a_failed_conversion_leaves_the_forward_as_it_was() -> None:
    class Fails(Model):
        def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
            assert not isinstance(self.first, RoastModule)
            return super().forward(tokens, scale)

    model = Fails()
    with pytest.raises(roastify.OutputMismatch):
        roastify.convert(model, 3, inplace=True, example_inputs=tokens())
    assert "forward" not in vars(model)
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()


# Streams and graphs.


@pytest.mark.gpu
def test_every_stream_makes_its_own_copy() -> None:
    model = converted("cuda")
    side = torch.cuda.Stream()
    main = torch.cuda.current_stream()
    x = torch.ones(4, 32, device="cuda")
    found: list[Tensor] = []

    def on_the_side() -> None:
        side.wait_stream(main)
        with torch.cuda.stream(side):
            found.append(model.first(x))
        main.wait_stream(side)

    model.between = on_the_side
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), PoolCasts(model) as casts:
        model(tokens("cuda"))
        expected = model.first(x)
    assert len(casts.dtypes) == 3 and torch.equal(found[0], expected)


@pytest.mark.gpu
def test_a_graph_captured_within_a_forward_pass_makes_its_own_copy() -> None:
    """Replayed after the weights have changed, it must read the new ones."""
    model = converted("cuda")
    graph, x = torch.cuda.CUDAGraph(), torch.ones(4, 32, device="cuda")
    captured: list[Tensor] = []

    def capture() -> None:
        model.between = lambda: None
        with torch.cuda.graph(graph):
            captured.append(model.first(x))

    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        model.first(x)
        model.between = capture
        model(tokens("cuda"))
        pool_of(model).weight.mul_(2.0)
        graph.replay()
        assert torch.equal(captured[0], model.first(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_are_refused(transform: str) -> None:
    model = roastify.convert(nn.Sequential(nn.Linear(32, 32)), ratio=2)
    x = torch.randn(3, 32)
    calls = {
        "grad": lambda: torch.func.grad(lambda x: model(x).sum())(x),
        "vmap": lambda: torch.func.vmap(model)(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,)),
    }
    with pytest.raises(RoastError, match=r"torch\.func.*roastify\.densify"):
        calls[transform]()
    assert model(x).requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize(
    ("transform", "grad"), [("grad", True), ("jvp", True), ("jvp", False), ("dual", True), ("dual", False)]
)
def test_missing_derivatives_are_refused_even_if_the_pool_is_frozen(transform: str, grad: bool) -> None:
    model = roastify.convert(nn.Sequential(nn.Linear(32, 32)), ratio=2).requires_grad_(False)
    x = torch.randn(3, 32)

    def dual() -> Tensor:
        with forward_ad.dual_level():
            # Without a tangent no derivative is missing.
            assert torch.equal(model(x), expected)
            return model(forward_ad.make_dual(x, x))

    calls = {
        "grad": lambda: torch.func.grad(lambda x: model(x).sum())(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,)),
        "dual": dual,
    }
    expected = model(x)
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match=r"forward mode.*roastify\.densify"):
        calls[transform]()
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batches_of_gradients() -> None:
    model = roastify.convert(nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32)), ratio=2).double()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    out = model[1](x + model[0](torch.arange(3)))
    vectors = torch.randn(4, *out.shape, dtype=torch.float64)
    wanted = x, pool_of(model).weight
    found = torch.autograd.grad(out, wanted, vectors, retain_graph=True, is_grads_batched=True)
    expected = [torch.autograd.grad(out, wanted, vector, retain_graph=True) for vector in vectors]
    for batch, each in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(batch, torch.stack(each))

"""In training, small layers keep their dense weights, and these weights are gathered together."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import roastify
from roastify.conversion.converted import pool_of
from roastify.kernels import dispatch, gathered_weights
from roastify.layers import pooled_weight
from roastify.layers.pooled_weight import PooledWeight
from roastify.pool.pass_cache import passes

WIDTH = 32


def nothing() -> None:
    pass


class Net(nn.Module):
    """Linear layers, one of them called twice, and a convolution; `skip` leaves the second block out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.between: Callable[[], None] = nothing

    def body(self, x: Tensor) -> Tensor:
        return self.again(self.again(self.first(x).tanh()).tanh()).tanh()

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.body(x)
        if not skip:
            x = self.conv(self.second(x).tanh().t()).t().tanh()
        self.between()
        return self.head(x)


class Checkpointed(Net):
    reentrant = False

    def body(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().body(x)
        return checkpoint(super().body, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True

    def body(self, x: Tensor) -> Tensor:
        # If no input requires a gradient, torch computes no gradient inside a reentrant checkpoint.
        return super().body(x if x.requires_grad else x.clone().requires_grad_(torch.is_grad_enabled()))


def converted(kind: type[nn.Module] = Net, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    config = roastify.RoastConfig(ratio=3.0, min_numel=1, tile="8x8", sign="row")
    return roastify.convert(kind().to(device, dtype), config=config)


def rows(count: int = WIDTH, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype)


@pytest.fixture
def none_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Return a function that turns keeping on or off; without it every layer gathers its own, as large layers do."""

    def choose(kept: bool) -> None:
        monkeypatch.setattr(PooledWeight, "_is_recorded", recorded if kept else lambda shared: False)

    recorded = PooledWeight._is_recorded
    yield choose


class Gathers:
    """Records how many kept weights each node gathers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.groups: list[int] = []
        gather = gathered_weights.gather_together

        def watched(pool: Tensor, table: Tensor, group: gathered_weights.WeightGroup, *rest: Any) -> Any:
            self.groups.append(len(group.weights))
            return gather(pool, table, group, *rest)

        patch.setattr("roastify.pool.pass_cache.gather_together", watched)


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> Gathers:
    return Gathers(monkeypatch)


# Training loops. Each function takes a model and returns gradients of the pool.


def steps(model: Any) -> list[Tensor]:
    """Every step changes the pool: weights gathered for one step must not be used in the next."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for seed in range(4):
        optimizer.zero_grad(set_to_none=True)
        model(rows(seed=seed)).square().sum().backward()
        found.append(pool_of(model).weight.grad.clone())
        optimizer.step()
    return found


def accumulated(model: Any) -> list[Tensor]:
    for seed in range(3):
        model(rows(seed=seed)).square().sum().backward()
    return [pool_of(model).weight.grad]


def forwards_first(model: Any) -> list[Tensor]:
    sum(model(rows(seed=seed)).square().sum() for seed in range(3)).backward()
    return [pool_of(model).weight.grad]


def partly(model: Any) -> list[Tensor]:
    """Some layers of a group do not run in a step, and run again in a later one."""
    for skip in (False, True, True, False):
        model(rows(), skip=skip).square().sum().backward()
    return [pool_of(model).weight.grad]


def retained(model: Any) -> list[Tensor]:
    for _ in range(2):
        out = model(rows())
        out.square().sum().backward(retain_graph=True)
        out.sum().backward()
    return [pool_of(model).weight.grad]


def asked_for(model: Any) -> list[Tensor]:
    pool, x = pool_of(model).weight, rows().requires_grad_()
    return [grad for _ in range(2) for grad in torch.autograd.grad(model(x).square().sum(), (pool, x))]


def twice_differentiated(model: Any) -> list[Tensor]:
    pool = pool_of(model).weight
    for _ in range(2):
        (grad,) = torch.autograd.grad(model(rows()).square().sum(), pool, create_graph=True)
        grad.square().sum().backward()
    return [pool.grad]


def beside_other_modes(model: Any) -> list[Tensor]:
    """Forward passes without gradients, and of other sizes, run in between."""
    found = []
    for count in (WIDTH, 1, WIDTH):
        with torch.no_grad():
            model(rows(count))
        model(rows(count)).square().sum().backward()
        with torch.inference_mode():
            found.append(model(rows(count)).clone())
    return [*found, pool_of(model).weight.grad]


def changed_between(model: Any) -> list[Tensor]:
    """The pool is written to in the middle of a forward pass."""

    def halve() -> None:
        with torch.no_grad():
            pool_of(model).weight.mul_(0.5)

    model(rows()).square().sum().backward()
    model.between = halve
    out = model(rows())
    model.between = nothing
    return [out.detach(), pool_of(model).weight.grad]


def of_a_copy(model: Any) -> list[Tensor]:
    model(rows()).sum().backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    with torch.no_grad():
        pool_of(twin).weight.mul_(2.0)
    twin(rows()).square().sum().backward()
    return [pool_of(twin).weight.grad]


def counted(model: Any) -> list[Tensor]:
    for _ in range(2):
        with FlopCounterMode(display=False):
            model(rows()).square().sum().backward()
    return [pool_of(model).weight.grad]


@pytest.mark.parametrize("kind", [Net, Checkpointed, Reentrant])
@pytest.mark.parametrize(
    "loop",
    [steps, accumulated, forwards_first, partly, retained, asked_for, twice_differentiated, beside_other_modes,
     changed_between, of_a_copy, counted],
)  # fmt: skip
def test_gradients_are_those_of_layers_that_gather_for_themselves(
    kind: type[Net],
    loop: Callable[[Any], list[Tensor]],
    none_kept: Callable[[bool], None],
    gathers: Gathers,
) -> None:
    if kind is Reentrant and loop in (asked_for, twice_differentiated, retained):
        pytest.skip("torch's reentrant checkpoints know backward() alone, once")
    none_kept(False)
    expected = loop(converted(kind))
    assert gathers.groups == []
    none_kept(True)
    found = loop(converted(kind))
    assert gathers.groups
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))
    assert not passes.running and not passes.recomputed


def test_a_weight_is_gathered_once_a_step_and_together_with_its_group(gathers: Gathers) -> None:
    model = converted()
    gathered: list[str] = []
    implementation = dispatch.implementations["gather"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.implementations, "gather", lambda *args: gathered.append("") or implementation(*args))
        for _ in range(3):
            model(rows()).sum().backward()
    # Four linear layers of one shape, and the convolution.
    assert gathers.groups == [4, 1] * 3
    assert len(gathered) == 15
    # Outside of a forward pass it is unknown whether the others will be read.
    gathers.groups.clear()
    model.head(model.first(rows())).sum().backward()
    assert gathers.groups == [1, 1]


def test_groups_are_no_larger_than_their_bound(gathers: Gathers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_weights, "_GROUP_ELEMENTS", 3 * WIDTH**2)
    model = converted()
    model(rows()).sum().backward()
    assert gathers.groups == [3, 1, 1]


def test_groups_hold_weights_that_one_kernel_can_gather() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.high, self.wide_too = nn.Linear(48, 32), nn.Linear(32, 48), nn.Linear(48, 32)
            self.conv, self.conv_too = nn.Conv1d(32, 32, 1), nn.Conv2d(32, 48, 3)
            self.table, self.custom = nn.Embedding(64, 32), Custom(32, 32)

    class Custom(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.relu(super().forward(input))

    config = roastify.RoastConfig(ratio=2.0, min_numel=1, tile="8x8")
    model = roastify.convert(Kinds(), config=config)
    pool = pool_of(model)
    groups = {frozenset(weight.shape for weight in pool.group_of(chosen).weights) for chosen in pool.retained}
    # The 3×3 convolutions have a basis, and other kernels make their weights.
    assert groups == {
        frozenset({(32, 48)}), frozenset({(48, 32)}), frozenset({(32, 32, 1)}), frozenset({(48, 32, 3, 3)}),
    }  # fmt: skip
    # A subclass with a forward of its own may not read its weight, so that weight is in no group.
    assert len(pool.retained) == 5 and len(pool.weights) == 7 and set(pool.retained) < set(pool.weights)
    apart = pool_of(roastify.convert(Kinds(), config=dataclasses.replace(config, sharing="local")))
    assert all(len(apart.group_of(weight).weights) == 1 for weight in apart.retained)


def test_a_weight_that_other_code_reads_is_not_gathered_with_a_group(gathers: Gathers) -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.t() * 2

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.own, self.last = nn.Linear(WIDTH, WIDTH), Own(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.own(self.first(x))
            return self.last(self.attention(x, x, x)[0])

    converted(Mixed)(rows()).sum().backward()
    # A product in a class's own code gathers its weight alone.
    assert gathers.groups == [2, 1]


def test_a_dispatch_mode_sees_each_weight_gathered_alone(gathers: Gathers) -> None:
    model = converted()
    for _ in range(2):
        with FlopCounterMode(display=False):
            model(rows()).sum().backward()
    assert gathers.groups == [1] * 10


class Selective(Net):
    """Checkpoints its regions one by one, and saves what some operators return in them."""

    saved: Any = None

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        for layer in (self.first, self.second, self.head):
            x = self._region(lambda x, layer=layer: layer(x).tanh(), x)
        return self._region(lambda x: self.conv(self.again(x).t()).t() * self.again(x), x)

    def _region(self, region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.saved is None:
            return region(x)

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            kept = self.saved == "all" or operator in self.saved
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(region, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("count", [WIDTH, 2])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "saved",
    [(), (torch.ops.aten.mm.default, torch.ops.aten.addmm.default), (torch.ops.roastify.gather.default,), "all"],
)
def test_checkpoints_may_choose_what_they_save(saved: Any, autocast: bool, count: int) -> None:
    """A recomputed region must run the same operators again, whichever layer read the pool first."""
    found = []
    for chosen in (None, saved):
        model = converted(Selective, torch.float32)
        model.saved = chosen
        x = rows(dtype=torch.float32)[:count]
        if count < WIDTH:
            model.conv = nn.Identity()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).square().sum()
        loss.backward()
        found.append(pool_of(model).weight.grad)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_forward_mode_derivatives_go_through_kept_weights() -> None:
    model, x, tangent = converted(), rows(), rows(seed=1)
    found = []
    for module in (model, roastify.densify(model)):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent)
    torch.testing.assert_close(*found)


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).relu())


def test_an_exported_graph_has_products_on_the_pool() -> None:
    """An exported graph has no backward pass, so it keeps no weights."""
    exported = torch.export.export(converted(Exported), (rows(),))
    operators = [node.target for node in exported.graph.nodes]
    assert operators.count(torch.ops.roastify.linear.default) == 2
    assert torch.ops.roastify.gather.default not in operators


def test_copies_and_pickles_have_groups_of_their_own(gathers: Gathers) -> None:
    model = converted()
    model(rows()).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        gathers.groups.clear()
        twin.zero_grad()
        twin(rows()).sum().backward()
        assert gathers.groups == [4, 1]
        assert torch.equal(pool_of(twin).weight.grad, pool_of(model).weight.grad)
        weight = pool_of(twin).retained[0]
        assert weight in pool_of(twin).group_of(weight).weights and weight not in pool_of(model).weights


def test_the_first_step_has_the_bits_of_any_other() -> None:
    model = converted(dtype=torch.float32)
    found = []
    for _ in range(3):
        model.zero_grad()
        model(rows(dtype=torch.float32)).square().sum().backward()
        found.append(pool_of(model).weight.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("reason", ["large", "few rows", "frozen", "no gradients"])
def test_weights_are_not_kept_where_it_would_not_pay(
    reason: str, gathers: Gathers, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "large":
        monkeypatch.setattr(pooled_weight, "_SMALL_ELEMENTS", WIDTH**2)
    model = converted()
    x = rows()
    if reason == "few rows":
        x = rows(WIDTH - 1)
    elif reason == "frozen":
        pool_of(model).weight.requires_grad_(False)
    with torch.set_grad_enabled(reason != "no gradients"):
        model.head(model.first(x))
    assert gathers.groups == []
    # At the bound itself a weight is kept.
    if reason == "few rows":
        model.first(rows(WIDTH))
        assert gathers.groups == [1]


@pytest.mark.parametrize("kind", [Net, Checkpointed])
def test_no_weight_is_kept_after_a_step(kind: type[Net]) -> None:
    model = converted(kind)
    made: list[weakref.ref[Tensor]] = []
    gather = gathered_weights.gather_together

    def watched(*args: Any) -> Any:
        tensors = gather(*args)
        made.extend(map(weakref.ref, tensors))
        return tensors

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("roastify.pool.pass_cache.gather_together", watched)
            for _ in range(2):
                model(rows()).sum().backward()
            assert len(made) >= 10 and not any(reference() is not None for reference in made)
            # The forward pass is over, but the graph still exists.
            kept = []
            model.between = lambda: kept.append(sum(reference() is not None for reference in made))
            out = model(rows())
            model.between()
            # Two kinds of weights are freed during the forward pass: the first layer's, because the input needs no
            # gradient, and a checkpoint's, because backward gathers them again.
            assert kept == [4 if kind is Net else 3] * 2
            del out
        assert not any(reference() is not None for reference in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("kept", [True, False])
def test_a_pool_that_is_written_to_before_the_backward_pass(kept: bool, none_kept: Callable[[bool], None]) -> None:
    """A kept weight gives the gradient for the values that the forward pass used; gathering again raises."""
    none_kept(kept)
    model, layers = (converted(), ("first", "again", "head"))
    x = rows().requires_grad_()

    def forward() -> Tensor:
        out = x
        for name in layers:
            out = getattr(model, name)(out)
        return out.square().sum()

    forward().backward()
    expected, x.grad = x.grad, None
    loss = forward()
    with torch.no_grad():
        pool_of(model).weight.mul_(2.0)
    if not kept:
        with pytest.raises(RuntimeError, match="modified inplace"):
            loss.backward()
        return
    loss.backward()
    assert expected is not None and torch.equal(x.grad, expected)


class Outputs(TorchDispatchMode):
    """Records the dtypes of operators' results."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[tuple[Any, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.dtypes.add((func, out.dtype))
        return out


def test_under_autocast_weights_are_gathered_in_its_dtype_and_gradients_summed_in_float32() -> None:
    model = converted(dtype=torch.float32)
    x = rows(dtype=torch.float32)
    with Outputs() as outputs, torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert {dtype for func, dtype in outputs.dtypes if func is torch.ops.roastify.gather.default} == {torch.bfloat16}
    found = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(x).square().sum().backward()
        found.append(pool_of(model).weight.grad)
    assert found[0].dtype == torch.float32 and torch.equal(*found)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)


def test_a_failed_read_does_not_change_later_groups(gathers: Gathers) -> None:
    model = converted()
    model(rows()).sum().backward()
    with pytest.raises(RuntimeError):
        model(torch.randn(WIDTH, WIDTH + 1, dtype=torch.float64))
    model(rows()).sum().backward()
    expected = pool_of(model).weight.grad.clone()
    model.zero_grad()
    for _ in range(2):
        model(rows()).sum().backward()
    assert gathers.groups == [4, 1, 4, 4, 1, 4, 1, 4, 1]
    torch.testing.assert_close(pool_of(model).weight.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Net, Checkpointed])
def test_kernels_for_groups_give_the_gradients_of_the_cpu(kind: type[Net]) -> None:
    """Steps, with gradients accumulated, then one that is captured in a CUDA graph and replayed."""
    expected = accumulated(converted(kind))
    model = converted(kind, torch.float32, "cuda")
    pool = pool_of(model)
    for _ in range(2):
        model.zero_grad()
        for seed in range(3):
            model(rows(seed=seed, dtype=torch.float32, device="cuda")).square().sum().backward()
        found = pool.weight.grad.double().cpu()
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4 * float(expected[0].abs().max()))
    assert any(group._kernels is not None for group in pool._groups.values())
    x = rows(dtype=torch.float32, device="cuda")
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().sum().backward()
    for seed in range(3):
        x.copy_(rows(seed=seed))
        graph.replay()
        single = converted(kind)
        single(rows(seed=seed)).square().sum().backward()
        reference = pool_of(single).weight.grad
        torch.testing.assert_close(
            pool.weight.grad.double().cpu(), reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max())
        )


@pytest.mark.gpu
def test_a_first_step_may_be_captured() -> None:
    """Before the kernels' tables are on the GPU, each weight has a kernel of its own."""
    model, x = converted(dtype=torch.float32, device="cuda"), rows(dtype=torch.float32, device="cuda")
    # Another model runs first: it compiles the kernels and allocates cuBLAS's workspace.
    converted(dtype=torch.float32, device="cuda")(x).sum().backward()
    for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with mode:
            converted(dtype=torch.float32, device="cuda")(x).sum().backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().sum().backward()
    graph.replay()
    found = pool_of(model).weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, pool_of(model).weight.grad, rtol=1e-5, atol=1e-5 * float(found.abs().max()))

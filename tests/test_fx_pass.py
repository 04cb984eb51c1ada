"""The fx pass: which modules become graphs, and how parameters are used; the model is left as it was."""

from __future__ import annotations

import collections
import copy
import random
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from roastify.conversion import isolated_trace
from roastify.conversion.fx_pass import Forest, ParameterInfo, WeightUse, _twin, matrix_of, trace


class Block(nn.Module):
    """Traceable."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(size, size)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(x).tanh() * scale


class Branching(nn.Module):
    """Untraceable by itself: its control flow depends on data."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = Block() if inner is None else inner

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return x - self.inner(x)


class Chain(nn.Module):
    """Calls its children in order."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.order = list(children)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def regions(forest: Forest) -> dict[str, bool]:
    """Return each region's path and whether it was traced."""
    for region in forest.regions:
        assert (region.graph is None) != (region.reason is None), region
    paths = [region.path for region in forest.regions]
    assert len(set(paths)) == len(paths)
    return {region.path: region.graph is not None for region in forest.regions}


def reason(forest: Forest, path: str) -> str:
    return next(region.reason for region in forest.regions if region.path == path) or ""


def parameter(forest: Forest, name: str) -> ParameterInfo:
    return next(info for info in forest.parameters if info.name == name)


def functions(forest: Forest, name: str) -> list[tuple[str, int | None]]:
    return [(use.op, use.position) for use in parameter(forest, name).uses if use.through == "function"]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def inside_graphs(forest: Forest) -> Iterator[str]:
    """Yield the path of every module that a graph runs, as a leaf or as code."""
    for region in forest.regions:
        if region.graph is None:
            continue
        yield region.path
        for node in region.graph.nodes:
            if node.op == "call_module":
                yield join(region.path, node.target)
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                yield join(region.path, path)


def assert_every_module_is_accounted_for(model: nn.Module, forest: Forest) -> None:
    seen = {model.get_submodule(path) for path in inside_graphs(forest)}
    seen |= {model.get_submodule(region.path) for region in forest.regions if region.reason}
    for path, module in model.named_modules():
        has_code = type(module).forward is not nn.Module.forward
        if has_code and not type(module).__module__.startswith("torch.nn."):
            assert module in seen, path
    assert [info.name for info in forest.parameters] == [name for name, _ in model.named_parameters()]
    for info in forest.parameters:
        assert info.uses, info.name
        aliases = [name for name, value in model.named_parameters(remove_duplicate=False) if value is info.parameter]
        assert list(info.aliases) == aliases


def test_a_traceable_model_is_one_region() -> None:
    model = Chain(first=Block(), norm=nn.LayerNorm(4), deep=Chain(a=Block(), b=nn.Sequential(Block(), nn.ReLU())))
    forest = trace(model)
    assert regions(forest) == {"": True}
    assert_every_module_is_accounted_for(model, forest)
    assert {info.name: [use.calls for use in info.uses] for info in forest.parameters} == {
        name: [1] for name, _ in model.named_parameters()
    }


def test_a_graph_computes_what_the_model_computes() -> None:
    model = Chain(first=Block(), deep=Chain(a=Block()))
    x = torch.randn(3, 4)
    graph = trace(model).regions[0].graph
    assert graph is not None
    assert torch.equal(torch.fx.GraphModule(model, graph)(x), model(x))


def test_a_model_with_control_flow_is_opaque_and_its_children_are_traced() -> None:
    model = Branching(Chain(a=Block(), b=Block()))
    forest = trace(model)
    assert regions(forest) == {"": False, "inner": True}
    assert reason(forest, "").startswith("TraceError") and "control flow" in reason(forest, "")
    assert_every_module_is_accounted_for(model, forest)
    # If the caller is opaque, nobody knows how often a region runs; inside the region its layers' calls are counted.
    assert parameter(forest, "inner.a.fc.weight").uses == [
        WeightUse("inner.a.fc", "weight", "linear", "module", calls=1, inputs=(":x", "inner:x"))
    ]


def test_a_layer_below_opaque_code_has_an_unknown_number_of_calls() -> None:
    model = Branching(nn.Linear(4, 4))
    forest = trace(model)
    assert regions(forest) == {"": False}
    use = WeightUse("inner", "weight", "linear", "module", calls=None, inputs=(":x",))
    assert parameter(forest, "inner.weight").uses == [use]


def test_nested_mixtures() -> None:
    model = Chain(
        head=Block(),
        a=Branching(Chain(x=Block(), y=Branching(Chain(z=Block(), w=Branching(nn.Linear(4, 4)))))),
        b=Chain(c=Branching(), d=nn.Sequential(Branching(), Block())),
        tail=nn.Linear(4, 4),
    )
    forest = trace(model)
    assert regions(forest) == {
        "": True,
        "a": False,
        "a.inner": True,
        "a.inner.y": False,
        "a.inner.y.inner": True,
        "a.inner.y.inner.w": False,
        "b.c": False,
        "b.c.inner": True,
        "b.d.0": False,
        "b.d.0.inner": True,
    }
    assert_every_module_is_accounted_for(model, forest)
    assert all("control flow" in reason(forest, path) for path, traced in regions(forest).items() if not traced)


@pytest.mark.parametrize("passed_on", [True, False])
def test_keyword_arguments(passed_on: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.block(x, **kwargs) if passed_on else self.block(x)

    model = Model()
    forest = trace(model)
    assert regions(forest) == ({"": False, "block": True} if passed_on else {"": True})
    if passed_on:
        assert "**kwargs" in reason(forest, "")
    assert_every_module_is_accounted_for(model, forest)


def test_a_forward_that_raises_says_what_it_raised() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            raise LookupError("no such thing\nand a second line")

    forest = trace(Chain(a=Failing(), b=Block()))
    assert regions(forest) == {"": True, "a": False, "a.block": True}
    assert reason(forest, "a") == "LookupError: no such thing"


def test_checkpointed_blocks_are_seen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    model = Model()
    forest = trace(model)
    assert_every_module_is_accounted_for(model, forest)
    assert parameter(forest, "block.fc.weight").uses[0].calls == 1


def test_modules_that_forward_never_calls_are_traced_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare, self.stubborn = Block(), Block(), Branching()
            self.spares = nn.ModuleList([Block(), Branching()])

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Model()
    forest = trace(model)
    assert regions(forest) == {
        "": True,
        "spare": True,
        "stubborn": False,
        "stubborn.inner": True,
        "spares.0": True,
        "spares.1": False,
        "spares.1.inner": True,
    }
    assert_every_module_is_accounted_for(model, forest)


def test_children_of_torchs_containers_are_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Branching(), nn.Sequential(Block()), nn.TransformerEncoderLayer(4, 1, 8))
    forest = trace(model)
    assert regions(forest) == {"1": False, "1.inner": True, "2.0": True}
    assert_every_module_is_accounted_for(model, forest)
    ops = {info.name: info.uses[0].op for info in forest.parameters}
    assert ops["3.self_attn.in_proj_weight"] == "MultiheadAttention"
    assert ops["3.self_attn.out_proj.weight"] == "linear" and ops["3.norm1.weight"] == "LayerNorm"


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.named = nn.ModuleDict({"a": Block()})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.named["a"](x)


@pytest.mark.parametrize("wrapped", [True, False])
def test_blocks_in_a_module_list_are_traced_once(wrapped: bool) -> None:
    model = Chain(inner=Listed()) if wrapped else Listed()
    forest = trace(model)
    assert regions(forest) == {"": True}
    weights = [info for info in forest.parameters if info.name.endswith("fc.weight")]
    assert len(weights) == 3 and all([use.calls for use in info.uses] == [1] for info in weights)


def test_a_module_called_twice_counts_two_calls() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.once, self.block = nn.Linear(4, 4), nn.Linear(4, 4), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.fc(self.once(self.fc(self.block(x)))))

    forest = trace(Model())
    calls = {info.name: [use.calls for use in info.uses] for info in forest.parameters}
    assert calls["fc.weight"] == calls["fc.bias"] == calls["block.fc.weight"] == [2]
    assert calls["once.weight"] == [1]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "linear": (5, 4),
            "keyword": (5, 4),
            "matmul": (4, 4),
            "operator": (4, 4),
            "table": (9, 4),
            "positions": (1, 9, 4),
            "einsum": (4, 6),
            "kernel": (3, 4, 2),
            "joined": (2, 4),
            "several": (4, 4),
            "unused": (4, 4),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.embed = nn.Embedding(9, 4)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return (
            F.linear(x, self.linear),
            F.linear(x, weight=self.keyword),
            torch.matmul(x, self.matmul),
            x @ self.operator,
            F.embedding(tokens, self.table),
            x + self.positions[:, :5],
            torch.einsum("ij,jk->ik", x, self.einsum),
            F.conv1d(x.t()[None], self.kernel),
            torch.cat([self.joined, x]),
            F.linear(torch.matmul(self.several, x.t()).t(), self.several),
            F.linear(self.embed(tokens), self.embed.weight),
        )


def test_functional_uses_name_the_operation_and_the_position() -> None:
    model = Functional()
    forest = trace(model)
    assert regions(forest) == {"": True}
    assert_every_module_is_accounted_for(model, forest)
    found = {info.name: functions(forest, info.name) for info in forest.parameters}
    assert found == {
        "linear": [("linear", 1)],
        "keyword": [("linear", None)],
        "matmul": [("matmul", 1)],
        "operator": [("matmul", 1)],
        "table": [("embedding", 1)],
        "positions": [("getitem", 0)],
        "einsum": [("einsum", 2)],
        "kernel": [("conv1d", 1)],
        "joined": [("cat", None)],
        "several": [("matmul", 0), ("linear", 1)],
        "unused": [],
        "embed.weight": [("linear", 1)],
    }
    linear = WeightUse("", "linear", "linear", "function", position=1, inputs=(":x",))
    assert parameter(forest, "linear").uses == [linear]
    assert parameter(forest, "unused").uses == [WeightUse("", "unused", "unused", "opaque")]
    through_module = WeightUse("embed", "weight", "embedding", "module", calls=1, inputs=(":tokens",))
    assert parameter(forest, "embed.weight").uses[0] == through_module


def test_functional_uses_in_a_region_below_opaque_code_carry_whole_paths() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    forest = trace(Branching(Chain(raw=Raw(), plain=nn.Linear(4, 4))))
    use = WeightUse("inner.raw", "w", "matmul", "function", position=1, inputs=("inner:x",))
    assert parameter(forest, "inner.raw.w").uses == [use]


def test_a_parameter_of_opaque_code_is_unseen() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w if x.sum() > 0 else x

    forest = trace(Chain(opaque=Opaque()))
    assert parameter(forest, "opaque.w").uses == [WeightUse("opaque", "w", "unseen", "opaque")]


@pytest.mark.parametrize("name", ["opaque.holder.p", "opaque.w"])
def test_a_parameter_that_opaque_code_may_read_is_not_called_unused(name: str) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(4, 4))

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.holder, self.w = Holder(), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.holder.p if x.sum() > 0 else x @ self.w

    opaque = Opaque()
    forest = trace(Chain(opaque=opaque, again=opaque))
    assert {use.op for use in parameter(forest, name).uses} == {"unseen"}


def test_a_users_subclass_of_a_layer_is_traced_through() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = Chain(a=Scaled(4, 4), b=Conv1D(4, 4))
    forest = trace(model)
    assert_every_module_is_accounted_for(model, forest)
    assert {use.op for use in parameter(forest, "a.weight").uses} == {"linear"}
    assert functions(forest, "a.weight") == [("linear", 1)]
    assert functions(forest, "b.weight") == [("addmm", 2)]
    # A transformers Conv1D counts as a linear layer whatever its forward calls.
    assert parameter(forest, "b.weight").uses[0].op == "linear"


def test_ties_appear_once_with_every_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight
            self.block = Block()
            self.alias = self.block

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.alias(self.block(self.embed(tokens))))

    model = Model()
    forest = trace(model)
    assert_every_module_is_accounted_for(model, forest)
    assert [(info.name, info.aliases) for info in forest.parameters] == [
        ("embed.weight", ("embed.weight", "head.weight")),
        ("block.fc.weight", ("block.fc.weight", "alias.fc.weight")),
        ("block.fc.bias", ("block.fc.bias", "alias.fc.bias")),
    ]
    assert {(use.module, use.op) for use in parameter(forest, "embed.weight").uses} == {
        ("embed", "embedding"),
        ("head", "linear"),
    }
    assert sum(use.calls or 0 for use in parameter(forest, "block.fc.weight").uses) == 2


def test_constant_tensors_are_known_except_on_the_meta_device() -> None:
    model = nn.Linear(40, 40)
    assert not parameter(trace(model), "weight").constant
    nn.init.zeros_(model.weight)
    assert parameter(trace(model), "weight").constant
    nn.init.constant_(model.weight, 0.25)
    assert parameter(trace(model), "weight").constant
    with torch.no_grad():
        # The first elements, which are compared first, are equal; the last one differs.
        model.weight[-1, -1] = 0.5
    assert not parameter(trace(model), "weight").constant
    assert not parameter(trace(nn.Linear(4, 4, device="meta")), "weight").constant


@pytest.mark.parametrize(
    ("shape", "expected"), [((), (1, 1)), ((7,), (7, 1)), ((5, 3), (5, 3)), ((5, 3, 2, 4), (5, 24)), ((0, 3), (0, 0))]
)
def test_matrix_of(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert matrix_of(torch.zeros(shape)) == expected


class Stateful(nn.Module):
    """Changes itself in forward, in the ways that users' models do."""

    log: list[Any]
    cache: Any

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("unset", None)
        self.counter, self.cache = 0, None
        self.log, self.seen, self.by_name = ["start"], {1}, {"first": 1}
        self.ordered = collections.OrderedDict(a=1)
        self.removed = "still here"

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        with torch.no_grad():
            self.scale.clamp_(0, 0.5)
        self.counter += 1
        self.cache = x
        self.added = x
        self.log.append(x)
        self.seen.add(2)
        self.by_name["x"] = x
        self.ordered["x"] = x
        self.block.note = x
        del self.removed
        self.eval()
        x = x + torch.rand(4) + torch.randn(())
        torch.manual_seed(123)
        return self.norm(self.block(x)) * self.scale


class Snapshot:
    """Everything of a model that tracing might change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.attributes = {
            name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in model.named_modules()
        }
        plain = (int, str, list, set, dict)
        self.copies = {
            name: {key: copy.copy(value) for key, value in values.items() if isinstance(value, plain)}
            for name, values in self.attributes.items()
        }
        self.generator = torch.get_rng_state()

    def assert_unchanged(self) -> None:
        after = Snapshot(self.model)
        assert after.tensors.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            assert after.tensors[name] is tensor, name
            assert torch.equal(after.values[name], self.values[name]), name
        assert after.attributes.keys() == self.attributes.keys()
        for name, attributes in self.attributes.items():
            assert after.attributes[name].keys() == attributes.keys(), name
            assert all(after.attributes[name][key] is value for key, value in attributes.items()), name
        assert after.copies == self.copies
        assert torch.equal(after.generator, self.generator)


@pytest.mark.parametrize("opaque", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_a_model_that_changes_itself_unchanged(opaque: bool, training: bool) -> None:
    model = Chain(first=Block(), deep=Branching(Stateful()) if opaque else Stateful()).train(training)
    before = Snapshot(model)
    forest = trace(model)
    before.assert_unchanged()
    assert regions(forest) == ({"": True, "deep": False, "deep.inner": True} if opaque else {"": True})
    # The model does change when it really runs, so the snapshot can tell.
    with torch.no_grad():
        model(torch.randn(3, 4))
    with pytest.raises(AssertionError):
        before.assert_unchanged()


def test_a_forward_that_fails_half_way_leaves_nothing_behind() -> None:
    class Half(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if x.sum() > 0:
                return x
            return -x

    model = Half()
    before = Snapshot(model)
    assert regions(trace(model)) == {"": False, "block": True}
    before.assert_unchanged()


def test_a_buffer_that_forward_replaces_is_restored() -> None:
    class Model(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            self.steps = self.steps + 1
            return super().forward(x, scale)

    model = Model()
    before = Snapshot(model)
    assert_every_module_is_accounted_for(model, trace(model))
    before.assert_unchanged()
    assert "steps" in model.state_dict()


class Recording(nn.Module):
    """Keeps its inputs inside objects that a shallow comparison does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.nested: dict[str, list[Any]] = {"log": []}
        self.recent: collections.deque[Any] = collections.deque(maxlen=4)
        self.by_key: collections.defaultdict[str, list[Any]] = collections.defaultdict(list)
        self.total = torch.zeros(3)


def _append_nested(model: Any, x: Tensor) -> None:
    model.nested["log"].append(x)


def _append_deque(model: Any, x: Tensor) -> None:
    model.recent.append(x)


def _append_default(model: Any, x: Tensor) -> None:
    model.by_key["x"].append(x)


def _add_in_place(model: Any, x: Tensor) -> None:
    model.total.add_(1)


@pytest.mark.parametrize("change", [_append_nested, _append_deque, _append_default, _add_in_place])
def test_tracing_changes_no_object_that_attributes_hold(change: Any) -> None:
    class Model(Recording):
        def forward(self, x: Tensor) -> Tensor:
            change(self, x)
            return self.fc(x)

    model = Model()
    trace(model)
    assert model.nested == {"log": []} and not model.recent and not model.by_key and not model.total.any()


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_tracing_leaves_pythons_and_numpys_random_generators_alone(draw: Any) -> None:
    class Model(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            draw()
            return super().forward(x, scale)

    model = Model()
    before = random.getstate(), np.random.get_state()
    trace(model)
    after = random.getstate(), np.random.get_state()
    assert before[0] == after[0]
    assert np.array_equal(before[1][1], after[1][1]) and before[1][2:] == after[1][2:]


def test_hooks_of_the_root_and_of_torch_layers_do_not_run() -> None:
    model = Chain(fc=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    fired: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: fired.append(m))
        module.register_forward_pre_hook(lambda m, args: fired.append(m))
    trace(model)
    assert not fired


def test_hooks_of_modules_inside_a_graph_do_not_run() -> None:
    model = Chain(block=Block())
    seen: list[Any] = []
    model.block.register_forward_hook(lambda m, args, out: seen.append(out))
    trace(model)
    assert not seen


class GaveUp(BaseException):
    """Raised by a test's model if tracing does not end; no handler catches it."""


@pytest.mark.parametrize("kept", ["in a plain list", "nowhere"])
def test_a_module_that_is_not_registered_does_not_stop_tracing(kept: str) -> None:
    attempts = 0

    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sigmoid()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), Swish()
            self.hidden = [Swish()]

        def forward(self, x: Tensor) -> Tensor:
            nonlocal attempts
            attempts += 1
            if attempts > 30:
                raise GaveUp
            return (self.hidden[0] if kept == "in a plain list" else Swish())(self.act(self.fc(x)))

    model = Model()
    forest = trace(model)
    assert parameter(forest, "fc.weight").uses[0].op == "linear"
    assert_every_module_is_accounted_for(model, forest)


def test_an_unregistered_torch_layer_makes_its_caller_opaque() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.ReLU()(self.fc(x))

    model = Model()
    forest = trace(model)
    assert regions(forest) == {"": False}
    assert "not installed as a submodule" in reason(forest, "")


def test_warnings_of_a_traced_forward_are_not_shown() -> None:
    class Model(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            warnings.warn("each forward says so", stacklevel=1)
            return super().forward(x, scale)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        forest = trace(Chain(a=Model()))
    assert seen == [] and regions(forest) == {"": True}


def test_train_and_eval_mode_give_the_same_result() -> None:
    model = Chain(a=Block(), drop=nn.Dropout(), b=Branching())
    train, evaluate = trace(model.train()), trace(model.eval())
    assert regions(train) == regions(evaluate)
    assert [info.uses for info in train.parameters] == [info.uses for info in evaluate.parameters]


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=20, **_SIZES)
    return transformers.BertForMaskedLM(config), {"input_ids": torch.arange(6).view(2, 3)}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=20, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.arange(6).view(2, 3)}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(image_size=16, patch_size=8, **_SIZES)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.ones(2, 3, 16, 16)}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    tokens = torch.arange(6).view(2, 3)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": tokens, "decoder_input_ids": tokens}


@pytest.mark.parametrize(
    ("build", "tied", "ops"),
    [
        (
            bert,
            ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
            {
                "bert.embeddings.position_embeddings.weight": "embedding",
                "bert.encoder.layer.1.intermediate.dense.weight": "linear",
                "bert.encoder.layer.0.attention.self.query.weight": "linear",
            },
        ),
        (
            gpt2,
            ("transformer.wte.weight", "lm_head.weight"),
            {"transformer.wpe.weight": "embedding", "transformer.h.1.mlp.c_fc.weight": "linear"},
        ),
        (vit, None, {"vit.embeddings.patch_embeddings.projection.weight": "conv2d", "classifier.weight": "linear"}),
        (
            t5,
            ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
            {"encoder.block.0.layer.0.SelfAttention.q.weight": "linear"},
        ),
    ],
)
def test_transformers_models(build: Any, tied: tuple[str, ...] | None, ops: dict[str, str]) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    expected = model(**inputs).logits
    before = Snapshot(model)
    start = time.perf_counter()
    forest = trace(model)
    # Traces take 0.3 s on an idle core.
    assert time.perf_counter() - start < 10
    before.assert_unchanged()
    assert torch.equal(model(**inputs).logits, expected)
    assert_every_module_is_accounted_for(model, forest)
    assert all(region.reason for region in forest.regions if region.graph is None)
    # Every model is opaque as a whole, and some of its parts are traced.
    assert set(regions(forest).values()) == {True, False} and not regions(forest)[""]
    for name, op in ops.items():
        assert op in [use.op for use in parameter(forest, name).uses], name
    if tied:
        assert parameter(forest, tied[0]).aliases == tied
    assert all(use.op != "unused" for info in forest.parameters for use in info.uses if info.parameter.dim() > 1)


class Expert(nn.Module):
    """One of many that are alike, but for what a test changes."""

    def __init__(self, way: str = "linear") -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.way: Any = way
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "product":
            return x @ self.up.weight
        if isinstance(self.way, list) and self.way:
            return self.down(x)
        return self.down(self.up(x)) + self.shift


def routed(experts: list[nn.Module]) -> nn.Module:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(experts)

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[int(x.sum()) % len(self.experts)](x)

    return Routed()


def traced(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Forest, list[str]]:
    """Return the forest, and the classes of the modules that were traced for it."""
    found: list[str] = []
    original = isolated_trace.trace_alone

    def trace_alone(tracer: fx.Tracer, root: nn.Module, *rest: Any) -> fx.Graph:
        found.append(type(root).__name__)
        return original(tracer, root, *rest)

    monkeypatch.setattr(isolated_trace, "trace_alone", trace_alone)
    forest = trace(model)
    monkeypatch.undo()
    return forest, found


def uses_of(forest: Forest, name: str) -> list[tuple[str, str]]:
    return next([(use.op, use.through) for use in info.uses] for info in forest.parameters if info.name == name)


def test_experts_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forest, found = traced(routed([Expert() for _ in range(20)]), monkeypatch)
    assert found.count("Expert") == 1 and len(forest.regions) == 21
    for number in range(20):
        for layer in ("up", "down"):
            info = next(each for each in forest.parameters if each.name == f"experts.{number}.{layer}.weight")
            assert [(use.op, use.module, use.calls) for use in info.uses] == [
                ("linear", f"experts.{number}.{layer}", 1)
            ]
    # Each reads an input of its own, so none is folded together with another's.
    inputs = {info.uses[0].inputs for info in forest.parameters if info.name.endswith("up.weight")}
    assert len(inputs) == 20


def test_experts_that_differ_in_what_forward_can_see_are_traced_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(change: Any) -> nn.Module:
        expert = Expert()
        change(expert)
        return expert

    different = [
        changed(lambda expert: setattr(expert, "way", "product")),
        changed(lambda expert: setattr(expert, "way", [])),
        changed(lambda expert: setattr(expert, "way", [0])),
        changed(lambda expert: setattr(expert, "way", True)),
        changed(lambda expert: setattr(expert, "way", 1)),
        changed(lambda expert: setattr(expert, "way", 1.0)),
        changed(lambda expert: setattr(expert, "way", object())),
        changed(lambda expert: setattr(expert, "way", object())),
        changed(lambda expert: expert.eval()),
        changed(lambda expert: setattr(expert, "down", nn.Linear(8, 8, bias=False))),
        changed(lambda expert: setattr(expert.down, "weight", expert.up.weight)),
        changed(lambda expert: setattr(expert, "down", expert.up)),
        changed(lambda expert: setattr(expert, "up", nn.Sequential(nn.Linear(8, 8)))),
        changed(lambda expert: expert.up.weight.requires_grad_(False)),
        changed(lambda expert: expert.double()),
    ]
    forest, found = traced(routed([Expert(), *different, Expert()]), monkeypatch)
    assert found.count("Expert") == 1 + len(different)
    assert uses_of(forest, "experts.0.up.weight") == [("linear", "module")]
    assert ("matmul", "function") in uses_of(forest, "experts.1.up.weight")
    assert uses_of(forest, "experts.3.down.weight") == [("linear", "module")]


def test_alike_modules_that_cannot_be_traced_are_explored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forest, found = traced(routed([Branching(Block()) for _ in range(9)]), monkeypatch)
    # The first is traced, and explored once or twice; of the others, only the blocks inside are opened.
    assert found.count("Branching") <= 3 and len([each for each in forest.regions if each.reason]) == 10


def test_a_twin_is_what_deepcopy_gives() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.others = {"list": [nn.Linear(2, 2)], "text": "x"}

        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            own = Own()
            own.copied = True  # type: ignore[assignment]
            return own

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.again = self.first
            self.listed = [self.first, nn.Linear(3, 3)]
            self.own, self.recurrent, self.attention = Own(), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)
            self.nothing: nn.Module | None = None
            self.register_parameter("absent", None)
            self.register_buffer("seen", torch.ones(2), persistent=False)
            self.first.register_forward_hook(lambda *_: None)
            object.__setattr__(self, "parent", self)

    model = Model()
    twin: Any = _twin(model)
    expected: Any = copy.deepcopy(model)
    assert vars(twin).keys() == vars(expected).keys()
    assert [type(each) for each in twin.modules()] == [type(each) for each in expected.modules()]
    assert twin.first is twin.again is twin.listed[0] and twin.first is not model.first
    assert twin.parent is twin and twin.own.copied and twin.listed[1] is not model.listed[1]
    assert twin._non_persistent_buffers_set == {"seen"} and twin.absent is None
    assert all(parameter.is_meta for name, parameter in twin.named_parameters() if not name.startswith("own"))
    assert not twin.first._forward_hooks and model.first._forward_hooks
    twin.first.in_features = 5
    assert model.first.in_features == 3

"""Converted models under `torch.compile`, in CUDA graphs and on several streams."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import roastify
from roastify import RoastConfig
from roastify.conversion.converted import pool_of
from roastify.kernels import ops
from roastify.kernels.gathered_weights import flat_part, gather_flat
from roastify.kernels.group_view import group_of_text
from roastify.pool import compiled_read

# torch.compile makes an object of every `autograd.Function` and looks at every `.grad`, of which torch itself warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

# Inductor warns of many things, of itself and of the device among them.
inductor = pytest.mark.filterwarnings("ignore")


class Tokens(nn.Module):
    """An embedding with a padding row, a convolution, products of both orientations, and a head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64, padding_idx=3)
        self.conv = nn.Conv1d(64, 48, 3, padding=1)
        self.up = nn.Linear(48, 128)
        self.down = Conv1D(64, 128)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.down(self.up(x).relu()).tanh())


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(96, 64, padding_idx=3)
        self.table = nn.Embedding(50, 64, padding_idx=0)
        self.head = nn.Linear(64, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens) + self.table(tokens % 50).sum(1))


class Rows(nn.Module):
    """Products alone, so that the batch is the rows of each."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(width, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        picked = self.embed(x[:, 0].abs().mul(10).long() % self.embed.num_embeddings)
        return self.second(self.first(x + picked).relu())


MODELS: dict[str, Callable[[], nn.Module]] = {"tokens": Tokens, "bags": Bags}
SETTINGS: dict[str, dict[str, Any]] = {
    "tile": {"sign": "tile"},
    "element": {"sign": "element"},
    "unpreconditioned": {"precondition": False},
    "unaligned": {"mapping": "roast"},
}


def convert(model: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    return roastify.convert(model.to(device, dtype), config=RoastConfig(**{"ratio": 3.0, "seed": 1} | settings))


def tokens(batch: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (batch, 9), generator=torch.Generator().manual_seed(seed)).to(device)


def rows(batch: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 256, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Return the output and the gradient of every parameter."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = run(x)
    gradients = torch.autograd.grad(out.float().square().mean(), list(model.parameters()))
    return [out.detach().clone(), *(gradient.clone() for gradient in gradients)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and other.any()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


# Inductor fuses operations into one kernel, and leaves out the rounding to autocast's dtype between them.
FUSED = {False: 1e-5, True: 1e-2}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


# One graph.


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_any_batch(name: str, settings: dict[str, Any], autocast: bool) -> None:
    model = convert(MODELS[name](), **settings)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (4, 7, 12):
        x = tokens(batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert_near(step(compiled, model, x, autocast), step(model, model, x, autocast))
        assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["tokens", pytest.param("bags", marks=pytest.mark.long)])
def test_all_sizes_dynamic(name: str) -> None:
    model = convert(MODELS[name]())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    assert_near(step(compiled, model, tokens(4)), step(model, model, tokens(4)))
    # torch first takes the number λ for a variable; once it finds that λ is constant, it compiles again.
    first = counter.frame_count
    assert first in (1, 2)
    for batch in (7, 12):
        assert_near(step(compiled, model, tokens(batch)), step(model, model, tokens(batch)))
    assert counter.frame_count == first


def test_sizes_become_dynamic_by_themselves() -> None:
    model = convert(Tokens())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(tokens(4))
    assert counter.frame_count == 1
    compiled(tokens(7))
    second = counter.frame_count
    compiled(tokens(12))
    assert counter.frame_count == second <= 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    model = convert(Tokens()).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        for batch in (4, 7):
            x = tokens(batch)
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_models_see_what_training_writes(autocast: bool) -> None:
    model = convert(Tokens())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    before = step(compiled, model, tokens(4), autocast)
    for _ in range(2):
        compiled(tokens(4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = step(compiled, model, tokens(4), autocast)
    assert not torch.equal(before[0], after[0])
    assert_near(after, step(model, model, tokens(4), autocast))
    pool_of(model).weight.data.mul_(2.0)
    found, expected = (step(run, model, tokens(4), autocast) for run in (compiled, model))
    assert_near(found, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_layer_in_a_model_that_is_not_compiled(autocast: bool) -> None:
    """The layer is called within the model's forward pass; while torch traces it, it must not use that pass's cache."""
    model = convert(Tokens())
    x = tokens(4)
    expected = step(model, model, x, autocast)
    for layer in (model.up, model.down):
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_near(step(model, model, x, autocast), expected)
    assert_near(step(model, model, x, autocast), expected)


def test_a_compiled_function_that_calls_a_model() -> None:
    model = convert(Tokens())

    def objective(x: Tensor) -> Tensor:
        return model(x).square().mean() + model.head.weight.square().mean()

    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(tokens(4)), pool_of(model).weight) for f in (compiled, objective))
    assert_near(list(found), list(expected))


def test_an_exported_program_runs() -> None:
    model = convert(Tokens()).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (tokens(4),), dynamic_shapes=({0: batch},))
    for size in (4, 7):
        torch.testing.assert_close(program.module()(tokens(size)), model(tokens(size)))
    # `roastify.read` serves a compiled backward pass, and an exported program has none.
    assert "roastify.embedding" in str(program.graph) and "roastify.read" not in str(program.graph)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_step_recorded_by_make_fx(mode: str) -> None:
    model = convert(Tokens())
    recorded = make_fx(functools.partial(step, model, model), tracing_mode=mode, _allow_non_fake_inputs=True)(tokens(4))
    assert "roastify.linear_reduce_" in str(recorded.graph)
    assert_near(recorded(tokens(4, seed=1)), step(model, model, tokens(4, seed=1)))


def test_a_model_runs_on_fake_tensors() -> None:
    model = convert(Tokens())
    other = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        out = model(fake.from_tensor(tokens(4)))
    assert isinstance(out, FakeTensor) and out.shape == (4, 9, 96) and out.requires_grad
    # The run on fake tensors leaves none of them behind for later runs.
    assert_near(step(model, model, tokens(4)), step(other, other, tokens(4)))


@pytest.mark.long
@inductor
def test_inductor() -> None:
    model = convert(nn.Sequential(nn.Embedding(96, 64, padding_idx=3), nn.Linear(64, 32)))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (4, 7):
        for autocast in (False, True):
            found, expected = (step(run, model, tokens(batch), autocast) for run in (compiled, model))
            assert_near(found, expected, FUSED[autocast])


@inductor
def test_inductor_and_a_sum_of_a_table_with_a_padding_row() -> None:
    model = convert(nn.Sequential(nn.Embedding(96, 64, padding_idx=3), nn.Linear(64, 32)))
    table = model[0]
    compiled = torch.compile(lambda: table.weight.sum(), fullgraph=True)
    found, expected = (
        torch.autograd.grad(run(), pool_of(model).weight) for run in (compiled, lambda: table.weight.sum())
    )
    assert_near(list(found), list(expected))


# The gradient of the pool in a compiled backward pass.


class Stack(nn.Module):
    """An embedding, then blocks; `how` runs a block."""

    def __init__(self, how: Callable[..., Tensor], depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.how = how

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            x = x + self.how(block, x, index).relu()
        return x


def plain(block: nn.Module, x: Tensor, index: int) -> Tensor:
    return block(x)


def twice(block: nn.Module, x: Tensor, index: int) -> Tensor:
    return block(block(x))


def checkpointed(block: nn.Module, x: Tensor, index: int) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def partly_without(block: nn.Module, x: Tensor, index: int) -> Tensor:
    with torch.set_grad_enabled(index != 2):
        return block(x)


def by_its_weight(block: nn.Module, x: Tensor, index: int) -> Tensor:
    return x @ block.weight + block(x) * (1 + block.weight.sum())


def left_out(block: nn.Module, x: Tensor, index: int) -> Tensor:
    return x if index == 1 else block(x)


def broken(block: nn.Module, x: Tensor, index: int) -> Tensor:
    if index == 2:
        torch._dynamo.graph_break()
    return block(x)


HOW = [plain, twice, checkpointed, partly_without, by_its_weight, left_out, broken]


# Sequences of nine words: too few to keep a block's weight for the backward pass, and enough.
FEW, MANY = 4, 16


def gradients(
    run: Callable[[Tensor], Tensor], model: nn.Module, autocast: bool = False, batch: int = FEW
) -> list[Tensor]:
    """Return the gradients of the parameters that get one."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(tokens(batch))
    found = torch.autograd.grad(out.float().square().mean(), list(model.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("batch", [FEW, MANY])
@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
def test_gradients_of_layers_that_share_a_graph(how: Callable[..., Tensor], batch: int, autocast: bool) -> None:
    model = convert(Stack(how))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=how is not broken)
    found, expected = (gradients(run, model, autocast, batch) for run in (compiled, model))
    assert len(found) > 1
    # A compiled graph casts a bias once, and sums the gradients of its readers in autocast's dtype.
    assert_near(found, expected, FUSED[autocast])


@pytest.mark.parametrize("batch", [FEW, MANY])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_of_forward_passes_and_pools_that_share_a_graph(backend: str, batch: int) -> None:
    both = nn.ModuleList(convert(Stack(plain), seed=seed) for seed in (1, 2))

    def objective(x: Tensor) -> Tensor:
        return both[0](x) * both[0](x.roll(1)) + both[1](x)

    compiled = torch.compile(objective, backend=backend, fullgraph=True)
    found, expected = (gradients(run, both, batch=batch) for run in (compiled, objective))
    assert len(found) == len(list(both.parameters()))
    assert_near(found, expected)


def test_a_second_backward_pass_through_a_compiled_graph() -> None:
    model = convert(Stack(plain))
    weight = pool_of(model).weight
    (expected,) = torch.autograd.grad(model(tokens(4)).square().mean(), weight)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens(4)).square().mean()
    loss.backward(retain_graph=True)
    assert_near([weight.grad], [expected])
    loss.backward()
    assert_near([weight.grad], [2 * expected])


@inductor
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("precondition", [pytest.param(False, marks=pytest.mark.long), True])
def test_layers_add_to_one_gradient_of_the_pool(precondition: bool, autocast: bool) -> None:
    model = convert(Stack(plain, depth=12), precondition=precondition)
    compiled = torch.compile(model, fullgraph=True)
    found, codes = run_and_get_code(lambda: gradients(compiled, model, autocast))
    assert_near(found, gradients(model, model, autocast), FUSED[autocast])
    backward = codes[-1]
    assert backward.count("roastify.linear_reduce_.default(") == 12
    assert backward.count("roastify.embedding_reduce_.default(") == 1
    assert "roastify.linear_reduce.default(" not in backward
    made = [
        math.prod(map(int, re.findall(r"\d+", size)))
        for size in re.findall(r"= empty_strided_\w+\((\(.*?\))", backward)
    ]
    # One tensor is the sum of the gradients; with the preconditioner another is the sum divided by Γ.
    assert made.count(pool_of(model).weight.numel()) == (2 if precondition else 1)


def graphs_of(run: Callable[[Callable[..., Any]], Any]) -> list[list[tuple[str, tuple[Any, ...]]]]:
    """Return our operators, with their arguments, in the graphs that `run` compiles with the backend it gets."""
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls = []
        for node in graph.graph.nodes:
            # An operator that writes in place is the first argument of another one, which has its arguments by name.
            for target in (node.target, *node.args[:1]):
                if isinstance(target, torch._ops.OpOverload) and target.namespace == "roastify":
                    calls.append((target._opname, (*node.args, *node.kwargs.values())))
        graphs.append(calls)
        return make_boxed_func(graph.forward)

    run(aot_autograd(fw_compiler=record, bw_compiler=record))
    return graphs


def operators_of(run: Callable[[Callable[..., Any]], Any]) -> Counter[str]:
    """Return how often the graphs that `run` compiles with the given backend call each of our operators."""
    return Counter(name for graph in graphs_of(run) for name, _ in graph)


def test_small_weights_of_a_graph_are_gathered_together() -> None:
    model = convert(Stack(plain, depth=6))
    graphs = graphs_of(
        lambda backend: gradients(torch.compile(model, backend=backend, fullgraph=True), model, batch=MANY)
    )
    # If this changes, graphs on users' disks are outdated: raise the number.
    assert compiled_read.RECORDING == 1
    assert [[name for name, _ in graph] for graph in graphs] == [
        ["embedding", "gather_group"], ["reduce_group_", "embedding_reduce_"]
    ]  # fmt: skip


def test_many_small_weights_are_gathered_in_groups_that_a_graph_can_name() -> None:
    model = convert(Stack(plain, depth=70))
    found = operators_of(
        lambda backend: gradients(torch.compile(model, backend=backend, fullgraph=True), model, batch=MANY)
    )
    assert (found["gather_group"], found["reduce_group_"], found["gather"]) == (2, 2, 0)


def test_weights_that_are_not_kept_are_not_gathered() -> None:
    """Only the layers with many inputs for their weights keep them for the backward pass."""
    model = convert(nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(64, 256), nn.Linear(256, 64)))))
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(100, 64)
    assert_near(step(compiled, model, x), step(model, model, x))
    torch.compiler.reset()
    graphs = graphs_of(lambda backend: step(torch.compile(model, backend=backend, fullgraph=True), model, x))
    (group,) = [args[2] for graph in graphs for name, args in graph if name == "gather_group"]
    assert {(view.rows, view.cols) for view in group_of_text(group).views} == {(64, 256)}


def test_a_compiled_model_that_loads_values_of_another_scale() -> None:
    """λ of every weight is a constant of the graph."""
    dense = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    wide = copy.deepcopy(dense)
    with torch.no_grad():
        wide[0].weight.mul_(2.0)
    model, other = (convert(each, init="match") for each in (dense, wide))
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(100, 64)
    step(compiled, model, x)
    before = [weight.scale for weight in pool_of(model).retained]
    model.load_state_dict(other.state_dict())
    assert pool_of(model).retained[0].scale > 1.2 * before[0]
    assert_near(step(compiled, model, x), step(model, model, x))


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "mul_": lambda pool: pool.mul_(0.5),
    "copy_": lambda pool: pool.copy_(pool.flip(0)),
    "foreach": lambda pool: torch._foreach_mul_([pool], 0.5),
    "data": lambda pool: pool.data.mul_(0.5),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_that_writes_to_the_pool_between_two_passes(backend: str, write: str) -> None:
    model = convert(Stack(plain))
    pool = pool_of(model).weight
    before = pool.detach().clone()

    def twice_with_a_step(x: Tensor) -> Tensor:
        first = model(x)
        with torch.no_grad():
            WRITES[write](pool)
        return torch.stack([first, model(x)])

    found = []
    for run in (torch.compile(twice_with_a_step, backend=backend, fullgraph=True), twice_with_a_step):
        pool.data.copy_(before)
        with torch.no_grad():
            pool.add_(0.0)
        found.append(run(tokens(MANY)).detach())
    assert_near(found[:1], found[1:])


@pytest.mark.parametrize("write", ["mul_", "foreach"])
def test_a_graph_that_writes_to_the_pool_between_two_layers(write: str) -> None:
    def halved(block: nn.Module, x: Tensor, index: int) -> Tensor:
        if index == 2:
            with torch.no_grad():
                WRITES[write](pool_of(model).weight)
        return block(x)

    model = convert(Stack(halved))
    before = pool_of(model).weight.detach().clone()
    found = []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        with torch.no_grad():
            pool_of(model).weight.copy_(before)
        found.append(run(tokens(MANY)).detach())
    assert_near(found[:1], found[1:])


def test_a_part_of_a_model_gathers_only_what_it_reads() -> None:
    """Of a model that is compiled block by block, each graph would otherwise gather the weights of all blocks."""
    model = convert(Stack(plain, depth=6))

    def run(backend: Callable[..., Any]) -> None:
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
        gradients(model, model, batch=MANY)

    found = operators_of(run)
    assert found["gather"] and found["reduce_"] and not found["gather_group"]


def test_gradients_of_a_flat_gather_without_a_buffer() -> None:
    """Where the pool's gradient cannot be added to a buffer, the parts return theirs to autograd."""
    model = convert(Stack(plain, depth=3))
    pool = pool_of(model)
    group = group_of_text(pool.retained[0].group)
    values = pool.weight.detach().double().requires_grad_()
    flat = gather_flat(values, pool.table, group)
    numbers = (2, 0, 2)
    parts = [flat_part(flat, group, number) for number in numbers]
    factors = [torch.randn_like(part) for part in parts]
    (found,) = torch.autograd.grad(parts, values, factors)
    dense = [ops.gather(values, pool.table, group.views[number], group.scales[number]) for number in numbers]
    (expected,) = torch.autograd.grad(dense, values, factors)
    assert_near([found], [expected], 1e-12)


# On a GPU: compilers.


@inductor
@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sign", ["tile", "element"])
def test_one_graph_for_any_choice_of_kernel(sign: str, autocast: bool) -> None:
    """The operator chooses its kernel by the number of rows, so no graph depends on that number."""
    model = convert(Rows(), "cuda", sign=sign)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (16, 64, 200, 3000):
        x = rows(batch, "cuda")
        torch._dynamo.mark_dynamic(x, 0)
        assert_near(step(compiled, model, x, autocast), step(model, model, x, autocast), 1e-2 if autocast else 1e-3)
        assert counter.frame_count == 1
    x = rows(1, "cuda")
    assert_near(step(compiled, model, x, autocast), step(model, model, x, autocast), 1e-2 if autocast else 1e-3)
    assert counter.frame_count == 2, "torch makes a graph of its own for a size of 1"


@inductor
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_folds_in_a_graph_for_any_batch(device: str, backend: str, learned: bool, autocast: bool) -> None:
    layers = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    model = convert(layers, device, ratio=8.0, fold=4, learned_scales=learned)
    assert all(fold.fold == 4 for fold in pool_of(model).plan.folds)
    transposed = rows(600, device).t().contiguous()
    for function in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
        for x in (rows(64, device), transposed[:, 40:77].t(), rows(1, device)):
            x.requires_grad_()
            expected = step(function, model, x, autocast)
            assert_near(step(compiled, model, x, autocast), expected, 2e-2 if autocast else 1e-3)
        assert compiled(rows(0, device)).shape == (0, 256)


@inductor
@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_inductor_on_a_gpu(name: str, autocast: bool) -> None:
    model = convert(MODELS[name](), "cuda")
    compiled = torch.compile(model, fullgraph=True)
    for batch in (4, 7, 300):
        x = tokens(batch, "cuda")
        torch._dynamo.mark_dynamic(x, 0)
        assert_near(step(compiled, model, x, autocast), step(model, model, x, autocast), 2e-2 if autocast else 1e-3)


def equal_layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))


def equal_convolutions() -> nn.Module:
    """Convolutions of one size, and what makes images of a batch's rows."""
    return nn.Sequential(
        nn.Unflatten(1, (64, 2, 2)), *(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)), nn.Flatten()
    )


# A model, its input by a seed, and settings.
REDUCED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[str, Any]]] = {
    "products": (Rows, lambda seed: rows(64, "cuda", seed=seed), {}),
    "equal layers": (equal_layers, lambda seed: rows(300, "cuda", seed=seed), {}),
    "folds": (equal_layers, lambda seed: rows(300, "cuda", seed=seed), {"fold": 2}),
    "learned scales": (equal_layers, lambda seed: rows(300, "cuda", seed=seed), {"fold": 2, "learned_scales": True}),
    "local sharing": (equal_layers, lambda seed: rows(300, "cuda", seed=seed), {"sharing": "local"}),
    "convolutions": (equal_convolutions, lambda seed: rows(300, "cuda", seed=seed), {}),
    "whole kernels": (equal_convolutions, lambda seed: rows(300, "cuda", seed=seed), {"kernel_basis": "none"}),
    "tokens": (Tokens, lambda seed: tokens(64, "cuda", seed), {}),
    "bags": (Bags, lambda seed: tokens(64, "cuda", seed), {}),
}
# Those whose layers gather their weights in a group.
GROUPED = {"equal layers", "folds", "learned scales", "convolutions", "whole kernels"}


@inductor
@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", REDUCED)
def test_reduce_overhead(name: str, training: bool, autocast: bool) -> None:
    """Inductor's own CUDA graphs, replayed on other inputs and after the weights have changed."""
    from roastify.kernels.gpu import group

    make, inputs, settings = REDUCED[name]
    model = convert(make(), "cuda", **settings)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    tolerance = 1e-2 if autocast else 1e-3
    # So that a group's tables are made while torch's memory for the graphs is in use. They must not lie there.
    group._group.cache_clear()
    for seed in range(6):
        x = inputs(seed)
        torch.compiler.cudagraph_mark_step_begin()
        if training:
            assert_near(step(compiled, model, x, autocast), step(model, model, x, autocast), tolerance)
        else:
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                assert_near([compiled(x).clone()], [model(x)], tolerance)
        pool_of(model).weight.data.mul_(1.1)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert (group._group.cache_info().currsize > 0) == (training and name in GROUPED)


# On a GPU: CUDA graphs.


def warm_up(run: Callable[[], Any], times: int = 3) -> None:
    """Run on a side stream, as torch requires before a capture; this compiles the kernels too."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [1, 16, 64, 200, 3000])
def test_a_captured_forward_pass(batch: int, autocast: bool) -> None:
    model = convert(Rows(), "cuda")
    x = rows(batch, "cuda")

    def run() -> Tensor:
        # Autocast's own cache would keep copies of the other weights from before the capture.
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            return model(x)

    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(3):
        x.copy_(rows(batch, "cuda", seed=seed))
        # torch does not count this write, and it comes after the capture: a replay must read the new weights.
        pool_of(model).weight.data.add_(0.01)
        graph.replay()
        assert_near([out], [run()], 1e-2 if autocast else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["rows", "tokens", "bags"])
def test_a_captured_training_step(name: str, autocast: bool) -> None:
    model = convert(Rows() if name == "rows" else MODELS[name](), "cuda")
    twin = copy.deepcopy(model)
    inputs = [rows(64, "cuda", seed=s) if name == "rows" else tokens(64, "cuda", seed=s) for s in range(8)]
    static = inputs[0].clone()

    def train(trained: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = trained(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    warm_up(lambda: train(model, optimizer, static))
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train(model, optimizer, static)
    found = []
    for x in inputs:
        static.copy_(x)
        graph.replay()
        found.append(loss.clone())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        train(twin, optimizer, inputs[0])
    expected = [train(twin, optimizer, x) for x in inputs]
    assert len({float(value.detach()) for value in found}) > 1
    torch.testing.assert_close(found, expected, rtol=1e-2 if autocast else 1e-4, atol=1e-6)
    torch.testing.assert_close(
        pool_of(model).weight, pool_of(twin).weight, rtol=1e-2 if autocast else 1e-3, atol=1e-3 if autocast else 1e-5
    )


@pytest.mark.gpu
def test_graphed_callables() -> None:
    """Torch captures forward and backward of a whole model; it refuses a model with hooks."""
    model = convert(Rows(), "cuda")
    plain = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (rows(64, "cuda"),))
    for seed in range(3):
        x = rows(64, "cuda", seed=seed)
        assert_near(step(graphed, model, x), step(plain, plain, x), 1e-4)


# On a GPU: streams, and the same bits.


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_two_streams_side_by_side(autocast: bool, grad: bool) -> None:
    model = convert(Rows(), "cuda")
    inputs = [rows(batch, "cuda", seed=batch) for batch in (48, 3000)]

    def run(x: Tensor) -> list[Tensor]:
        if grad:
            return step(model, model, x, autocast)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return [model(x)]

    expected = [run(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        found = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(x))
        torch.cuda.synchronize()
        # The bits may differ: cuBLAS has a workspace for each stream, and may choose its algorithm by it.
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other, 1e-2 if autocast else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 16, 64, 200, 3000])
@pytest.mark.parametrize("sign", ["tile", "element"])
def test_the_same_bits_on_every_run(sign: str, batch: int, dtype: torch.dtype) -> None:
    model = convert(Rows(), "cuda", dtype, sign=sign)
    x = rows(batch, "cuda", dtype)
    first = step(model, model, x)
    assert all(value.any() for value in first)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(step(model, model, x), first, strict=True))

"""`emit="graph"`: one GraphModule that computes what the model computes, or a refusal with the reason."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import roastify
from roastify.conversion.converted import pool_of
from roastify.conversion.emitted_graph import emit_graph
from roastify.errors import ConfigError, ConversionError
from roastify.layers.reading import tracers


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def halved(x: Tensor) -> Tensor:
    return x * 0.5


class Block(nn.Module):
    """A raw weight in both orientations, a helper, a method, and layers of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(48, 48) / 7)
        self.norm = nn.LayerNorm(48)
        self.layers = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 48)])
        self.drop = nn.Dropout(0.2)

    def mix(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) @ self.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.drop(self.norm(halved(self.mix(x))))


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 48)
        self.positions = nn.Parameter(normal(1, 30, 48))
        self.blocks = nn.Sequential(Block(), Block())
        self.gru = nn.GRU(48, 48, batch_first=True)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = (self.embed(tokens) + self.positions[:, : tokens.shape[1]]) * mask[..., None]
        x = self.blocks(x) * self.scale
        out, last = self.gru(x)
        return out, last


INPUTS = torch.arange(10).view(2, 5), torch.ones(2, 5)


def emitted(**settings: Any) -> tuple[nn.Module, fx.GraphModule]:
    model = Straight()
    converted = roastify.convert(model, 4, seed=3, inplace=True, **settings)
    return converted, emit_graph(converted)  # type: ignore[attr-defined,return-value]


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_computes_what_the_model_computes(training: bool) -> None:
    converted, graph = emitted()
    converted.train(training), graph.train(training)
    gradients = []
    for model in (converted, graph):
        torch.manual_seed(0)
        out, last = model(*INPUTS)
        (out.sum() + last.square().sum()).backward()
        gradients.append((out, last, pool_of(converted).weight.grad))
        pool_of(converted).weight.grad = None
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_is_one_module_with_the_models_signature() -> None:
    model = Straight()
    graph = roastify.convert(model, 4, emit="graph", example_inputs=INPUTS)
    assert isinstance(graph, fx.GraphModule) and type(model).__name__ in type(graph).__name__ + graph._get_name()
    expected = inspect.signature(model.forward, eval_str=True)
    assert inspect.signature(graph.forward) == expected
    assert [name for name, _ in graph.named_parameters() if "pool" in name] == ["roast_pool.weight"]
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert "blocks.0.layers.1" in targets and sum(target.startswith("roast_reads.") for target in targets) == 3
    # Another length works too: the graph has not recorded the shape as a constant.
    assert graph(torch.arange(14).view(2, 7), torch.ones(2, 7))[0].shape == (2, 7, 48)
    twin = copy.deepcopy(graph)
    with torch.no_grad():
        graph.eval(), twin.eval()
        assert torch.equal(graph(*INPUTS)[0], twin(*INPUTS)[0])
        twin.roast_pool.weight.zero_()
        assert not torch.equal(graph(*INPUTS)[0], twin(*INPUTS)[0])
    assert not tracers


class Branching(Straight):
    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.embed(tokens) if self.training else self.positions


class Optional(Straight):
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        return self.embed(tokens)


class AnyNumber(Straight):
    def forward(self, *tokens: Tensor) -> Any:
        return self.embed(tokens[0])


class Asking(Straight):
    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.embed(tokens), isinstance(tokens, Tensor)


class Counting(Straight):
    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        self.calls = 1
        return self.embed(tokens)


class Constant(Straight):
    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.embed(tokens) + torch.randn(48)


def sneaky(x: Tensor) -> Tensor:
    return x if x.sum() is not None else -x


class Helped(Straight):
    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return sneaky(self.embed(tokens))


class Inside(Straight):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Counting()

    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.inner(tokens, mask)


class Shaped(Straight):
    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.embed(tokens) + torch.zeros(len(tokens), 1, 1)


def hooked() -> nn.Module:
    model = Straight()
    model.embed.register_forward_hook(lambda module, args, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Branching, r"Branching\.forward branches or compares \(its line 2"),
        (Optional, "argument 'mask' of its forward is optional"),
        (AnyNumber, r"takes any number of arguments \(\*tokens"),
        (Asking, "calls 'isinstance', which inspects a value"),
        (Counting, "sets the attribute 'calls'"),
        (Constant, "creates a tensor that depends on no input"),
        (Helped, "sneaky branches or compares"),
        (Inside, r"Counting\.forward sets the attribute 'calls'"),
        (Shaped, "it cannot be traced: RuntimeError: 'len' is not supported"),
        (hooked, "it has modules with hooks"),
    ],
)
def test_code_that_a_graph_cannot_express_is_refused_with_the_reason(
    build: Callable[[], nn.Module], reason: str
) -> None:
    model = build()
    with pytest.raises(ConversionError, match=rf"^one graph cannot do everything that this \w+ does: .*{reason}"):
        roastify.convert(model, 4, emit="graph")
    assert not tracers and type(model.embed) is nn.Embedding
    with pytest.raises(ConfigError, match="emit must be one of model, graph; found 'grph'; closest: 'graph'"):
        roastify.convert(model, 4, emit="grph")


def test_a_graph_is_emitted_from_a_converted_model_only() -> None:
    with pytest.raises(ConversionError, match="holds no roastify pool"):
        emit_graph(Straight())  # type: ignore[attr-defined]

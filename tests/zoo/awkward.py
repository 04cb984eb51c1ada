"""Hand-written models that break naive converters; each is a family of its own."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.examine import Entry


def normal(*shape: int) -> Tensor:
    """Return the same normal numbers every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


class Recurrent(nn.Module):
    """A recurrent layer whose packed and plain outputs are summed, behind an embedding."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(20, 24, **options)

    def forward(self, x: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 2]), batch_first=self.rnn.batch_first)
        return self.rnn(x)[0], self.rnn(packed)[0].data


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.RNNCell(20, 24), nn.GRUCell(24, 24), nn.LSTMCell(24, 24)])

    def forward(self, x: Tensor) -> Tensor:
        rnn, gru, lstm = self.cells
        return lstm(gru(rnn(x)))[0]


class Experts(nn.Module):
    """Fused experts: 3-D weights, read by `bmm`, by `einsum` and one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(normal(4, 32, 48) / 6)
        self.down = nn.Parameter(normal(4, 24, 32) / 5)
        self.router = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.bmm(x.expand(4, -1, -1), self.gate_up).chunk(2, dim=-1)
        every = torch.einsum("ebi,eio->ebo", F.silu(gate) * up, self.down)
        chosen = self.router(x).softmax(-1)
        alone = sum(x[:, :24] @ self.down[expert] for expert in range(4))
        return (every * chosen.t()[..., None]).sum(0) + alone


class Raw(nn.Module):
    """A class token, a position table, a relative bias, and parameters in lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(normal(1, 1, 32))
        self.positions = nn.Parameter(normal(1, 50, 32))
        self.relative = nn.Parameter(normal(7, 7))
        self.several = nn.ParameterList([normal(32, 20), normal(20, 32)])
        self.named = nn.ParameterDict({"left": normal(32, 16), "right": normal(16, 32)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.positions[:, : x.shape[1]]
        x = x + (self.relative[: x.shape[1], : x.shape[1]] @ x)
        for weight in self.several:
            x = x @ weight
        return x @ self.named["left"] @ self.named["right"]


class Tied(nn.Module):
    """One parameter in three modules: by an embedding, a linear layer and as a raw matrix in both orientations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight
        self.raw = nn.Module()
        self.raw.table = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x) + x @ self.raw.table.t() + (self.head(x) @ self.raw.table) @ self.raw.table.t()


class Magic(nn.Module):
    """Looks its parameter up by a `__getattr__` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(normal(32, 32))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("kernel" if name == "alias" else name)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.alias + x @ self.kernel


class Lora(nn.Module):
    """A frozen layer with a trained low-rank adapter, as PEFT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(128, 128).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(128, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 128, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 40)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(40, 32)),
        nn.utils.parametrizations.orthogonal(nn.Linear(32, 32)),
    )


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        first = nn.utils.weight_norm(nn.Linear(32, 40))
    return nn.Sequential(first, nn.utils.spectral_norm(nn.Linear(40, 32)))


class Noisy(nn.Linear):
    """A layer's subclass with a second matrix of its own and a forward of its own."""

    def __init__(self) -> None:
        super().__init__(32, 48)
        self.spread = nn.Parameter(normal(48, 32) / 50)
        self.register_buffer("noise", normal(48, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.spread * self.noise, self.bias)


class Twice(nn.Module):
    """One module called twice, and held under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)
        self.again = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Choosing(nn.Module):
    """Branches on its mode, an optional argument, a shape and values; takes keywords; gives a dataclass in a dict."""

    @dataclass
    class Result:
        """The output of `Choosing`."""

        logits: Tensor
        hidden: tuple[Tensor, ...]

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(24, 48))
        self.layers = nn.ModuleDict({name: nn.Linear(48, 48) for name in ("short", "long", "drilled")})

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        x = self.table[tokens] * scale
        if mask is not None:
            x = x * mask[..., None]
        x = x + self.layers["short" if tokens.shape[1] < 5 else "long"](x)
        if self.training and bool((x.mean() < 100).item()):
            x = self.layers["drilled"](x)
        return {"result": self.Result(x @ self.table.t(), (x, x.mean(1)))}


class Counting(nn.Module):
    """Keeps buffers and plain attributes up to date in its forward, and checkpoints its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 48) for _ in range(2)])
        self.norm = nn.BatchNorm1d(48)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.history.append(len(x))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.training else layer(x)
        return self.norm(x)


class Hypernetwork(nn.Module):
    """Computes the weights of one layer by another, and runs it by `functional_call`."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(16, 32 * 16)
        self.code = nn.Parameter(normal(16))
        self.made = nn.Linear(32, 16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(self.code).view(16, 32)
        return torch.func.functional_call(self.made, {"weight": weight, "bias": weight.sum(1)}, (x,))


class Mixed(nn.Module):
    """Layers of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(32, 48).double()
        self.usual = nn.Linear(48, 48)
        self.narrow = nn.Linear(48, 32).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.usual(self.wide(x.double()).float()).bfloat16())


class Guided(nn.Module):
    """Asks its parameters for their dtype and device, and iterates over them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(48, 48, bias=False), nn.Tanh(), nn.Linear(48, 48, bias=False))
        self.scale = nn.Parameter(normal(40, 48))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype).to(self.scale.device) @ self.scale.t() @ self.scale
        return self.body(x.to(next(self.body.parameters()).dtype).to(next(self.body[2].parameters()).device))


class Changing(nn.Module):
    """Changes its layers' outputs in place, in its forward and by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 48)
        self.layer = nn.Linear(48, 48)
        self.layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.layer.register_forward_hook(lambda module, args, output: output.mul_(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mul_(3)
        return self.layer(x).add_(1).transpose(0, 1)


class Selfish(nn.Module):
    """Copies itself, and writes its own state dict, as torch-geometric's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(48, 32) / 6)

    def __deepcopy__(self, memo: Any) -> Selfish:
        twin = Selfish()
        twin.weight = nn.Parameter(self.weight.detach().clone())
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Abstract(abc.ABC, nn.Module):
    """Inherits an abstract class before `nn.Module`, and so do its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = AbstractLinear(32, 48)
        self.scale = nn.Parameter(normal(48, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.scale


class AbstractLinear(abc.ABC, nn.Linear):
    """A layer with another class before torch's."""


class Block(nn.Module):
    """A block as ConvNeXt has it: its layer scale has two dimensions of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 7, padding=3, groups=32)
        self.mix = nn.Conv2d(32, 32, 1)
        self.scale = nn.Parameter(torch.full((32, 1, 1), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.mix(self.conv(x))


def reflected() -> nn.Module:
    """Layers that are orthogonal by Householder reflections, whose signs stand on the diagonal of what is stored."""
    orthogonal = nn.utils.parametrizations.orthogonal
    return nn.Sequential(orthogonal(nn.Linear(32, 48)), nn.Tanh(), orthogonal(nn.Linear(48, 40)), nn.Linear(40, 64))


x3 = normal(3, 4, 20)
# test_read_weights.py uses these models as well.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "rnn": (lambda: Recurrent(nn.RNN, batch_first=True), (x3,)),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True), (x3,)),
    "lstm with projections": (lambda: Recurrent(nn.LSTM, batch_first=True, proj_size=12), (x3,)),
    "lstm without biases": (lambda: Recurrent(nn.LSTM, batch_first=True, bias=False, dropout=0.3, num_layers=2), (x3,)),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True), (x3,)),
    "cells": (Cells, (normal(3, 20),)),
    "attention": (lambda: nn.MultiheadAttention(32, 4), (normal(5, 2, 32),) * 3),
    "attention with sizes": (
        lambda: nn.MultiheadAttention(32, 4, kdim=24, vdim=20, add_bias_kv=True),
        (normal(5, 2, 32), normal(6, 2, 24), normal(6, 2, 20)),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        (normal(2, 5, 32),),
    ),
    "decoder": (lambda: nn.TransformerDecoderLayer(32, 4, 64), (normal(5, 2, 32), normal(6, 2, 32))),
    "transformer": (lambda: nn.Transformer(32, 4, 1, 1, 64), (normal(5, 2, 32), normal(6, 2, 32))),
    "experts": (Experts, (normal(6, 32),)),
    "raw": (Raw, (normal(2, 6, 32),)),
    "tied": (Tied, (torch.arange(6).view(2, 3),)),
    "magic": (Magic, (normal(2, 32),)),
    "parametrizations": (weight_normed, (normal(2, 32),)),
    "old weight norm": (old_weight_norm, (normal(2, 32),)),
}
MORE: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "subclass with a forward": (Noisy, (normal(2, 32),)),
    "module used twice": (Twice, (normal(2, 48),)),
    "branches": (Choosing, {"tokens": torch.arange(6).view(2, 3), "mask": torch.ones(2, 3), "scale": 0.5}),
    "state in forward": (Counting, (normal(4, 48),)),
    "hypernetwork": (Hypernetwork, (normal(4, 32),)),
    "mixed dtypes": (Mixed, (normal(4, 32),)),
    "asks its parameters": (Guided, (normal(4, 48),)),
    "copies itself": (lambda: nn.Sequential(Selfish(), nn.Linear(48, 48)), (normal(4, 32),)),
    "abstract classes": (Abstract, (normal(2, 32),)),
    "layer scale": (Block, (normal(2, 32, 9, 9),)),
    "reflectors": (reflected, (normal(2, 32),)),
    "in-place": (Changing, (torch.arange(6).view(2, 3),)),
    "adapter": (Lora, (normal(2, 128),)),
    # A model whose root is DataParallel is refused.
    "data parallel": (lambda: nn.Sequential(nn.DataParallel(nn.Linear(32, 48)), nn.Linear(48, 32)), (normal(2, 32),)),
}


def entries() -> Iterator[Entry]:
    """Yield every model of this file."""
    for name, (build, inputs) in {**MODELS, **MORE}.items():
        yield Entry(name, "awkward", build, lambda inputs=inputs: inputs)

"""Small models of every kind of layer, and dense twins whose weights are made from a pool by torch's indexing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from roastify.conversion.converted import pool_of
from roastify.layers.base import RoastModule


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 48)
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(4))
        self.last = nn.Linear(48, 40)
        self.again: Callable[..., Tensor] = lambda function, x: function(x)

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.again(lambda x: layer(x).tanh(), x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = self.run(layer, x)
        return self.last(x)


class Transformer(nn.Module):
    """A tied embedding with a padding row, attention that reads its weights as tensors, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 32, padding_idx=3)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 90, bias=False)
        self.head.weight = self.embed.weight
        self.again: Callable[..., Tensor] = lambda function, x: function(x)

    def block(self, x: Tensor) -> Tensor:
        # `need_weights` makes attention compute plain products; those have a second derivative.
        x = x + self.attention(x, x, x, need_weights=True)[0]
        return self.norm(x + self.down(self.up(x).relu()))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.detach().abs() * 1000).long() % 90
        x = self.embed(tokens) + x[..., None]
        return self.head(self.again(self.block, self.again(self.block, x)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(32, 16, 3)
        self.last = nn.Linear(16, 70)
        self.again: Callable[..., Tensor] = lambda function, x: function(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 4, 2, 5)
        x = self.again(lambda x: self.second(self.first(x).relu()).relu(), x)
        return self.last(self.up(x).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 24, num_layers=2, batch_first=True)
        self.last = nn.Linear(24, 50)
        self.again: Callable[..., Tensor] = lambda function, x: function(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(lambda x: self.lstm(x)[0], x.view(-1, 5, 8)))


MODELS: dict[str, type[nn.Module]] = {
    "stack": Stack,
    "transformer": Transformer,
    "convolutions": Convolutions,
    "recurrent": Recurrent,
}


@functools.cache
def cpu_trains_lstm(dtype: torch.dtype) -> bool:
    """Whether torch can train an LSTM under autocast on this CPU: oneDNN has kernels for some processors alone."""
    x = torch.zeros(1, 1, 2)
    try:
        with torch.autocast("cpu", dtype):
            nn.LSTM(2, 2, batch_first=True)(x)[0].float().sum().backward()
    except RuntimeError:
        return False
    return True


class Naive:
    """The dense model; torch's indexing makes each shared weight from a pool, and the pool's gradient is divided by Γ.

    Basis kernels stay as they are.
    """

    def __init__(self, model: nn.Module, dense: nn.Module) -> None:
        self.dense = dense
        pool = pool_of(model).weight
        self.pool = pool.detach().clone().requires_grad_()
        self.made: list[tuple[list[tuple[nn.Module, str]], Tensor, Tensor]] = []
        self.bases: list[tuple[Tensor, torch.Size] | None] = []
        tensors: dict[Any, list[tuple[str, Any]]] = {}
        for path, module in model.named_modules():
            for name, shared in module._roast.items() if isinstance(module, RoastModule) else ():
                tensors.setdefault((shared.view, shared.scale), []).append((f"{path}.{name}", shared))
        gamma = torch.zeros_like(pool).flatten()
        for readers in tensors.values():
            # A pool of element numbers gives the element that each weight reads, and a pool of ones gives its factor.
            first = readers[0][1]
            coefficients = {"basis_index": None, "shape": torch.Size(first.gathered_shape)}
            shared = dataclasses.replace(first, dtype=torch.float64, **coefficients)
            numbers = torch.arange(pool.numel(), dtype=torch.float64, device=pool.device).view(pool.shape)
            seen = {"table": pool_of(model).table, "parameter": lambda: pool, "stored_dtype": pool.dtype}
            plain = dataclasses.replace(shared, view=shared.view._replace(sign=0), scale=1.0)
            places = dataclasses.replace(plain, pool=SimpleNamespace(read=lambda _, n=numbers: n, **seen)).dense()
            ones = SimpleNamespace(read=lambda _, n=numbers: torch.ones_like(n), **seen)
            factors = dataclasses.replace(shared, pool=ones).dense().to(pool.dtype)
            gamma.index_add_(0, places.long().flatten(), factors.square().flatten())
            owners = []
            for name, _ in readers:
                path, attribute = name.rsplit(".", 1)
                owners.append((dense.get_submodule(path), attribute))
            self.made.append((owners, places.long(), factors))
            basis = None if first.basis_index is None else pool_of(model).bases()[first.basis_index].detach().clone()
            self.bases.append(None if basis is None else (basis, first.shape))
        self.gamma = gamma = torch.where(gamma == 0, 1, gamma).view(pool.shape)
        self.pool.register_hook(lambda grad: grad / gamma)

    def __call__(self, x: Tensor) -> Tensor:
        for (owners, places, factors), basis in zip(self.made, self.bases, strict=True):
            weight = self.pool.flatten()[places] * factors
            if basis is not None:
                kernels, shape = basis
                weight = torch.einsum("ij,jk->ik", weight, kernels).reshape(shape)
            for module, name in owners:
                module._parameters.pop(name, None)
                setattr(module, name, weight)
        return self.dense(x)

    def projected(self) -> Tensor:
        """Return the pool that is nearest to the dense model's own weights; the model must not have basis kernels."""
        assert not any(self.bases)
        total = torch.zeros_like(self.pool).flatten()
        for owners, places, factors in self.made:
            module, name = owners[0]
            total.index_add_(0, places.flatten(), (getattr(module, name).detach() * factors).flatten())
        return total.view_as(self.pool) / self.gamma

    def write(self, pool: Tensor) -> None:
        """Set the dense model's own weights to those that a pool stands for; the model must not have basis kernels."""
        assert not any(self.bases)
        with torch.no_grad():
            for owners, places, factors in self.made:
                module, name = owners[0]
                getattr(module, name).copy_(pool.flatten()[places] * factors)

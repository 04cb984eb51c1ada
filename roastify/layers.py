"""Layers that read their weights from the pool: each a subclass of the layer it replaces.

A converted module keeps its identity: `to_roast` only changes the object's class and takes the dense Parameter out of
it, so hooks, modes, attributes and every reference to the module stay as they are, and `to_dense` reverses it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roastify.errors import RoastError
from roastify.kernels import ops
from roastify.kernels.view import TileView
from roastify.pool import RoastPool


@dataclass
class SharedTensor:
    """One tensor in the pool, as its layers see it.

    Args:
        pool: the pool's module; its Parameter is read at each use, because sharding replaces it.
        view: where the tensor lies.
        scale: λ.
        shape: of the dense tensor.
        transposed: whether the matrix in the pool is the dense tensor's transpose.
        dtype: of the dense tensor.
        zero_row: a row that is zero and stays so (an embedding's padding row), or None.
    """

    pool: RoastPool
    view: TileView
    scale: float
    shape: torch.Size
    transposed: bool
    dtype: torch.dtype
    zero_row: int | None = None

    def dense(self) -> Tensor:
        """Return the dense, differentiable tensor."""
        matrix = ops.gather(self.pool.read(self.dtype), self.pool.table, self.view, self.scale)
        weight = (matrix.t() if self.transposed else matrix).reshape(self.shape)
        if self.zero_row is None:
            return weight
        # Filled on the device: a copy from the CPU cannot be captured in a CUDA graph.
        row = torch.full((), self.zero_row, device=weight.device)
        return weight.index_fill(0, row, 0.0)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x · weightᵀ + bias`."""
        return self._product(ops.linear_t if self.transposed else ops.linear, x, bias)

    def linear_t(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x · weight + bias`."""
        return self._product(ops.linear if self.transposed else ops.linear_t, x, bias)

    def _product(self, product: Callable[..., Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        # Read in the dtype that the product runs in, so that autocast finds nothing left to cast.
        pool = self.pool.read(ops.product_dtype(x, self.dtype))
        return product(x, pool, bias, self.pool.table, self.view, self.scale)

    def rows(self, index: Tensor) -> Tensor:
        """Return `weight[index]`."""
        if self.transposed:
            return F.embedding(index, self.dense())
        rows = ops.embedding(index, self.pool.read(self.dtype), self.pool.table, self.view, self.scale)
        if self.zero_row is None:
            return rows
        return rows.masked_fill((index == self.zero_row)[..., None], 0.0)


class RoastModule(nn.Module):
    """What every layer on the pool has: `weight` reads as the dense, differentiable tensor."""

    _roast: dict[str, SharedTensor]

    # A property under a type that lets it stand where the dense layers declare a Tensor.
    weight: Any = property(
        lambda self: self._roast["weight"].dense(),
        doc="The dense weight, materialised from the pool; gradients flow back to the pool.",
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_roast", ()):
            raise RoastError(
                f"{name!r} of this {type(self).__name__} lives in the shared pool and cannot be assigned; train the "
                f"pool, or call roastify.densify(model) to get a model whose weights can be set"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoastModule:
        super()._apply(fn, recurse)
        for shared in self._roast.values():
            # What `fn` (half, to, …) makes of a tensor of this dtype, asked of an empty one.
            shared.dtype = fn(torch.empty(0, dtype=shared.dtype)).dtype
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Classes made for a user's subclass are not importable, so copies and pickles name the original class.
        return _new_layer, (original_class(type(self)),), self.__dict__

    def extra_repr(self) -> str:
        """Describe the layer as its original does, and what it reads from the pool."""
        parts = [super().extra_repr()]
        for name, shared in self.__dict__.get("_roast", {}).items():
            view = shared.view
            what = "strips" if view.strips else "tiles"
            parts.append(
                f"{name}: {view.num_tiles} {what} of {view.tile_rows}×{view.tile_cols} in {view.num_slots} shared "
                f"slots, scale={shared.scale:.4g}"
            )
        return ", ".join(part for part in parts if part)


class RoastLinear(RoastModule, nn.Linear):
    """`nn.Linear` on the pool; no whole weight is materialised for a small batch."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input · weightᵀ + bias`."""
        return self._roast["weight"].linear(input, self.bias)


class RoastBilinear(RoastModule, nn.Bilinear):
    """`nn.Bilinear` on the pool, its weight materialised for the call."""


class RoastEmbedding(RoastModule, nn.Embedding):
    """`nn.Embedding` on the pool: only the rows asked for are read, and cost goes with the tokens."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of `input`; the gradient of `padding_idx` is blocked, as in the dense layer."""
        rows = self._roast["weight"].rows(input)
        if self.padding_idx is None or self._roast["weight"].zero_row is not None or not torch.is_grad_enabled():
            return rows
        return torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)


class RoastEmbeddingBag(RoastModule, nn.EmbeddingBag):
    """`nn.EmbeddingBag` on the pool: the rows asked for are read, then reduced."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the reduced bags; all modes and arguments of the dense layer."""
        shared = self._roast["weight"]
        if input.dim() not in (1, 2):
            raise ValueError(f"input has to be 1D or 2D Tensor, but got Tensor of dimension {input.dim()}")
        if input.dim() == 2 and input.shape[1] and offsets is None and self._are_plain(per_sample_weights, input):
            return self._reduce(shared.rows(input), input, per_sample_weights)
        flat = input.reshape(-1)
        rows = shared.rows(flat)
        position = torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype)
        padding_idx = None
        if self.padding_idx is not None:
            # The bag operator skips one index, so all padding entries point at one more row.
            padding_idx = flat.numel()
            position = torch.where(flat == self.padding_idx, padding_idx, position)
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
        return F.embedding_bag(
            position.view(input.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding_idx,
        )

    def _are_plain(self, weights: Tensor | None, input: Tensor) -> bool:
        """Whether there is nothing about these weights that the bag operator would refuse."""
        return weights is None or (self.mode == "sum" and weights.shape == input.shape)

    def _reduce(self, rows: Tensor, input: Tensor, weights: Tensor | None) -> Tensor:
        """Return bags of one length, from their rows `[bags, entries, dim]`.

        The bag operator would do, but a compiler makes a constant of its number of rows, which is the batch's here.
        """
        padding = None if self.padding_idx is None else input == self.padding_idx
        if weights is not None:
            rows = rows * weights[..., None]
        if padding is not None:
            rows = rows.masked_fill(padding[..., None], -torch.inf if self.mode == "max" else 0.0)
        if self.mode == "max":
            bags = rows.max(1).values
            return bags if padding is None else bags.masked_fill(padding.all(1)[:, None], 0.0)
        # In the rows' dtype, which autocast would widen.
        total = rows.sum(1, dtype=rows.dtype)
        if self.mode != "mean":
            return total
        if padding is None:
            return total / input.shape[1]
        return total / (~padding).sum(1)[:, None].clamp(min=1)


class RoastConv1d(RoastModule, nn.Conv1d):
    """`nn.Conv1d` on the pool, its weight materialised for the call."""


class RoastConv2d(RoastModule, nn.Conv2d):
    """`nn.Conv2d` on the pool, its weight materialised for the call."""


class RoastConv3d(RoastModule, nn.Conv3d):
    """`nn.Conv3d` on the pool, its weight materialised for the call."""


class RoastConvTranspose1d(RoastModule, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on the pool, its weight materialised for the call."""


class RoastConvTranspose2d(RoastModule, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on the pool, its weight materialised for the call."""


class RoastConvTranspose3d(RoastModule, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on the pool, its weight materialised for the call."""


class _RoastTransformersConv1D(RoastModule):
    """transformers' `Conv1D` (a linear layer that keeps its weight as `[in, out]`) on the pool."""

    # transformers' own would leave out what the pool adds.
    __repr__ = nn.Module.__repr__

    def forward(self, x: Tensor) -> Tensor:
        return self._roast["weight"].linear_t(x, cast(Tensor, self.bias))


@dataclass(frozen=True)
class LayerKind:
    """How modules of one class read a weight.

    Args:
        op: the operation's name in reports.
        roast: the class on the pool.
        transposed: whether the dense weight is `[in, out]`, so that the pool holds its transpose.
        materialises: whether the operation wants the whole weight; then it is cut into strips, not tiles.
        refusal: returns why a module of this kind must keep its weight, or None.
    """

    op: str
    roast: type[RoastModule]
    transposed: bool = False
    materialises: bool = False
    refusal: Callable[[Any], str | None] = lambda module: None


def _refuse_table(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.max_norm is not None:
        return "max_norm rewrites rows in place, and a row in the pool has many owners"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq scales a table's own gradient, which does not exist here"
    return None


# The one list of supported modules.
_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind("linear", RoastLinear),
    nn.Bilinear: LayerKind("bilinear", RoastBilinear, materialises=True),
    nn.Embedding: LayerKind("embedding", RoastEmbedding, refusal=_refuse_table),
    nn.EmbeddingBag: LayerKind("embedding_bag", RoastEmbeddingBag, refusal=_refuse_table),
    nn.Conv1d: LayerKind("conv1d", RoastConv1d, materialises=True),
    nn.Conv2d: LayerKind("conv2d", RoastConv2d, materialises=True),
    nn.Conv3d: LayerKind("conv3d", RoastConv3d, materialises=True),
    nn.ConvTranspose1d: LayerKind("conv_transpose1d", RoastConvTranspose1d, materialises=True),
    nn.ConvTranspose2d: LayerKind("conv_transpose2d", RoastConvTranspose2d, materialises=True),
    nn.ConvTranspose3d: LayerKind("conv_transpose3d", RoastConvTranspose3d, materialises=True),
}


def _transformers_conv1d() -> type[nn.Module] | None:
    """Return transformers' `Conv1D` if transformers is loaded: a model that has one has loaded it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def kind_of(module_class: type) -> LayerKind | None:
    """Return how modules of this class, or of the supported class it derives from, read their `weight`."""
    for base in module_class.__mro__:
        if base in _KINDS:
            return _KINDS[base]
        if base is _transformers_conv1d():
            return LayerKind("linear", _RoastTransformersConv1D, transposed=True)
    return None


_roast_classes: dict[type[nn.Module], type[RoastModule]] = {}


def roast_class(module_class: type[nn.Module]) -> type[RoastModule]:
    """Return the class on the pool for a supported class or a subclass of one; the same one every time.

    A user's subclass keeps its place in front: its own `forward` still runs, and where that calls `super().forward`,
    the pool's comes next.
    """
    kind = kind_of(module_class)
    assert kind is not None, module_class
    if kind.roast.__bases__[-1] is module_class:
        return kind.roast
    if module_class not in _roast_classes:
        bases: tuple[type, ...] = (module_class, kind.roast)
        if kind.roast is _RoastTransformersConv1D:
            # This one cannot name transformers' class as its base, so that is joined to it first.
            conv1d = cast("type[nn.Module]", _transformers_conv1d())
            bases = (kind.roast, conv1d) if module_class is conv1d else (module_class, roast_class(conv1d))
        _roast_classes[module_class] = cast(
            "type[RoastModule]", type(f"Roast{module_class.__name__}", bases, {"_roast_original": module_class})
        )
    return _roast_classes[module_class]


def original_class(roast: type) -> type[nn.Module]:
    """Return the class that a class on the pool stands for."""
    return roast.__dict__.get("_roast_original", roast.__bases__[-1])


def _new_layer(module_class: type[nn.Module]) -> RoastModule:
    roast = roast_class(module_class)
    return roast.__new__(roast)


def to_roast(module: nn.Module, name: str, shared: SharedTensor) -> None:
    """Turn a module into its class on the pool, in place; the dense Parameter is let go.

    A `None` stays in the Parameter's place, which keeps the order of a state dict's keys for the way back.
    """
    module._parameters[name] = None
    module.__class__ = roast_class(type(module))
    module.__dict__["_roast"] = {name: shared}


def to_dense(module: RoastModule, parameters: dict[str, nn.Parameter]) -> None:
    """Turn a module on the pool back into its original class, with these dense Parameters."""
    del module.__dict__["_roast"]
    module.__class__ = original_class(type(module))  # type: ignore[assignment]
    module._parameters.update(parameters)

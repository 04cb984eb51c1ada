"""The one list of layers whose own operation reads the pool, and the read paths of all other modules."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from roastify.kernels.torch_internals import is_householder
from roastify.layers.base import RoastLayer, RoastModule
from roastify.layers.modules import (
    RoastBilinear,
    RoastConv1d,
    RoastConv2d,
    RoastConv3d,
    RoastConvTranspose1d,
    RoastConvTranspose2d,
    RoastConvTranspose3d,
    RoastEmbedding,
    RoastEmbeddingBag,
    RoastLinear,
    RoastTransformersConv1D,
)
from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.source_scan import uses_in_source
from roastify.pool.forward_pass import RootForward


@dataclass(frozen=True)
class LayerKind:
    """How modules of one class read their `weight`.

    Args:
        op: the operation's name in reports.
        roast: the class on the pool that replaces the layer's class.
        transposed: whether the dense weight is `[in, out]`, so that the pool holds its transpose.
        materialises: whether the operation needs the whole dense weight; if so, the weight is cut into strips, not
            tiles.
        refusal: a function that returns why a module of this kind must keep its dense weight, or None.
        retains: a function that returns whether the layer's forward may keep this dense weight until the backward pass.
        multiplies: whether the operation is a product of the inputs' last dimension with the weight.
        kernels: whether the weight is a convolution's: one kernel (all dimensions but the first two) for each pair of
            channels.
    """

    op: str
    roast: type[RoastLayer]
    transposed: bool = False
    materialises: bool = False
    refusal: Callable[[Any], str | None] = lambda module: None
    retains: Callable[[PooledWeight], bool] = lambda shared: False
    multiplies: bool = False
    kernels: bool = False


def _refuse_table(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.max_norm is not None:
        return "max_norm rewrites rows in place, and other tensors read the same pool elements"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq scales the table's own gradient, and a shared table has none"
    return None


def _retains_product(shared: PooledWeight) -> bool:
    return shared.is_small and shared.is_scaled_pool


def _retains_whole(shared: PooledWeight) -> bool:
    return shared.can_multiply


# The one list of layers whose own operation reads the pool. `read_path_of` decides for all other modules.
_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind("linear", RoastLinear, retains=_retains_product, multiplies=True),
    nn.Bilinear: LayerKind("bilinear", RoastBilinear, materialises=True),
    nn.Embedding: LayerKind("embedding", RoastEmbedding, refusal=_refuse_table),
    nn.EmbeddingBag: LayerKind("embedding_bag", RoastEmbeddingBag, refusal=_refuse_table),
    nn.Conv1d: LayerKind("conv1d", RoastConv1d, materialises=True, retains=_retains_whole, kernels=True),
    nn.Conv2d: LayerKind("conv2d", RoastConv2d, materialises=True, retains=_retains_whole, kernels=True),
    nn.Conv3d: LayerKind("conv3d", RoastConv3d, materialises=True, retains=_retains_whole, kernels=True),
    nn.ConvTranspose1d: LayerKind("conv_transpose1d", RoastConvTranspose1d, materialises=True),
    nn.ConvTranspose2d: LayerKind("conv_transpose2d", RoastConvTranspose2d, materialises=True),
    nn.ConvTranspose3d: LayerKind("conv_transpose3d", RoastConvTranspose3d, materialises=True),
}


def transformers_conv1d() -> type[nn.Module] | None:
    """Return transformers' `Conv1D`, or None if transformers is not loaded: then no model has one."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def kind_of(module_class: type, attribute: str = "weight") -> LayerKind | None:
    """Return the kind of the layer that a class derives from; None without one, or for another attribute."""
    if attribute != "weight":
        return None
    for base in module_class.__mro__:
        if base in _KINDS:
            return _KINDS[base]
        if base is transformers_conv1d():
            return LayerKind(
                "linear", RoastTransformersConv1D, transposed=True, retains=_retains_product, multiplies=True
            )
    return None


def is_vector(module: nn.Module, attribute: str, shape: Sequence[int]) -> bool:
    """Whether a tensor has one size above 1 at most: magnitudes of `weight_norm`, layer scales `[channels, 1, 1]`.

    A layer's own weight is a matrix whatever its sizes, as that of `nn.Linear(4096, 1)`.
    """
    if len(shape) <= 1:
        return True
    return kind_of(type(module), attribute) is None and sum(size > 1 for size in shape) <= 1


def is_reflectors(module: nn.Module) -> bool:
    """Whether a module holds the Householder reflectors of an orthogonal weight.

    On their diagonal stand the weight's signs; the weight becomes zero if they are not ±1.
    """
    return isinstance(module, ParametrizationList) and any(map(is_householder, module))


def refusal_of(module: nn.Module, attribute: str) -> str | None:
    """Return why a module must keep an attribute dense, or None."""
    kind = kind_of(type(module), attribute)
    return kind.refusal(module) if kind else None


# With fewer columns or rows, a matrix of tiles is mostly padding, and materialising it costs little.
_LEAST_COLS = 32
_LEAST_ROWS = 8


@dataclass(frozen=True)
class ReadPath:
    """How a module reads a shared attribute.

    Args:
        through: `layer` (the layer's own operation reads the pool), `operation` (the operations in the module's code
            read the pool), or `attribute` (the attribute is materialised on access).
        whole: why the attribute is materialised; empty if it is not.
        tiles: whether the operations read two-dimensional tiles.
        orientations: how the module's code multiplies with the attribute, see `AttributeUses`.
    """

    through: str
    whole: str = ""
    tiles: bool = False
    orientations: frozenset[str] = frozenset()


def read_path_of(module: nn.Module, attribute: str, shape: Sequence[int]) -> ReadPath:
    """Return how a dense module's attribute of this shape will be read from the pool."""
    kind = kind_of(type(module), attribute)
    if kind is not None and (kind.materialises or not has_forward_of_its_own(type(module))):
        return ReadPath("layer", tiles=not kind.materialises)
    uses = uses_in_source(type(module), attribute)
    whole = uses.whole_of(len(shape)) or _other_code_in_call(module) or _too_narrow(shape, kind)
    through = "attribute" if whole else "operation" if kind is None else "layer"
    return ReadPath(through, whole or "", kind is not None or not whole, uses.orientations)


def has_forward_of_its_own(module_class: type[nn.Module]) -> bool:
    """Whether a layer's subclass replaces the layer's forward."""
    kind = kind_of(module_class)
    layer = next((base for base in module_class.__mro__ if base in _KINDS or base is transformers_conv1d()), None)
    return kind is not None and layer is not None and module_class.forward is not layer.forward


def retains_weight(module: RoastModule, attribute: str, shared: PooledWeight) -> bool:
    """Whether a training pass may gather a module's weight in a group: the layer's own forward reads and keeps it.

    The output projection of `nn.MultiheadAttention` is an exception: the attention reads its weight, and never calls
    its forward.
    """
    original = type(module)._roast_original
    kind = kind_of(original, attribute)
    if kind is None or has_forward_of_its_own(original):
        return False
    return kind.retains(shared) and not issubclass(original, nn.modules.linear.NonDynamicallyQuantizableLinear)


def multiplies_inputs(module: nn.Module, attribute: str) -> bool:
    """Whether a module only multiplies inputs with an attribute: a linear layer or a convolution as torch's own is.

    The output projection of `nn.MultiheadAttention` is an exception, as in `retains_weight`.
    """
    kind = kind_of(type(module), attribute)
    if kind is None or has_forward_of_its_own(type(module)):
        return False
    if kind.kernels:
        return convolves_all_channels(module)
    if not kind.multiplies:
        return False
    return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def convolves_all_channels(module: Any) -> bool:
    """Whether a convolution has one group, and convolves as torch's own class does."""
    layer = next(base for base in type(module).__mro__ if base in _KINDS)
    is_replaced = "_conv_forward" in module.__dict__ or type(module)._conv_forward is not cast(Any, layer)._conv_forward
    return module.groups == 1 and not is_replaced


def _other_code_in_call(module: nn.Module) -> str | None:
    """Return which code runs in a module's call besides its class's code, or None."""
    forward = module.__dict__.get("forward")
    if forward is not None and not isinstance(forward, RootForward):
        return f"this {type(module).__name__} has a forward of its own besides its class's"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"this {type(module).__name__} has hooks, whose code may read it"
    return None


def _too_narrow(shape: Sequence[int], kind: LayerKind | None) -> str | None:
    rows, cols = math.prod(shape[:-1]), shape[-1] if shape else 1
    if kind is None and (rows < _LEAST_ROWS or cols < _LEAST_COLS):
        return f"a {rows}×{cols} matrix is too small for tiles"
    return None

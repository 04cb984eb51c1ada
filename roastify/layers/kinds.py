"""How modules of each class read what is shared, and the way of a module onto the pool and back.

A converted module keeps its identity: `to_roast` only changes the object's class and takes the dense Parameter out of
it, so hooks, modes, attributes and every reference to the module stay as they are, and `to_dense` reverses it.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

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
    RoastLayer,
    RoastLinear,
    RoastLookup,
    RoastModule,
    RoastReader,
    RoastRNN,
    RoastTransformersConv1D,
    describe_shared,
    operand,
    reading,
)
from roastify.layers.pooled_weight import SharedTensor
from roastify.layers.source_scan import reads_of
from roastify.pool.forward_pass import RootForward


@dataclass(frozen=True)
class LayerKind:
    """How modules of one class read their `weight`.

    Args:
        op: the operation's name in reports.
        roast: the class on the pool.
        transposed: whether the dense weight is `[in, out]`, so that the pool holds its transpose.
        materialises: whether the operation wants the whole weight; then it is cut into strips, not tiles.
        refusal: returns why a module of this kind must keep its weight, or None.
        keeps: whether its forward, in a training pass, may keep a dense weight until the backward pass.
        kernels: whether its weight is one kernel, of all sizes but the first two, for each pair of channels.
    """

    op: str
    roast: type[RoastLayer]
    transposed: bool = False
    materialises: bool = False
    refusal: Callable[[Any], str | None] = lambda module: None
    keeps: Callable[[SharedTensor], bool] = lambda shared: False
    kernels: bool = False


def _refuse_table(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.max_norm is not None:
        return "max_norm rewrites rows in place, and a row in the pool has many owners"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq scales a table's own gradient, which does not exist here"
    return None


def _keeps_product(shared: SharedTensor) -> bool:
    return shared.is_small and not shared.center


def _keeps_whole(shared: SharedTensor) -> bool:
    return shared.can_be_whole


# The one list of layers whose own operation runs on the pool. Whatever else has a Parameter materialises it.
_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind("linear", RoastLinear, keeps=_keeps_product),
    nn.Bilinear: LayerKind("bilinear", RoastBilinear, materialises=True),
    nn.Embedding: LayerKind("embedding", RoastEmbedding, refusal=_refuse_table),
    nn.EmbeddingBag: LayerKind("embedding_bag", RoastEmbeddingBag, refusal=_refuse_table),
    nn.Conv1d: LayerKind("conv1d", RoastConv1d, materialises=True, keeps=_keeps_whole, kernels=True),
    nn.Conv2d: LayerKind("conv2d", RoastConv2d, materialises=True, keeps=_keeps_whole, kernels=True),
    nn.Conv3d: LayerKind("conv3d", RoastConv3d, materialises=True, keeps=_keeps_whole, kernels=True),
    nn.ConvTranspose1d: LayerKind("conv_transpose1d", RoastConvTranspose1d, materialises=True),
    nn.ConvTranspose2d: LayerKind("conv_transpose2d", RoastConvTranspose2d, materialises=True),
    nn.ConvTranspose3d: LayerKind("conv_transpose3d", RoastConvTranspose3d, materialises=True),
}


def _transformers_conv1d() -> type[nn.Module] | None:
    """Return transformers' `Conv1D` if transformers is loaded: a model that has one has loaded it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def kind_of(module_class: type, attribute: str = "weight") -> LayerKind | None:
    """Return how modules of this class, or of the layer it derives from, read an attribute; None if materialised."""
    if attribute != "weight":
        return None
    for base in module_class.__mro__:
        if base in _KINDS:
            return _KINDS[base]
        if base is _transformers_conv1d():
            return LayerKind("linear", RoastTransformersConv1D, transposed=True, keeps=_keeps_product)
    return None


def refusal_of(module: nn.Module, attribute: str) -> str | None:
    """Return why a module must keep an attribute, or None."""
    kind = kind_of(type(module), attribute)
    return kind.refusal(module) if kind else None


# Below these, a matrix of tiles is mostly padding, and little is saved by not materialising it.
_LEAST_COLS = 32
_LEAST_ROWS = 8


@dataclass(frozen=True)
class Way:
    """How a module reads a shared attribute.

    Args:
        through: `layer` (the layer's own operation), `operation` (those of the module's code), or `attribute` (it is
            materialised on access).
        whole: why it is materialised, if it is.
        tiles: whether what reads it reads tiles.
        orientations: in which its code multiplies, see `Reads`.
    """

    through: str
    whole: str = ""
    tiles: bool = False
    orientations: frozenset[str] = frozenset()


def way_of(module: nn.Module, attribute: str, shape: Sequence[int]) -> Way:
    """Return how a dense module's attribute of this shape will be read from the pool."""
    kind = kind_of(type(module), attribute)
    if kind is not None and (kind.materialises or not _has_forward_of_its_own(type(module))):
        return Way("layer", tiles=not kind.materialises)
    reads = reads_of(type(module), attribute)
    whole = reads.whole_of(len(shape)) or _obstacle(module) or _too_narrow(shape, kind)
    through = "attribute" if whole else "operation" if kind is None else "layer"
    return Way(through, whole or "", kind is not None or not whole, reads.orientations)


def _has_forward_of_its_own(module_class: type[nn.Module]) -> bool:
    """Whether a layer's subclass replaces the layer's forward."""
    kind = kind_of(module_class)
    layer = next((base for base in module_class.__mro__ if base in _KINDS or base is _transformers_conv1d()), None)
    return kind is not None and layer is not None and module_class.forward is not layer.forward


def keeps_weight(module: RoastModule, attribute: str, shared: SharedTensor) -> bool:
    """Whether a training pass may gather a module's weight with others': the layer's own forward will read and keep it.

    `nn.MultiheadAttention` reads the weight of its projection, and calls no forward of that.
    """
    original = type(module)._roast_original
    kind = kind_of(original, attribute)
    if kind is None or _has_forward_of_its_own(original):
        return False
    return kind.keeps(shared) and not issubclass(original, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _obstacle(module: nn.Module) -> str | None:
    """Return what else than its class's code runs in a module's call, or None."""
    forward = module.__dict__.get("forward")
    if forward is not None and not isinstance(forward, RootForward):
        return f"this {type(module).__name__} has a forward of its own, beside its class's"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"this {type(module).__name__} has hooks, whose code may read it"
    return None


def _too_narrow(shape: Sequence[int], kind: LayerKind | None) -> str | None:
    rows, cols = math.prod(shape[:-1]), shape[-1] if shape else 1
    if kind is None and (rows < _LEAST_ROWS or cols < _LEAST_COLS):
        return f"{rows}×{cols} is too little for tiles"
    return None


class _Made:
    """What the classes made here add to a class on the pool: they are not importable, and know the way back."""

    _roast_original: type[nn.Module]
    _roast: dict[str, SharedTensor]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copies and pickles name the original class, and have this one made again.
        return _new_module, (self._roast_original, frozenset(self._roast)), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = _new_module(self._roast_original, frozenset(self._roast))
        memo[id(self)] = twin
        if hasattr(super(), "__deepcopy__"):
            # A class that copies itself would make a dense module. Torch's parametrized ones do so for this state.
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        else:
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        # A class that writes its attributes by itself writes what they read; the pool is in the state dict once.
        for name in self._roast:
            destination.pop(prefix + name, None)

    def _leave_pool(self, name: str) -> None:
        to_dense(cast(RoastModule, self), {name: None})

    def extra_repr(self) -> str:
        """Describe the module as its original does, and what it reads from the pool."""
        parts = [super().extra_repr(), describe_shared(cast(RoastModule, self))]  # type: ignore[misc]
        return ", ".join(part for part in parts if part)


_roast_classes: dict[tuple[type[nn.Module], frozenset[str]], type[RoastModule]] = {}


def roast_class(module_class: type[nn.Module], names: frozenset[str]) -> type[RoastModule]:
    """Return the class on the pool for modules of any class that share these attributes; the same one every time.

    A layer's class on the pool has a `forward` of its own. A user's subclass of a layer keeps its place in front: its
    `forward` still runs, and where that calls `super().forward`, the pool's comes next. Any other class keeps its code
    and its name, by which libraries look classes up (wrapping policies, transformers' initialisers); only its shared
    attributes are read otherwise.
    """
    key = module_class, names
    if key not in _roast_classes:
        kind = kind_of(module_class) if "weight" in names else None
        bases: tuple[type, ...]
        attributes: dict[str, Any] = {"_roast_original": module_class, "__doc__": module_class.__doc__}
        replaced = kind is None or _has_forward_of_its_own(module_class)
        attributes |= {name: _reader(module_class, name) for name in names if replaced or name != "weight"}
        if kind is None:
            title, bases = module_class.__name__, _other_bases(module_class)
            attributes |= {"__module__": module_class.__module__, "__qualname__": module_class.__qualname__}
        else:
            title, bases = f"Roast{module_class.__name__}", _layer_bases(module_class, kind)
            if _looks_up(module_class):
                bases += (RoastLookup,)
        if names and replaced and bases[0] is module_class:
            # In front, to be there before the class's own `__call__`; the rest of it stays behind.
            bases = (RoastReader, *bases)
        made = type(title, (_Made, *bases), attributes)
        _roast_classes[key] = cast("type[RoastModule]", made)
    return _roast_classes[key]


def _reader(module_class: type[nn.Module], name: str) -> property:
    """Return the property through which modules of a class read a shared attribute."""
    reads = reads_of(module_class, name)
    return operand(name, reads.of_parts) if reads.whole is None else reading(name)


def _other_bases(module_class: type[nn.Module]) -> tuple[type, ...]:
    if issubclass(module_class, nn.RNNBase):
        # In front: it replaces how these keep count of their Parameters.
        return RoastRNN, module_class
    if module_class is nn.Module:
        return (RoastModule,)
    return module_class, RoastLookup if _looks_up(module_class) else RoastModule


def _looks_up(module_class: type[nn.Module]) -> bool:
    return module_class.__getattr__ is not nn.Module.__getattr__


def _layer_bases(module_class: type[nn.Module], kind: LayerKind) -> tuple[type, ...]:
    if kind.roast.__bases__[-1] is module_class:
        return (kind.roast,)
    if kind.roast is not RoastTransformersConv1D:
        return module_class, kind.roast
    # This one cannot name transformers' class as its base, so that is joined to it first.
    conv1d = cast("type[nn.Module]", _transformers_conv1d())
    if module_class is conv1d:
        return kind.roast, conv1d
    return module_class, type(kind.roast.__name__, (kind.roast, conv1d), {})


def _new_module(module_class: type[nn.Module], names: frozenset[str]) -> RoastModule:
    roast = roast_class(module_class, names)
    return roast.__new__(roast)


def to_roast(module: nn.Module, name: str, shared: SharedTensor) -> None:
    """Turn a module into its class on the pool, in place, or add an attribute to it; the dense Parameter is let go."""
    held = {**module.__dict__.get("_roast", {}), name: shared}
    original = type(module)._roast_original if isinstance(module, RoastModule) else type(module)
    module._parameters[name] = None
    module.__class__ = roast_class(original, frozenset(held))
    module.__dict__["_roast"] = held
    _renew_flat_weights(module)


def to_emptied(module: nn.Module) -> None:
    """Turn a module that has no Parameters left below it into a class that answers for them (`parameters`)."""
    if not isinstance(module, RoastModule):
        module.__class__ = roast_class(type(module), frozenset())
        module.__dict__["_roast"] = {}


def to_dense(module: RoastModule, parameters: Mapping[str, nn.Parameter | None]) -> None:
    """Take attributes of a module out of the pool, with these dense Parameters; its class goes back with the last."""
    original = type(module)._roast_original
    held = {name: shared for name, shared in module._roast.items() if name not in parameters}
    module.__class__ = roast_class(original, frozenset(held)) if held else original  # type: ignore[assignment]
    if held:
        module.__dict__["_roast"] = held
    else:
        del module.__dict__["_roast"]
    module._parameters.update(parameters)
    _renew_flat_weights(module)


def _renew_flat_weights(module: nn.Module) -> None:
    """Have a recurrent module's list of its own Parameters follow what it holds now."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()

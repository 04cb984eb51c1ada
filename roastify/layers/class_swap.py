"""Moves a module onto the pool and back by changing its class; the object stays the same.

`to_roast` changes the module's class and takes the dense Parameter out of it. Hooks, modes, attributes and every
reference to the module stay as they are. `to_dense` reverses it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from roastify.layers.base import RoastLookup, RoastModule, RoastReader, describe_shared
from roastify.layers.kinds import LayerKind, has_forward_of_its_own, kind_of, transformers_conv1d
from roastify.layers.modules import RoastRNN, RoastTransformersConv1D
from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.reading import dense_property, lazy_property
from roastify.layers.source_scan import uses_in_source


class _Swapped:
    """A base of every class that this file creates. It supports copies, pickles and the way back.

    Copying and pickling need support because the created classes cannot be imported.
    """

    _roast_original: type[nn.Module]
    _roast: dict[str, PooledWeight]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copies and pickles name the original class. `_new_module` creates this class again from it.
        return _new_module, (self._roast_original, frozenset(self._roast)), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = _new_module(self._roast_original, frozenset(self._roast))
        memo[id(self)] = twin
        if hasattr(super(), "__deepcopy__"):
            # The class's own `__deepcopy__` would create a dense module, so it is not called. Torch's parametrized
            # classes define one, because they refuse `__getstate__`.
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        else:
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        # A class with a state-dict method of its own may write a shared attribute's dense tensor. It is removed, since
        # the state dict has the pool once.
        for name in self._roast:
            destination.pop(prefix + name, None)

    def _leave_pool(self, name: str) -> None:
        to_dense(cast(RoastModule, self), {name: None})

    def extra_repr(self) -> str:
        """Describe the module as its original class does, and the attributes that it reads from the pool."""
        parts = [super().extra_repr(), describe_shared(cast(RoastModule, self))]  # type: ignore[misc]
        return ", ".join(part for part in parts if part)


_roast_classes: dict[tuple[type[nn.Module], frozenset[str]], type[RoastModule]] = {}


def roast_class(module_class: type[nn.Module], names: frozenset[str]) -> type[RoastModule]:
    """Return the class on the pool for a class and its shared attributes; the same arguments give the same class.

    - A layer of torch.nn gets a `forward` that reads the pool.
    - A user's subclass of a layer stays first in the method resolution order: its `forward` still runs, and if it calls
      `super().forward`, the forward that reads the pool runs next.
    - Any other class keeps its code, and only its shared attributes are read from the pool. It also keeps its name,
      because libraries look classes up by name (wrapping policies, transformers' initialisers).
    """
    key = module_class, names
    if key not in _roast_classes:
        kind = kind_of(module_class) if "weight" in names else None
        bases: tuple[type, ...]
        attributes: dict[str, Any] = {"_roast_original": module_class, "__doc__": module_class.__doc__}
        replaced = kind is None or has_forward_of_its_own(module_class)
        attributes |= {name: _reader(module_class, name) for name in names if replaced or name != "weight"}
        if kind is None:
            title, bases = module_class.__name__, _other_bases(module_class)
            attributes |= {"__module__": module_class.__module__, "__qualname__": module_class.__qualname__}
        else:
            title, bases = f"Roast{module_class.__name__}", _layer_bases(module_class, kind)
            if _looks_up(module_class):
                bases += (RoastLookup,)
        if names and replaced and bases[0] is module_class:
            # `RoastReader` goes first, so that its `__call__` runs before the class's own. Its base `RoastModule` stays
            # behind the class.
            bases = (RoastReader, *bases)
        swapped = type(title, (_Swapped, *bases), attributes)
        _roast_classes[key] = cast("type[RoastModule]", swapped)
    return _roast_classes[key]


def _reader(module_class: type[nn.Module], name: str) -> property:
    """Return the property through which modules of a class read a shared attribute."""
    uses = uses_in_source(module_class, name)
    return lazy_property(name, uses.of_parts) if uses.whole is None else dense_property(name)


def _other_bases(module_class: type[nn.Module]) -> tuple[type, ...]:
    if issubclass(module_class, nn.RNNBase):
        # `RoastRNN` goes first, because it replaces the recurrent layers' list of Parameters.
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
    # `RoastTransformersConv1D` does not have transformers' class as a base, because roastify does not import
    # transformers. So the base is added here.
    conv1d = cast("type[nn.Module]", transformers_conv1d())
    if module_class is conv1d:
        return kind.roast, conv1d
    return module_class, type(kind.roast.__name__, (kind.roast, conv1d), {})


def _new_module(module_class: type[nn.Module], names: frozenset[str]) -> RoastModule:
    roast = roast_class(module_class, names)
    return roast.__new__(roast)


def to_roast(module: nn.Module, name: str, shared: PooledWeight) -> None:
    """Move a module's attribute onto the pool, in place: change the module's class and drop the dense Parameter."""
    attributes = {**module.__dict__.get("_roast", {}), name: shared}
    original = type(module)._roast_original if isinstance(module, RoastModule) else type(module)
    module._parameters[name] = None
    module.__class__ = roast_class(original, frozenset(attributes))
    module.__dict__["_roast"] = attributes
    _renew_flat_weights(module)


def to_emptied(module: nn.Module) -> None:
    """Change the class of a module that has no Parameter left, in place, so that `parameters()` is not empty."""
    if not isinstance(module, RoastModule):
        module.__class__ = roast_class(type(module), frozenset())
        module.__dict__["_roast"] = {}


def to_dense(module: RoastModule, parameters: Mapping[str, nn.Parameter | None]) -> None:
    """Take attributes of a module out of the pool and give it these dense Parameters instead.

    If no shared attribute is left, the module gets its original class back.
    """
    original = type(module)._roast_original
    left = {name: shared for name, shared in module._roast.items() if name not in parameters}
    module.__class__ = roast_class(original, frozenset(left)) if left else original  # type: ignore[assignment]
    if left:
        module.__dict__["_roast"] = left
    else:
        del module.__dict__["_roast"]
    module._parameters.update(parameters)
    _renew_flat_weights(module)


def _renew_flat_weights(module: nn.Module) -> None:
    """Rebuild the list that a recurrent module keeps of its Parameters, from its present ones."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()

"""Moves a module onto the pool and back by changing its class; the object stays the same.

`to_roast` changes the module's class and takes the dense Parameter out of it. Hooks, modes, attributes and every
reference to the module stay as they are. `to_dense` reverses it.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any, Generic, cast

from torch import nn

from roastify.errors import RoastError
from roastify.layers.base import RoastLookup, RoastModule, RoastReader, describe_shared
from roastify.layers.kinds import LayerKind, has_forward_of_its_own, kind_of, transformers_conv1d
from roastify.layers.modules import RoastRNN, RoastTransformersConv1D
from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.reading import dense_property, lazy_property
from roastify.layers.source_scan import uses_in_source
from roastify.pool.members import MEMBER, POOL_NAME, is_placeholder


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
        # A class that torch derived from this one, to parametrize a bias, is kept.
        derived = type(self) is not roast_class(self._roast_original, frozenset(self._roast))
        twin: Any = type(self).__new__(type(self)) if derived else None
        if twin is None:
            twin = _new_module(self._roast_original, frozenset(self._roast))
        memo[id(self)] = twin
        if derived or hasattr(super(), "__deepcopy__"):
            # The class's own `__deepcopy__` would create a dense module, so it is not called. Torch's parametrized
            # classes define one, because they refuse `__getstate__`.
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
            twin._renew_members()
        else:
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        cast(RoastModule, self)._renew_members()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        module = cast(RoastModule, self)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        # A class with a state-dict method of its own may write a shared attribute's dense tensor. It is removed, since
        # the state dict has the pool.
        for name in self._roast:
            destination.pop(prefix + name, None)
        for pool in module._pools():
            # Not by the members that there are now: another thread may be renewing them.
            for name in pool.tied:
                destination.pop(prefix + MEMBER + name, None)
            if module._modules.get(POOL_NAME) is not pool:
                pool.save_in(destination, prefix + MEMBER, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        module = cast(RoastModule, self)
        for name in self._roast:
            if is_placeholder(state_dict.get(prefix + name)):
                del state_dict[prefix + name]
        pools = [pool for pool in module._pools() if module._modules.get(POOL_NAME) is not pool]
        if not pools:
            return super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)  # type: ignore[misc]
        of_pool = {key: value for key, value in state_dict.items() if key.startswith(prefix + MEMBER)}
        rest = {key: value for key, value in state_dict.items() if key not in of_pool} if of_pool else state_dict
        with module._without_members():
            super()._load_from_state_dict(rest, prefix, metadata, strict, *lists)  # type: ignore[misc]
        for pool in pools:
            pool.load_from(of_pool, prefix + MEMBER, metadata, strict, *lists)
        return None

    def _leave_pool(self, name: str) -> None:
        to_dense(cast(RoastModule, self), {name: None})()

    def extra_repr(self) -> str:
        """Describe the module as its original class does, and the attributes that it reads from the pool."""
        parts = [super().extra_repr(), describe_shared(cast(RoastModule, self))]  # type: ignore[misc]
        return ", ".join(part for part in parts if part)


_layouts: dict[type, type] = {}
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
            # The module of a layer of torch's own: torch.fx does not trace into what is defined in torch.nn.
            title, bases = f"Roast{module_class.__name__}", _layer_bases(module_class, kind)
            attributes["__module__"] = module_class.__module__
            if _looks_up(module_class):
                bases += (RoastLookup,)
        if names and replaced and bases[0] is module_class:
            # `RoastReader` goes first, so that its `__call__` runs before the class's own. Its base `RoastModule` stays
            # behind the class.
            bases = (RoastReader, *bases)
        bases = (*_layout(module_class), _Swapped, *bases)
        swapped = types.new_class(title, bases, exec_body=lambda body: body.update(attributes))
        _roast_classes[key] = cast("type[RoastModule]", swapped)
    return _roast_classes[key]


def _layout(module_class: type[nn.Module]) -> tuple[type, ...]:
    """Return the base that gives a class on the pool the original class's layout in memory, if it needs one.

    Python changes an object's class only if both classes' first bases add the same slots to the same base. A class
    whose first base has no `__dict__` (`abc.ABC`, `typing.Generic`) adds one to that base, and not to `object`.
    """
    layout: type = module_class
    while layout.__base__ is not None and layout.__base__.__dictoffset__:
        layout = layout.__base__
    base = layout.__base__
    if base is None or base is object:
        return ()
    if base not in _layouts:
        # `Generic` refuses a subclass without parameters, unless it has this name.
        _layouts[base] = types.new_class("Protocol" if base is Generic else "Layout", (base,))
    return (_layouts[base],)


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
    cast(RoastModule, module)._renew_members()
    _renew_flat_weights(module)


def check_undone(module: RoastModule) -> None:
    """Raise `RoastError` if a module cannot get its original class back."""
    if type(module) is not roast_class(type(module)._roast_original, frozenset(module._roast)):
        raise RoastError(
            f"this {type(module).__name__} was parametrized after the conversion, and cannot be made dense with the "
            f"parametrization: call torch.nn.utils.parametrize.remove_parametrizations first, or parametrize the dense "
            f"model before you convert it"
        )


def state_of(module: nn.Module) -> Callable[[], None]:
    """Return a function that gives a module the class, the Parameters and the shared attributes that it has now."""
    original, parameters, shared = type(module), dict(module._parameters), module.__dict__.get("_roast")

    def restore() -> None:
        module.__class__ = original
        module.__dict__["_parameters"] = dict(parameters)
        if shared is None:
            module.__dict__.pop("_roast", None)
        else:
            module.__dict__["_roast"] = shared
        _renew_flat_weights(module)

    return restore


def to_dense(module: RoastModule, parameters: Mapping[str, nn.Parameter | None]) -> Callable[[], None]:
    """Return a function that takes attributes of a module out of the pool and gives it dense Parameters instead.

    If no shared attribute is left, the module gets its original class back. If the function was interrupted, it may be
    called again.

    Args:
        module: what is taken out.
        parameters: by attribute; None for one that is assigned next.
    """
    check_undone(module)
    original, pools = type(module)._roast_original, module._pools()
    left = {name: shared for name, shared in module._roast.items() if name not in parameters}
    own = {name: value for name, value in module._parameters.items() if not name.startswith(MEMBER)}

    def apply() -> None:
        module.__class__ = roast_class(original, frozenset(left)) if left else original  # type: ignore[assignment]
        module.__dict__["_parameters"] = {**own, **parameters}
        if left:
            module.__dict__["_roast"] = left
            module._renew_members()
        else:
            module.__dict__.pop("_roast", None)
            for pool in pools:
                pool.remove_reader(module)
        _renew_flat_weights(module)

    return apply


def _renew_flat_weights(module: nn.Module) -> None:
    """Rebuild the list that a recurrent module keeps of its Parameters, from its present ones."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()

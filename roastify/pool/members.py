"""Who has a pool's Parameters: the modules that read it, as tied members, and the names under which they are known.

A layer owns what it reads, as it would own a tied weight. So the pool's Parameters are members of every module that
reads the pool, under the names that they would have if the pool were its child (`roast_pool.weight`). The pool keeps
these members and its own Parameters the same objects, whatever replaces one of them, and writes and reads a state dict
so that it has the pool once: under the name at which it is met first.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

# The name of the pool: of the child that a converted model has, and in the names of its Parameters elsewhere.
POOL_NAME = "roast_pool"
# What the names of the pool's Parameters begin with in a module that reads them.
MEMBER = POOL_NAME + "."
# What a folder of transformers has in the place of a tensor that is in the pool; see `integrations.pretrained_folder`.
_PLACEHOLDER = b"needs roastify"
# Attributes that belong to the modules around a pool, and not to its copies.
_OF_MODULES = {"_sharded_reader", "_readers", "_root", "_owner", "_given", "_saved", "_loading"}


class TiedModule(nn.Module):
    """A module whose Parameters are tied members of the modules that read them: the base of `RoastPool`."""

    _readers: weakref.WeakSet[nn.Module]
    _root: weakref.ref[nn.Module] | None
    _owner: weakref.ref[nn.Module] | None
    _sharded_reader: bool
    _given: dict[str, dict[int, Tensor]]
    _saved: threading.local
    _loading: tuple[list[str] | None, tuple[str, ...]]
    # The Parameters that the readers have as members, by the pool's names.
    tied: dict[str, nn.Parameter]
    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._forget_modules()

    def _forget_modules(self) -> None:
        # The modules with the pool's Parameters, the model whose forward is a pass, and the module that has the pool as
        # a child. Weakly: they hold the pool.
        self.__dict__["_readers"] = weakref.WeakSet[nn.Module]()
        self.__dict__["_root"] = self.__dict__["_owner"] = None
        # Whether FSDP2 has been given a module that reads the pool.
        self.__dict__["_sharded_reader"] = False
        # Tensors that stand for Parameters for a while, by the `MemberPool` through which they came.
        self.__dict__["_given"] = {}
        # Where this pool was last written in a state dict, and the load that last read it or missed it.
        self.__dict__["_saved"] = threading.local()
        self.__dict__["_loading"] = (None, ())

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_MODULES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_modules()
        super().__setstate__(state)

    def become_child_of(self, owner: nn.Module) -> None:
        """Become a module's first child, `roast_pool`.

        The first, so that the Parameters have these names: `named_parameters` and the state dict name a tied Parameter
        where they meet it first. And `list(model.children())[:-1]` leaves out the model's own last child.
        """
        children = {name: child for name, child in owner._modules.items() if name != POOL_NAME}
        # One store: another thread, or an interrupt, never finds the owner without its children.
        owner.__dict__["_modules"] = {POOL_NAME: self, **children}
        self.__dict__["_owner"] = weakref.ref(owner)

    def set_root(self, root: nn.Module) -> None:
        """Note the model that reads the pool. Names in a state dict's fingerprint begin there."""
        self.__dict__["_root"] = weakref.ref(root)

    def is_read_by(self, root: nn.Module) -> bool:
        """Whether this is the model whose forward is a pass."""
        return self._root is not None and self._root() is root

    def add_reader(self, module: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Note a module that reads the pool, and return the members that it has to have.

        Args:
            module: the module; if the pool is its child, it has the Parameters already.
            names: the pool's names of the Parameters that the module reads.
        """
        if module._modules.get(POOL_NAME) is self:
            self.__dict__["_owner"] = weakref.ref(module)
            return {}
        self._readers.add(module)
        return {MEMBER + name: self.tied[name] for name in names}

    def remove_reader(self, module: nn.Module) -> None:
        """Forget a module that no longer reads the pool."""
        self._readers.discard(module)

    def present(self, name: str) -> Any:
        """Return the tensor that is read in the place of a Parameter: what was given for it, or the Parameter."""
        given = self._given.get(name)
        return next(reversed(given.values())) if given else self.tied[name]

    def _tie_readers(self) -> None:
        """Give every reader the Parameters that the pool has now."""
        own = self.__dict__["tied"] = dict(self._parameters)
        for module in self._readers:
            for key in module._parameters:
                if key.startswith(MEMBER) and (parameter := own.get(key.removeprefix(MEMBER))) is not None:
                    module._parameters[key] = parameter

    def __setattr__(self, name: str, value: Any) -> None:
        # Defined so that FSDP2, which writes past `register_parameter` where it can, comes through it.
        super().__setattr__(name, value)

    def is_owned(self) -> bool:
        """Whether a module that is in use has the pool as a child."""
        modules = [reference() for reference in (self._owner, self._root) if reference is not None]
        return any(module is not None and module._modules.get(POOL_NAME) is self for module in modules)

    def save_in(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write the pool to a state dict under a prefix, unless it is in there already."""
        last = getattr(self._saved, "last", None)
        if last is not None:
            key, value = last
            if key in destination and destination[key] is value():
                return
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "weight"
        self._saved.last = (key, weakref.ref(destination[key])) if key in destination else None

    def load_from(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Read the pool from a state dict that has it under a prefix.

        A whole model and each of its parts hold the pool once, so only one of the modules that read it finds it.
        """
        missing, unexpected, errors = lists
        load, reported = self._loading
        if load is missing and prefix + "weight" not in state_dict:
            return
        for key in reported if load is missing else ():
            missing.remove(key)
        key = prefix + "weight"
        if load is missing and not reported and not self._holds(state_dict[key]):
            errors.append(
                f"{key} has other values than the same pool under another name in this state dict, and both are one "
                f"Parameter here: the state dict was put together from several models"
            )
            return
        before = len(missing)
        self._read_state(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.__dict__["_loading"] = missing, tuple(missing[before:])

    def _holds(self, value: Any) -> bool:
        """Whether the pool has these values. Sharded ones and those of a meta tensor are not looked at."""
        if not isinstance(value, Tensor) or is_sharded(self.weight) or is_sharded(value) or self.weight.is_meta:
            return True
        return value.shape == self.weight.shape and torch.equal(value.to(self.weight), self.weight.detach())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.save_in(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.load_from(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter, here and in every module that reads it."""
        super().register_parameter(name, param)
        self._tie_readers()

    def _read_state(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Read the Parameters from a state dict that has them under a prefix."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class MemberPool(nn.Module):
    """A pool as a member of one module that reads it: what `layer.roast_pool` is, for tools that walk along names.

    It has the pool's Parameters. `torch.func.functional_call` puts other tensors in their places for one call, under
    every name of a tied Parameter, and puts back what it found under each. So each name has a place of its own: in the
    pool for the whole model's name, and here for a part's.
    """

    def __init__(self, pool: TiedModule) -> None:
        super().__init__()
        self.__dict__["pool"] = pool
        self.__dict__["_parameters"] = _Places(pool)

    def __getattr__(self, name: str) -> Any:
        places = self.__dict__["_parameters"]
        return places[name] if name in places else getattr(self.pool, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter in the pool."""
        self.pool.register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemberPool:
        self.pool._apply(fn, recurse)
        return self

    def forward(self, x: Any) -> Any:
        """Return `x`, as the pool does."""
        return x


class _Places(dict[str, Any]):
    """The Parameters of a `MemberPool`. The pool reads a tensor that is put here, until its Parameter is put back."""

    def __init__(self, pool: TiedModule) -> None:
        # What the pool reads now: in a nested call, what the outer call has put there.
        super().__init__({name: pool.present(name) for name in pool.tied})
        self.pool = pool
        self.found = dict(self)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        given = self.pool._given.setdefault(name, {})
        given.pop(id(self), None)
        if value is not self.found.get(name):
            given[id(self)] = value
        elif not given:
            del self.pool._given[name]

    def __del__(self) -> None:
        # What nobody can put back any more was meant to stay: Accelerate sets Parameters in this way.
        for name, given in list(self.pool._given.items()):
            if id(self) in given:
                value = given.pop(id(self))
                if not given:
                    del self.pool._given[name]
                self.pool.register_parameter(name, cast(nn.Parameter, value))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes (a `DTensor`), so that this process holds a part of its values."""
    return type(tensor) is not nn.Parameter and hasattr(tensor, "placements")


def placeholder() -> Tensor:
    """Return bytes that stand in a file under the name of a tensor that is in the pool, and that no weight can be."""
    return torch.tensor(list(_PLACEHOLDER), dtype=torch.uint8)


def is_placeholder(value: object) -> bool:
    """Whether this is what `placeholder` returns."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.shape != (len(_PLACEHOLDER),):
        return False
    return not value.is_meta and bytes(value.tolist()) == _PLACEHOLDER

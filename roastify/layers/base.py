"""Base classes of modules on the pool: how shared attributes are read, assigned, copied and cast."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from roastify.errors import RoastError
from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.read_weight import ReadWeight
from roastify.layers.reading import ModuleCall, dense_property, read_attribute, read_in_call, running, tracers
from roastify.pool.forward_pass import RootForward
from roastify.pool.members import MEMBER, POOL_NAME, MemberPool
from roastify.pool.pool import ReplicatedPool, RoastPool, basis_name


class RoastModule(nn.Module):
    """The base class of every module on the pool: its shared attributes read as dense, differentiable tensors.

    `_roast` holds the shared attributes by name. The pool's Parameter is a member of the module, as a tied Parameter
    is, under the name `roast_pool.weight`: what a module reads is among its `parameters()`, in its state dict (a whole
    model's holds the pool once) and in its copies. The class that `class_swap` creates for the module has a property
    for each shared attribute. In `_parameters`, a `None` replaces each shared Parameter, so that a densified model's
    state dict has its keys in the original order.
    """

    _roast: dict[str, PooledWeight]
    # Set on the classes that `class_swap` creates.
    _roast_original: ClassVar[type[nn.Module]]
    # Takes an attribute out of the pool. `class_swap` defines it, because that module changes the class back.
    _leave_pool: Callable[[str], None]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_roast", ()):
            self._assign_shared(name, value)
            return
        if name == "qconfig":
            _warn_of_quantization(type(self).__name__)
        if name == "_is_fsdp_managed_module":
            for pool in self._pools():
                pool.__dict__["_sharded_reader"] = value
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter. If a shared attribute has that name, the attribute leaves the pool."""
        if name in self.__dict__.get("_roast", ()):
            self._assign_shared(name, param)
        elif name.startswith(MEMBER):
            raise RoastError(
                f"this {type(self).__name__} reads the pool, and so do others: the pool cannot be replaced or split "
                f"for this layer alone, as tensor parallelism does. Shard the whole model with fully_shard (FSDP2) "
                f"instead, or pass roastify.densify(model)"
            )
        elif (base := _normalised(name)) in self.__dict__.get("_roast", ()):
            if base not in self._parameters:
                # Torch has taken the attribute's place away already.
                self.__dict__["_parameters"] = {base: None, **self._parameters}
            raise RoastError(
                f"{base!r} of this {type(self).__name__} lives in the shared pool, and cannot be normalised or pruned "
                f"by hooks; do that before the conversion, or in roastify.densify(model)"
            )
        elif isinstance(param, ReadWeight):
            raise RoastError(
                f"{name!r} of this {type(self).__name__} would be a weight that lives in the shared pool, and no "
                f"Parameter, as pruning needs it; prune before the conversion, or prune roastify.densify(model)"
            )
        else:
            super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if f"{name}_orig" in self.__dict__.get("_roast", ()) and name in self.__dict__:
            raise RoastError(
                f"{name!r} of this {type(self).__name__} is computed from {name}_orig, which lives in the shared pool, "
                f"and a pruned weight cannot: make the pruning permanent in roastify.densify(model)"
            )
        if name in self.__dict__.get("_roast", ()):
            self._leave_pool(name)
            # Not super(): `_leave_pool` may have changed the class of this object.
            delattr(self, name)
        else:
            super().__delattr__(name)

    def _assign_shared(self, name: str, value: Any) -> None:
        """Accept the tensor that the attribute reads already, or a new Parameter, which takes it out of the pool."""
        if isinstance(value, ReadWeight):
            # A tie to the same shared tensor changes nothing; transformers' `tie_weights` makes such ties.
            if value.source is not None and value.source[2] is self._roast[name]:
                return
        elif type(value) is nn.Parameter:
            self._leave_pool(name)
            setattr(self, name, value)
            return
        raise RoastError(
            f"{name!r} of this {type(self).__name__} lives in the shared pool and cannot be assigned a "
            f"{type(value).__name__}; train the pool, assign a new nn.Parameter to take {name!r} out of the pool, or "
            f"call roastify.densify(model) to get a model whose weights can be set"
        )

    @property
    def roast_pool(self) -> nn.Module:
        """The pool that the module reads."""
        if (child := self._modules.get(POOL_NAME)) is not None:
            return child
        for pool in self._pools():
            return MemberPool(pool)
        raise AttributeError(POOL_NAME)

    def _renew_members(self) -> None:
        """Make the Parameters of the pool that this module reads its members, and no others."""
        own = {key: value for key, value in self._parameters.items() if not key.startswith(MEMBER)}
        # First, so that a tool that changes one Parameter after the other meets those that it cannot change first.
        members: dict[str, Any] = {}
        for pool in self._pools():
            bases = {each.basis_index for each in self._roast.values() if each.pool is pool}
            names = ["weight", *map(basis_name, sorted(index for index in bases if index is not None))]
            members |= pool.add_reader(self, names)
        found = {key: id(value) for key, value in self._parameters.items() if key.startswith(MEMBER)}
        if found != {key: id(value) for key, value in members.items()}:
            # One assignment: other threads may be running this module.
            self.__dict__["_parameters"] = {**members, **own}

    def _pools(self) -> list[RoastPool]:
        """Return the pool that this module reads in a list; empty in a replica of `nn.DataParallel`."""
        pools = {id(each.pool): each.pool for each in self._roast.values()}
        return [pool for pool in pools.values() if isinstance(pool, RoastPool)]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the module's Parameters with their names.

        Without `recurse`, the pool's are left out where a model has the pool as a child: code that visits every module
        finds them there. That puts the pool into the root's group of FSDP2, which shards a Parameter with the first
        module that shows it.
        """
        shown = recurse or not any(pool.is_owned() for pool in self._pools())
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if shown or not name.removeprefix(prefix).lstrip(".").startswith(MEMBER):
                yield name, parameter

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the module's Parameters; if there are none, the tensors that the module reads from the pool.

        Code reads a dtype or a device from `next(self.parameters(recurse=False))`, and a tensor that was read from the
        pool has both.
        """
        count = 0
        for parameter in super().parameters(recurse):
            count += 1
            yield parameter
        if count == 0:
            for name in self._roast:
                yield cast(nn.Parameter, read_attribute(self, name))

    @contextlib.contextmanager
    def _without_members(self) -> Iterator[None]:
        self.__dict__["_parameters"] = {
            key: value for key, value in self._parameters.items() if not key.startswith(MEMBER)
        }
        try:
            yield
        finally:
            self._renew_members()

    def _replicate_for_data_parallel(self) -> RoastModule:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_roast"] = {
            name: dataclasses.replace(shared, pool=cast(RoastPool, ReplicatedPool(shared.pool)))
            for name, shared in self._roast.items()
        }
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoastModule:
        # The pool takes care of its Parameters: where `fn` makes new ones, each module would make one of its own.
        with self._without_members():
            super()._apply(fn, recurse)
            for pool in self._pools():
                pool.apply_of_reader(fn)
        for shared in self._roast.values():
            # `fn` (half, to, …) decides the dtype, so it is applied to an empty tensor of the present dtype.
            shared.dtype = fn(torch.empty(0, dtype=shared.dtype)).dtype
        return self


def _warn_of_quantization(layer: str) -> None:
    warnings.warn(
        f"torch.ao.quantization replaces layers by their exact class, so a {layer} stays as it is, on the pool in its "
        f"own dtype; to quantize it, pass roastify.densify(model)",
        stacklevel=3,
    )


def _normalised(name: str) -> str:
    """Return the attribute that `weight_norm`, `spectral_norm` and pruning replace by a Parameter of this name."""
    return next((name.removesuffix(end) for end in ("_g", "_v", "_orig") if name.endswith(end)), "")


def describe_shared(module: RoastModule) -> str:
    """Return a description of the attributes that a module reads from the pool."""
    parts = []
    for name, shared in module.__dict__.get("_roast", {}).items():
        view = shared.view
        what = "strips" if view.strips else "tiles"
        kernels = "" if shared.basis_index is None else f", kernels of basis_{shared.basis_index}"
        parts.append(
            f"{name}: {view.num_tiles} {what} of {view.tile_rows}×{view.tile_cols} in {view.num_slots} shared slots, "
            f"scale={shared.scale:.4g}{kernels}"
        )
    return ", ".join(parts)


class RoastReader(RoastModule):
    """A module whose own code reads shared attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module.

        Within the call, the module's code reads a shared attribute as a lazy weight, or as the same tensor each time.
        """
        if tracers or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        calls = running.calls
        outer = calls.get(self)
        calls[self] = ModuleCall(self._runs_its_own_code())
        try:
            return super().__call__(*args, **kwargs)
        finally:
            if outer is None:
                del calls[self]
            else:
                calls[self] = outer

    def _runs_its_own_code(self) -> bool:
        """Whether only the class's code runs in a call: the instance has no hooks and no forward of its own."""
        forward = self.__dict__.get("forward")
        return (
            (forward is None or (isinstance(forward, RootForward) and forward.inner is None))
            and not self._forward_hooks
            and not self._forward_pre_hooks
        )


class RoastLookup(RoastModule):
    """Added to classes with a `__getattr__` of their own, which may look up a shared attribute by another name."""

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_roast", ()):
            return read_in_call(self, name)
        return super().__getattr__(name)


class RoastLayer(RoastModule):
    """A layer whose `weight` is in the pool."""

    # Annotated as Any, because the dense layers declare a Tensor here and this is a property.
    weight: Any = dense_property("weight")

"""What modules on the pool have in common: assignment, copies, casts, and how their shared attributes are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from roastify.errors import RoastError
from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.read_weight import ReadWeight
from roastify.layers.reading import ModuleCall, dense_property, read_attribute, read_in_call, running, tracers
from roastify.pool.forward_pass import RootForward
from roastify.pool.pool import ReplicatedPool, RoastPool


class RoastModule(nn.Module):
    """What every module on the pool has: its shared attributes read as dense, differentiable tensors.

    `_roast` names them. The class made for the module has a property for each, and a `None` stays in the Parameter's
    place among `_parameters`, which keeps the order of a state dict's keys for the way back.
    """

    _roast: dict[str, PooledWeight]
    # Set on the classes that `class_swap` makes.
    _roast_original: ClassVar[type[nn.Module]]
    # Takes an attribute out of the pool; `class_swap` makes the classes and knows the way back.
    _leave_pool: Callable[[str], None]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_roast", ()):
            self._assign_shared(name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter; one in the place of a shared attribute takes that out of the pool."""
        if name in self.__dict__.get("_roast", ()):
            self._assign_shared(name, param)
        else:
            super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_roast", ()):
            self._leave_pool(name)
            # Not super(): the class may no longer be this one.
            delattr(self, name)
        else:
            super().__delattr__(name)

    def _assign_shared(self, name: str, value: Any) -> None:
        """Take what is assigned to a shared attribute: what it reads already, or a Parameter of the module's own."""
        if isinstance(value, ReadWeight):
            # Tying again what is tied already, as transformers' `tie_weights` does.
            if value.source is not None and value.source[2] is self._roast[name]:
                return
        elif isinstance(value, nn.Parameter):
            self._leave_pool(name)
            setattr(self, name, value)
            return
        raise RoastError(
            f"{name!r} of this {type(self).__name__} lives in the shared pool and cannot be assigned a "
            f"{type(value).__name__}; train the pool, assign a new nn.Parameter to take it out of the pool, or call "
            f"roastify.densify(model) to get a model whose weights can be set"
        )

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the module's Parameters; where sharing left none, what it reads instead.

        Code asks `next(self.parameters())` for a dtype or a device. What is read answers that, and an optimizer, or
        `requires_grad = False`, refuses it with an error of its own: neither can be had for a part of the pool.
        """
        count = 0
        for parameter in super().parameters(recurse):
            count += 1
            yield parameter
        if count == 0:
            for module in self.modules() if recurse else [self]:
                if isinstance(module, RoastModule):
                    for name in module._roast:
                        yield cast(nn.Parameter, read_attribute(module, name))

    def _replicate_for_data_parallel(self) -> RoastModule:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_roast"] = {
            name: dataclasses.replace(shared, pool=cast(RoastPool, ReplicatedPool(shared.pool)))
            for name, shared in self._roast.items()
        }
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoastModule:
        super()._apply(fn, recurse)
        for shared in self._roast.values():
            # What `fn` (half, to, …) makes of a tensor of this dtype, asked of an empty one.
            shared.dtype = fn(torch.empty(0, dtype=shared.dtype)).dtype
        return self


def describe_shared(module: RoastModule) -> str:
    """Return what a module reads from the pool."""
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
        """Call the module; within the call, its code is given lazy weights, or the same tensors throughout."""
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
        """Whether nothing but the class's code runs in a call: no hooks, and no other forward."""
        forward = self.__dict__.get("forward")
        return (
            (forward is None or (isinstance(forward, RootForward) and forward.inner is None))
            and not self._forward_hooks
            and not self._forward_pre_hooks
        )


class RoastLookup(RoastModule):
    """Joined to classes that look their attributes up themselves and may ask for a shared one by another name."""

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_roast", ()):
            return read_in_call(self, name)
        return super().__getattr__(name)


class RoastLayer(RoastModule):
    """A layer whose `weight` is in the pool."""

    # A property under a type that lets it stand where the dense layers declare a Tensor.
    weight: Any = dense_property("weight")

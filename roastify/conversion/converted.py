"""Queries on a converted model: its pool, its shared tensors, and whether its plan still describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from roastify.conversion.adapters import adapter_tensors
from roastify.errors import ConversionError, WriteRefused
from roastify.kernels.torch_internals import is_compiled
from roastify.layers.base import RoastModule
from roastify.layers.pooled_weight import PooledWeight
from roastify.pool.members import POOL_NAME, is_sharded
from roastify.pool.plan import RoastPlan, TensorPlan
from roastify.pool.pool import RoastPool
from roastify.pool.start_values import start_offsets


def pools_in(model: nn.Module) -> list[RoastPool]:
    """Return the pools that a model's modules read or hold."""
    pools: dict[int, RoastPool] = {}
    for module in model.modules():
        if isinstance(module, RoastModule):
            pools |= {id(pool): pool for pool in module._pools()}
        elif isinstance(module, RoastPool):
            pools[id(module)] = module
    return list(pools.values())


def find_pool(model: nn.Module) -> RoastPool | None:
    """Return the first pool of a converted model, or None for any other model."""
    return next(iter(pools_in(model)), None)


def pools_of(model: nn.Module) -> list[RoastPool]:
    """Return the pools of a converted model, or of a model that contains converted models or parts of them.

    Raises:
        ConversionError: the model reads no pool, or it is a wrapper whose own code would get in the way.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"expected a torch.nn.Module; found {type(model).__name__}")
    refuse_wrapped(model)
    pools = pools_in(model)
    if not pools:
        raise ConversionError(
            f"this {type(model).__name__} holds no roastify pool; expected a model that roastify.convert or "
            f"roastify.load returned"
        )
    return pools


def pool_of(model: nn.Module) -> RoastPool:
    """Return the only pool of a converted model; see `pools_of`.

    Raises:
        ConversionError: as in `pools_of`, or there are several pools.
    """
    pools = pools_of(model)
    if len(pools) > 1:
        raise ConversionError(
            f"this {type(model).__name__} reads {len(pools)} pools; pass one converted model at a time"
        )
    return pools[0]


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `ConversionError` for a model inside a wrapper that runs it, and say where the model itself is."""
    if is_compiled(model):
        what, where = "torch.compile's wrapper", "_orig_mod"
    elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        what, where = f"the wrapper {type(model).__name__}", "module"
    else:
        return
    raise ConversionError(
        f"this model is {what}; pass the model inside it (its .{where}), and wrap what comes back again if you need to"
    )


class Place(NamedTuple):
    """A module that reads a shared tensor, the tensor's name in it, and the path of the module."""

    path: str
    module: RoastModule
    attribute: str

    @property
    def name(self) -> str:
        """The tensor's name in the model."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute


def readers_of(model: nn.Module, pool: RoastPool) -> list[list[Place]]:
    """Return where a model's modules read every shared tensor of a pool now, in the order of the plan's tensors.

    A tensor has several places if it is tied, or if its module is in the model several times; it has none if its layer
    was replaced or removed.
    """
    places: dict[int, list[Place]] = {id(weight): [] for weight in pool.weights}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RoastModule):
            for attribute, weight in module._roast.items():
                if id(weight) in places:
                    places[id(weight)].append(Place(path, module, attribute))
    return [places[id(weight)] for weight in pool.weights]


def refuse_sharded(model: nn.Module) -> None:
    """Raise `ConversionError` for a model whose tensors are sharded over processes."""
    name = next((name for name, tensor in model.named_parameters() if is_sharded(tensor)), None)
    if name is not None:
        raise ConversionError(
            f"{name} is sharded over processes (FSDP2), so this process holds a part of its values; write the artifact "
            f"with roastify.save(model, path, state_dict=…), and use the model that roastify.load returns"
        )


def owners(model: nn.Module, tensor: TensorPlan) -> Iterator[tuple[nn.Module, str]]:
    """Yield every module that holds a tensor, once, with the tensor's name in it. Modules that are gone are skipped."""
    seen = set()
    for alias in tensor.aliases:
        path, _, attribute = alias.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if (id(module), attribute) not in seen:
            seen.add((id(module), attribute))
            yield module, attribute


def matrix(tensor: TensorPlan, dense: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor as a matrix; unless it has a basis or is folded, the pool holds this matrix."""
    if tensor.transposed:
        return dense.reshape(-1, tensor.rows).t()
    return dense.reshape(tensor.rows, -1)


def pooled_weight(pool: RoastPool, tensor: TensorPlan) -> PooledWeight:
    """Return a shared tensor as its layers read it."""
    return PooledWeight(
        pool.plan.view(tensor),
        scale_of(tensor),
        torch.Size(tensor.shape),
        tensor.transposed,
        _basis_index(pool.plan, tensor),
        None if tensor.fold is None else pool.plan.fold_view(tensor.fold),
        pool=pool,
        dtype=getattr(torch, tensor.dtype),
        zero_row=tensor.zero_row,
        center=tensor.center,
        diagonal=tensor.diagonal,
        start_at=next((start for other, start in start_offsets(pool.plan) if other.name == tensor.name), None),
    )


def basis_of(pool: RoastPool, tensor: TensorPlan) -> nn.Parameter | None:
    """Return the basis kernels of a shared tensor, or None."""
    index = _basis_index(pool.plan, tensor)
    return None if index is None else pool.bases()[index]


def _basis_index(plan: RoastPlan, tensor: TensorPlan) -> int | None:
    if not tensor.basis_count:
        return None
    return [other.name for other in plan.with_basis].index(tensor.name)


def scale_of(tensor: TensorPlan) -> float:
    """Return λ of a shared tensor whose plan is complete."""
    assert tensor.scale is not None, f"{tensor.name} has no scale yet"
    return tensor.scale


def refused_write(model: nn.Module, plan: RoastPlan, error: BaseException | None) -> str | None:
    """Return the name of the shared tensor that a model tried to write to, or None if the error has another cause."""
    if not isinstance(error, WriteRefused) or error.source is None:
        return None
    return next((tensor.name for tensor in plan.shared if error.source in list(owners(model, tensor))), None)


def current_plans(model: nn.Module) -> list[RoastPlan]:
    """Return the plans of a model's pools, with the names, dtypes and kept parameters that the model has now.

    Layers may have been moved, renamed, repeated, or replaced by dense ones since the conversion. A shared tensor that
    no layer reads any more stays in its plan, without names, because others share its place in the pool. All kept
    parameters are in the first plan.
    """
    plans: list[RoastPlan] = []
    pools = pools_of(model)
    parameters = _kept_parameters(model)
    if any(pool.plan.of_adapters for pool in pools):
        stored = tensors_of_adapters(model, [pool.plan for pool in pools])
        parameters = [(names, parameter) for names, parameter in parameters if id(parameter) in stored]
    for pool in pools:
        old: RoastPlan = pool.plan
        shared = [
            dataclasses.replace(
                tensor,
                name=places[0].name if places else tensor.name,
                aliases=tuple(place.name for place in places),
                dtype=_dtype_name(weight.dtype),
            )
            for tensor, weight, places in zip(old.shared, pool.weights, readers_of(model, pool), strict=True)
        ]
        kept = [] if plans else [_kept(old, names, parameter) for names, parameter in parameters]
        dtype = _dtype_name(pool.weight.dtype)
        tensors = _in_order(old, shared, kept)
        owner, root = _owner_and_root(model, pool)
        plans.append(dataclasses.replace(old, tensors=tensors, dtype=dtype, owner=owner, root=root))
    return plans


def tensors_of_adapters(model: nn.Module, plans: Iterable[RoastPlan]) -> set[int]:
    """Return the ids of the Parameters and buffers that a model with plans of adapters stores, the pool's included.

    Raises:
        ConversionError: a pool is of adapters, and another is not.
    """
    plans = list(plans)
    if not all(plan.of_adapters for plan in plans):
        raise ConversionError(
            "the model has a pool of adapters and another pool, so what belongs to the base is not clear; save the "
            "converted base and the adapters each by themselves"
        )
    # A Parameter that was trained beside the adapters may be frozen by now.
    kept = {alias for plan in plans for tensor in plan.kept for alias in tensor.aliases}
    named = {id(each) for name, each in model.named_parameters(remove_duplicate=False) if name in kept}
    return named | adapter_tensors(model).keys() | {id(each) for pool in pools_in(model) for each in pool.parameters()}


def _owner_and_root(model: nn.Module, pool: RoastPool) -> tuple[str, str]:
    """Return the path of the module that has a pool, or else reads it first, and that of the pool's root."""
    owner = reader = root = None
    for path, module in model.named_modules():
        if owner is None and module._modules.get(POOL_NAME) is pool:
            owner = path
        if reader is None and isinstance(module, RoastModule) and any(each is pool for each in module._pools()):
            reader = path
        if root is None and pool.is_read_by(module):
            root = path
    return owner if owner is not None else reader or "", root or ""


def _kept_parameters(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Parameter]]:
    """Return a model's Parameters, with all their names, but for those of its pools."""
    pools = {id(parameter) for pool in pools_in(model) for parameter in pool.parameters()}
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in pools:
            names.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter
    return [(tuple(names[key]), parameter) for key, parameter in parameters.items()]


def _kept(plan: RoastPlan, names: tuple[str, ...], parameter: nn.Parameter) -> TensorPlan:
    before = next((tensor for tensor in plan.kept if tensor.name == names[0]), None)
    shape = tuple(parameter.shape)
    if before is None or before.shape != shape:
        before = TensorPlan(names[0], names, shape, "", "", False, "new since the conversion")
    return dataclasses.replace(before, aliases=names, dtype=_dtype_name(parameter.dtype))


def _in_order(plan: RoastPlan, shared: list[TensorPlan], kept: list[TensorPlan]) -> tuple[TensorPlan, ...]:
    """Return shared tensors in their order, and between them, where a plan has them, kept ones; new ones last."""
    rest, by_name = iter(shared), {tensor.name: tensor for tensor in kept}
    merged = [next(rest) if tensor.shared else by_name.pop(tensor.name, None) for tensor in plan.tensors]
    return tuple(tensor for tensor in [*merged, *by_name.values()] if tensor is not None)


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")

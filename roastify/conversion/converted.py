"""Queries on a converted model: its pool, its shared tensors, and whether its plan still describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from roastify.errors import ConversionError, WriteRefused
from roastify.layers.base import RoastModule
from roastify.layers.pooled_weight import PooledWeight
from roastify.pool.plan import RoastPlan, TensorPlan
from roastify.pool.pool import RoastPool, is_sharded

POOL_NAME = "roast_pool"


def find_pool(model: nn.Module) -> RoastPool | None:
    """Return the pool of a converted model, or None for any other model."""
    return next((module for module in model.modules() if isinstance(module, RoastPool)), None)


def pool_of(model: nn.Module) -> RoastPool:
    """Return the pool of a whole converted model.

    Raises:
        ConversionError: the model is not converted, or it is only a part or a wrapper of a converted model.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"expected a torch.nn.Module; found {type(model).__name__}")
    pool = find_pool(model)
    part = next((module for module in model.modules() if isinstance(module, RoastModule)), None)
    if pool is None and part is None:
        raise ConversionError(
            f"this {type(model).__name__} holds no roastify pool; expected a model that roastify.convert or "
            f"roastify.load returned"
        )
    try:
        owner = model.get_submodule(pool.plan.owner) if pool else nn.Module()
    except AttributeError:
        owner = nn.Module()
    if pool is None or owner._modules.get(POOL_NAME) is not pool:
        raise ConversionError(
            f"this {type(model).__name__} is a wrapper or a part of a converted model; pass the model that "
            f"roastify.convert returned (for a wrapper, its .module)"
        )
    return pool


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
    """Return a dense tensor as a matrix; unless it has a basis, the pool holds this matrix."""
    if tensor.transposed:
        return dense.reshape(tensor.cols, tensor.rows).t()
    return dense.reshape(tensor.rows, -1)


def pooled_weight(pool: RoastPool, tensor: TensorPlan) -> PooledWeight:
    """Return a shared tensor as its layers read it."""
    return PooledWeight(
        pool.plan.view(tensor),
        scale_of(tensor),
        torch.Size(tensor.shape),
        tensor.transposed,
        _basis_index(pool.plan, tensor),
        pool=pool,
        dtype=getattr(torch, tensor.dtype),
        zero_row=tensor.zero_row,
        center=tensor.center,
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


def current_plan(model: nn.Module) -> RoastPlan:
    """Return the plan of a converted model, with the model's present dtypes.

    Raises:
        ConversionError: a layer on the pool, or a parameter, was replaced, added or removed since the conversion.
    """
    pool = pool_of(model)
    plan: RoastPlan = pool.plan
    unseen = dict(model.named_parameters(remove_duplicate=False))
    tensors = []
    for tensor in plan.tensors:
        if tensor.shared:
            views = [_on_pool(model, alias) for alias in tensor.aliases]
            changed = any(view is None or view.pool is not pool for view in views)
            dtype = None if views[0] is None else views[0].dtype
        else:
            parameters = [unseen.pop(alias, None) for alias in tensor.aliases]
            changed = any(parameter is None or tuple(parameter.shape) != tensor.shape for parameter in parameters)
            dtype = None if parameters[0] is None else parameters[0].dtype
        if changed:
            raise ConversionError(
                f"{tensor.name} was replaced or removed since the conversion, so the plan no longer describes the "
                f"model; call roastify.densify(model) and convert the dense model again"
            )
        tensors.append(dataclasses.replace(tensor, dtype=_dtype_name(dtype)))
    pools = {id(pool.weight), *map(id, pool.bases())}
    extra = [name for name, parameter in unseen.items() if id(parameter) not in pools]
    if extra:
        raise ConversionError(
            f"{extra[0]} was added since the conversion, so the plan does not describe it; call "
            f"roastify.densify(model) and convert the dense model again"
        )
    return dataclasses.replace(plan, tensors=tuple(tensors), dtype=_dtype_name(pool.weight.dtype))


def _on_pool(model: nn.Module, alias: str) -> PooledWeight | None:
    path, _, attribute = alias.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module._roast.get(attribute) if isinstance(module, RoastModule) else None


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")

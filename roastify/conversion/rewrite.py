"""Applies a plan to a model, and takes it back; it decides nothing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from roastify.conversion.fx_pass import computed_attributes
from roastify.conversion.transformers_ties import forget_ties, remember_ties
from roastify.errors import ConversionError, WriteRefused
from roastify.layers.kinds import keeps_weight, to_dense, to_emptied, to_roast
from roastify.layers.modules import RoastModule
from roastify.layers.pooled_weight import SharedTensor
from roastify.pool.forward_pass import RootForward
from roastify.pool.plan import RoastPlan, TensorPlan
from roastify.pool.pool import RoastPool, is_sharded

POOL_NAME = "roast_pool"


def find_pool(model: nn.Module) -> RoastPool | None:
    """Return the pool of a converted model, or None for any other."""
    return next((module for module in model.modules() if isinstance(module, RoastPool)), None)


def pool_of(model: nn.Module) -> RoastPool:
    """Return the pool of a whole converted model.

    Raises:
        ConversionError: the model is not a converted one, or only a part or a wrapper of one.
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
    """Raise `ConversionError` for a model whose tensors are spread over processes."""
    name = next((name for name, tensor in model.named_parameters() if is_sharded(tensor)), None)
    if name is not None:
        raise ConversionError(
            f"{name} is sharded over processes (FSDP2), so this one holds a part of its values; write the artifact "
            f"with roastify.save(model, path, state_dict=…), and work on what roastify.load returns"
        )


def copy_without(model: nn.Module, left_out: set[int]) -> nn.Module:
    """Deep-copy a model, but give the tensors whose ids are in `left_out` no memory: they become meta tensors.

    Raises:
        ConversionError: the model holds something that cannot be copied.
    """
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in left_out:
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    for tensor in computed_attributes(model):
        memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # any object's own copying may fail in its own way
        raise ConversionError(
            f"the model cannot be deep-copied ({type(error).__name__}: {error}); pass inplace=True to convert the "
            f"model itself"
        ) from error


def build_pool(plan: RoastPlan, device: torch.device | str) -> RoastPool:
    """Return an uninitialised pool for a plan whose scales are known."""
    pool = RoastPool(
        plan.num_slots,
        plan.tile,
        plan.maps(),
        [(plan.view(tensor), _scale(tensor)) for tensor in plan.shared],
        unread_rows=[
            (plan.view(tensor), _scale(tensor), tensor.zero_row)
            for tensor in plan.shared
            if tensor.zero_row is not None
        ],
        bases=[(tensor.basis_shape, _basis_energy(plan, tensor)) for tensor in plan.with_basis],
        dtype=getattr(torch, plan.dtype),
        device=device,
        trainable=plan.trainable,
        precondition=plan.precondition,
    )
    pool.plan = plan
    return pool


def _scale(tensor: TensorPlan) -> float:
    assert tensor.scale is not None, f"{tensor.name} has no scale yet"
    return tensor.scale


def _basis_energy(plan: RoastPlan, tensor: TensorPlan) -> float:
    """Return the sum of the squared coefficients of a basis kernel, as a random pool has them.

    Divided by that, a step of SGD on the basis is the dense one, projected.
    """
    assert plan.pool_std is not None, "the plan was not measured"
    return max(tensor.matrix_numel / tensor.basis_count * (_scale(tensor) * plan.pool_std) ** 2, 1e-12)


def owners(model: nn.Module, tensor: TensorPlan) -> Iterator[tuple[nn.Module, str]]:
    """Yield every module that holds a tensor, with its name there, each once; places that are gone are passed over."""
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
    """Return a dense tensor as a matrix: the one that the pool holds, or would without a basis."""
    if tensor.transposed:
        return dense.reshape(tensor.cols, tensor.rows).t()
    return dense.reshape(tensor.rows, -1)


def shared_tensor(pool: RoastPool, tensor: TensorPlan) -> SharedTensor:
    """Return a shared tensor as its layers see it."""
    return SharedTensor(
        pool,
        pool.plan.view(tensor),
        _scale(tensor),
        torch.Size(tensor.shape),
        tensor.transposed,
        getattr(torch, tensor.dtype),
        tensor.zero_row,
        tensor.center,
        _basis_index(pool.plan, tensor),
    )


def basis_of(pool: RoastPool, tensor: TensorPlan) -> nn.Parameter | None:
    """Return the basis kernels of a shared tensor, or None."""
    index = _basis_index(pool.plan, tensor)
    return None if index is None else pool.bases()[index]


def _basis_index(plan: RoastPlan, tensor: TensorPlan) -> int | None:
    if not tensor.basis_count:
        return None
    return [other.name for other in plan.with_basis].index(tensor.name)


def apply(model: nn.Module, plan: RoastPlan, pool: RoastPool) -> Callable[[], None]:
    """Turn every module that the plan names into one on the pool and register the pool, in place; all or nothing.

    Returns:
        a function that undoes it, holding on to the dense Parameters for as long as it is kept.
    """
    swapped: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    owner = model.get_submodule(plan.owner)
    own_forward = model.__dict__.get("forward")
    around = {model.get_submodule(path) for path in _paths_to(plan.owner)}
    # Those that hold the pool have a Parameter.
    filled = [module for module in model.modules() if module not in around and _holds_parameters(module)]

    def undo() -> None:
        owner._modules.pop(POOL_NAME, None)
        _set_forward(model, own_forward)
        forget_ties(model)
        _fill_again(model)
        for module, attribute, parameter in reversed(swapped):
            if isinstance(module, RoastModule) and attribute in module._roast:
                to_dense(module, {attribute: parameter})
            else:
                module._parameters[attribute] = parameter

    try:
        remember_ties(model)
        kept = []
        for tensor in plan.shared:
            shared = shared_tensor(pool, tensor)
            holders = list(owners(model, tensor))
            for module, attribute in holders:
                swapped.append((module, attribute, module._parameters[attribute]))
                to_roast(module, attribute, shared)
            if any(keeps_weight(cast(RoastModule, module), attribute, shared) for module, attribute in holders):
                kept.append(shared.weight)
        pool.weights = tuple(kept)
        for module in filled:
            if not _holds_parameters(module):
                to_emptied(module)
        owner.add_module(POOL_NAME, pool)
        _set_forward(model, RootForward(model, pool, own_forward))
    except BaseException:
        undo()
        raise
    return undo


def copy_weights(converted: nn.Module, dense: nn.Module) -> None:
    """Write the weights that a converted model stands for into the dense model it was made from, one at a time."""
    pool = pool_of(converted)
    with torch.no_grad():
        for tensor in pool.plan.shared:
            dense.get_parameter(tensor.name).copy_(shared_tensor(pool, tensor).dense())


def _set_forward(model: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give an instance a forward of its own, or take it away."""
    model.__dict__.pop("forward", None)
    model.__dict__.pop("_replicate_for_data_parallel", None)
    if forward is not None:
        model.__dict__["forward"] = forward
    if isinstance(forward, RootForward):
        model.__dict__["_replicate_for_data_parallel"] = forward.replicate


def refused_write(model: nn.Module, plan: RoastPlan, error: BaseException | None) -> str | None:
    """Return the name of the shared tensor that a model tried to write to, if that is what an error says."""
    if not isinstance(error, WriteRefused) or error.source is None:
        return None
    return next((tensor.name for tensor in plan.shared if error.source in list(owners(model, tensor))), None)


def _paths_to(path: str) -> Iterator[str]:
    parts = path.split(".") if path else []
    yield from (".".join(parts[:length]) for length in range(len(parts) + 1))


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.named_parameters(), None) is not None


def _fill_again(model: nn.Module) -> None:
    """Give modules that had no Parameters left their own classes again."""
    for module in model.modules():
        if isinstance(module, RoastModule) and not module._roast:
            to_dense(module, {})


def current_plan(model: nn.Module) -> RoastPlan:
    """Return the plan of a converted model with the dtypes that it has now.

    Raises:
        ConversionError: a layer on the pool, or a parameter, was replaced, added or removed since the conversion.
    """
    pool = pool_of(model)
    plan: RoastPlan = pool.plan
    found = dict(model.named_parameters(remove_duplicate=False))
    tensors = []
    for tensor in plan.tensors:
        if tensor.shared:
            views = [_on_pool(model, alias) for alias in tensor.aliases]
            changed = any(view is None or view.pool is not pool for view in views)
            dtype = None if views[0] is None else views[0].dtype
        else:
            parameters = [found.pop(alias, None) for alias in tensor.aliases]
            changed = any(parameter is None or tuple(parameter.shape) != tensor.shape for parameter in parameters)
            dtype = None if parameters[0] is None else parameters[0].dtype
        if changed:
            raise ConversionError(
                f"{tensor.name} was replaced or removed since the conversion, so the plan no longer describes the "
                f"model; go back with roastify.densify(model) and convert again"
            )
        tensors.append(dataclasses.replace(tensor, dtype=_dtype_name(dtype)))
    pools = {id(pool.weight), *map(id, pool.bases())}
    extra = [name for name, parameter in found.items() if id(parameter) not in pools]
    if extra:
        raise ConversionError(
            f"{extra[0]} was added since the conversion, so the plan does not describe it; go back with "
            f"roastify.densify(model) and convert again"
        )
    return dataclasses.replace(plan, tensors=tuple(tensors), dtype=_dtype_name(pool.weight.dtype))


def _on_pool(model: nn.Module, alias: str) -> SharedTensor | None:
    path, _, attribute = alias.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module._roast.get(attribute) if isinstance(module, RoastModule) else None


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def restore(model: nn.Module) -> None:
    """Turn a converted model back into a dense one, in place: original classes, names and ties."""
    pool = pool_of(model)
    plan: RoastPlan = pool.plan
    dense: list[tuple[RoastModule, str, nn.Parameter]] = []
    for tensor in plan.shared:
        # A layer that the user has replaced since is the user's.
        holders = [
            (module, name)
            for module, name in owners(model, tensor)
            if isinstance(module, RoastModule) and name in module._roast
        ]
        if holders:
            weight = holders[0][0]._roast[holders[0][1]].dense().detach()
            parameter = nn.Parameter(weight.contiguous(), requires_grad=pool.weight.requires_grad)
            dense += [(module, name, parameter) for module, name in holders]
    for module, name, parameter in dense:
        to_dense(module, {name: parameter})
    del model.get_submodule(plan.owner)._modules[POOL_NAME]
    # One that the user has put around it or in its place since is the user's.
    if isinstance(forward := model.__dict__.get("forward"), RootForward):
        _set_forward(model, forward.inner)
    forget_ties(model)
    _fill_again(model)

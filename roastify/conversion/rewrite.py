"""Applies a plan to a model, and restores the dense model; it decides nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import torch
from torch import nn

from roastify.conversion.adapters import base_of
from roastify.conversion.converted import owners, pool_of, pooled_weight, pools_of, readers_of, tensors_of_adapters
from roastify.conversion.fx_pass import computed_attributes
from roastify.conversion.peft_methods import replace_peft_methods, restore_peft_methods
from roastify.conversion.transformers_ties import forget_ties, remember_ties
from roastify.errors import ConversionError
from roastify.layers.base import RoastModule
from roastify.layers.class_swap import check_undone, state_of, to_dense, to_roast
from roastify.layers.kinds import retains_weight
from roastify.pool.forward_pass import RootForward, bound_to
from roastify.pool.members import POOL_NAME
from roastify.pool.plan import RoastPlan
from roastify.pool.pool import RoastPool
from roastify.pool.start_values import start_values

_M = TypeVar("_M", bound=nn.Module)


def copy_without(model: _M, left_out: set[int], *, shared: Collection[int] = ()) -> _M:
    """Deep-copy a model. In the copy, tensors whose ids are in `left_out` are meta tensors, without memory.

    The tensors whose ids are in `shared` are the model's own.

    Raises:
        ConversionError: the model holds an object that cannot be copied.
    """
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in left_out:
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        elif id(tensor) in shared:
            memo[id(tensor)] = tensor
    for tensor in computed_attributes(model):
        memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # an object's own `__deepcopy__` may raise any error
        raise ConversionError(
            f"the model cannot be deep-copied ({type(error).__name__}: {error}); pass inplace=True to convert the "
            f"model itself"
        ) from error


def build_pool(plan: RoastPlan, device: torch.device | str) -> RoastPool:
    """Return an uninitialised pool for a plan whose scales are known."""
    shared, unread_rows = plan.readings()
    pool = RoastPool(
        plan.num_slots,
        plan.tile,
        plan.maps(),
        shared,
        unread_rows=unread_rows,
        scales=plan.scale_energies(),
        bases=[(tensor.basis_shape, plan.basis_energy(tensor)) for tensor in plan.with_basis],
        starts=start_values(plan),
        dtype=getattr(torch, plan.dtype),
        device=device,
        trainable=plan.trainable,
        precondition=plan.precondition,
    )
    pool.plan = plan
    if plan.of_adapters:
        # The frozen layers around the adapters are no oversight.
        pool.meant = plan.trainable
    return pool


def apply_plan(model: nn.Module, plan: RoastPlan, pool: RoastPool) -> Callable[[], None]:
    """Move every module that the plan names onto the pool, and register the pool, in place.

    If an error is raised, the model is as it was before.

    Returns:
        a function that restores the dense model. While it exists, it keeps the dense Parameters in memory.
    """
    before: list[Callable[[], None]] = []
    owner, root = model.get_submodule(plan.owner), model.get_submodule(plan.root)
    own_forward = root.__dict__.get("forward")
    children = owner._modules

    def undo() -> None:
        owner.__dict__["_modules"] = children
        _set_forward(root, own_forward)
        forget_ties(model)
        restore_peft_methods(model)
        for restore in reversed(before):
            restore()

    try:
        remember_ties(model)
        pool.become_child_of(owner)
        retained, weights = [], []
        for tensor in plan.shared:
            shared = pooled_weight(pool, tensor)
            weights.append(shared)
            holders = list(owners(model, tensor))
            for module, attribute in holders:
                before.append(state_of(module))
                to_roast(module, attribute, shared)
            if any(retains_weight(cast(RoastModule, module), attribute, shared) for module, attribute in holders):
                retained.append(shared)
        pool.retain(retained)
        pool.weights = tuple(weights)
        _set_forward(root, RootForward(root, pool, own_forward))
        if plan.of_adapters:
            replace_peft_methods(model, _dense_copy)
    except BaseException:
        undo()
        raise
    return undo


def _dense_copy(model: _M) -> _M:
    """Return a dense copy of a model whose adapters lie in a pool, on the same base."""
    base = base_of(model, tensors_of_adapters(model, [pool.plan for pool in pools_of(model)]))
    dense = copy_without(model, set(), shared=set(map(id, base.values())))
    restore_dense(dense)
    return dense


def copy_weights(converted: nn.Module, dense: nn.Module) -> None:
    """Write a converted model's dense weights into the dense model that it was made from, one tensor at a time."""
    pool = pool_of(converted)
    with torch.no_grad():
        for tensor in pool.plan.shared:
            dense.get_parameter(tensor.name).copy_(pooled_weight(pool, tensor).dense())


def _set_forward(model: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Set an instance's own forward, or remove it if `forward` is None."""
    model.__dict__.pop("forward", None)
    model.__dict__.pop("_replicate_for_data_parallel", None)
    if forward is not None:
        model.__dict__["forward"] = forward
    if isinstance(forward, RootForward):
        model.__dict__["_replicate_for_data_parallel"] = forward.replicate


def restore_dense(model: nn.Module) -> None:
    """Turn a converted model back into a dense model, in place, with its original classes, names and ties.

    Layers are found where they are now: moved, renamed, wrapped, repeated, or in a model around the converted one.
    """
    pools = pools_of(model)
    dense: dict[RoastModule, dict[str, nn.Parameter]] = {}
    for pool in pools:
        for places in readers_of(model, pool):
            holders = list(dict.fromkeys((place.module, place.attribute) for place in places))
            for holder, _ in holders:
                check_undone(holder)
            if holders:
                weight = holders[0][0]._roast[holders[0][1]].dense().detach()
                parameter = nn.Parameter(weight.contiguous(), requires_grad=pool.weight.requires_grad)
                for module, name in holders:
                    dense.setdefault(module, {})[name] = parameter
    swaps = [to_dense(module, parameters) for module, parameters in dense.items()]

    def swap() -> None:
        for step in swaps:
            step()
        for each in list(model.modules()):
            if isinstance(each._modules.get(POOL_NAME), RoastPool):
                each.__dict__["_modules"] = {name: m for name, m in each._modules.items() if name != POOL_NAME}
            # A forward that the user has set since the conversion stays as it is.
            while (forward := bound_to(each)) is not None:
                _set_forward(each, forward.inner)
        forget_ties(model)
        restore_peft_methods(model)

    try:
        swap()
    except BaseException:
        # What was begun is finished: an interrupt leaves no model that is half dense.
        swap()
        raise

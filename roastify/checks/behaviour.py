"""Checks that a converted model can be copied, keeps its state in its state dict and gets gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from roastify.calls import run_model, split_inputs
from roastify.conversion.converted import find_pool
from roastify.errors import OutputMismatch
from roastify.kernels.torch_internals import pytree


def check_behaviour(original: nn.Module, converted: nn.Module, example_inputs: Any = None) -> tuple[str, ...]:
    """Return the names of the checks that a converted model passed; a check that the original fails too is left out.

    Raises:
        OutputMismatch: the model cannot be copied, a copy with the model's state dict returns other outputs, or no
            gradient reaches the pool although gradients reach the original's parameters.
    """
    pool = find_pool(converted)
    if pool is None:
        return ()
    passed = []
    twin = _copied_model(original, converted)
    if twin is not None:
        _scramble(twin)
        state = converted.state_dict()
        missing = twin.load_state_dict(state, strict=True)
        if missing.missing_keys or missing.unexpected_keys:
            raise OutputMismatch(f"a copy of the converted model does not load the model's own state dict: {missing}")
        passed += ["deepcopy", "state dict"]
    if example_inputs is None:
        return tuple(passed)
    args, kwargs = split_inputs(example_inputs)
    if twin is not None:
        expected = _tensors(run_model(converted, args, kwargs, "eval"))
        found = _tensors(run_model(twin, args, kwargs, "eval"))
        for place, (one, other) in enumerate(zip(expected, found, strict=True)):
            if not torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)):
                raise OutputMismatch(
                    f"a copy of the converted model with the same state dict returns another output {place} than the "
                    f"model itself; expected equal outputs, so some state is missing from the state dict"
                )
    if pool.weight.requires_grad and _takes_gradients(original, args, kwargs):
        if _gradients_reach(converted, args, kwargs, [pool.weight]):
            passed.append("gradients")
        elif _gradients_reach(original, args, kwargs, _shared(original, pool.plan)):
            raise OutputMismatch(
                "no gradient reaches the pool of the converted model in train mode, although gradients reach the "
                "original's parameters; look for code that reads a weight without gradients (no_grad, detach)"
            )
    return tuple(passed)


def _copied_model(original: nn.Module, converted: nn.Module) -> nn.Module | None:
    try:
        return copy.deepcopy(converted)
    except Exception as error:  # any object's own copying may fail in its own way
        try:
            copy.deepcopy(original)
        except Exception:  # as above
            return None
        raise OutputMismatch(
            f"the converted model cannot be deep-copied, but the original can: {type(error).__name__}: {error}"
        ) from error


def _scramble(model: nn.Module) -> None:
    """Change every stored value, so that a value that the state dict does not restore shows."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if isinstance(value, Tensor) and value.is_floating_point() and not key.endswith("_extra_state"):
                value.mul_(0.5).add_(0.25)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _takes_gradients(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for parameter in model.parameters():
        if parameter.requires_grad:
            return run_model(model, args, kwargs, "train", lambda output: _loss(output) is not None)
    return False


def _gradients_reach(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether any of these tensors gets a gradient that is not zero; behind a head that starts at zero, none does."""

    def differentiate(output: Any) -> bool:
        loss = _loss(output)
        if loss is None or not tensors:
            return False
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

    return run_model(model, args, kwargs, "train", differentiate)


def _shared(original: nn.Module, plan: Any) -> list[Tensor]:
    """Return the original's parameters whose weights are in the converted model's pool."""
    names = {tensor.name for tensor in plan.shared}
    return [parameter for name, parameter in original.named_parameters() if name in names and parameter.requires_grad]


def _loss(output: Any) -> Tensor | None:
    """Return a weighted sum of all differentiable outputs; None if there are none.

    Each element has another weight, because the plain sum of a normalisation layer's outputs is constant.
    """
    terms = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.numel():
            values = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            flat = values.reshape(-1).float()
            terms.append((flat * torch.linspace(-1.0, 1.5, flat.numel(), device=flat.device)).sum())
    return torch.stack(terms).sum() if terms else None

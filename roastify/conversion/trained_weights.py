"""Whether a model's own parameters show that it was trained, so that a start at random would throw training away."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from roastify.pool.plan import RoastPlan


def trained_norms(model: nn.Module, plan: RoastPlan) -> list[str]:
    """Return the names of norm layers by which a model that is to be shared has been trained; mostly there are none.

    A norm layer starts with one number for all its weights and another for all its biases, and a batch norm with means
    of zero; only training makes these differ. Linear layers start at random and do not tell. So a model without norm
    layers never counts as trained, nor one most of whose norm layers are as they were made. A norm layer counts if its
    parent module holds a shared tensor. A frozen one does not, if other parameters are trained: adapters, a new head.
    """
    if plan.of_adapters:
        return []
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    names = [tensor.name.split(".") for tensor in plan.shared]
    parents = {".".join(name[:length]) for name in names for length in range(len(name))}
    norms = [
        (name, norm)
        for name, norm, weight in _norms(model)
        if name.rpartition(".")[0] in parents and (frozen or weight.requires_grad)
    ]
    found = [name for name, norm in norms if _is_trained(norm)]
    return found if 2 * len(found) > len(norms) else []


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield torch's norm layers and those of libraries: they have such a name, and a weight for each feature."""
    for name, module in model.named_modules():
        # A property of this name may do anything.
        weight = module._parameters.get("weight")
        if "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1:
            yield name, module, weight


def _is_trained(norm: nn.Module) -> bool:
    mean = norm._buffers.get("running_mean")
    if mean is not None and not bool(mean.any()):
        return False
    values = (norm._parameters.get(name) for name in ("weight", "bias"))
    return all(_differ(each) for each in values if each is not None)


def _differ(values: Tensor) -> bool:
    return values.numel() > 1 and bool((values.detach() != values.detach().flatten()[0]).any())

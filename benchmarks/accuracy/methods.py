"""Every method by its name: what it makes of the dense model, and how many parameters that stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import roastify
from benchmarks.accuracy import nets, pruning, rivals
from benchmarks.accuracy.budget import UnreachableError
from benchmarks.accuracy.runs import MODEL_CHANGES, RECIPE_CHANGES, Run
from benchmarks.accuracy.tasks import Task
from roastify.config import RoastConfig
from roastify.errors import PlanError

SETTINGS = {field.name for field in dataclasses.fields(RoastConfig)} - {"ratio", "seed"}


@dataclass(frozen=True)
class Method:
    """One way to store fewer parameters.

    Args:
        title: for the tables.
        kind: `dense`, `ours`, `variant` (ours with a setting changed), `hash` (other ways to share by hashing) or
            `other`.
        settings: of the conversion, if it is one.
        rates: factors of the task's first learning rate to try instead of the task's grid; with SGD only.
    """

    title: str
    kind: str
    settings: tuple[tuple[str, object], ...] = ()
    rates: tuple[float, ...] = ()

    @property
    def converts(self) -> bool:
        """Whether it is a conversion of roastify."""
        return self.kind in ("ours", "variant", "hash")


def _shared(title: str, kind: str = "hash", **settings: object) -> Method:
    return Method(title, kind, tuple(settings.items()))


METHODS = {
    "dense": Method("dense", "dense"),
    "ours": Method("roastify", "ours"),
    "smaller": Method("smaller dense model", "other"),
    # Two factors make a step's effect on their product larger.
    "lowrank": Method("low rank", "other", rates=(2.5, 1.0, 0.25, 0.05)),
    "random": Method("pruned at random", "other"),
    "magnitude": Method("pruned by magnitude", "other"),
    "snip": Method("pruned by SNIP", "other"),
    "local": _shared("roastify, a pool for each tensor", "variant", sharing="local"),
    # A gradient that is not divided by Γ is about as many times larger as a pool element has readers.
    "plain": Method("roastify, no preconditioner", "variant", (("precondition", False),), (2.5, 1.0, 0.25, 0.05)),
    "whole": _shared("roastify, kernels without a basis", "variant", kernel_basis="none"),
    "elementwise": _shared("element-wise hashing, global", mapping="hashednet", kernel_basis="none"),
    "hashednet": _shared("HashedNet (element-wise, local)", mapping="hashednet", sharing="local", kernel_basis="none"),
    "roast": _shared("ROAST's unaligned tiles", mapping="roast", tile="16x16", sign="tile", kernel_basis="none"),
    "cyclic": _shared("STABLE-RPS's rotations", mapping="cyclic", kernel_basis="none"),
}


@dataclass
class Built:
    """A model ready to train, and what it stores."""

    model: nn.Module
    stored: int
    note: str = ""


def target(task: Task, ratio: float) -> int:
    """Return how many parameters may be stored: the same for every method."""
    with torch.device("meta"):
        total = nets.size(nets.dense_net(task))
    return int(total / ratio)


def build(
    run: Run, task: Task, device: str, batch: pruning.Batches, start: Mapping[str, Tensor] | None = None
) -> Built:
    """Return a run's model on the device, its initial values drawn from the run's seed.

    Args:
        run: the run.
        task: its task.
        device: where it will train.
        batch: gives training examples as the model takes them, for methods that look at the data first.
        start: the state dict of a trained dense model, instead of the initial values.

    Raises:
        UnreachableError: the method cannot store so few parameters.
    """
    torch.manual_seed(run.seed)
    allowed = target(task, run.ratio)
    if run.method == "smaller":
        if task.is_image:
            model = rivals.smaller_image_net(task, allowed)
        else:
            model = rivals.smaller_text_net(task, allowed, run.change("width"))
        return Built(model.to(device), nets.size(model), _sizes(model))
    model = nets.dense_net(task)
    if start is not None:
        model.load_state_dict(start)
    model = with_changes(model, run)
    if run.method == "lowrank":
        rivals.low_rank(model, allowed)
    elif run.method in pruning.SCORES:
        model.to(device)
        stored = pruning.prune(model, allowed, pruning.SCORES[run.method](model, batch, run.seed))
        return Built(model, stored, "the mask is not counted")
    elif METHODS[run.method].converts:
        return _converted(model, run, device)
    return Built(model.to(device), nets.size(model))


def conversion(run: Run) -> RoastConfig:
    """Return the settings of a run's conversion."""
    changes = {name: value for name, value in run.changes if name in SETTINGS}
    if run.change("warm"):
        changes = {"init": "project", **changes}
    return RoastConfig(seed=run.seed, **{**dict(METHODS[run.method].settings), **changes})


def _converted(model: nn.Module, run: Run, device: str) -> Built:
    try:
        model = roastify.convert(model, run.ratio, config=conversion(run), inplace=True)
    except PlanError as error:
        raise UnreachableError(str(error)) from error
    plan = model.roast_pool.plan
    note = f"{plan.num_slots} slots of {plan.tile[0]}×{plan.tile[1]}, sign {plan.sign}, share {plan.share}"
    return Built(model.to(device), nets.size(model), note)


def _sizes(model: nn.Module) -> str:
    tables = [f"{module.num_embeddings} words" for module in model.modules()
              if isinstance(module, nn.Embedding)][:1]  # fmt: skip
    widths = [str(module.out_channels) for module in model.modules() if isinstance(module, nn.Conv2d)]
    inner = [f"width {module.normalized_shape[0]}" for module in model.modules() if isinstance(module, nn.LayerNorm)]
    return ", ".join(tables + inner[:1]) or "widths " + "-".join(dict.fromkeys(widths))


def check_changes(run: Run) -> None:
    """Raise `ValueError` for a change that nothing would read, and for distillation by values without a meaning."""
    unknown = {name for name, _ in run.changes} - SETTINGS - set(RECIPE_CHANGES) - set(MODEL_CHANGES)
    if unknown:
        raise ValueError(f"{run}: nothing reads {', '.join(sorted(unknown))}")
    share, temperature = run.change("distill"), run.change("temperature")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"{run}: distill is the teacher's share of the loss, above 0 and at most 1, not {share}")
    if temperature is not None and share is None:
        raise ValueError(f"{run}: temperature is that of distillation; add distill, or leave it out")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"{run}: temperature divides logits, so it must be above 0, not {temperature}")
    if run.change("warm") and run.method == "smaller":
        raise ValueError(f"{run}: a smaller model has no use for the dense model's weights")


class RowScales(nn.Module):
    """A linear layer followed by a learned factor for each of its outputs."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.scales = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scales


def with_changes(model: nn.Module, run: Run) -> nn.Module:
    """Apply what a run changes about the dense model before anything is made of it.

    `spread` multiplies the initial weights of all matrices; `tied_spread` gives all the same spread, so that every λ is
    1; `row_scales` puts a learned factor on each output of every linear layer but the head.
    """
    with torch.no_grad():
        weights = list(pruning.prunable(model).values())
        if run.change("spread"):
            for weight in weights:
                weight.mul_(run.change("spread"))
        if run.change("tied_spread"):
            total = sum(weight.numel() for weight in weights)
            common = (sum(weight.numel() * weight.var() for weight in weights) / total).sqrt()
            for weight in weights:
                weight.mul_(common / weight.std())
    if run.change("row_scales"):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "head":
                model.set_submodule(name, RowScales(module))
    return model

"""Every method by its name: what it makes of the dense decoder, what that stores, and how much it multiplies."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import roastify
from benchmarks.accuracy import nets
from benchmarks.accuracy.budget import UnreachableError
from benchmarks.accuracy.language.decoder import Decoder, Shape
from benchmarks.accuracy.language.factors import factor
from benchmarks.accuracy.language.runs import Recipe, Run
from benchmarks.accuracy.language.sizes import RULES, Sizes
from roastify.config import RoastConfig
from roastify.errors import PlanError

# Above a fold of 8 the prototype lost accuracy; below it, arithmetic.
MOST_FOLD = 8


@dataclass(frozen=True)
class Method:
    """One way to store fewer parameters.

    Args:
        title: for the tables.
        is_ours: whether it is a conversion.
        folds: whether that folds every linear layer, as often as `fold_at` says.
        learned_scales: whether folds learn scales.
    """

    title: str
    is_ours: bool = False
    folds: bool = False
    learned_scales: bool = False


METHODS = {
    "dense": Method("dense"),
    "scaled": Method("roastify, folded with learned scales", True, True, True),
    "folded": Method("roastify, folded", True, True),
    "global": Method("roastify, not folded", True),
    "smaller": Method("smaller dense model"),
    "lowrank": Method("low rank"),
    "monarch": Method("Monarch"),
    "tied": Method("tied layers"),
}


def fold_at(ratio: float) -> int | str:
    """Return the largest fold, a power of two, that a ratio allows: the default folds only layers of a million weights.

    A fold may not exceed the ratio, or a layer would read fewer numbers than the pool has for it.
    """
    fold = 1 << int(math.log2(min(ratio, MOST_FOLD)))
    return fold if fold > 1 else "none"


@dataclass
class Built:
    """A model ready to train.

    Args:
        model: on the device.
        stored: parameters.
        products: multiply-adds of its matrix products, for a token; attention's own are left out.
        note: its sizes.
    """

    model: nn.Module
    stored: int
    products: int
    note: str


def target(recipe: Recipe, ratio: float) -> int:
    """Return how many parameters may be stored: the same for every method."""
    return int(recipe.shape.size / ratio)


def sizes_of(run: Run, recipe: Recipe) -> Sizes:
    """Return a rival's sizes.

    Raises:
        UnreachableError: its rule finds none that store so many.
    """
    assert run.sizes is not None, "a rival is built when its sizes are chosen"
    return RULES[run.method][run.sizes](recipe.shape, target(recipe, run.ratio))


def reachable(method: str, ratio: float, recipe: Recipe) -> list[str]:
    """Return the names of a method's rules that find sizes at a ratio; [""] for a method without rules.

    Raises:
        UnreachableError: none does.
    """
    return [name for name, _ in _found(method, ratio, recipe)]


def candidates(method: str, ratio: float, recipe: Recipe) -> list[str]:
    """Return the names of the rules among which a method chooses at a ratio: of equal sizes the first.

    Raises:
        UnreachableError: no rule finds sizes.
    """
    first: dict[Sizes | None, str] = {}
    for name, sizes in _found(method, ratio, recipe):
        first.setdefault(sizes, name)
    return list(first.values())


def _found(method: str, ratio: float, recipe: Recipe) -> list[tuple[str, Sizes | None]]:
    if method not in RULES:
        return [("", None)]
    found: list[tuple[str, Sizes | None]] = []
    reasons = []
    for name, rule in RULES[method].items():
        try:
            found.append((name, rule(recipe.shape, target(recipe, ratio))))
        except UnreachableError as error:
            reasons.append(f"{name}: {error}")
    if not found:
        raise UnreachableError("; ".join(reasons))
    return found


def conversion(run: Run) -> RoastConfig:
    """Return the settings of a run's conversion."""
    method = METHODS[run.method]
    settings: dict[str, Any] = {"fold": fold_at(run.ratio) if method.folds else "none"}
    settings["learned_scales"] = method.learned_scales
    return RoastConfig(seed=run.seed, **{**settings, **dict(run.changes)})


def build(run: Run, recipe: Recipe, device: str) -> Built:
    """Return a run's model on the device, its initial values drawn from the run's seed.

    Raises:
        UnreachableError: the method cannot store so few parameters.
    """
    torch.manual_seed(run.seed)
    if METHODS[run.method].is_ours:
        return _converted(run, recipe, device)
    sizes: Sizes = recipe.shape if run.method == "dense" else sizes_of(run, recipe)
    if isinstance(sizes, Shape):
        model: nn.Module = Decoder(sizes, recipe.context)
    else:
        # On the device: low rank begins with an eigenvalue decomposition of every layer.
        model = factor(Decoder(sizes.shape, recipe.context).to(device), sizes)
    stored = nets.size(model)
    assert stored == sizes.size, f"{stored:,} parameters, and the sizes say {sizes.size:,}"
    return Built(model.to(device), stored, sizes.products, str(sizes))


def _converted(run: Run, recipe: Recipe, device: str) -> Built:
    model: nn.Module = Decoder(recipe.shape, recipe.context)
    try:
        model = roastify.convert(model, run.ratio, config=conversion(run), inplace=True)
    except PlanError as error:
        raise UnreachableError(str(error)) from error
    plan = model.roast_pool.plan
    folds = sorted({(fold.cols, fold.fold, fold.hashes) for fold in plan.folds})
    folded = [f"{cols} inputs folded {fold} times, {hashes} hashes" for cols, fold, hashes in folds]
    note = [f"{plan.num_slots} slots of {plan.tile[0]}×{plan.tile[1]}, sign {plan.sign}, share {plan.share}", *folded]
    # A folded product's multiply-adds are those of its narrow matrix.
    products = recipe.shape.products - plan.folded_numel + plan.multiplied_numel
    return Built(model.to(device), nets.size(model), products, "; ".join(note))


def check(run: Run) -> None:
    """Raise `ValueError` for a change that nothing would read."""
    if run.changes and not METHODS[run.method].is_ours:
        raise ValueError(f"{run}: only conversions have settings to change")
    settings = {field.name for field in dataclasses.fields(RoastConfig)} - {"ratio", "seed"}
    unknown = {name for name, _ in run.changes} - settings
    if unknown:
        raise ValueError(f"{run}: nothing reads {', '.join(sorted(unknown))}")

"""The aims of the accuracy measurement, and whether each is met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.table import Table, Variant
from benchmarks.accuracy.tasks import TASKS
from benchmarks.stats import Difference, half_width, sign_flip_p

SEEDS = 3
# What the aims are judged for as well: longer training of images, and a teacher beside labels.
IMAGE_VARIANTS = (Variant(96, None), Variant(24, 0.9), Variant(96, 0.9))
TEXT_VARIANT = Variant(None, 0.9)


@dataclass(frozen=True)
class Verdict:
    """One aim: what was to be shown, what was found, and whether that meets it (None: too few runs)."""

    aim: str
    found: str
    met: bool | None

    def wanted(self, task: str) -> bool:
        """Whether it is shown: an aim of the claim always, another net's where it was measured."""
        return task == "resnet9" or self.met is not None

    @property
    def text(self) -> str:
        return {True: "met", False: "**missed**", None: "not measured"}[self.met]


def not_hashed(method: str) -> bool:
    return METHODS[method].kind == "other"


def verdicts(table: Table) -> list[Verdict]:
    """Return every aim in turn."""
    # STABLE-RPS's nets join where they were trained; what is claimed of images is claimed of ResNet-9.
    others = (task for task in table.tasks() if task in ("vgg11", "resnet20"))
    images = (verdict for task in ("resnet9", *others) for verdict in _images(table, task) if verdict.wanted(task))
    longer = (_images(Table(table.rows, variant), "resnet9", variant) for variant in IMAGE_VARIANTS)
    taught = _text(Table(table.rows, TEXT_VARIANT), TEXT_VARIANT)
    return [
        *images,
        *(verdict for found in longer for verdict in _begun(found)),
        *_text(table),
        *_begun(taught),
        _sharing(table),
        _preconditioner(table),
    ]


def _begun(variant: Iterable[Verdict]) -> list[Verdict]:
    """Return a variant's aims if it was begun, those that nothing was found of as well."""
    found = list(variant)
    return found if any(each.met is not None for each in found) else []


def _judge(aim: str, difference: Difference | None, test: Callable[[float], bool], what: str) -> Verdict:
    if difference is None:
        return Verdict(aim, "–", None)
    few = "" if difference.degrees + 1 >= SEEDS else f", of {difference.degrees + 1} of {SEEDS} seeds"
    return Verdict(aim, f"{difference} points {what}{few}", test(difference.mean))


def _images(table: Table, task: str, variant: Variant | None = None) -> Iterator[Verdict]:
    title, to_dense = _names(task, variant)
    for ratio, allowed in ((10.0, 1.0), (100.0, 5.0)):
        difference = table.difference(task, ratio, "ours", "dense", 1.0)
        aim = f"{title}: ratio {ratio:g} within {allowed:g} {'point' if allowed == 1 else 'points'} of dense"
        yield _judge(aim, difference, lambda mean, allowed=allowed: mean >= -allowed, to_dense)
    aim = f"{title}: ratio 100 at least 3 points above the best rival that does not hash"
    best = table.best(task, 100.0, not_hashed)
    difference = table.difference(task, 100.0, "ours", best[0], 100.0) if best else None
    yield _judge(aim, difference, lambda mean: mean >= 3, f"to {METHODS[best[0]].title}" if best else "")
    if variant is not None:
        return
    aim = f"{title}: ratio 1 equals dense (the 95 % interval of the difference holds 0)"
    difference = table.difference(task, 1.0, "ours", "dense", 1.0)
    if difference is None or difference.degrees < 1:
        yield Verdict(aim, "–" if difference is None else f"{difference} points, one seed", None)
    else:
        half = half_width(difference.error, difference.degrees)
        yield _judge(aim, difference, lambda mean: abs(mean) <= half, "to dense")


def _names(task: str, variant: Variant | None) -> tuple[str, str]:
    """Return a task's title, and what its dense model is called, in a variant."""
    title = TASKS[task].title if variant is None else f"{TASKS[task].title}, {variant}"
    return title, "to dense" if variant is None or variant.distill is None else "to dense, on labels alone"


def _text(table: Table, variant: Variant | None = None) -> Iterator[Verdict]:
    task = "imdb"
    title, to_dense = _names(task, variant)
    difference = table.difference(task, 10.0, "ours", "dense", 1.0)
    yield _judge(f"{title}: ratio 10 no worse than dense", difference, lambda mean: mean >= 0, to_dense)
    difference = table.difference(task, 100.0, "ours", "dense", 1.0)
    aim = f"{title}: ratio 100 within 1.5 points of dense"
    yield _judge(aim, difference, lambda mean: mean >= -1.5, to_dense)
    difference = table.difference(task, 100.0, "ours", "smaller", 100.0)
    aim = f"{title}: ratio 100 not below the smaller dense model"
    yield _judge(aim, difference, lambda mean: mean >= 0, f"to the {METHODS['smaller'].title}")


def _sharing(table: Table) -> Verdict:
    return _everywhere(table, "one pool for all tensors above a pool for each at every ratio from 10", "local", 10.0)


def _preconditioner(table: Table) -> Verdict:
    return _everywhere(table, "with the preconditioner above without at every ratio measured", "plain", 1.0)


def _everywhere(table: Table, aim: str, other: str, least_ratio: float) -> Verdict:
    pairs = table.pairs("ours", other, least_ratio)
    if not pairs:
        return Verdict(aim, "–", None)
    below = [f"{TASKS[task].title} at ratio {ratio:g}" for (task, ratio), values in pairs.items() if sum(values) <= 0]
    flat = [value for values in pairs.values() for value in values]
    found = f"{sum(flat) / len(flat):+.2f} points, p = {sign_flip_p(flat):.2g} over {len(flat)} pairs"
    return Verdict(aim, found + (f"; not above: {', '.join(below)}" if below else ""), not below)

"""Named groups of runs, each in the order of importance: what is cut off at the end is missed least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.runs import Run, asked_of_row
from benchmarks.accuracy.table import RESULTS
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.trials import trials
from benchmarks.rows import load

RATIOS = (10.0, 100.0, 30.0, 3.0, 300.0, 1.0)
SEEDS = range(3)


def _seeds(task: str, cells: Sequence[tuple[str, float]]) -> Iterator[Run]:
    """All cells with one seed, then with the next: a result that is cut off still has whole comparisons."""
    for seed, (method, ratio) in itertools.product(SEEDS, cells):
        yield Run(task, method, ratio, seed)


def main() -> Iterator[Run]:
    """What the claims are about: dense, ours and its closest rivals at ratios 10 and 100, images and text."""
    cells = [("dense", 1.0), ("ours", 10.0), ("ours", 100.0), ("smaller", 100.0), ("smaller", 10.0)]
    for pair in zip(_seeds("resnet9", cells), _seeds("imdb", cells), strict=True):
        yield from pair
    alone = [("local", 100.0), ("local", 10.0), ("plain", 100.0), ("plain", 10.0)]
    yield from _seeds("resnet9", [*alone, ("ours", 1.0)])
    yield from _seeds("resnet9", [("snip", 100.0), ("lowrank", 100.0), ("magnitude", 100.0), ("random", 100.0)])
    yield from _seeds("imdb", alone)


def grid() -> Iterator[Run]:
    """Every method at every ratio on ResNet-9."""
    yield from _grid("resnet9")


def text() -> Iterator[Run]:
    """Every method at every ratio on IMDB."""
    yield from _grid("imdb")


def _grid(task: str) -> Iterator[Run]:
    # Nothing in the text model has kernels.
    left_out = {"dense"} if TASKS[task].is_image else {"dense", "whole"}
    others = [method for method in METHODS if method not in left_out]
    for seed in SEEDS:
        yield Run(task, "dense", 1.0, seed)
        for ratio, method in itertools.product(RATIOS, others):
            # At ratio 1 every rival but the hashed ones is the dense model, and no kernel of ours has a basis.
            if ratio > 1 or (METHODS[method].converts and method != "whole"):
                yield Run(task, method, ratio, seed)


def nets() -> Iterator[Run]:
    """STABLE-RPS's nets: dense, ours, a smaller one and SNIP."""
    for task in ("vgg11", "resnet20"):
        ratios = (10.0, 100.0) if task == "vgg11" else (3.0, 10.0)
        yield from _seeds(task, [("dense", 1.0), *itertools.product(("ours", "smaller", "snip"), ratios)])


def distillation() -> Iterator[Run]:
    """Learning from the dense model beside labels: every method, on images at two lengths."""
    cells = [(method, ratio) for ratio in (100.0, 10.0) for method in ("ours", "smaller", "magnitude")]
    for seed, count, (method, ratio) in itertools.product(SEEDS, (24, 96), [*cells, ("dense", 1.0)]):
        yield Run("resnet9", method, ratio, seed, epochs=count, changes=(("distill", 0.9),))
    for seed, ratio, method in itertools.product(SEEDS, (10.0, 100.0), ("ours", "smaller", "lowrank")):
        yield Run("imdb", method, ratio, seed, changes=(("distill", 0.9),))


def folding() -> Iterator[Run]:
    """Every linear layer of the text model folded as often as its ratio allows; by default none is large enough."""
    for seed, ratio in itertools.product(SEEDS, RATIOS[:-1]):
        yield Run("imdb", "ours", ratio, seed, changes=(("fold", 8 if ratio >= 8 else 2),))


def convolutions() -> Iterator[Run]:
    """Every convolution of ResNet-9 folded; by default none has enough channels."""
    for seed, (ratio, fold) in itertools.product(SEEDS, ((10.0, 4), (100.0, 8))):
        yield Run("resnet9", "ours", ratio, seed, changes=(("fold", fold),))


def experiments() -> Iterator[Run]:
    """Every run that has a committed row and is in no other group: how the recipe was chosen, and what else was tried.

    Trials of the step size are not among them: runs that wait for trials bring their own.
    """
    asked = dict.fromkeys(asked_of_row(row) for row in load(RESULTS)["rows"])
    others = {run for group in _NAMED for run in group()}
    waiting = [run for run in (*others, *asked) if run.rate is None]
    others |= {trial for run in waiting for trial in trials(run, TASKS[run.task])}
    yield from (run for run in asked if run not in others)


_NAMED: tuple[Callable[[], Iterator[Run]], ...] = (main, grid, text, nets, distillation, folding, convolutions)
GROUPS = {function.__name__: function for function in (*_NAMED, experiments)}

"""Named groups of runs, each in the order of importance: what is cut off at the end is missed least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.runs import Run
from benchmarks.accuracy.tasks import TASKS

RATIOS = (10.0, 100.0, 30.0, 3.0, 300.0, 1.0)
SEEDS = range(3)
# Rate and epochs of the recipe's experiments: what the trials chose, shorter.
HELD_OUT = {
    ("resnet9", "ours"): (1.0, 12), ("resnet9", "whole"): (1.0, 12), ("resnet9", "dense"): (0.4, 12),
    ("imdb", "ours"): (5e-4, 4),
}  # fmt: skip
# Most of the recipe was chosen before kernels had a basis.
CHOSEN_WITH = {"resnet9": "whole", "imdb": "ours"}
NOT_HASHED = ("smaller", "snip", "lowrank", "magnitude", "random")


def _seeds(task: str, cells: Sequence[tuple[str, float]]) -> Iterator[Run]:
    """All cells with one seed, then with the next: a result that is cut off still has whole comparisons."""
    for seed, (method, ratio) in itertools.product(SEEDS, cells):
        yield Run(task, method, ratio, seed)


def main() -> Iterator[Run]:
    """What the claims are about: dense, ours and its closest rivals at ratios 10 and 100, images and text."""
    images = [("dense", 1.0), ("ours", 10.0), ("ours", 100.0), ("smaller", 100.0), ("smaller", 10.0)]
    text = [("dense", 1.0), ("ours", 10.0), ("ours", 100.0), ("smaller", 100.0), ("smaller", 10.0)]
    for first, second in itertools.zip_longest(_seeds("resnet9", images), _seeds("imdb", text)):
        yield from (run for run in (first, second) if run)
    yield from _seeds("resnet9", [("local", 100.0), ("local", 10.0), ("plain", 100.0), ("plain", 10.0), ("ours", 1.0)])
    yield from _seeds("resnet9", [("snip", 100.0), ("lowrank", 100.0), ("magnitude", 100.0), ("random", 100.0)])
    yield from _seeds("imdb", [("local", 100.0), ("local", 10.0), ("plain", 100.0), ("plain", 10.0)])


def sharing() -> Iterator[Run]:
    """One pool for all against a region for each tensor, at every ratio from 10."""
    for task in ("resnet9", "imdb"):
        yield from _seeds(task, list(itertools.product(("ours", "local"), (10.0, 100.0, 30.0, 300.0))))


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
            if ratio > 1 or (METHODS[method].kind in ("ours", "hash") and method != "whole"):
                yield Run(task, method, ratio, seed)


def nets() -> Iterator[Run]:
    """STABLE-RPS's nets: dense, ours, a smaller one and SNIP."""
    for task in ("vgg11", "resnet20"):
        ratios = (10.0, 100.0) if task == "vgg11" else (3.0, 10.0)
        yield from _seeds(task, [("dense", 1.0), *itertools.product(("ours", "smaller", "snip"), ratios)])


def _vary(task: str, ratios: Sequence[float], *changes: dict[str, Any], method: str | None = None) -> Iterator[Run]:
    """Each change by itself, and none; judged on held-out examples, since the recipe is chosen by them."""
    method = method or CHOSEN_WITH[task]
    rate, epochs = HELD_OUT[task, method]
    for change, ratio in itertools.product(({}, *changes), ratios):
        yield Run(task, method, ratio, 0, rate, epochs, True, tuple(sorted(change.items())))


def rates() -> Iterator[Run]:
    """Learning rate against ratio, judged on held-out examples; of the closest rivals at their full length too."""
    for rate, ratio in itertools.product((2.0, 1.0, 4.0, 0.4), (100.0, 10.0, 300.0, 30.0)):
        yield Run("resnet9", CHOSEN_WITH["resnet9"], ratio, 0, rate, 24, True)
    for rate, ratio in itertools.product((5e-4, 1e-3, 2e-3, 4e-3), (100.0, 10.0)):
        yield Run("imdb", "ours", ratio, 0, rate, 4, True)
    cells = [("dense", 1.0), *itertools.product(("ours", "smaller", "magnitude"), (100.0, 10.0))]
    for (method, ratio), rate in itertools.product(cells, (0.2, 0.4, 1.0, 2.0)):
        yield Run("resnet9", method, ratio, 0, rate, 24, True)


def epochs() -> Iterator[Run]:
    """Longer training: dense, ours and the closest rivals."""
    cells = [(method, ratio) for ratio in (100.0, 10.0) for method in ("ours", "smaller", "magnitude")]
    for count, (method, ratio) in itertools.product((96, 48, 12), [*cells, ("dense", 1.0)]):
        yield Run("resnet9", method, ratio, 0, epochs=count)
    for seed, (method, ratio) in itertools.product(SEEDS[1:], [*cells, ("dense", 1.0)]):
        yield Run("resnet9", method, ratio, seed, epochs=96)
    for count, (method, ratio) in itertools.product(
        (4, 8, 16, 2, 1), (("ours", 100.0), ("ours", 10.0), ("dense", 1.0))
    ):
        yield Run("imdb", method, ratio, 0, epochs=count)


def pool() -> Iterator[Run]:
    """λ and the pool's initialisation; the pool's own step size, which is its scale under Adam."""
    changes = [{"tied_spread": True}, {"init": "project"}, {"spread": 0.5}, {"spread": 2.0}]
    yield from _vary("resnet9", (100.0, 10.0), *changes)
    yield from _vary("imdb", (100.0, 10.0), *changes, {"pool_rate": 0.3}, {"pool_rate": 3.0}, {"pool_rate": 10.0})


def decay() -> Iterator[Run]:
    """Weight decay."""
    yield from _vary("resnet9", (100.0, 10.0), *({"decay": value} for value in (2e-4, 1e-3, 0.0)))
    yield from _vary("imdb", (100.0, 10.0), *({"decay": value} for value in (0.0, 0.1)))


def signs() -> Iterator[Run]:
    """The sign's granularity."""
    changes = [{"sign": sign} for sign in ("element", "row", "tile", "none")]
    yield from _vary("resnet9", (10.0, 100.0), *changes)
    yield from _vary("imdb", (10.0, 100.0), *changes)


def tiles() -> Iterator[Run]:
    """The tile's size in small pools, and in large ones with a sign for each element."""
    sides = [{"tile": f"{side}x{side}"} for side in (16, 8, 64)]
    yield from _vary("resnet9", (300.0,), *sides[:2])
    yield from _vary("resnet9", (100.0,), *sides, {"mapping": "hashednet"})
    yield from _vary("resnet9", (10.0,), *({**change, "sign": "element"} for change in ({"tile": "32x32"}, *sides[:2])))
    yield from _vary("imdb", (100.0,), *sides)


def text_tiles() -> Iterator[Run]:
    """Tile, sign and what else may help on text, at the lengths and rates that suit each ratio; three seeds."""
    unchanged: dict[str, Any] = {}
    coarse, fine, finest = ({"tile": f"{side}x{side}"} for side in (32, 16, 8))
    by_element, by_tile = {"sign": "element"}, {"sign": "tile"}
    tiles = [unchanged, coarse, fine, finest, {**fine, **by_element}]
    others = [{"row_scales": True}, {"init": "project"}]
    cells: list[tuple[float, float, int, Sequence[dict[str, Any]]]] = [
        (100.0, 2e-3, 4, [*tiles, {**finest, **by_element}, {**coarse, **by_element}, {**fine, **by_tile}]),
        (300.0, 2e-3, 4, [unchanged, fine, finest, {**fine, **by_element}, {**finest, **by_element}, *others]),
        (10.0, 2e-3, 2, tiles),
        (100.0, 2e-3, 4, [*others, {"share": "all"}]),
        (100.0, 5e-4, 8, [unchanged, finest, {**fine, **by_element}]),
        (30.0, 2e-3, 2, tiles),
        (10.0, 5e-4, 2, tiles),
        # Where signs could go by row or element.
        (10.0, 2e-3, 2, [by_element]),
        (10.0, 5e-4, 2, [by_element]),
        (15.0, 2e-3, 2, [unchanged, by_element]),
        (30.0, 2e-3, 2, [{**coarse, **by_element}]),
    ]
    for seed, (ratio, rate, epochs, changes) in itertools.product(SEEDS, cells):
        for change in changes:
            yield Run("imdb", "ours", ratio, seed, rate, epochs, True, tuple(sorted(change.items())))
    for seed in SEEDS:
        yield Run("imdb", "ours", 10.0, seed, changes=(("sign", "element"),))


def kept() -> Iterator[Run]:
    """What is worth keeping dense."""
    everything = {"share": "all"}, {"share": "weights"}
    ends = {"exclude": ("prepare", "head")}, {"exclude": "prepare"}, {"exclude": "head"}
    small = ({"share": "weights", "tile": tile} for tile in ("16x16", "8x8"))
    yield from _vary("resnet9", (500.0, 1000.0), *reversed(everything))
    yield from _vary("resnet9", (300.0,), *reversed(everything), *small)
    yield from _vary("imdb", (300.0, 1000.0), *everything)
    yield from _vary("resnet9", (100.0, 10.0), *ends, *everything)
    inside = {"exclude": "head"}, {"exclude": "positions"}, {"row_scales": True}
    yield from _vary("imdb", (100.0, 10.0), *everything, *inside)


def data() -> Iterator[Run]:
    """Augmentation and smoothed labels, dense and ours."""
    for method, ratios in ((CHOSEN_WITH["resnet9"], (100.0, 10.0)), ("dense", (1.0,))):
        yield from _vary("resnet9", ratios, {"cutout": 8}, {"smoothing": 0.1}, method=method)


def basis() -> Iterator[Run]:
    """How many basis kernels a 3×3 convolution's kernels are made of, and the sign and the tile that go with few."""
    rate, epochs = HELD_OUT["resnet9", "ours"]
    counts = [{"kernel_basis": count} for count in (6, 3, 4, 2, 5, 8)]
    # With few slots, counts were compared with the sign that such pools had.
    few = [{**count, "sign": "element"} for count in counts]
    signs = [{"kernel_basis": 3, "sign": "row"}, {"kernel_basis": 3, "tile": "16x16"}]
    cells = [
        *((ratio, changes) for changes in ({}, *few) for ratio in (100.0, 300.0, 30.0)),
        *((10.0, changes) for changes in ({}, *counts[1:])),
        *((ratio, {"kernel_basis": "none"}) for ratio in (100.0, 300.0, 30.0, 10.0)),
        *((ratio, changes) for changes in signs for ratio in (100.0, 300.0)),
    ]
    for seed, (ratio, changes) in itertools.product(SEEDS, cells):
        yield Run("resnet9", "ours", ratio, seed, rate, epochs, True, tuple(sorted(changes.items())))


def small_bases() -> Iterator[Run]:
    """What else there is to choose where basis kernels are few: decay, rate, a dense head; other nets' sign."""
    element, row = ({"kernel_basis": 3, "sign": sign} for sign in ("element", "row"))
    head, ends = {"exclude": "head"}, {"exclude": ("prepare", "head")}
    high, low = (100.0, 300.0), (10.0,)
    cells: list[tuple[str, dict[str, Any], float, Sequence[float]]] = [
        *(("resnet9", {**element, "decay": decay}, 1.0, high) for decay in (2e-4, 1e-3)),
        *(("resnet9", element, rate, high) for rate in (0.5, 2.0)),
        ("resnet9", {**element, **head}, 1.0, high),
        *(("resnet9", {**row, **kept}, 1.0, (*high, 30.0)) for kept in (head, ends)),
        ("resnet9", {**row, **head}, 2.0, high),
        *(("resnet9", kept, 1.0, low) for kept in (head, ends, {"sign": "element"})),
        *(("vgg11", changes, 1.0, high[:1]) for changes in ({}, element, row, {**row, **head})),
    ]
    for seed, (task, changes, rate, ratios) in itertools.product(SEEDS, cells):
        for ratio in ratios:
            yield Run(task, "ours", ratio, seed, rate, 12, True, tuple(sorted(changes.items())))
    for seed, ratio in itertools.product(SEEDS, (10.0, 3.0)):
        yield Run("resnet20", "ours", ratio, seed, changes=(("sign", "row"),))


def distillation() -> Iterator[Run]:
    """Learning from the dense model beside labels: its share and temperature, then every method at two lengths."""
    shares = {"distill": 0.9}, {"distill": 0.5}, {"distill": 0.9, "temperature": 2.0}
    yield from _vary("resnet9", (100.0, 10.0), *shares)
    cells = [(method, ratio) for ratio in (100.0, 10.0) for method in ("ours", "smaller", "magnitude")]
    for seed, count, (method, ratio) in itertools.product(SEEDS, (24, 96), [*cells, ("dense", 1.0)]):
        yield Run("resnet9", method, ratio, seed, epochs=count, changes=(("distill", 0.9),))
    for seed, ratio, method in itertools.product(SEEDS, (10.0, 100.0), ("ours", "smaller", "lowrank")):
        yield Run("imdb", method, ratio, seed, changes=(("distill", 0.9),))


def warm() -> Iterator[Run]:
    """Starting from the trained dense model, projected or pruned, on labels and with it as the teacher."""
    methods = "ours", "magnitude", "lowrank"
    for seed, ratio, method, taught in itertools.product(SEEDS, (10.0, 100.0), methods, (False, True)):
        changes = (("distill", 0.9), ("warm", True)) if taught else (("warm", True),)
        yield Run("resnet9", method, ratio, seed, epochs=24, changes=changes)


def widths() -> Iterator[Run]:
    """The smaller text model's trade of width for words."""
    for width in (16, 24, 38, 48):
        yield Run("imdb", "smaller", 100.0, 0, changes=(("width", width),))
    for ratio, tried in ((100.0, (8, 12)), (30.0, (12, 16, 24, 36)), (300.0, (4, 6, 8, 12, 20))):
        for width in tried:
            yield Run("imdb", "smaller", ratio, 0, 2e-3, 2, True, (("width", width),))


_ALL: tuple[Callable[[], Iterator[Run]], ...] = (
    main, sharing, grid, text, nets, rates, epochs, pool, decay, signs, tiles, text_tiles, kept, data, widths,
    distillation, warm, basis, small_bases,
)  # fmt: skip
GROUPS = {function.__name__: function for function in _ALL}

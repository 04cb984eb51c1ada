"""Benchmark of folded convolutions on a GPU: a row of layers, dense and converted, forward and with the backward pass.

Both sides run in bfloat16, cuDNN searches its fastest algorithm for each, and calls are replayed from CUDA graphs. Ours
read the pool, combine the kernels and fold the input in every call. Outputs are compared with those of the densified
layers first.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor, nn

import roastify
from benchmarks import timing
from benchmarks.layers import relative_error
from benchmarks.rows import FOLDER, Cases, machine
from roastify.conversion.converted import pool_of

RESULTS = FOLDER / "convolutions.json"
LAYERS = 4
RATIO = 20
LIMIT = 3e-2


class Case(NamedTuple):
    """Sizes of a convolution with kernels of 3×3, a padding of 1 and a stride of 1."""

    batch: int
    channels: int
    out: int
    side: int

    def __str__(self) -> str:
        return f"{self.channels}→{self.out}, {self.batch}×{self.side}×{self.side}"


# Of ResNet-50, of a classifier of larger images, and of a latent diffusion model's U-Net.
CASES = (
    Case(64, 256, 256, 14), Case(64, 512, 512, 7), Case(64, 512, 512, 28), Case(8, 320, 320, 64),
    Case(8, 640, 640, 32), Case(8, 1280, 1280, 16), Case(8, 2560, 1280, 16), Case(1, 1280, 1280, 16),
)  # fmt: skip
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


class Side:
    """A row of layers of one kind, with inputs of their own, whose calls are timed."""

    def __init__(self, layers: nn.Sequential, inputs: list[Tensor], gradients: list[Tensor]) -> None:
        self.layers, self.inputs, self.gradients = list(layers), inputs, gradients

    def forward(self) -> list[timing.Call]:
        def call(layer: nn.Module, x: Tensor) -> Tensor:
            with torch.no_grad():
                return layer(x)

        pairs = zip(self.layers, self.inputs, strict=True)
        return [lambda layer=layer, x=x: call(layer, x) for layer, x in pairs]

    def with_backward(self) -> list[timing.Call]:
        def call(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient, allow_unused=True)

        triples = zip(self.layers, self.inputs, self.gradients, strict=True)
        return [lambda layer=layer, x=x, grad=grad: call(layer, x, grad) for layer, x, grad in triples]


def measure(rows: Cases, case: Case, layout: str, fold: int, device: str = "cuda") -> None:
    """Measure a case, unless it was not asked for.

    Raises:
        click.ClickException: the output differs from the densified layer's by more than rounding explains.
    """
    name = f"{case}, {layout}, fold {fold}"
    if not rows.wanted(name):
        return
    torch.manual_seed(0)
    options = {"device": device, "dtype": torch.bfloat16}
    dense = nn.Sequential(
        *(nn.Conv2d(case.channels, case.out, 3, padding=1, bias=False, **options) for _ in range(LAYERS))
    )
    converted = roastify.convert(dense, RATIO, fold=fold, init="match")
    places = case.batch, case.channels, case.side, case.side
    inputs = [torch.randn(*places, **options) for _ in range(LAYERS)]
    wanted = [torch.randn(case.batch, case.out, case.side, case.side, **options) for _ in range(LAYERS)]
    format = LAYOUTS[layout]
    inputs, wanted = ([each.to(memory_format=format) for each in values] for values in (inputs, wanted))
    for x in inputs:
        x.requires_grad_()
    same = roastify.densify(copy.deepcopy(converted)).to(memory_format=format)
    with torch.no_grad():
        pairs = zip(converted, same, inputs, strict=True)
        error = max(relative_error(ours(x), other(x).double()) for ours, other, x in pairs)
    if error > LIMIT:
        raise click.ClickException(f"{name}: the error is {error:.1e}; at most {LIMIT:.0e} is right")
    sides = {
        "dense": Side(dense.to(memory_format=format), inputs, wanted),
        "converted": Side(converted.to(memory_format=format), inputs, wanted),
    }
    found = {
        "forward": timing.measure({name: side.forward() for name, side in sides.items()}),
        "with backward": timing.measure({name: side.with_backward() for name, side in sides.items()}),
    }
    ratios = {what: each["dense"]["median_us"] / each["converted"]["median_us"] for what, each in found.items()}
    plan = pool_of(converted).plan
    row = {
        "case": name, **case._asdict(), "layout": layout, "fold": fold, "hashes": plan.folds[0].hashes,
        "ratio": plan.achieved_ratio, "basis_kernels": plan.shared[0].basis_count, "layers": LAYERS, "error": error,
        "times": found, "dense_over_converted": ratios,
    }  # fmt: skip
    rows.add(row, ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items()))


@click.command()
@click.option("--only", default="", metavar="PATTERN", help="Regular expression of cases.")
@click.option("--minutes", default=5.0, show_default=True, help="Begin no case after so long; what is left is named.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, help="The JSON file.")
def main(only: str, minutes: float, output: Path) -> None:
    """Measure folded convolutions on this machine's GPU."""
    torch.backends.cudnn.benchmark = True
    rows = Cases(output, only, minutes, machine("cuda"))
    for fold in (8, 4):
        for case in CASES:
            for layout in LAYOUTS:
                measure(rows, case, layout, fold)
    rows.close()


if __name__ == "__main__":
    main()

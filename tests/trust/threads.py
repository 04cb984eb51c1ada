"""Conversions in some threads beside dense models that run in others: nothing may fail, and plans stay the same.

python -m trust.threads --seconds 30
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roastify
from roastify.conversion.converted import pool_of


class Block(nn.Module):
    """Code that torch.fx traces: submodules, parameters of its own, functions of torch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.ones(width, width))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return x + self.out(torch.tanh(self.query(z)) * F.linear(self.key(z), self.scale))


class Branching(nn.Module):
    """Code that torch.fx cannot trace, so that it is explored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


def model(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), Block(width), Branching(width), Block(width))


def run(seconds: float, converting: int = 4, dense: int = 4) -> tuple[int, int, list[str]]:
    """Return how many conversions and how many dense passes ended, and what failed."""
    source = model()
    expected = pool_of(roastify.convert(source, 10)).plan
    x = torch.randn(3, 64)
    want = source(x).detach()
    end, failures, counts = time.monotonic() + seconds, [], {"convert": 0, "dense": 0}
    lock = threading.Lock()

    def convert_once() -> None:
        plan = pool_of(roastify.convert(source, 10)).plan
        if plan != expected:
            failures.append("a conversion beside others gave another plan")

    def pass_once() -> None:
        found = source(x)
        if isinstance(found, Tensor) is False or not torch.equal(found, want):
            failures.append("a dense model gave another output")

    def repeat(kind: str, call: Callable[[], None]) -> None:
        while time.monotonic() < end:
            try:
                call()
            except BaseException:
                failures.append(traceback.format_exc())
            with lock:
                counts[kind] += 1

    threads = [threading.Thread(target=repeat, args=("convert", convert_once)) for _ in range(converting)]
    threads += [threading.Thread(target=repeat, args=("dense", pass_once)) for _ in range(dense)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts["convert"], counts["dense"], failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    conversions, passes, failures = run(parser.parse_args().seconds)
    sys.stdout.write(f"{conversions} conversions beside {passes} dense passes: {len(failures)} failures\n")
    for text in failures[:3]:
        sys.stdout.write(f"{text}\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()

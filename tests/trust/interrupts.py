"""Interrupts at many lines of a conversion and of densifying in place: a working model is left, the old or the new one.

python -m trust.interrupts --count 500
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

import roastify
from roastify.pool.pool import RoastPool
from trust.threads import model

_CODE = ("roastify", "kernels", "torch/fx")


class Lines:
    """Counts the lines of some files, and raises KeyboardInterrupt at one of them, once.

    Args:
        at: which line; None: only count.
        code: parts of the files' names; our code and torch.fx if not given.
    """

    def __init__(self, at: int | None, code: tuple[str, ...] = _CODE) -> None:
        self.count, self.at, self.code = 0, at, code
        self.where = ""

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if any(part in frame.f_code.co_filename for part in self.code) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line

    def run(self, call: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            return call()
        finally:
            sys.settrace(before)


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-5))


def cases() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]]:
    """Return, by name, how a model is made and what is interrupted."""
    return {
        "convert": (model, lambda dense: roastify.convert(dense, 10, init="project", inplace=True)),
        "densify": (
            lambda: roastify.convert(model(), 10, init="project", inplace=True),
            lambda converted: roastify.densify(converted, inplace=True),
        ),
    }


def run(count: int, seed: int = 0) -> Iterator[tuple[str, int, str]]:
    """Interrupt `count` times; yield what is broken after it: the case, the line's number and what is wrong."""
    chosen, x = random.Random(seed), torch.randn(3, 64)
    for name, (make, call) in cases().items():
        before = make()
        old = before(x).detach()
        lines = Lines(None)
        new = lines.run(lambda: call(before))(x).detach()  # noqa: B023
        for _ in range(count // 2):
            at = chosen.randint(1, lines.count)
            subject, interrupted = make(), Lines(at)
            try:
                interrupted.run(lambda: call(subject))  # noqa: B023
            except KeyboardInterrupt:
                pass
            except BaseException:
                yield name, at, f"{interrupted.where}: another error\n{traceback.format_exc()}"
            if wrong := _wrong(subject, x, (old, new)):
                yield name, at, f"{interrupted.where}: {wrong}"


def _wrong(subject: nn.Module, x: Tensor, expected: tuple[Tensor, ...]) -> str:
    if _symbolic_trace.is_fx_symbolic_tracing():
        return "torch.fx's flag is left set"
    for name in ("__call__", "__getattr__"):
        if getattr(nn.Module, name).__module__ != "torch.nn.modules.module" or hasattr(
            getattr(nn.Module, name), "__wrapped__"
        ):
            return f"nn.Module.{name} is left patched"
    try:
        out = subject(x)
        if not any(_same(out, one) for one in expected):
            return "the model gives outputs of neither model"
        out.sum().backward()
        copy.deepcopy(subject)(x)
        # Whatever was left can be converted, or densified.
        is_converted = any(isinstance(module, RoastPool) for module in subject.modules())
        again = roastify.densify(subject) if is_converted else roastify.convert(subject, 10)
        again(x)
    except BaseException:
        return f"the model that was left fails\n{traceback.format_exc()}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    count = parser.parse_args().count
    broken = list(run(count))
    sys.stdout.write(f"{count} interrupts: {len(broken)} broken models\n")
    for name, at, text in broken[:5]:
        sys.stdout.write(f"{name}, line {at}: {text}\n")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()

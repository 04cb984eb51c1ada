"""Every program of this folder at full size, as `make trust` runs them: about an hour on two cores.

python -m trust [--part NAME] [--scale 0.1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trust import code_audit, interrupts, mutations, races, recoveries, threads

# What a part found: a line to print, and what was wrong.
Found = tuple[str, list[str]]


def _mutations(scale: float, folder: Path) -> Found:
    wrong: list[str] = []
    ends = mutations.run(round(10_000 * scale), 0, folder, lambda *lines: wrong.append("\n".join(lines)))
    return ", ".join(f"{number:,} {end}" for end, number in sorted(ends.items())), wrong


def _race(race: str, kind: str, count: int) -> Callable[[float, Path], Found]:
    def part(scale: float, folder: Path) -> Found:
        seen = races.RACES[race](kind, folder / "raced", max(1, round(count * scale)))
        return str(dict(seen)), sorted(seen.keys() - races.FINE)

    return part


def _recoveries(scale: float, folder: Path) -> Found:
    seen = recoveries.killed_recoveries(folder, max(1, round(200 * scale)))
    return str(dict(seen)), sorted(seen.keys() - recoveries.FINE)


def _interrupts(scale: float, folder: Path) -> Found:
    count = max(2, round(2000 * scale))
    wrong = [f"{name}, line {at}: {text}" for name, at, text in interrupts.run(count)]
    return f"{count:,} interrupts, {len(wrong)} broken models", wrong


def _threads(scale: float, folder: Path) -> Found:
    conversions, passes, wrong = threads.run(60 * scale)
    return f"{conversions:,} conversions in 4 threads beside {passes:,} passes of dense models in 4", wrong


def _audit(scale: float, folder: Path) -> Found:
    wrong = code_audit.run()
    return f"{len(wrong)} events that must not happen", wrong


PARTS: dict[str, Callable[[float, Path], Found]] = {
    "mutated artifacts": _mutations,
    "kills in save": _race("kills", "artifact", 500),
    "kills in a checkpoint's write": _race("kills", "checkpoint", 200),
    "kills in recover": _recoveries,
    "loads during saves": _race("loads", "artifact", 1000),
    "loads of checkpoints during writes": _race("loads", "checkpoint", 1000),
    "two writers of an artifact": _race("writers", "artifact", 500),
    "two writers of a checkpoint": _race("writers", "checkpoint", 500),
    "interrupts": _interrupts,
    "threads": _threads,
    "audit of code": _audit,
}


def main() -> int:
    """Run the parts and print what each found; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--scale", type=float, default=1.0, help="a part of the usual counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for name in options.part or PARTS:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found, wrong = PARTS[name](options.scale, Path(folder))
        failed |= bool(wrong)
        sys.stdout.write(f"{'WRONG' if wrong else 'right'}  {name}: {found} ({time.perf_counter() - begun:.0f} s)\n")
        sys.stdout.write("".join(f"    {line}\n" for line in wrong[:5]))
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

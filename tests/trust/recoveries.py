"""Recoveries that are killed at any moment and resumed: no step that was saved is lost, and the end is the same.

python -m trust.recoveries --count 200
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import roastify
from roastify.conversion.converted import pool_of
from trust.races import PROCESSES, SECONDS, running

STEPS = 12


def _recovered(folder: Path) -> Tensor:
    """Recover a model, or go on from the folder's checkpoint, which is written after every step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    student = roastify.convert(teacher, 4, init="project")
    data = [torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(7)]
    roastify.recover(student, teacher, data, steps=STEPS, folder=folder, save_every=1, resume=True)
    return pool_of(student).weight.detach()


def _recover_once(folder: Path, begun: Any, result: Path) -> None:
    begun.set()
    values = _recovered(folder)
    save_file({"pool": values}, result.with_suffix(".part"))
    os.replace(result.with_suffix(".part"), result)


def _step(folder: Path) -> int:
    """Return the step that a folder's checkpoint was written at; 0 if there is none."""
    manifest = folder / "recovery.json"
    if not manifest.is_file():
        return 0
    state = json.loads(manifest.read_text(encoding="utf-8"))["state"]
    return dict(map(tuple, state["dict"]))["step"]


def _wait(process: Any, folder: Path, step: int, seconds: float) -> None:
    """Wait until a recovery has saved a step or ended, and for a moment more."""
    end = time.monotonic() + SECONDS
    while process.exitcode is None and _step(folder) < step and time.monotonic() < end:
        time.sleep(0.005)
    process.join(seconds)


def killed_recoveries(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Kill recoveries `count` times; count what was left: a later step, the same, an earlier one, or another end."""
    chance, seen = random.Random(seed), Counter[str]()
    expected = _recovered(folder / "whole")
    kills = 0
    for number in itertools.count():
        place, result, step = folder / str(number), folder / f"{number}.safetensors", 0
        while not result.exists() and kills < count:
            begun = PROCESSES.Event()
            with running((_recover_once, (place, begun, result))) as processes:
                assert begun.wait(SECONDS)
                _wait(processes[0], place, step + chance.randrange(8), chance.random() / 20)
                if processes[0].exitcode is None:
                    os.kill(processes[0].pid, signal.SIGKILL)
                    kills += 1
                elif processes[0].exitcode:
                    seen["a resumed recovery failed"] += 1
            before, step = step, _step(place)
            seen["a step was lost" if step < before else "further on" if step > before else "as before"] += 1
        if result.exists():
            same = torch.equal(load_file(result)["pool"], expected)
            seen["ended equal" if same else "ended otherwise"] += 1
        shutil.rmtree(place, ignore_errors=True)
        if kills >= count:
            return seen
    raise AssertionError


# What may be counted besides failures.
FINE = {"further on", "as before", "ended equal"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        seen = killed_recoveries(Path(place), parser.parse_args().count)
    sys.stdout.write(f"{json.dumps({'found': dict(seen), 'seconds': round(time.perf_counter() - begun, 1)})}\n")
    return 0 if seen.keys() <= FINE else 1


if __name__ == "__main__":
    from trust.recoveries import main as run

    sys.exit(run())

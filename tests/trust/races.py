"""Races of processes over one folder: loads during saves, two writers, killed writers; for artifacts and checkpoints.

`python tests/trust/races.py COUNT` runs each race COUNT times and prints what was found; the exit code is 1 if anything
was mixed, lost or refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import roastify
from roastify import api
from roastify.errors import RoastError
from roastify.recovery import checkpoint

# A fresh process in milliseconds: it is forked from one that has imported torch and started no thread.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["trust.races"])
SECONDS = 120


def _dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))


def _models() -> dict[str, nn.Module]:
    """Return two models that differ in mapping and values but not in any shape, so that a mixture loads in silence."""
    torch.set_num_threads(1)
    return {str(seed): roastify.convert(_dense(), 4, seed=seed) for seed in (1, 2)}


class _Artifacts:
    """Saves the two models, and says which of them a folder holds."""

    def __init__(self) -> None:
        self.models = _models()
        self.wholes = {name: roastify.densify(model).state_dict() for name, model in self.models.items()}
        self.turn = itertools.count()

    def write(self, name: str, folder: Path) -> None:
        roastify.save(self.models[name], folder)

    def read(self, folder: Path) -> str:
        """Load and densify in turn."""
        if next(self.turn) % 2:
            with tempfile.TemporaryDirectory() as place:
                api.densify_artifact(folder, Path(place) / "dense.safetensors")
                found = load_file(Path(place) / "dense.safetensors")
        else:
            found = dict(roastify.densify(roastify.load(folder, _dense())).state_dict())
        return next((name for name, whole in self.wholes.items() if _same(whole, found)), "mixture")


class _Checkpoints:
    """The same for a recovery's checkpoints."""

    def write(self, name: str, folder: Path) -> None:
        state = {"name": name, "values": torch.full((50_000,), float(name)), "step": random.randrange(1000)}
        checkpoint.write_checkpoint(folder, {}, state)

    def read(self, folder: Path) -> str:
        state = checkpoint.read_checkpoint(folder, {})
        return state["name"] if bool((state["values"] == float(state["name"])).all()) else "mixture"


KINDS: dict[str, Callable[[], Any]] = {"artifact": _Artifacts, "checkpoint": _Checkpoints}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _found(store: Any, folder: Path) -> str:
    try:
        return "whole" if store.read(folder) in "12" else "mixture"
    except RoastError as error:
        return f"refused: {str(error).replace(str(folder), 'FOLDER')}"


def _save_on_and_on(kind: str, folder: Path, begun: Any) -> None:
    store = KINDS[kind]()
    for name in itertools.cycle("12"):
        store.write(name, folder)
        begun.set()


def _save_when_told(kind: str, folder: Path, name: str, count: int, meeting: Any, failed: Any) -> None:
    store = KINDS[kind]()
    for _ in range(count):
        meeting.wait(SECONDS)
        try:
            store.write(name, folder)
        except RoastError:
            with failed.get_lock():
                failed.value += 1
        meeting.wait(SECONDS)


@contextmanager
def running(*tasks: tuple[Callable[..., None], tuple[Any, ...]]) -> Iterator[list[Any]]:
    processes = [PROCESSES.Process(target=target, args=arguments, daemon=True) for target, arguments in tasks]
    before = os.environ.get("PYTHONPATH")
    # The server that forks finds this file by the environment alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), before]))
    try:
        for process in processes:
            process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def loads_during_saves(kind: str, folder: Path, count: int) -> Counter[str]:
    """Load again and again while another process saves two models in turn; count what was loaded."""
    begun, store = PROCESSES.Event(), KINDS[kind]()
    with running((_save_on_and_on, (kind, folder, begun))):
        assert begun.wait(SECONDS)
        return Counter(_found(store, folder) for _ in range(count))


def two_writers(kind: str, folder: Path, count: int) -> Counter[str]:
    """Let two processes save at once; count what the folder holds after each race, and what else lies there."""
    store, meeting, failed = KINDS[kind](), PROCESSES.Barrier(3), PROCESSES.Value("i")
    seen: Counter[str] = Counter()
    with running(*((_save_when_told, (kind, folder, name, count, meeting, failed)) for name in "12")):
        for _ in range(count):
            meeting.wait(SECONDS)
            meeting.wait(SECONDS)
            seen[_found(store, folder)] += 1
            if len(os.listdir(folder)) > 2:
                seen["files left behind"] += 1
    if failed.value:
        seen["failed saves"] += failed.value
    return seen


def killed_writers(kind: str, folder: Path, count: int) -> Counter[str]:
    """Kill one of two processes that save on and on, at any moment; count what the folder holds then.

    At the end one more save must leave the two files alone: what the dead left behind is removed.
    """
    store = KINDS[kind]()
    store.write("1", folder)
    seen: Counter[str] = Counter()
    for _ in range(count):
        begun = PROCESSES.Event(), PROCESSES.Event()
        with running(*((_save_on_and_on, (kind, folder, each)) for each in begun)) as processes:
            assert all(each.wait(SECONDS) for each in begun)
            time.sleep(random.random() / 20)
            os.kill(processes[0].pid, signal.SIGKILL)
            seen[_found(store, folder)] += 1
        seen[_found(store, folder)] += 1
    seen["temporary folders of killed writers"] += len(os.listdir(folder)) - 2
    store.write("1", folder)
    if len(os.listdir(folder)) > 2:
        seen["files left behind"] += 1
    return seen


RACES = {"loads": loads_during_saves, "writers": two_writers, "kills": killed_writers}
# What may be counted besides failures.
FINE = {"whole", "temporary folders of killed writers"}


def main() -> int:
    """Run the races and print what each found, as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="how often each race is run")
    parser.add_argument("--race", choices=RACES, action="append", help="only this race; may be repeated")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind of folder; may be repeated")
    options = parser.parse_args()
    failed = False
    for race, kind in itertools.product(options.race or RACES, options.kind or KINDS):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            seen = RACES[race](kind, Path(place) / "folder", options.count)
        failed |= not seen.keys() <= FINE
        result = {"race": race, "kind": kind, "found": dict(seen), "seconds": round(time.perf_counter() - begun, 1)}
        print(json.dumps(result), flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    # The processes import this file as `trust.races`, so this one must mean the same classes.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from trust.races import main as run

    sys.exit(run())

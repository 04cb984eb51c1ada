"""Examine models of timm, torchvision and torch-geometric: from `tests/`, `python -m zoo.outside`.

Models run in processes of their own, side by side, each with a time limit; what a model does to its process becomes its
row. Raw results go to `benchmarks/results/zoo.json`, and from there into `docs/coverage.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from zoo import extras, pretrained
from zoo.examine import Entry, Row, Unbuilt, examine
from zoo.page import OUTSIDE, load, write_outside
from zoo.run import collected

LISTS = {"outside": extras.entries, "transformers": pretrained.entries}
_PACKAGES = ("torch", "timm", "torchvision", "torch-geometric", "transformers")
_NO_TIME = "no time was left"


def serve(name: str, connection: Connection) -> None:
    """Examine the entries of a list whose numbers arrive, and send what is found; entries themselves do not travel."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entries = list(LISTS[name]())
    connection.send(None)
    while True:
        entry = entries[connection.recv()]
        try:
            connection.send(examine(entry))
        except Unbuilt as error:
            connection.send(f"{entry.name}: {error}")


class _Worker:
    """A process that examines one model at a time."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.entry: Entry | None = None
        self.since = 0.0

    def give(self, number: int, entry: Entry) -> None:
        self.entry, self.since = entry, time.monotonic()
        self.connection.send(number)

    def end(self, patience: float = 0.0) -> int | None:
        """End the process if it does not end by itself within `patience` seconds; return its exit code."""
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        return self.process.exitcode


def examine_all(
    name: str, entries: list[tuple[int, Entry]], processes: int, seconds: float, limit: float
) -> Iterator[Row | str]:
    """Yield a `Row`, or why there is none, for every entry: as they come, until the time is over.

    Args:
        name: of the list.
        entries: numbers in the list, and entries.
        processes: side by side.
        seconds: for all of them.
        limit: seconds for one.
    """
    until = time.monotonic() + seconds
    left = list(entries)
    workers = [_Worker(name) for _ in range(min(processes, len(left)))]
    try:
        while workers and time.monotonic() < until:
            ready = wait([worker.connection for worker in workers], timeout=0.2)
            for worker in list(workers):
                entry = worker.entry
                found: Row | str | None = None
                if worker.connection in ready:
                    try:
                        found = worker.connection.recv()
                    except EOFError:
                        found = _ended(entry, f"its process ended with exit code {worker.end(patience=10.0)}")
                        workers.remove(worker)
                elif entry is not None and time.monotonic() - worker.since > limit:
                    worker.end()
                    workers.remove(worker)
                    found = _ended(entry, f"took over {limit:g} s")
                else:
                    continue
                worker.entry = None
                if found is not None:
                    yield found
                if worker not in workers and left:
                    workers.append(_Worker(name))
                elif worker in workers and left:
                    worker.give(*left.pop(0))
                elif worker in workers:
                    workers.remove(worker)
                    worker.end()
    finally:
        unfinished = [worker.entry for worker in workers if worker.entry is not None]
        for worker in workers:
            worker.end()
    for entry in [*unfinished, *(entry for _, entry in left)]:
        yield f"{entry.name}: {_NO_TIME}"


def _ended(entry: Entry | None, why: str) -> Row:
    if entry is None:
        raise RuntimeError(f"a process for models did not start: {why}")
    return Row(entry.name, entry.family, failure=why)


def _in_turn(entries: list[Entry]) -> list[tuple[int, Entry]]:
    """Return numbered entries, one of each family after the other, so that a short time covers every package."""
    seen: dict[str, int] = {}
    ranked = []
    for number, entry in enumerate(entries):
        seen[entry.family] = seen.get(entry.family, 0) + 1
        ranked.append((seen[entry.family], number, entry))
    return [(number, entry) for _, number, entry in sorted(ranked, key=lambda item: item[:2])]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Run what is asked for; the exit code is 1 if a model fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these models")
    parser.add_argument("--list", choices=LISTS, default="outside")
    parser.add_argument("--minutes", type=float, default=3.0, help="for all models; what is left then is not run")
    parser.add_argument("--timeout", type=float, default=100.0, help="seconds for one model")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=OUTSIDE, help="of raw results")
    parser.add_argument("--page", action="store_true", help="run nothing: write docs/coverage.md from raw results")
    options = parser.parse_args()
    if options.page:
        write_outside(load(options.output))
        return 0
    entries = _in_turn(list(LISTS[options.list]()))
    if options.names:
        entries = [(number, entry) for number, entry in entries if entry.name in options.names]
    order = {entry.name: number for number, entry in entries}
    found = examine_all(options.list, entries, options.processes, 60 * options.minutes, options.timeout)
    rows, unbuilt = collected(found)
    rows.sort(key=lambda row: order[row.name])
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": _versions(),
        "processes": options.processes,
        "rows": [dataclasses.asdict(row) for row in rows],
        "unbuilt": sorted(unbuilt),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.output == OUTSIDE and not options.names:
        write_outside(load(OUTSIDE))
    failed = [row for row in rows if row.failure]
    sys.stdout.write(f"{len(rows) - len(failed)} of {len(rows)} pass, {len(unbuilt)} not run\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

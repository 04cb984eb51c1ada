"""Run the zoo and write `docs/coverage.md`: `make zoo`, or from `tests/` `python -m zoo [--unlisted] [NAME …]`."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from zoo import awkward, pretrained, torch_nn
from zoo.examine import Entry, Row, Unbuilt, examine
from zoo.page import DOCUMENT, markdown

_BATCH = 80


def entries(unlisted: bool = False) -> Iterator[Entry]:
    """Yield the zoo's models: those that this machine's packages allow."""
    yield from torch_nn.entries()
    yield from awkward.entries()
    if importlib.util.find_spec("transformers"):
        yield from pretrained.unlisted() if unlisted else pretrained.entries()


def _examine_by_number(job: tuple[int, bool]) -> Row | str:
    """Examine one entry in a process of its own: entries hold functions, which do not travel."""
    number, unlisted = job
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entry = list(entries(unlisted))[number]
    try:
        return examine(entry)
    except Unbuilt as error:
        return f"{entry.name}: {error}"


def _examine_all(jobs: list[tuple[int, bool]], processes: int) -> Iterator[Row | str]:
    """Examine entries in processes that are renewed now and then: some models leave much behind.

    Executors, because they notice when a process is killed; one after another, because one that renews its processes
    itself can hang in Python 3.11.
    """
    for start in range(0, len(jobs), _BATCH):
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(_examine_by_number, jobs[start : start + _BATCH])


def collected(found: Iterable[Row | str]) -> tuple[list[Row], list[str]]:
    """Return the rows, and what was not run; each is printed as it comes."""
    rows: list[Row] = []
    unbuilt: list[str] = []
    for one in found:
        if isinstance(one, str):
            unbuilt.append(one)
            sys.stdout.write(f"not run  {one}\n")
        else:
            rows.append(one)
            verdict = "FAILS" if one.failure else "ok"
            sys.stdout.write(f"{verdict:8} {one.name}: {one.shared:.1%} shared {one.failure}\n")
        sys.stdout.flush()
    return rows, unbuilt


def main() -> int:
    """Run what is asked for; the exit code is 1 if a model fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these models; nothing is written then")
    parser.add_argument("--unlisted", action="store_true", help="transformers' models that the zoo does not list")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    jobs = [
        (number, options.unlisted)
        for number, entry in enumerate(entries(options.unlisted))
        if not options.names or entry.name in options.names
    ]
    rows, unbuilt = collected(_examine_all(jobs, options.processes))
    failed = [row for row in rows if row.failure]
    sys.stdout.write(f"{len(rows) - len(failed)} of {len(rows)} pass, {len(unbuilt)} not run\n")
    if not options.names and not options.unlisted:
        DOCUMENT.write_text(markdown(rows, unbuilt), encoding="utf-8")
    return 1 if failed else 0

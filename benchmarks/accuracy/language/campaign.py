"""Many runs, the most important first: each worker process makes one run at a time on a GPU of its own."""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.accuracy.budget import UnreachableError
from benchmarks.accuracy.campaign import Failure, Worker, set_up
from benchmarks.accuracy.language import methods, trials
from benchmarks.accuracy.language.runs import Recipe, Run, as_row, of_row
from benchmarks.accuracy.language.training import train
from benchmarks.accuracy.step import CaptureError
from benchmarks.accuracy.training import MACHINE
from benchmarks.rows import Row, machine

# What may come on top of a run's expected time before it counts as not to end in time.
_MARGIN = 1.1


def attempt(run: Run, recipe: Recipe, path: Path, device: str, graph: bool) -> Row | Failure:
    try:
        return train(run, recipe, path, device, graph)
    except CaptureError:
        return Failure(traceback.format_exc(), in_capture=True)
    except Exception:
        return Failure(traceback.format_exc())


@dataclass
class Campaign:
    """Everything that runs are chosen by.

    Args:
        recipe: of all runs.
        path: of the tokens.
        devices: one for each worker process.
        rows: of earlier and of this campaign; finished rows are added.
        in_process: train in this process, on the one device.
        deadline: `time.time()` at which runs should have ended.
        graph: whether steps are replayed from CUDA graphs.
        smoke: whether rows are of a smoke test.
        skipped: runs that would not have ended in time.
    """

    recipe: Recipe
    path: Path
    devices: Sequence[str]
    rows: list[Row]
    in_process: bool = False
    deadline: float = math.inf
    graph: bool = True
    smoke: bool = False
    skipped: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_run: dict[Run, Row] = {of_row(row): row for row in self.rows}
        self.failed: set[Run] = set()
        # Steps that could not be captured, by method, and why.
        self.eager: dict[str, str] = {}

    def missing(self, asked: Sequence[Run]) -> list[Run]:
        """Return what was asked for and has no row, whether or not its trials are made."""
        return [run for run in asked if not self._is_done(run)]

    def outcomes(self, asked: Sequence[Run]) -> Iterator[tuple[Run, Row | Failure]]:
        """Yield each run and trial, and what came of it, in the order in which they end."""
        pending = self.missing(asked)
        yield from self._in_process(pending) if self.in_process else self._in_workers(pending)

    def _is_done(self, asked: Run) -> bool:
        if any(trial not in self.by_run for trial in trials.wanted(asked, self.recipe, self.by_run)):
            return False
        try:
            return trials.choose(asked, self.recipe, self.by_run) in self.by_run
        except UnreachableError:
            return asked in self.by_run

    def _next(self, pending: list[Run], running: set[Run]) -> tuple[Run, Run | Row | Failure] | None:
        """Return what was asked for first and can go on: with the run to make now, or with what came of it at once.

        None if all that is left waits for runs that are being made.
        """
        for asked in list(pending):
            needed = [run for run in trials.wanted(asked, self.recipe, self.by_run) if run not in self.by_run]
            if not self.failed.isdisjoint(needed):
                pending.remove(asked)
                return asked, Failure("A trial of it failed, so its rate or its sizes are not chosen.")
            if needed:
                run = next((run for run in needed if run not in running), None)
            else:
                pending.remove(asked)
                try:
                    run = trials.choose(asked, self.recipe, self.by_run)
                except UnreachableError as error:
                    allowed = methods.target(self.recipe, asked.ratio)
                    here = {"allowed": allowed, "machine": machine("cpu", *MACHINE)}
                    return asked, {**as_row(asked), **here, "unreachable": str(error), "seconds": 0.0}
                if run in self.by_run or run in running:
                    continue
            if run is None:
                continue
            if time.time() + self._expected(run) > self.deadline:
                self.skipped.append(asked)
                if asked in pending:
                    pending.remove(asked)
                continue
            return asked, run
        return None

    def _expected(self, run: Run) -> float:
        """Return seconds by the last run of its method, or else of any; 0 if there was none."""
        alike = [row for row in self.rows if "loss" in row and row["method"] == run.method] or [
            row for row in self.rows if "loss" in row
        ]
        if not alike:
            return 0.0
        last = alike[-1]
        return last["setup"] + _MARGIN * (last["seconds"] - last["setup"]) * run.steps / last["steps"]

    def _finish(self, asked: Run, run: Run, outcome: Row | Failure) -> Row | Failure:
        if isinstance(outcome, Failure):
            self.failed.add(run)
            return outcome
        chosen = () if run.trial else tuple(name for name in ("rate", "sizes") if getattr(asked, name) is None)
        outcome |= {"tuned": list(chosen), "smoke": self.smoke, "not_captured": self.eager.get(run.method)}
        # Trials of other candidates may have chosen otherwise.
        overtaken = {
            id(row)
            for row in self.rows
            if chosen and row["tuned"] == outcome["tuned"] and self._asked(row) == asked and of_row(row) != run
        }
        self.rows[:] = [row for row in self.rows if id(row) not in overtaken and of_row(row) != run] + [outcome]
        self.by_run = {of_row(row): row for row in self.rows}
        return outcome

    @staticmethod
    def _asked(row: Row) -> Run:
        return of_row({**row, **dict.fromkeys(row["tuned"])})

    def _in_process(self, pending: list[Run]) -> Iterator[tuple[Run, Row | Failure]]:
        (device,) = self.devices
        set_up(device, torch.get_num_threads())
        while (found := self._next(pending, set())) is not None:
            asked, run = found
            if isinstance(run, Run):
                yield run, self._finish(asked, run, attempt(run, self.recipe, self.path, device, self.graph))
            else:
                yield asked, self._finish(asked, asked, run)

    def _in_workers(self, pending: list[Run]) -> Iterator[tuple[Run, Row | Failure]]:
        workers = [Worker(device, max(1, (os.cpu_count() or 1) // len(self.devices))) for device in self.devices]
        busy: dict[Future, tuple[Worker, Run, Run]] = {}
        try:
            while True:
                for worker in workers:
                    if worker in (other for other, *_ in busy.values()):
                        continue
                    while (found := self._next(pending, {run for *_, run in busy.values()})) is not None:
                        asked, run = found
                        if isinstance(run, Run):
                            graph = self.graph and run.method not in self.eager
                            job = worker.submit(attempt, run, self.recipe, self.path, worker.device, graph)
                            busy[job] = worker, asked, run
                            break
                        yield asked, self._finish(asked, asked, run)
                if not busy:
                    return
                for job in wait(busy, return_when=FIRST_COMPLETED).done:
                    worker, asked, run = busy.pop(job)
                    outcome = worker.result(job)
                    if isinstance(outcome, Failure):
                        # What failed may have left its process's GPU state unusable.
                        worker.restart()
                        if outcome.in_capture:
                            # Once more, without a graph.
                            self.eager[run.method] = outcome.text.strip().splitlines()[-1]
                            pending.insert(0, asked)
                            continue
                    yield run, self._finish(asked, run, outcome)
        finally:
            for worker in workers:
                worker.stop()

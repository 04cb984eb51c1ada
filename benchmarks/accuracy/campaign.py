"""Many runs on all GPUs: each worker process makes one run at a time, the most important first."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import inputs, trials
from benchmarks.accuracy.runs import Run, asked_of_row, of_row
from benchmarks.accuracy.step import CaptureError
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.training import train
from benchmarks.rows import Row

# What may come on top of a run's expected time before it counts as not to end in time.
_MARGIN = 1.1
_RECENT = 4


@dataclass(frozen=True)
class Failure:
    """A run that gave no row, and whether because its step could not be captured in a CUDA graph."""

    text: str
    in_capture: bool = False


def attempt(run: Run, task: Task, folder: Path, device: str, graph: bool) -> Row | Failure:
    try:
        return train(run, task, folder, device, graph)
    except CaptureError:
        return Failure(traceback.format_exc(), in_capture=True)
    except Exception:
        return Failure(traceback.format_exc())


def set_up(device: str, threads: int) -> None:
    """Prepare a worker process: its GPU, its threads."""
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(torch.device(device).index or 0)


@dataclass
class Durations:
    """What runs took, to tell how long the next will."""

    seen: dict[tuple[str, ...], list[tuple[float, float]]] = field(default_factory=dict)

    def learn(self, row: Mapping[str, Any]) -> None:
        if "accuracy" in row:
            epoch = (row["seconds"] - row["setup"]) / row["epochs"]
            for key in ((row["task"], row["method"]), (row["task"],)):
                self.seen.setdefault(key, []).append((row["setup"], epoch))

    def expected(self, run: Run) -> float:
        """Return seconds by the last runs of its method, or else of its task; 0 if there were none."""
        seen = self.seen.get((run.task, run.method)) or self.seen.get((run.task,)) or [(0.0, 0.0)]
        setup, epoch = (max(values) for values in zip(*seen[-_RECENT:], strict=True))
        assert run.epochs is not None
        return setup + epoch * run.epochs * _MARGIN


@dataclass
class Campaign:
    """Everything that runs are chosen by.

    Args:
        tasks: recipes by name.
        data: folder of the data sets.
        cache: folder for decoded arrays.
        devices: one for each worker process.
        rows: of earlier and of this campaign; finished rows are added.
        in_process: train in this process, on the one device.
        scale: what the tasks' epochs were multiplied by.
        deadline: `time.time()` at which runs should have ended.
        graph: whether steps are replayed from CUDA graphs.
        smoke: whether rows are of a smoke test.
        skipped: runs that would not have ended in time.
        untried: runs without a rate, as a trial of theirs gave no row.
        unchanged: runs that waited for new trials and have a row already with what these chose.
    """

    tasks: Mapping[str, Task]
    data: Path
    cache: Path
    devices: Sequence[str]
    rows: list[Row]
    in_process: bool = False
    scale: float = 1.0
    deadline: float = math.inf
    graph: bool = True
    smoke: bool = False
    skipped: list[Run] = field(default_factory=list)
    untried: list[Run] = field(default_factory=list)
    unchanged: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_run: dict[Run, Row] = {of_row(row): row for row in self.rows}
        self.durations = Durations()
        # Steps that could not be captured, by task and method, and why.
        self.eager: dict[tuple[str, str], str] = {}

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs, and the trials they wait for, that have no row yet.

        A run whose rate is chosen has one if all its trials do and the row is of what they choose: with other
        candidates than it was made with, it is made again where the choice changes.
        """
        left = [run for run in map(self._with_epochs, runs) if not self._is_done(run)]
        return [run for run in trials.with_trials(left, self.tasks) if run not in self.by_run]

    def outcomes(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Row | Failure]]:
        """Yield each run, with its rate, and what came of it, in the order in which they end."""
        yield from self._in_process(runs) if self.in_process else self._in_workers(runs)
        for run in self.untried:
            if set(self.skipped).isdisjoint(trials.trials(run, self.tasks[run.task])):
                yield run, Failure("A trial of it gave no row, so its learning rate is not chosen.")
            else:
                self.skipped.append(run)

    def _is_done(self, run: Run) -> bool:
        if run.rate is not None:
            return run in self.by_run
        return trials.decided(run, self.tasks[run.task], self.by_run) and any(
            of_row(row) == self._resolve(run) for row in self._tuned(run)
        )

    def _tuned(self, asked: Run) -> list[Row]:
        """Return the rows of a run without a rate: of what its trials choose, or chose from other candidates.

        One with a rate has none.
        """
        return [
            row for row in self.rows if row.get("tuned") and row["scale"] == self.scale and asked_of_row(row) == asked
        ]

    def _with_epochs(self, run: Run) -> Run:
        """Return a run whose rate is given with the most epochs of its task's grid, unless they are given too."""
        if run.rate is None or run.epochs is not None:
            return run
        return dataclasses.replace(run, epochs=max(epochs for _, epochs in self.tasks[run.task].grid))

    def _resolve(self, run: Run) -> Run:
        return run if run.rate is not None else trials.choose(run, self.tasks[run.task], self.by_run)

    def _waits(self, run: Run, undecided: set[Run]) -> bool:
        return run.rate is None and not undecided.isdisjoint(trials.trials(run, self.tasks[run.task]))

    def _take(self, pending: list[Run], running: set[Run], prepared: set[Path]) -> Run | None:
        """Remove and return the most important run that can start now and end in time."""
        while True:
            undecided, before = running | set(pending), len(pending)
            for run in list(pending):
                if self._folder(run.task) not in prepared or self._waits(run, undecided):
                    continue
                if not trials.decided(run, self.tasks[run.task], self.by_run):
                    pending.remove(run)
                    self.untried.append(run)
                    continue
                if self._is_done(run):
                    pending.remove(run)
                    self.unchanged.append(run)
                    continue
                resolved = self._resolve(run)
                if time.time() + self.durations.expected(resolved) > self.deadline:
                    pending.remove(run)
                    self.skipped.append(run)
                    continue
                pending.remove(run)
                return run
            # What was put aside may have been what another run waited for.
            if len(pending) == before:
                return None

    def _finish(self, asked: Run, run: Run, outcome: Row | Failure) -> Row | Failure:
        if isinstance(outcome, Failure):
            return outcome
        outcome |= {
            "tuned": asked.rate is None,
            "epochs_asked": asked.epochs is not None,
            "scale": self.scale,
            "smoke": self.smoke,
            "not_captured": self.eager.get((run.task, run.method)),
        }
        # What was chosen from other candidates is no longer the run's row.
        overtaken = {id(row) for row in self._tuned(asked)}
        self.rows[:] = [row for row in self.rows if id(row) not in overtaken]
        self.rows.append(outcome)
        self.by_run = {of_row(row): row for row in self.rows}
        self.durations.learn(outcome)
        return outcome

    def _in_process(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Row | Failure]]:
        (device,) = self.devices
        set_up(device, torch.get_num_threads())
        pending = list(runs)
        folders = self._folders(pending)
        for task in folders.values():
            inputs.prepare(task, self.data, self.cache)
        while (asked := self._take(pending, set(), set(folders))) is not None:
            run = self._resolve(asked)
            outcome = attempt(run, self.tasks[run.task], self._folder(run.task), device, self.graph)
            yield run, self._finish(asked, run, outcome)

    def _folder(self, task: str) -> Path:
        return inputs.cache_folder(self.tasks[task], self.data, self.cache)

    def _folders(self, runs: Sequence[Run]) -> dict[Path, Task]:
        """Return where the runs' data is kept; several tasks may share a folder."""
        return {self._folder(run.task): self.tasks[run.task] for run in runs}

    def _in_workers(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Row | Failure]]:
        workers = [Worker(device, max(1, (os.cpu_count() or 1) // len(self.devices))) for device in self.devices]
        pending, prepared = list(runs), set[Path]()
        to_prepare = self._folders(pending)
        busy: dict[Future, tuple[Worker, Path | tuple[Run, Run]]] = {}
        try:
            while True:
                for worker in workers:
                    if worker in (other for other, _ in busy.values()):
                        continue
                    running = {what[0] for _, what in busy.values() if not isinstance(what, Path)}
                    if to_prepare:
                        folder = next(iter(to_prepare))
                        job = worker.submit(inputs.prepare, to_prepare.pop(folder), self.data, self.cache)
                        busy[job] = worker, folder
                    elif (asked := self._take(pending, running, prepared)) is not None:
                        run = self._resolve(asked)
                        graph = self.graph and (run.task, run.method) not in self.eager
                        where = self.tasks[run.task], self._folder(run.task), worker.device
                        busy[worker.submit(attempt, run, *where, graph)] = worker, (asked, run)
                if not busy:
                    return
                for job in wait(busy, return_when=FIRST_COMPLETED).done:
                    worker, what = busy.pop(job)
                    if isinstance(what, Path):
                        job.result()
                        prepared.add(what)
                        continue
                    asked, run = what
                    outcome = worker.result(job)
                    if isinstance(outcome, Failure):
                        # What failed may have left its process's GPU state unusable.
                        worker.restart()
                    if isinstance(outcome, Failure) and outcome.in_capture:
                        # Once more, without a graph.
                        self.eager[run.task, run.method] = outcome.text.strip().splitlines()[-1]
                        pending.insert(0, asked)
                        continue
                    yield run, self._finish(asked, run, outcome)
        finally:
            for worker in workers:
                worker.stop()


class Worker:
    """One process on one device; a process that dies fails its run only."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self._start()

    def _start(self) -> None:
        # CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        arguments = (self.device, self.threads)
        self.executor = ProcessPoolExecutor(1, context, initializer=set_up, initargs=arguments)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        return self.executor.submit(function, *arguments)

    def result(self, job: Future) -> Row | Failure:
        try:
            return job.result()
        except BrokenProcessPool as error:
            return Failure(f"the worker process died: {error}")

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)

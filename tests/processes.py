"""Processes that talk through gloo on the CPU and run what a test hands them; two, unless a test asks for more."""

from __future__ import annotations

import datetime
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

SIZE = 2
# If one process fails, the other waits for it: at most so many seconds.
SECONDS = 90


class Processes:
    """Started once for many tests: torch takes seconds to import.

    Args:
        folder: an empty one, where the processes find each other.
        size: how many.
    """

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, there, str(folder / "meeting")), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module's function in all processes; return what each returned.

        Raises:
            AssertionError: it failed in one of them, or did not end.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(SECONDS), f"process {rank} did not answer within {SECONDS} s"
            answers.append(pipe.recv())
        failed = [f"in process {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [value for value, _ in answers]

    def killed(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a module's function in all processes, of which the first is killed by it; then kill the others.

        Raises:
            AssertionError: the first process did not end by SIGKILL.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        self._processes[0].join(SECONDS)
        assert self._processes[0].exitcode == -signal.SIGKILL, self._processes[0].exitcode
        for process in self._processes[1:]:
            process.kill()

    def end(self) -> None:
        """End all of them, killed ones too."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(rank: int, size: int, pipe: Any, meeting: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timeout)
    while (asked := pipe.recv()) is not None:
        function, arguments = asked
        try:
            pipe.send((function(*arguments), ""))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


# AdamW's first steps, of 1e-2 each, turn the rounding of a gradient that nearly cancels into 3e-4 of a step.
def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 4e-6) -> None:
    """Check that what several processes computed is what one computes."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0.0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )

"""For work that takes more than a second: a progress bar or a spinner on a terminal, lines of JSON elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from roastify.printable import printable

_PATIENCE_S = 1.0
_Item = TypeVar("_Item")


class _Shown(threading.local):
    """Whether this thread shows something already: a terminal has room for one bar."""

    something = False


_shown = _Shown()


def _is_seen() -> bool:
    return sys.stderr.isatty() and not _shown.something


def track(
    items: Sequence[_Item],
    description: str,
    size: Callable[[_Item], int] = lambda item: 1,
    note: Callable[[], str] = lambda: "",
) -> Iterator[_Item]:
    """Yield the items; on a terminal, show a progress bar on standard error once it has taken over a second.

    Within other work that is shown, nothing is.

    Args:
        items: what there is to do.
        description: what is done.
        size: how much work an item is.
        note: what the bar says beside the time that is left, asked after each item.
    """
    if not _is_seen():
        yield from items
        return
    # Imported here, so that `import roastify` does not import rich.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    last = TextColumn("left  {task.fields[note]}")
    progress = Progress(*columns, last, console=Console(stderr=True), transient=True)
    task = progress.add_task(description, total=sum(map(size, items)), note=note())
    begun = time.monotonic()
    shown, _shown.something = False, True
    try:
        for item in items:
            if not shown and time.monotonic() - begun > _PATIENCE_S:
                progress.start()
                shown = True
            yield item
            progress.update(task, advance=size(item), note=note())
    finally:
        _shown.something = False
        if shown:
            progress.stop()


@contextlib.contextmanager
def working(description: str) -> Iterator[None]:
    """On a terminal, say on standard error what is being done once it has taken over a second.

    Args:
        description: what is done, in a step whose length is not known.
    """
    if not _is_seen():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # Without markup, which a file's name may look like.
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    console = Console(stderr=True)
    # What the work prints goes where it always goes.
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    progress.add_task(printable(description), total=None)
    # The step itself gives no sign of life, so another thread waits for it.
    timer = threading.Timer(_PATIENCE_S, progress.start)
    timer.daemon = True
    timer.start()
    _shown.something = True
    try:
        yield
    finally:
        _shown.something = False
        timer.cancel()
        timer.join()
        progress.stop()


class JsonLines:
    """Numbers as lines of JSON on standard error, for whoever reads it instead of a terminal.

    Nothing is written before the work has taken over a second; then all lines are.

    Args:
        work: the name of the work, which every line has as `roastify`.
    """

    def __init__(self, work: str) -> None:
        self.work = work
        self.begun = time.monotonic()
        self._waiting: list[str] = []

    def write(self, numbers: dict[str, Any]) -> None:
        """Write a line, unless standard error is a terminal."""
        if sys.stderr.isatty():
            return
        self._waiting.append(json.dumps({"roastify": self.work, **numbers}))
        if time.monotonic() - self.begun > _PATIENCE_S:
            print(*self._waiting, sep="\n", file=sys.stderr, flush=True)  # noqa: T201
            self._waiting.clear()

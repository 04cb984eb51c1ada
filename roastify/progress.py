"""For work that takes more than a second: a progress bar or a spinner on a terminal, lines of JSON elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from roastify.printable import printable

_PATIENCE_S = 1.0
# Between two lines of JSON, unless a user says how often: a run of a minute has a dozen.
_BETWEEN_LINES_S = 5.0
_REDRAW_S = 0.25
_BAR_CELLS = 20
_Item = TypeVar("_Item")


class _Shown(threading.local):
    """What this thread shows already: a terminal has room for one bar."""

    something = False
    # What all bars begin with.
    stage = ""


_shown = _Shown()


def _is_seen() -> bool:
    return sys.stderr.isatty() and not _shown.something


@contextlib.contextmanager
def stage(description: str) -> Iterator[None]:
    """Let every bar and spinner begin with the stage that the work is in, for example `ratio 10, 2 of 4`."""
    before, _shown.stage = _shown.stage, f"{description}: "
    try:
        yield
    finally:
        _shown.stage = before


def track(
    items: Sequence[_Item],
    description: str,
    size: Callable[[_Item], int] = lambda item: 1,
    note: Callable[[], str] = lambda: "",
    unit: str = "",
) -> Iterator[_Item]:
    """Yield the items; on a terminal, show a progress bar on standard error once it has taken over a second.

    Within other work that is shown, nothing is.

    Args:
        items: what there is to do.
        description: what is done.
        size: how much work an item is.
        note: what the bar says beside the time that is left, asked after each item.
        unit: of the work, for the rate.
    """
    if not _is_seen():
        yield from items
        return
    done = 0
    with _Bar(description, sum(map(size, items)), unit, note) as bar:
        for item in items:
            bar.draw()
            yield item
            done += size(item)
            bar.reach(done)


def for_seconds(seconds: float, least: int, description: str) -> Iterator[None]:
    """Yield for about so many seconds, and at least so often; on a terminal, show a bar as `track` does.

    The bar is drawn between two items and never while one runs, so that a measurement is not disturbed.
    """
    begun, count = time.perf_counter(), 0
    with _Bar(description, seconds, alone=True) if _is_seen() else contextlib.nullcontext() as bar:
        while count < least or time.perf_counter() < begun + seconds:
            yield
            count += 1
            if bar is not None:
                bar.reach(min(time.perf_counter() - begun, seconds))
                bar.draw()


class _Bar:
    """A progress bar that appears once the work has taken over a second: part, rate and the time that is left.

    Args:
        description: what is done.
        total: how much there is to do.
        unit: of the total; without one, there is no rate.
        note: what the bar says at its end.
        alone: draw in `draw` alone, and not from another thread ten times a second.
    """

    def __init__(
        self,
        description: str,
        total: float,
        unit: str = "",
        note: Callable[[], str] = lambda: "",
        alone: bool = False,
    ) -> None:
        # Imported here, so that `import roastify` does not import rich.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        # Without markup, which a file's name may look like.
        columns = [TextColumn("{task.description}", markup=False), BarColumn(_BAR_CELLS), TaskProgressColumn()]
        columns += [TextColumn("{task.fields[rate]}", markup=False)] if unit else []
        columns += [TimeRemainingColumn(compact=True), TextColumn("left  {task.fields[note]}", markup=False)]
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=not alone)
        name = printable(_shown.stage + description)
        self.task = self.progress.add_task(name, total=total, note=note(), rate="")
        self.unit, self.note, self.alone = unit, note, alone
        self.begun = self.drawn = time.monotonic()
        self.shown = False

    def __enter__(self) -> Self:
        _shown.something = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _shown.something = False
        if self.shown:
            self.progress.stop()

    def draw(self) -> None:
        """Show the bar, if the work has taken over a second."""
        now = time.monotonic()
        if not self.shown and now - self.begun > _PATIENCE_S:
            self.progress.start()
            self.shown = True
        elif self.shown and self.alone and now - self.drawn > _REDRAW_S:
            self.progress.refresh()
            self.drawn = now

    def reach(self, done: float) -> None:
        """Set how much is done."""
        rate = _rate(self.progress.tasks[0].speed, self.unit)
        self.progress.update(self.task, completed=done, note=self.note(), rate=rate)


def _rate(speed: float | None, unit: str) -> str:
    """Return units in a second in words, for example `12.3 steps/s`; nothing while it is not known."""
    if not speed:
        return ""
    prefixes = ["", "k", "M", "G"]
    while speed >= 1000 and len(prefixes) > 1:
        speed /= 1000
        prefixes.pop(0)
    return f"{speed:.3g} {prefixes[0]}{unit}/s" if unit == "B" else f"{speed:.3g}{prefixes[0]} {unit}/s"


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
    progress.add_task(printable(_shown.stage + description), total=None)
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
    """The numbers of a training as lines of JSON on standard error, for whoever reads it instead of a terminal.

    Nothing is written before the work has taken over a second. A point of the loss curve that comes within five seconds
    of another line is left out, unless it is the last. Evaluations are always written.

    Args:
        work: the name of the work, which every line has as `roastify`.
        steps: how many steps there are, which every line has too.
        every_point: whether no point is left out.
    """

    def __init__(self, work: str, steps: int, every_point: bool = False) -> None:
        self.work, self.steps, self.every_point = work, steps, every_point
        self.begun = time.monotonic()
        self.last: float | None = None
        self._waiting: list[str] = []

    def write(self, numbers: dict[str, Any]) -> None:
        """Write the numbers of a step as a line, unless standard error is a terminal.

        Args:
            numbers: `step` and, if they are a point of the loss curve, `loss`.
        """
        if sys.stderr.isatty():
            return
        now = time.monotonic()
        kept = self.every_point or "loss" not in numbers or numbers["step"] == self.steps
        if kept or self.last is None or now - self.last >= _BETWEEN_LINES_S:
            self._waiting.append(json.dumps({"roastify": self.work, **numbers, "steps": self.steps}))
            self.last = now
        if self._waiting and now - self.begun > _PATIENCE_S:
            print(*self._waiting, sep="\n", file=sys.stderr, flush=True)  # noqa: T201
            self._waiting.clear()

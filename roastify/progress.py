"""A progress bar on a terminal, for work that takes more than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_PATIENCE_S = 1.0
_Item = TypeVar("_Item")


def track(items: Sequence[_Item], description: str, size: Callable[[_Item], int] = lambda item: 1) -> Iterator[_Item]:
    """Yield the items; on a terminal, show a progress bar on standard error once it has taken over a second.

    Args:
        items: what there is to do.
        description: what is done.
        size: how much work an item is.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    # Imported here, so that `import roastify` does not import rich.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, TextColumn("left"), console=Console(stderr=True), transient=True)
    task = progress.add_task(description, total=sum(map(size, items)))
    begun = time.monotonic()
    shown = False
    try:
        for item in items:
            if not shown and time.monotonic() - begun > _PATIENCE_S:
                progress.start()
                shown = True
            yield item
            progress.advance(task, size(item))
    finally:
        if shown:
            progress.stop()

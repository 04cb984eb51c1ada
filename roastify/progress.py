"""A progress bar on a terminal, for work that takes more than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

_PATIENCE_S = 1.0
_Item = TypeVar("_Item")


def track(items: Sequence[_Item], description: str) -> Iterator[_Item]:
    """Yield the items; on a terminal, show a progress bar on standard error once it has taken over a second."""
    if not sys.stderr.isatty():
        yield from items
        return
    # Imported here, so that `import roastify` does not import rich.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(description, total=len(items))
    begun = time.monotonic()
    shown = False
    try:
        for item in items:
            if not shown and time.monotonic() - begun > _PATIENCE_S:
                progress.start()
                shown = True
            yield item
            progress.advance(task)
    finally:
        if shown:
            progress.stop()

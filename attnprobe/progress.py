"""Progress bars for long work, drawn by rich on standard error, and only on request.

Functions with an argument `progress` call this. What is left to others: what counts as a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[], None]


@contextmanager
def progress_bar(label: str, total: int | None, *, shown: bool) -> Iterator[Advance]:
    """Yield a function that advances the bar by one step; with `total=None` the end is unknown.

    >>> with progress_bar("measuring", 2, shown=False) as advance:
    ...     advance()
    """
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)

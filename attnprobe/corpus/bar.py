"""The progress bar of a run over a corpus: rows, tokens per second, and the time left.

`score` draws one for each pass. What is left to others: the bars of shorter work (progress).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnprobe.corpus.scorer import Advance


@contextmanager
def corpus_bar(label: str, rows: int, *, shown: bool, finished: int = 0) -> Iterator[Advance]:
    """Yield a function that advances the bar by rows and tokens.

    `finished` rows are there from an earlier run, and do not count in the speed.

    >>> with corpus_bar("scoring", 3, shown=False) as advance:
    ...     advance(1, 120)
    """
    if not shown:
        yield lambda rows, tokens: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows, {task.fields[speed]} tokens/s, left"),
        # Over ten minutes: shards differ in length.
        TimeRemainingColumn(),
        TextColumn("after"),
        TimeElapsedColumn(),
    )
    total = 0
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as progress:
        task = progress.add_task(label, total=rows, completed=finished, speed="-")

        def advance(rows: int, tokens: int) -> None:
            nonlocal total
            total += tokens
            elapsed = progress.tasks[task].elapsed
            speed = f"{total / elapsed:,.0f}" if elapsed and total else "-"
            progress.update(task, advance=rows, speed=speed)

        yield advance

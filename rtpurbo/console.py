"""What the command line and the demo draw while they work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(console: Console, label: str) -> Iterator[Callable[..., None]]:
    """A progress bar; yields tick(done, total, label)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(label, total=None)

        def tick(done: int, total: int, now: str = label) -> None:
            progress.update(task, completed=done, total=total, description=now)

        yield tick

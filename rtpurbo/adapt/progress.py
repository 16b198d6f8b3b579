"""Progress of a training run: a rich bar on a terminal, ten plain lines elsewhere."""

import time
from typing import Any


class Progress:
    """Shows how far a run is, its figures and the time that is left.

    Args:
        total, first: the last step, and how many were done before.
        shown: False shows nothing (other processes, or a quiet run).
    """

    def __init__(self, name: str, total: int, first: int, shown: bool):
        self._name = name
        self._total = total
        self._first = first
        self._shown = shown
        self._every = max(1, (total - first) // 10)
        self._began = time.perf_counter()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self._shown:
            import rich
            from rich import progress as parts

            if rich.get_console().is_terminal:
                self._bar = parts.Progress(
                    parts.TextColumn("{task.description}"),
                    parts.BarColumn(),
                    parts.MofNCompleteColumn(),
                    parts.TextColumn("{task.fields[figures]}"),
                    parts.TimeElapsedColumn(),
                    parts.TextColumn("ETA"),
                    parts.TimeRemainingColumn(),
                )
                self._bar.start()
                self._task = self._bar.add_task(
                    self._name, total=self._total, completed=self._first, figures=""
                )
        return self

    def __call__(self, step: int, figures: str) -> None:
        """Reports that `step` steps are done."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step % self._every == 0 or step == self._total:
            spent = time.perf_counter() - self._began
            left = spent / (step - self._first) * (self._total - step)
            print(f"{self._name} {step}/{self._total}  {figures}  ETA {left:.0f} s", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

"""A kernel of another project as a baseline of a case."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

from benchmarks.measure import captured, cuda_seconds
from benchmarks.peers.problems import Problem, check
from benchmarks.registry import Run

P = TypeVar("P", bound=Problem)
FEW_ROWS = 16
CLOCKED = 5


class PeerError(RuntimeError):
    """A peer is not installed, cannot do it or does something else; `measure` makes it a note."""


class Peer(Generic[P]):
    """Made and checked by its first call.

    `solve` makes a run that returns the output [B, H, M, D] of a problem. Every row of that of
    `small` is compared with SDPA, and a few rows of that of each of the `problems`, which are made
    late, too: a layout of their own may take much memory.
    """

    def __init__(
        self,
        solve: Callable[[P], Callable[[], Tensor]],
        small: Callable[[], P],
        problems: Callable[[], Iterable[P]],
    ) -> None:
        self.solve, self.small, self.problems = solve, small, problems
        self.runs: list[Run] | None = None

    def __call__(self) -> object:
        try:
            if self.runs is None:
                self.runs = self.made()
            return [run() for run in self.runs]
        except Exception as error:  # of whatever kind: the benchmark goes on without the peer
            raise PeerError(f"{type(error).__name__}: {error}") from error

    def made(self) -> list[Run]:
        small = self.small()
        check(self.solve(small)(), small)
        runs: list[Run] = []
        for problem in self.problems():
            run = self.solve(problem)
            check(run(), problem, FEW_ROWS)
            runs.append(run)
        return runs


def fastest(runs: Iterable[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Of several settings, which a user would have to choose; without what launches cost."""

    def seconds(run: Run) -> float:
        run()
        replay = captured(run, None)
        return min(cuda_seconds(replay) for _ in range(CLOCKED))

    candidates = list(runs)
    return min(candidates, key=seconds) if len(candidates) > 1 else candidates[0]

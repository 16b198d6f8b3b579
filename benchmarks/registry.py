"""What a benchmark is, and the list of all of them.

A module of this package registers a function that yields cases. It is told which are wanted, so
that it builds no tensors for others. The runner times a case and its baselines in turns, so that
their ratio comes from one run; cases yielded as a list take their turns together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Run: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One line of the results: `run` against `baselines`.

    `flops` are those of `run`'s mask, `bytes` what it cannot but read; `goals` gives, by baseline,
    the speed ratio to reach, `goal_seconds` the time of a round. A call of `run` or a baseline does
    the work `rounds` times. On "cuda" short calls are captured in graphs. A run that cases of a
    list share, the same object, is timed once for all of them. `facts` are what the inputs turned
    out to be; they are reported and choose nothing.
    """

    parameters: dict[str, Any]
    run: Run
    baselines: dict[str, Run]
    flops: float | None = None
    bytes: float | None = None
    goals: dict[str, float] = field(default_factory=dict)
    rounds: int = 1
    device: str = "cpu"
    facts: dict[str, float] = field(default_factory=dict)
    goal_seconds: float | None = None


def in_turn(runs: Sequence[Run]) -> Run:
    """One call of each, after each other."""
    return lambda: [run() for run in runs]


Wanted: TypeAlias = Callable[[dict[str, Any]], bool]
"""Tells by its parameters whether a case is to run."""

Benchmark: TypeAlias = Callable[[Wanted], Iterator[Case | list[Case]]]

BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(function: Benchmark) -> Benchmark:
    """Registers a generator of cases under its own name."""
    BENCHMARKS[function.__name__] = function
    return function

"""What a benchmark is, and the list of all of them.

A module of this package registers a function that yields cases. The runner times the case and its
baselines in turns, so that their ratio comes from one run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One line of the results: `run` against `baselines`.

    `flops` are those of `run`'s mask; `goals` gives, by baseline, the speed ratio to reach. A call
    of `run` or a baseline does the work `rounds` times. On "cuda" the calls are captured in graphs.
    """

    parameters: dict[str, Any]
    run: Run
    baselines: dict[str, Run]
    flops: float | None = None
    goals: dict[str, float] = field(default_factory=dict)
    rounds: int = 1
    device: str = "cpu"


BENCHMARKS: dict[str, Callable[[], Iterator[Case]]] = {}


def benchmark(function: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    """Registers a generator of cases under its own name."""
    BENCHMARKS[function.__name__] = function
    return function

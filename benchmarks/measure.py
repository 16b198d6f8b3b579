"""Times cases and their baselines in turns and reads the peak of memory beside each."""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from benchmarks.registry import Case, Run

CUDA_REPEATS = 10
CUDA_SECONDS = 1.0
"""What the repeats of one callable may take, as far as two of them do."""
EAGER_REPEATS = 5
LONG = 0.2
"""Seconds from which launches no longer count, so that a graph is not worth two more runs."""


@dataclass
class Timer:
    """A callable that is warm, how often it is to be timed, and what was read so far."""

    run: Run
    clock: Callable[[Run], float]
    repeats: int
    peak: int
    seconds: list[float] = field(default_factory=list)
    eager: float | None = None
    """Seconds of a call that is not replayed from a graph."""

    def take_turn(self) -> None:
        if len(self.seconds) < self.repeats:
            self.seconds.append(self.clock(self.run))


def measure(cases: list[Case], repeats: int) -> list[dict[str, Any]]:
    """A row for each case: median seconds, ratios (above 1: faster than the baseline), peaks.

    A baseline that cannot run, for want of memory or of a compiler, gets a note instead of times.
    """
    if cases[0].device == "cuda":
        # One pool for all graphs: nothing reads their outputs, so they may overwrite each other.
        timer_of = partial(cuda_timer, repeats=repeats, pool=torch.cuda.graph_pool_handle())
    else:
        timer_of = partial(cpu_timer, repeats=repeats)
    ours = {case.run for case in cases}
    timers: dict[Run, Timer] = {}
    failures: dict[Run, str] = {}
    for run in dict.fromkeys(r for case in cases for r in (case.run, *case.baselines.values())):
        try:
            timers[run] = timer_of(run)
        except RuntimeError as error:
            if run in ours:
                raise
            failures[run] = f"{type(error).__name__}: {error}".splitlines()[0]
    # Forth and back, so that none always follows the one that takes most power.
    in_order = list(timers.values())
    for turn in range(max(timer.repeats for timer in in_order)):
        for timer in in_order if turn % 2 == 0 else reversed(in_order):
            timer.take_turn()
    return [row(case, timers, failures) for case in cases]


def row(case: Case, timers: dict[Run, Timer], failures: dict[Run, str]) -> dict[str, Any]:
    runs = {"ours": case.run, **case.baselines}
    on_cuda = case.device == "cuda"
    timed = {name: timers[run] for name, run in runs.items() if run in timers}
    medians = {name: statistics.median(t.seconds) / case.rounds for name, t in timed.items()}
    ours = medians.pop("ours")
    ratios = {name: median / ours for name, median in medians.items()}
    return {
        **case.parameters,
        "seconds": ours,
        "facts": case.facts,
        "baseline_seconds": medians,
        "ratios": ratios,
        "goals": case.goals,
        "goal_seconds": case.goal_seconds,
        "reached": reached(case, ours, ratios),
        "gflops_per_second": case.flops / ours / 1e9 if case.flops else None,
        "bytes": case.bytes,
        "gbytes_per_second": case.bytes / ours / 1e9 if case.bytes else None,
        "copy_share": case.bytes / ours / copy_rate() if case.bytes and on_cuda else None,
        "eager_seconds": {n: t.eager / case.rounds for n, t in timed.items() if t.eager},
        "peak_extra_bytes": {name: timer.peak for name, timer in timed.items()},
        "repeats": {name: len(timer.seconds) for name, timer in timed.items()},
        "notes": {name: failures[run] for name, run in runs.items() if run in failures},
    }


def reached(case: Case, ours: float, ratios: dict[str, float]) -> bool | None:
    """None of a case without a goal."""
    if not case.goals and case.goal_seconds is None:
        return None
    in_time = case.goal_seconds is None or ours <= case.goal_seconds
    return in_time and all(ratios.get(name, 0.0) >= goal for name, goal in case.goals.items())


def cpu_timer(run: Run, repeats: int) -> Timer:
    return Timer(run, seconds, repeats, peak=peak_extra_bytes(run))  # warms up, too


def cuda_timer(run: Run, repeats: int, pool: Any) -> Timer:
    run()  # warms up
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = cuda_seconds(run)
    peak = torch.cuda.max_memory_allocated() - before
    repeats = affordable(taken, repeats * CUDA_REPEATS)
    if taken > LONG:
        return Timer(run, cuda_seconds, repeats, peak, [taken])
    eager = statistics.median(cuda_seconds(run) for _ in range(min(repeats, EAGER_REPEATS)))
    return Timer(captured(run, pool), cuda_seconds, repeats, peak, eager=eager)


def affordable(taken: float, most: int) -> int:
    """Repeats of a run that takes so many seconds: two at least, for a median."""
    return max(2, min(most, int(CUDA_SECONDS / taken)))


def captured(run: Run, pool: Any) -> Run:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    graph.replay()
    return graph.replay


@cache
def copy_rate() -> float:
    """Bytes that this GPU reads and writes in a second when it copies."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [cuda_seconds(lambda: target.copy_(source)) for _ in range(CUDA_REPEATS)]
    return 2 * source.numel() / statistics.median(times)


def cuda_seconds(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak_extra_bytes(run: Run) -> int:
    """How far the resident memory rose while `run` ran (Linux, glibc)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed before counts again
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak starts over from here
    before = status_bytes("VmRSS")
    run()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

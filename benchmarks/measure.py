"""Times a case and its baselines in turns and reads the peak of memory beside each."""

import ctypes
import statistics
import time
from typing import Any

import torch

from benchmarks.registry import Case, Run

CUDA_REPEATS = 10


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Median seconds, ratios (above 1: faster than the baseline), peak extra memory in bytes."""
    runs: dict[str, Run] = {"ours": case.run, **case.baselines}
    on_cuda = case.device == "cuda"
    peak, clock = (cuda_peak_bytes, cuda_seconds) if on_cuda else (peak_extra_bytes, seconds)
    peaks = {name: peak(run) for name, run in runs.items()}  # these runs warm up, too
    if on_cuda:
        runs = {name: captured(run) for name, run in runs.items()}
        repeats *= CUDA_REPEATS
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(clock(run) / case.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians.pop("ours")
    ratios = {name: median / ours for name, median in medians.items()}
    return {
        **case.parameters,
        "seconds": ours,
        "baseline_seconds": medians,
        "ratios": ratios,
        "goals": case.goals,
        "reached": all(ratios[name] >= goal for name, goal in case.goals.items()),
        "gflops_per_second": case.flops / ours / 1e9 if case.flops else None,
        "peak_extra_bytes": peaks,
    }


def captured(run: Run) -> Run:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def cuda_seconds(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def cuda_peak_bytes(run: Run) -> int:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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

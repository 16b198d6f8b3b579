"""Each stage of a decode step on the GPU alone, against a copy that moves as many bytes.

| stage | what runs |
|---|---|
| near | `decode` of sinks and window, all heads local |
| scan | `select` up to the barrier behind its scores: p = 1 takes every key, and one has room |
| top_p | `top_p` of given float32 scores; it writes an index, or padding, for each of them; \
its baseline `sort` is the same with `exact` |
| select | scan and top-p in one launch |
| gather | `decode` of the lists, and of one near key a head, which it cannot do without |
| step | `sparse_decode` |

The `floor` copies half of the bytes that a stage must read, so that it moves as many: the ratio is
the share of the memory's speed that the stage reaches. What top-p adds to a step is `select` less
its baseline `scan`. Of 4 bits there are the stages that read index keys. Inputs rotate, so that
none of them is still in the L2 cache.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.decode_layer import SELECTED, Step
from benchmarks.registry import Case, Run, Wanted, benchmark, in_turn

LENGTHS = (131_072, 1_048_576)
STAGES = {
    "near": Step.attend_near,
    "scan": Step.scan,
    "top_p": Step.top_p,
    "select": Step.select,
    "gather": Step.gather,
    "step": Step.select_and_attend,
}
STAGES_OF_BITS = {16: tuple(STAGES), 4: ("scan", "select", "step")}
GOALS = {
    ("scan", 16, 131_072): 7.5e-6,
    ("scan", 16, 1_048_576): 50e-6,
    ("scan", 4, 1_048_576): 16e-6,
    ("select", 16, 131_072): 10.5e-6,
    ("gather", 16, 131_072): 9e-6,
    ("gather", 16, 1_048_576): 9e-6,
    ("step", 16, 131_072): 30e-6,
    ("step", 16, 1_048_576): 70e-6,
    ("step", 4, 1_048_576): 40e-6,
}
"""Seconds, by stage, bits and keys; that of `select` is the scan's and 3 us for top-p."""
ROTATED = 1 << 27
"""Bytes that a stage reads, at least, before it reads the same ones again."""
ALIGNED = 256


def bytes_of(step: Step, stage: str) -> int:
    return step.bytes("sparse_decode" if stage == "step" else stage)


def rotating_steps(keys: int, bits: int, stages: list[str], device: str) -> list[Step]:
    """As many as the stage that reads least needs."""
    first = Step(1, keys, bits=bits, device=device)
    rounds = -(-ROTATED // min(bytes_of(first, stage) for stage in stages))
    others = [Step(1, keys, bits=bits, device=device) for _ in range(rounds - 1)]
    return [first, *others]


def copies(moved: int, rounds: int, device: str) -> Run:
    """Each reads and writes half of the bytes `moved`, at places of its own."""
    half = -(-moved // (2 * ALIGNED)) * ALIGNED
    sources = torch.empty(rounds, half, dtype=torch.uint8, device=device)
    targets = torch.empty_like(sources)
    return in_turn([partial(t.copy_, s) for t, s in zip(targets, sources, strict=True)])


def parameters_at(keys: int, bits: int) -> Iterator[dict[str, Any]]:
    for stage in STAGES_OF_BITS[bits]:
        yield {"stage": stage, "selected": SELECTED, "bits": bits, "keys": keys}


def cases_at(
    keys: int, bits: int, chosen: list[dict[str, Any]], device: str = "cuda"
) -> list[Case]:
    stages = [parameters["stage"] for parameters in chosen]
    steps = rotating_steps(keys, bits, stages, device)

    def in_turn_of_steps(run: Callable[[Step], object]) -> Run:
        return in_turn([partial(run, step) for step in steps])

    runs = {stage: in_turn_of_steps(run) for stage, run in STAGES.items()}
    besides = {
        "select": {"scan": runs["scan"]},
        "top_p": {"sort": in_turn_of_steps(Step.exact_top_p)},
    }
    sizes = {stage: bytes_of(steps[0], stage) for stage in stages}
    floors = {size: copies(size, len(steps), device) for size in set(sizes.values())}
    return [
        Case(
            parameters=parameters,
            run=runs[stage],
            baselines={"floor": floors[sizes[stage]], **besides.get(stage, {})},
            bytes=sizes[stage],
            goal_seconds=GOALS.get((stage, bits, keys)),
            rounds=len(steps),
            device=device,
        )
        for stage, parameters in zip(stages, chosen, strict=True)
    ]


@benchmark
def decode_stages_cuda(wanted: Wanted) -> Iterator[list[Case]]:
    if not torch.cuda.is_available():
        return
    for keys in LENGTHS:
        for bits in STAGES_OF_BITS:
            chosen = [parameters for parameters in parameters_at(keys, bits) if wanted(parameters)]
            if chosen:
                yield cases_at(keys, bits, chosen)
                torch.cuda.empty_cache()

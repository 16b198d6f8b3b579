"""One decoded token of a layer on the GPU: `sparse_decode` against dense SDPA, and its parts.

Inputs rotate, so that from 8K keys on little of a window is still in the L2 cache; times are of
graph replays.
Kernels of other projects join in where they are installed (`benchmarks/peers`): one is dense; the
others attend to the same tokens and choose none, which makes `attend` their like.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.decode_layer import HEADS, RETRIEVAL, SELECTED, SINKS, WINDOW, Step
from benchmarks.dense import BACKENDS, dense
from benchmarks.peers.decode import decode_peers, dense_peers
from benchmarks.registry import Case, Wanted, benchmark, in_turn

PARTS = {
    "step": Step.whole,
    "sparse_decode": Step.select_and_attend,
    "near_lse": Step.near_lse,
    "select": Step.select,
    "attend": Step.attend,
}


def baselines(steps: list[Step]) -> dict[str, dict[str, Callable[[], object]]]:
    """By part."""
    runs: dict[str, Callable[[], object]] = {
        name: in_turn([partial(dense, b, step.q, step.k, step.v) for step in steps])
        for name, b in BACKENDS.items()
    }
    runs.update(dense_peers(steps))
    if steps[0].k.shape[2] <= WINDOW + SINKS:
        return {"step": runs}
    runs["fixed blocks of 16"] = in_turn([step.fixed_blocks for step in steps])
    peers = decode_peers(steps, WINDOW, SINKS)
    return {
        "step": {**runs, **peers},
        "refined step": runs,
        "sparse_decode": {**peers},
        "attend": {**peers},
    }


EVERY_HEAD = list(range(HEADS))
OPTIONS = ("shared", "selected", "min_tokens")
DEFAULTS_SELECT = [(1, 71_680), (4, 26_624), (16, 15_360), (64, 12_544)]
"""Batch and keys, little more than from which on the rule selects with 64 `min_tokens`."""
SHAPES = [
    *[dict(batch=1, keys=keys) for keys in (16, 256, 1024)],
    *[dict(batch=1, keys=2**i * 1024) for i in range(2, 11)],
    *[dict(batch=1, keys=keys, bits=bits) for bits in (8, 4) for keys in (131_072, 1_048_576)],
    *[dict(batch=batch, keys=2**i * 1024) for batch in (4, 16) for i in (2, 3, 5, 7, 9, 10)],
    *[dict(batch=batch, keys=keys) for batch in (2, 8, 32) for keys in (1024, 8192, 32_768)],
    *[dict(batch=batch, keys=256) for batch in (4, 16, 64)],
    *[
        dict(batch=1, keys=keys, selected=selected)
        for keys in (131_072, 1_048_576)
        for selected in (512, 2048, 16_384)
    ],
    *[dict(batch=64, keys=keys) for keys in (1024, 8192, 32_768)],
    *[
        dict(batch=batch, keys=keys, selected=selected, min_tokens=64)
        for batch, keys in DEFAULTS_SELECT
        for selected in (64, 1024)
    ],
    *[
        dict(batch=1, keys=keys, heads="all", **index)
        for keys in (131_072, 262_144, 524_288, 1_048_576)
        for index in (dict(shared=False), dict(shared=True), dict(bits=4))
    ],
]


def goals(parameters: dict[str, Any]) -> dict[str, float]:
    """A step is never slower than dense attention, and from 128K on quicker."""
    if parameters["part"] != "step":
        return {}
    batch, keys, bits = parameters["batch"], parameters["keys"], parameters.get("bits", 16)
    goal = 1.0
    if parameters.get("heads") == "all":
        goal = 4.5 if bits == 4 else 4.0 if parameters["shared"] else 1.95
    elif parameters["selected"] == SELECTED:
        at_1m = 14.0 if bits == 4 else 8.0
        named = {(1, 131_072): 3.4, (1, 1_048_576): at_1m, (16, 131_072): 5.0}
        goal = named.get((batch, keys), 1.0)
    return {"cudnn": goal, "flash": 1.0}


@benchmark
def decode_cuda(wanted: Wanted) -> Iterator[Case]:
    if not torch.cuda.is_available():
        return
    for shape in SHAPES:
        batch, keys, bits = shape["batch"], shape["keys"], shape.get("bits", 16)
        heads = EVERY_HEAD if shape.get("heads") == "all" else RETRIEVAL
        rounds = 6 if batch * keys <= 524_288 else 3 if batch * keys <= 4_194_304 else 1
        apart = keys in (131_072, 1_048_576) and batch == 1 and "selected" not in shape
        parts = PARTS if apart else {"step": Step.whole}
        if heads is EVERY_HEAD:  # what the rule spares, too
            parts = {**parts, "sparse_decode": Step.select_and_attend}
        if bits < 16:
            parts = {**parts, "refine": Step.refine, "refined step": Step.refine_and_attend}
        parameters = {part: {"part": part, "selected": SELECTED, **shape} for part in parts}
        chosen = [part for part in parts if wanted(parameters[part])]
        if not chosen:
            continue
        options = {name: shape[name] for name in OPTIONS if name in shape}
        steps = [Step(batch, keys, heads, bits, **options) for _ in range(rounds)]
        against = baselines(steps)
        for part in chosen:
            yield Case(
                parameters=parameters[part],
                run=in_turn([partial(parts[part], step) for step in steps]),
                baselines=against.get(part, {}),
                bytes=steps[0].bytes(part),
                goals=goals(parameters[part]),
                rounds=len(steps),
                device="cuda",
            )
        del steps, against
        torch.cuda.empty_cache()

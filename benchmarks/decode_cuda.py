"""One decoded token of a layer on the GPU: `sparse_decode` against dense SDPA, and its parts.

| parameter | without it | |
|---|---|---|
| heads | 5 of 32/4/128 retrieve | `all` of them do, or another layer's |
| min_tokens | `selected` | what the rule takes a head to select |
| window | 8192 | |
| form | `beyond_window` | of the index: in `full` a model's `recent` keys are near |

Inputs rotate, so that from 8K keys on (9/3/64: 32K) little of a window is still in the L2 cache;
times are of graph replays.
Kernels of other projects join in where they are installed (`benchmarks/peers`): one is dense; the
others attend to the same tokens and choose none, which makes `attend` their like.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.attention import SMALL, WIDE, Layer
from benchmarks.decode_layer import LAYER, SELECTED, SINKS, WINDOW, Step, rounds
from benchmarks.dense import dense_in_turn
from benchmarks.peers.decode import decode_peers, dense_peers
from benchmarks.registry import Case, Wanted, benchmark, in_turn

PARTS: dict[str, Callable[[Step], object]] = {
    "step": Step.whole,
    "sparse_decode": Step.select_and_attend,
    "exact sparse_decode": Step.select_exactly_and_attend,
    "near_lse": Step.near_lse,
    "select": Step.select,
    "attend": Step.attend,
}


def baselines(steps: list[Step]) -> dict[str, dict[str, Callable[[], object]]]:
    """By part."""
    runs = dense_in_turn((step.q, step.k, step.v) for step in steps)
    runs.update(dense_peers(steps))
    if steps[0].k.shape[2] <= steps[0].near_window + SINKS:
        return {"step": runs}
    runs["fixed blocks of 16"] = in_turn([step.fixed_blocks for step in steps])
    peers = decode_peers(steps, SINKS)
    return {
        "step": {**runs, **peers},
        "refined step": runs,
        "sparse_decode": {**peers},
        "attend": {**peers},
    }


HEADS = {
    "all": replace(LAYER, retrieval_heads=tuple(range(LAYER.heads))),
    SMALL.shape: SMALL,
    WIDE.shape: WIDE,
}
LENGTHS = [16, 64, 256, 512, *(2**i * 1024 for i in range(11))]
DEFAULTS_SELECT = [(1, 39_936), (4, 18_432), (16, 12_800), (64, 11_264)]
"""Batch and keys: a few more than those from which on an H200 selects with 64 `min_tokens`."""
SHAPES: list[dict[str, Any]] = [
    *[
        dict(batch=batch, keys=keys)
        for batch in (1, 4, 16, 2, 8, 32, 64)
        for keys in LENGTHS
        if batch * keys <= 1 << 24
    ],
    *[dict(batch=1, keys=keys, bits=bits) for bits in (8, 4) for keys in (131_072, 1_048_576)],
    *[
        dict(batch=1, keys=keys, selected=selected)
        for keys in (131_072, 1_048_576)
        for selected in (512, 2048, 16_384)
    ],
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
    *[
        dict(batch=batch, keys=keys, heads=layer.shape, selected=1024, min_tokens=64)
        for layer in (SMALL, WIDE)
        for batch in (1, 4, 16, 64)
        for keys in LENGTHS
        if batch * keys <= 1 << 22
    ],
    *[
        dict(batch=1, keys=keys, **other)
        for keys in (131_072, 1_048_576)
        for other in (dict(form="full"), dict(window=1024))
    ],
]


def layer_of(shape: dict[str, Any]) -> Layer:
    return HEADS[shape["heads"]] if "heads" in shape else LAYER


def step_of(shape: dict[str, Any], device: str = "cuda") -> Step:
    options = {name: value for name, value in shape.items() if name != "heads"}
    return Step(layer=layer_of(shape), device=device, **options)


def rounds_of(shape: dict[str, Any]) -> int:
    return rounds(layer_of(shape), shape["batch"], shape["keys"])


def parts_of(shape: dict[str, Any]) -> dict[str, Callable[[Step], object]]:
    keys, bits = shape["keys"], shape.get("bits", 16)
    apart = keys in (131_072, 1_048_576) and shape["batch"] == 1 and "selected" not in shape
    parts = {part: run for part, run in PARTS.items() if apart or part == "step"}
    if "heads" in shape and keys > WINDOW + SINKS:  # what the rule spares, too
        parts["sparse_decode"] = Step.select_and_attend
    if bits < 16:
        parts |= {"refine": Step.refine, "refined step": Step.refine_and_attend}
    if shape.get("form") == "full":
        parts.pop("near_lse", None)
    return parts


def goals(parameters: dict[str, Any]) -> dict[str, float]:
    """A step is never slower than dense attention, and from 128K on quicker."""
    if parameters["part"] != "step":
        return {}
    batch, keys, bits = parameters["batch"], parameters["keys"], parameters.get("bits", 16)
    goal = 1.0
    if parameters.get("heads") == "all":
        goal = 4.5 if bits == 4 else 4.0 if parameters["shared"] else 1.95
    elif parameters["selected"] == SELECTED and not {"form", "window"} & parameters.keys():
        at_1m = 14.0 if bits == 4 else 8.0
        named = {(1, 131_072): 3.4, (1, 1_048_576): at_1m, (16, 131_072): 5.0}
        goal = named.get((batch, keys), 1.0)
    return {"cudnn": goal, "flash": 1.0}


@benchmark
def decode_cuda(wanted: Wanted) -> Iterator[Case]:
    if not torch.cuda.is_available():
        return
    for shape in SHAPES:
        parts = parts_of(shape)
        parameters = {part: {"part": part, "selected": SELECTED, **shape} for part in parts}
        chosen = [part for part in parts if wanted(parameters[part])]
        if not chosen:
            continue
        steps = [step_of(shape) for _ in range(rounds_of(shape))]
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

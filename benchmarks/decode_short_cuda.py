"""The short-input rule of a decode step: a layer as the rule runs it, against both ways.

A head selects SELECTED tokens, as many as the rule takes the default to. `retrieval`: how many
heads retrieve, `owners`: how many KV heads have one. `selects`: 1 or 0.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.attention import SMALL, WIDE, Layer
from benchmarks.decode_layer import LAYER, Step, rounds
from benchmarks.dense import dense_in_turn
from benchmarks.registry import Case, Wanted, benchmark, in_turn
from rtpurbo import RTPurboConfig
from rtpurbo.short_inputs.decode import USUAL_TOKENS

LAYERS_OF_RULE = [
    *[replace(LAYER, retrieval_heads=heads) for heads in ((1,), (1, 9), (0, 1, 2, 3))],
    LAYER,
    Layer(32, 8, 64, (1, 9, 10, 17, 30)),
    *[replace(SMALL, retrieval_heads=heads) for heads in ((4,), (0, 4, 8))],
    *[replace(WIDE, retrieval_heads=heads) for heads in ((1,), (1, 6, 13))],
]
SELECTED, MIN_TOKENS = USUAL_TOKENS, RTPurboConfig.min_tokens
LENGTHS = [2**i * 1024 for i in range(4, 9)]
MOST_KEYS = 524_288
"""Of a batch."""
SHAPES = [
    (layer, batch, keys)
    for layer in LAYERS_OF_RULE
    for batch in (1, 4, 16)
    for keys in LENGTHS
    if batch * keys <= MOST_KEYS
]


def parameters_of(layer: Layer, batch: int, keys: int) -> dict[str, Any]:
    owners = len(set(layer.owners))
    heads = {"heads": layer.shape, "retrieval": len(layer.retrieval_heads), "owners": owners}
    return {**heads, "batch": batch, "keys": keys}


def case_of(layer: Layer, batch: int, keys: int, device: str = "cuda") -> Case:
    options: dict[str, Any] = dict(selected=SELECTED, min_tokens=MIN_TOKENS, device=device)
    steps = [Step(batch, keys, layer, **options) for _ in range(rounds(layer, batch, keys))]
    ways = {
        "dense retrieval heads": in_turn([partial(s.decoded, s.retrieval) for s in steps]),
        "listed retrieval heads": in_turn([step.select_and_attend for step in steps]),
    }
    others = dense_in_turn((step.q, step.k, step.v) for step in steps)
    return Case(
        parameters=parameters_of(layer, batch, keys),
        run=in_turn([step.whole for step in steps]),
        baselines={**ways, **others},
        goals={"dense retrieval heads": 1.0, **dict.fromkeys(others, 1.0)},
        rounds=len(steps),
        device=device,
        facts={"selects": float(steps[0].selects)},
    )


@benchmark
def decode_short_cuda(wanted: Wanted) -> Iterator[Case]:
    if not torch.cuda.is_available():
        return
    for shape in SHAPES:
        if wanted(parameters_of(*shape)):
            yield case_of(*shape)
            torch.cuda.empty_cache()

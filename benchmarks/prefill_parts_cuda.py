"""What one launch for heads of all roles saves a prefilled layer, and what its selection costs.

| mode | what runs | against |
|---|---|---|
| layer | `attention`: retrieval heads dense, the others local | `one launch a role` |
| attention | the same, retrieval heads by block lists | `one launch a role` |
| sparse | a layer of `prefill="sparse"` | `index_project`, its `near_lse`, its `select_tiles` |

`one launch a role` is two of `attention`, after each other: for the retrieval heads and for the
local ones, whose outputs stay apart. Each must have as many heads on each KV head, so there is one
retrieval head on each. Against parts of itself the ratio is a part's share of the time;
`index_project`, of the layer's rows, comes before it. Lists are random ones of the named density,
as in `prefill_cuda`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.attention import LAYERS, Layer
from benchmarks.prefill_cuda import lowest_density
from benchmarks.prefill_layer import SINKS, Lists, Prefill
from benchmarks.random_lists import ListPlan
from benchmarks.registry import Case, Wanted, benchmark, in_turn

EVEN = Layer(32, 4, 128, (3, 14, 20, 27))
MODES = {EVEN: ("layer", "attention"), LAYERS[0]: ("sparse",)}
LENGTHS = (32768, 131_072)
DENSITIES = {1024: 0.08, 8192: 0.15}
"""By window."""


def parameters_at(layer: Layer, keys: int) -> Iterator[dict[str, Any]]:
    for window, density in DENSITIES.items():
        for mode in MODES[layer]:
            heads = len(layer.retrieval_heads)
            parameters = {"mode": mode, "retrieval": heads, "keys": keys, "window": window}
            if mode == "layer":
                yield parameters
            elif density >= lowest_density(keys, window):
                yield {**parameters, "density": str(density)}


def random_lists(prefill: Prefill, parameters: dict[str, Any]) -> Lists:
    density = float(parameters["density"])
    plan = ListPlan(prefill.keys, parameters["window"], SINKS, density)
    return plan.draw(len(prefill.retrieval), prefill.device)


def launch_case(whole: Prefill, parameters: dict[str, Any]) -> Case:
    retrieval, local = whole.role(retrieval=True), whole.role(retrieval=False)
    window = parameters["window"]
    lists = None if parameters["mode"] == "layer" else random_lists(whole, parameters)
    apart = [
        partial(retrieval.attend, retrieval.retrieval, window, lists),
        partial(local.attend, [], window),
    ]
    return Case(
        parameters=parameters,
        run=partial(whole.attend, whole.retrieval, window, lists),
        baselines={"one launch a role": in_turn(apart)},
        device=whole.device,
    )


def selection_case(prefill: Prefill, parameters: dict[str, Any]) -> Case:
    window = parameters["window"]
    return Case(
        parameters=parameters,
        run=partial(prefill.sparse, window, random_lists(prefill, parameters)),
        baselines={
            "index_project": prefill.index_project,
            "near_lse": partial(prefill.near_lse, window),
            "select_tiles": partial(prefill.select_tiles, window, prefill.near_lse(window)),
        },
        device=prefill.device,
    )


def cases_at(
    layer: Layer, keys: int, chosen: list[dict[str, Any]], device: str = "cuda"
) -> list[Case]:
    prefill = Prefill(layer, keys, device)
    return [
        (selection_case if parameters["mode"] == "sparse" else launch_case)(prefill, parameters)
        for parameters in chosen
    ]


@benchmark
def prefill_parts_cuda(wanted: Wanted) -> Iterator[list[Case]]:
    if not torch.cuda.is_available():
        return
    for layer in MODES:
        for keys in LENGTHS:
            chosen = [parameters for parameters in parameters_at(layer, keys) if wanted(parameters)]
            if chosen:
                yield cases_at(layer, keys, chosen)
                torch.cuda.empty_cache()

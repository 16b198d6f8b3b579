"""Attention of one prefilled layer on the GPU against dense SDPA and compiled flex_attention.

| mode | what runs |
|---|---|
| near, dense | `attention` with all heads local, with all heads dense |
| layer | `attention` with retrieval heads dense and the others local |
| lists | `attention` of every head by random block lists of one density, a window's included |
| sparse | a layer of `prefill="sparse"`, form `beyond_window`: the next three after each other |
| near_lse, select_tiles | of the retrieval heads |
| attention | retrieval heads by block lists, the others local |

An index with random keys gives no say in the density. So `select_tiles` runs in full, its time
hardly depends on the data, but the attention reads random lists of the named density: the share of
the causal pairs of a row and a key that a retrieval head attends to, window and sinks included.
Rates count the FLOPs of the attention's mask. Goals are for the default window.
Kernels of other projects join in where they are installed (`benchmarks/peers`).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.attention import LARGE, SMALL, Layer
from benchmarks.dense_prefill import cudnn, flash
from benchmarks.masks import dense_pairs, near_pairs
from benchmarks.peers.prefill import listed_peers, windowed_peers
from benchmarks.prefill_layer import SINKS, Prefill
from benchmarks.random_lists import ListPlan
from benchmarks.registry import Case, Run, Wanted, benchmark

LENGTHS = [(LARGE, 2**i * 1024) for i in range(2, 11)] + [(SMALL, 32768)]
WINDOW = 8192
WINDOWS = {LARGE: (1024, WINDOW), SMALL: (1024,)}
NAMED = {131_072: (0.15, 0.28), 524_288: (0.12,), 1 << 20: (0.05, 0.08)}
GRID, GRID_LENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5), (32768, 131_072, 524_288, 1 << 20)
SMALL_DENSITY = 0.19  # what that model needs at 32K
PARTS_AT = (131_072, 1 << 20)
LISTS, LISTS_UP_TO = (0.05, 0.12, 0.3), 131_072
LONGEST_LISTS = (0.05, 0.12)
"""Of 1M keys."""
FLEX_UP_TO = 131_072
"""Its masks list pairs of blocks: 32 heads have 2^31 of 1M keys, sorted as 64-bit numbers."""

LAYER_GOALS = {
    32768: 2.83, 65536: 4.25, 131_072: 5.92, 262_144: 7.47, 524_288: 8.62, 1 << 20: 9.36,
}  # fmt: skip
SPARSE_GOALS = {
    (131_072, 0.15): 6.5, (131_072, 0.28): 5.5, (524_288, 0.12): 14.0, (1 << 20, 0.05): 30.0,
    (1 << 20, 0.08): 25.0,
}  # fmt: skip
NEAR_FLOPS, NEAR_FROM = 550e12, 65536
"""Of local heads at the default window, a second, and the keys from which on."""
HEAD_SELECTION_SECONDS = {131_072: 0.45e-3, 1 << 20: 30e-3}
"""Of `select_tiles` by maxima."""


def parameters_at(layer: Layer, keys: int) -> Iterator[dict[str, Any]]:
    """Of all cases of a length."""

    def named(mode: str, **others: Any) -> dict[str, Any]:
        return {"heads": layer.shape, "mode": mode, "keys": keys, **others}

    named_densities = (SMALL_DENSITY,) if layer is SMALL else NAMED.get(keys, ())
    grid = GRID if layer is LARGE and keys in GRID_LENGTHS else ()
    yield named("dense")
    for window in WINDOWS[layer]:
        yield named("near", window=window)
        yield named("layer", window=window)
        for density in sorted({*named_densities, *grid}):
            if density >= lowest_density(keys, window):
                yield named("sparse", window=window, density=str(density))
        if layer is LARGE and keys in PARTS_AT:
            yield named("near_lse", window=window)
            yield named("select_tiles", window=window)
            for density in named_densities:
                yield named("attention", window=window, density=str(density))
        if layer is SMALL:
            for density in sorted({*named_densities, *LISTS}):
                if density >= lowest_density(keys, window):
                    yield named("lists", window=window, density=str(density))
    if layer is LARGE:
        of_length = LISTS if keys <= LISTS_UP_TO else LONGEST_LISTS if keys == 1 << 20 else ()
        for density in of_length:
            if density >= lowest_density(keys, window=1):
                yield named("lists", density=str(density))


def lowest_density(keys: int, window: int) -> float:
    return ListPlan(keys, window, SINKS).pairs / dense_pairs(keys)


def goals(layer: Layer, parameters: dict[str, Any]) -> dict[str, float]:
    mode, keys, window = parameters["mode"], parameters["keys"], parameters.get("window")
    if layer is SMALL:
        return {"cudnn": 3.0} if mode == "sparse" else {}
    if mode == "dense" and keys >= 16384:
        return {"cudnn": 1.0}
    if mode == "layer" and window == WINDOW and keys in LAYER_GOALS:
        return {"flash": LAYER_GOALS[keys]}
    if mode == "sparse" and window == WINDOW:
        density = float(parameters["density"])
        return {"cudnn": SPARSE_GOALS[keys, density]} if (keys, density) in SPARSE_GOALS else {}
    return {}


def goal_seconds(layer: Layer, parameters: dict[str, Any], flops: float) -> float | None:
    mode, keys = parameters["mode"], parameters["keys"]
    if layer is SMALL or parameters.get("window") != WINDOW:
        return None
    if mode == "near" and keys >= NEAR_FROM:
        return flops / NEAR_FLOPS
    if mode == "select_tiles" and keys in HEAD_SELECTION_SECONDS:
        return HEAD_SELECTION_SECONDS[keys] * len(layer.retrieval_heads)
    return None


def case_of(prefill: Prefill, parameters: dict[str, Any], causal: dict[str, Run]) -> Case:
    layer, keys, mode = prefill.layer, prefill.keys, parameters["mode"]
    window = parameters.get("window", 1)  # of dense and listed heads: none
    every = list(range(layer.heads))
    heads = {"near": [], "dense": every, "lists": every}.get(mode, prefill.retrieval)
    baselines, listed = causal, dense_pairs(keys)
    run: Run
    if mode in ("near", "dense", "layer"):
        run = partial(prefill.attend, heads, window)
        if keys <= FLEX_UP_TO:
            flex = {} if mode == "dense" else {"flex": prefill.flex(heads, window)}
            baselines = {**causal, **flex, **windowed_peers(prefill, heads, window)}
    elif "density" in parameters:
        plan = ListPlan(keys, window, SINKS, float(parameters["density"]))
        listed, lists = plan.pairs, plan.draw(len(heads), prefill.device)
        if mode == "sparse":
            run = partial(prefill.sparse, window, lists)
        else:
            run = partial(prefill.attend, heads, window, lists)
        if mode == "lists":
            baselines = {**causal, **listed_peers(prefill, lists)}
    elif mode == "near_lse":
        run = partial(prefill.near_lse, window)
    else:
        run = partial(prefill.select_tiles, window, prefill.near_lse(window))
    is_selection = mode in ("near_lse", "select_tiles")
    pairs = len(heads) * listed + (layer.heads - len(heads)) * near_pairs(keys, window, SINKS)
    flops = 4.0 * layer.dim * pairs
    return Case(
        parameters=parameters,
        run=run,
        baselines={} if is_selection or mode == "attention" else baselines,
        flops=None if is_selection else flops,
        goals=goals(layer, parameters),
        goal_seconds=goal_seconds(layer, parameters, flops),
        device=prefill.device,
    )


def cases_at(
    layer: Layer, keys: int, chosen: list[dict[str, Any]], device: str = "cuda"
) -> list[Case]:
    """They share the tensors and the dense baselines, by far the slowest runs."""
    prefill = Prefill(layer, keys, device)
    causal = {**flash(prefill), **cudnn(prefill)}
    return [case_of(prefill, parameters, causal) for parameters in chosen]


@benchmark
def prefill_cuda(wanted: Wanted) -> Iterator[list[Case]]:
    if not torch.cuda.is_available():
        return
    for layer, keys in LENGTHS:
        chosen = [parameters for parameters in parameters_at(layer, keys) if wanted(parameters)]
        if chosen:
            yield cases_at(layer, keys, chosen)
            torch.cuda.empty_cache()

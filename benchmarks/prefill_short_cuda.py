"""The short-input rule of sparse prefill: a layer as the rule runs it, against both ways.

Where it selects, lists hold LISTED_SHARE of the far pairs of a row and a key. `selects`: 1 or 0.
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.attention import LAYERS
from benchmarks.dense import BACKENDS, dense
from benchmarks.masks import dense_pairs, near_pairs
from benchmarks.prefill_cuda import lowest_density
from benchmarks.prefill_layer import INDEX_DIM, SINKS, Prefill
from benchmarks.random_lists import ListPlan
from benchmarks.registry import Case, Wanted, benchmark
from rtpurbo.short_inputs import LISTED_SHARE, seconds_spared

LENGTHS = [2**i * 1024 for i in range(1, 7)]
WINDOWS = (256, 1024, 4096, 8192)


def case_of(prefill: Prefill, window: int) -> Case:
    keys, heads = prefill.keys, prefill.retrieval
    near = near_pairs(keys, window, SINKS)
    density = (near + LISTED_SHARE * (dense_pairs(keys) - near)) / dense_pairs(keys)
    density = max(density, lowest_density(keys, window))
    lists = ListPlan(keys, window, SINKS, density).draw(len(heads), prefill.device)
    ways = {
        "dense retrieval heads": partial(prefill.attend, heads, window),
        "listed retrieval heads": partial(prefill.sparse, window, lists),
    }
    spared = seconds_spared(
        len(heads), keys, keys, window + SINKS, prefill.layer.dim, INDEX_DIM, beyond_window=True
    )
    selects = spared > 0
    return Case(
        parameters={"heads": prefill.layer.shape, "keys": keys, "window": window},
        run=ways["listed retrieval heads" if selects else "dense retrieval heads"],
        baselines={
            **ways,
            "cudnn": partial(
                dense, BACKENDS["cudnn"], prefill.q, prefill.k, prefill.v, is_causal=True
            ),
        },
        goals={"dense retrieval heads": 1.0, "cudnn": 1.0},
        device=prefill.device,
        facts={"selects": float(selects)},
    )


@benchmark
def prefill_short_cuda(wanted: Wanted) -> Iterator[list[Case]]:
    if not torch.cuda.is_available():
        return
    for layer in LAYERS:
        for keys in LENGTHS:
            windows = [
                window
                for window in WINDOWS
                if window < keys and wanted({"heads": layer.shape, "keys": keys, "window": window})
            ]
            if windows:
                prefill = Prefill(layer, keys, "cuda")
                yield [case_of(prefill, window) for window in windows]

"""The short-input rule of sparse prefill: a layer as the rule runs it, against both ways.

| kind | what |
|---|---|
| whole | prompts of equal length |
| padded | one of as many keys, three of FEW, padded on the left |
| chunk | the last rows of a prompt whose other keys are cached |

Where it selects, lists hold LISTED_SHARE of the far pairs of a row and a key. `selects`: 1 or 0.
`window` is the local heads'. Retrieval heads select outside it; in form `full` outside RECENT keys.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.attention import LAYERS, WIDE
from benchmarks.dense_prefill import cudnn, flash
from benchmarks.prefill_layer import SINKS, Prefill
from benchmarks.prefill_shape import Shape, by_shape
from benchmarks.random_lists import draw_batch
from benchmarks.registry import Case, Run, Wanted, benchmark
from rtpurbo.short_inputs.prefill import LISTED_SHARE, PrefillPass, seconds_spared

FEW, RECENT = 1024, 64
LENGTHS = [16, 128, 512, *(2**i * 1024 for i in range(7))]
BATCHES = {1: 65536, 4: 32768, 16: 8192, 64: 2048}
"""The most keys of a prompt, by how many there are."""
CHUNKS = [(keys, rows) for keys in (16384, 65536, 262_144) for rows in (512, 4096)]
WINDOWS = {"beyond_window": (256, 1024, 4096, 8192), "full": (1024,)}
"""By index form."""

SHAPES = [
    *[
        Shape("whole", keys, layer, lengths=(keys,) * batch)
        for layer in LAYERS
        for batch, most in BATCHES.items()
        for keys in LENGTHS
        if keys <= most
    ],
    *[Shape("whole", keys, WIDE) for keys in LENGTHS],
    *[
        Shape("padded", keys, layer, lengths=(keys, FEW, FEW, FEW))
        for layer in LAYERS
        for keys in (8192, 16384, 32768)
    ],
    *[Shape("chunk", keys, layer, rows=rows) for layer in LAYERS for keys, rows in CHUNKS],
]


def parameters_of(shape: Shape) -> list[dict[str, Any]]:
    return [
        {**shape.parameters, "index": index, "window": window}
        for index, windows in WINDOWS.items()
        for window in windows
        if window < shape.keys or window == windows[0]
    ]


def case_of(prefill: Prefill, parameters: dict[str, Any], baselines: dict[str, Run]) -> Case:
    heads, window = prefill.retrieval, parameters["window"]
    recent = RECENT if parameters["index"] == "full" else None
    near = window if recent is None else recent
    ways: dict[str, Run] = {"dense retrieval heads": partial(prefill.attend, heads, window)}
    has_far = prefill.keys > near + SINKS
    if has_far:
        lists = draw_batch(prefill.plans(near, LISTED_SHARE), len(heads), prefill.device)
        ways["listed retrieval heads"] = partial(prefill.sparse, window, lists, recent)
    spared = seconds_spared(
        PrefillPass(
            lengths=prefill.lengths,
            rows=prefill.rows,
            heads=len(heads),
            local_heads=prefill.layer.heads - len(heads),
            near=near + SINKS,
            window=window + SINKS,
            dim=prefill.layer.dim,
            beyond_window=recent is None,
        )
    )
    selects = has_far and spared > 0
    return Case(
        parameters=parameters,
        run=ways["listed retrieval heads" if selects else "dense retrieval heads"],
        baselines={**ways, **baselines},
        goals={"dense retrieval heads": 1.0, **dict.fromkeys(baselines, 1.0)},
        device=prefill.device,
        facts={"selects": float(selects)},
    )


def cases_at(shape: Shape, chosen: list[dict[str, Any]], device: str = "cuda") -> list[Case]:
    """They share the tensors and the baselines."""
    prefill = shape.draw(device)
    baselines = {**cudnn(prefill), **flash(prefill)}
    return [case_of(prefill, parameters, baselines) for parameters in chosen]


@benchmark
def prefill_short_cuda(wanted: Wanted) -> Iterator[list[Case]]:
    return by_shape(SHAPES, parameters_of, cases_at, wanted)

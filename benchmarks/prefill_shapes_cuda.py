"""A prefilled layer of other shapes than `prefill_cuda`'s, against dense attention of PyTorch.

| kind | what |
|---|---|
| batch | 4 or 8 prompts of equal length |
| padded | 4 prompts, of 1, 5/8, 19/64 and 1/16 of the keys, padded on the left |
| chunk | the last rows of a prompt whose other keys are cached |
| fp16, dim, group | that type; 256 and 64 dimensions of a head; 1 and 7 query heads of a KV head |

Modes are `prefill_cuda`'s near, dense, layer and sparse. Random lists hold LISTED of the far pairs
of a row and a key; `density` is what that makes of all causal pairs. Rates count the FLOPs of the
attention's mask, without padding. Baselines are those of `benchmarks/dense_prefill.py`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.attention import WIDE, Layer
from benchmarks.dense_prefill import cudnn, flash
from benchmarks.prefill_layer import Prefill
from benchmarks.prefill_shape import Shape, by_shape
from benchmarks.random_lists import draw_batch
from benchmarks.registry import Case, Run, Wanted, benchmark

MODES = ("dense", "near", "layer", "sparse")
LISTED = 0.1
DIMS = (WIDE, Layer(32, 8, 64, (3, 9, 14, 20, 27)))
GROUPS = (Layer(32, 32, 128, (3, 9, 14, 20, 27)), Layer(28, 4, 128, (2, 9, 16, 25)))


def padded(keys: int) -> tuple[int, ...]:
    return keys, keys * 5 // 8, keys * 19 // 64, keys // 16


SHAPES = [
    *[Shape("batch", n, lengths=(n,) * batch) for n in (8192, 32768) for batch in (4, 8)],
    *[Shape("padded", n, lengths=padded(n)) for n in (8192, 32768)],
    *[Shape("chunk", n, rows=rows) for n in (65536, 262_144) for rows in (4096, 8192)],
    *[Shape("fp16", n, dtype=torch.float16) for n in (32768, 131_072)],
    *[Shape("dim", n, layer) for layer in DIMS for n in (32768, 131_072)],
    *[Shape("group", 32768, layer) for layer in GROUPS],
]


def parameters_of(shape: Shape) -> list[dict[str, Any]]:
    window = 8192 if shape.keys >= 32768 else 1024
    return [{**shape.parameters, "mode": mode, "window": window} for mode in MODES]


def case_of(prefill: Prefill, parameters: dict[str, Any], baselines: dict[str, Run]) -> Case:
    layer, mode, window = prefill.layer, parameters["mode"], parameters["window"]
    heads = {"near": [], "dense": list(range(layer.heads))}.get(mode, prefill.retrieval)
    near, listed = prefill.near_pairs(window), prefill.dense_pairs()
    facts = {}
    run: Run = partial(prefill.attend, heads, window)
    if mode == "sparse":
        plans = prefill.plans(window, LISTED)
        listed = sum(plan.pairs for plan in plans)
        facts = {"density": listed / prefill.dense_pairs()}
        run = partial(prefill.sparse, window, draw_batch(plans, len(heads), prefill.device))
    return Case(
        parameters=parameters,
        run=run,
        baselines=baselines,
        flops=4.0 * layer.dim * (len(heads) * listed + (layer.heads - len(heads)) * near),
        goals=dict.fromkeys(baselines, 1.0),
        device=prefill.device,
        facts=facts,
    )


def cases_at(shape: Shape, chosen: list[dict[str, Any]], device: str = "cuda") -> list[Case]:
    """They share the tensors and the baselines."""
    prefill = shape.draw(device)
    baselines = {**flash(prefill), **cudnn(prefill)}
    return [case_of(prefill, parameters, baselines) for parameters in chosen]


@benchmark
def prefill_shapes_cuda(wanted: Wanted) -> Iterator[list[Case]]:
    return by_shape(SHAPES, parameters_of, cases_at, wanted)

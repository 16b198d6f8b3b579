"""One decoded token of a layer against dense SDPA."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.attention import LAYERS
from benchmarks.registry import Case, Wanted, benchmark
from rtpurbo import ops

KEYS, WINDOW, SINKS = 32768, 1024, 4


def random_members(heads: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` far keys of each head."""
    far = range(SINKS, KEYS - WINDOW)
    chosen = [torch.randperm(len(far))[:count].sort().values + SINKS for _ in range(heads)]
    indices = torch.stack(chosen).to(torch.int32).view(1, heads, 1, count)
    return indices, torch.full((1, heads, 1), count, dtype=torch.int32)


@benchmark
def decode(wanted: Wanted) -> Iterator[Case]:
    """The goal is 3x dense SDPA with 2048 selected keys a retrieval head."""
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            retrieval = list(layer.retrieval_heads)
            for selected in (2048, None):
                parameters = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "heads": layer.shape,
                    "keys": KEYS,
                    "window": WINDOW,
                    "selected": selected or "all",
                }
                if not wanted(parameters):
                    continue
                q, k, v = layer.qkv(1, KEYS, dtype)
                k, v = k.contiguous(), v.contiguous()
                lists = random_members(len(retrieval), selected) if selected else (None, None)
                yield Case(
                    parameters=parameters,
                    run=partial(
                        ops.decode,
                        q,
                        k,
                        v,
                        retrieval,
                        WINDOW,
                        WINDOW,
                        SINKS,
                        layer.dim**-0.5,
                        *lists,
                    ),
                    baselines={"dense sdpa": partial(sdpa, q, k, v, enable_gqa=True)},
                    goals={"dense sdpa": 3.0} if selected else {},
                )

"""Attention of one prefilled layer on the GPU against dense SDPA: near, dense and listed heads.

"layer" is head-wise attention with dense retrieval heads, "lists" has a random part of the far
blocks for every head. Rates count the FLOPs of the mask. Times are of graph replays.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.registry import Case, Run, Wanted, benchmark
from rtpurbo import ops

HEADS, KV_HEADS, DIM = 32, 4, 128
RETRIEVAL = [1, 9, 10, 17, 30]
WINDOW, SINKS = 8192, 4
TILE, BLOCK = 128, 64
SCALE = DIM**-0.5
DENSITIES = [0.05, 0.12, 0.3]
BASELINES = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def dense_pairs(keys: int) -> int:
    return keys * (keys + 1) // 2


def near_pairs(keys: int) -> int:
    """Pairs of a row and a key that it sees through the window or as a sink."""
    far = max(0, keys - WINDOW)
    return (
        dense_pairs(min(keys, WINDOW))
        + far * WINDOW
        + sum(range(1, min(far, SINKS) + 1))
        + (max(0, far - SINKS) * SINKS)
    )


def random_lists(keys: int, density: float) -> tuple[Tensor, Tensor, int]:
    """Indices and counts: the first block, those of the tile's rows, a random part of the rest.

    Also the pairs of a row and a key that it sees.
    """
    tiles, blocks = keys // TILE, keys // BLOCK
    per_tile = TILE // BLOCK
    tile = torch.arange(tiles, device="cuda")[:, None]
    block = torch.arange(blocks, device="cuda")
    picked = torch.rand(HEADS, tiles, blocks, device="cuda") < density
    picked = (picked | (block == 0) | (block >= per_tile * tile)) & (block < per_tile * (tile + 1))
    counts = picked.sum(-1, dtype=torch.int32)
    order = torch.where(picked, block, blocks).sort(-1).values
    indices = order[..., : int(counts.max())].to(torch.int32).contiguous()
    whole = int(counts.sum()) - HEADS * tiles * per_tile
    pairs = whole * BLOCK * TILE + HEADS * tiles * TILE * (TILE + 1) // 2
    return indices[None], counts[None], pairs


@benchmark
def prefill_cuda(wanted: Wanted) -> Iterator[Case]:
    if not torch.cuda.is_available():
        return
    for keys in [2**i * 1024 for i in range(2, 8)]:
        q, k, v = (
            torch.randn(1, keys, heads, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

        def attend(heads: list[int], **lists: Any) -> Run:
            return lambda: ops.attention(q, k, v, heads, WINDOW, SINKS, SCALE, **lists)  # noqa: B023

        def dense(backend: SDPBackend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=True, enable_gqa=True)  # noqa: B023

        baselines: dict[str, Run] = {name: partial(dense, b) for name, b in BASELINES.items()}
        every = list(range(HEADS))
        near = near_pairs(keys)
        for mode, heads in (("near", []), ("dense", every), ("layer", RETRIEVAL)):
            pairs = len(heads) * dense_pairs(keys) + (HEADS - len(heads)) * near
            yield Case(
                parameters={"mode": mode, "keys": keys},
                run=attend(heads),
                baselines=baselines,
                flops=4.0 * DIM * pairs,
                goals={"cudnn": 1.0} if mode == "dense" else {},
                device="cuda",
            )
        for density in DENSITIES:
            indices, counts, pairs = random_lists(keys, density)
            yield Case(
                parameters={"mode": "lists", "keys": keys, "density": str(density)},
                run=attend(every, block_indices=indices, block_counts=counts),
                baselines=baselines,
                flops=4.0 * DIM * pairs,
                device="cuda",
            )

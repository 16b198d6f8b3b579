"""Selection in decode and in sparse prefill against eager PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.eager import pooled_shares
from benchmarks.registry import Case, Wanted, benchmark
from rtpurbo import ops

HEADS, INDEX_DIM, WINDOW, SINKS, P, MIN_TOKENS = 5, 16, 1024, 4, 0.9, 64
TILE, BLOCK = 128, 64


def sorted_top_p(q_index: Tensor, k_index: Tensor, near_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Indices in order of mass and counts of the far keys of a decoded token."""
    far = k_index[:, :, SINKS : k_index.shape[2] - WINDOW].float()
    scores = (q_index.float() @ far.mT)[:, :, 0] * INDEX_DIM**-0.5
    total = torch.logaddexp(scores.logsumexp(-1), near_lse[..., 0])[..., None]
    ranked, order = (scores - total).exp().sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked + (near_lse - total).exp()
    return order + SINKS, (before < P).sum(-1).clamp(min=MIN_TOKENS)


def index_tensors(rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index keys as the cache stores them, and logits with a spread as after training."""
    q_index = torch.randn(1, HEADS, rows, INDEX_DIM) * 3
    k_index = torch.randn(1, HEADS, keys, INDEX_DIM).half()
    return q_index, k_index, torch.full((1, HEADS, rows), 8.0)


@benchmark
def select(wanted: Wanted) -> Iterator[Case]:
    """One decoded token; the baseline sorts all far keys."""
    for keys in (8192, 32768, 131072):
        for block_size in (1, BLOCK):
            parameters = {"retrieval": HEADS, "keys": keys, "block_size": block_size}
            if not wanted(parameters):
                continue
            q_index, k_index, near_lse = index_tensors(1, keys)
            yield Case(
                parameters=parameters,
                run=partial(
                    ops.select,
                    q_index,
                    k_index,
                    list(range(HEADS)),
                    P,
                    WINDOW,
                    SINKS,
                    MIN_TOKENS,
                    block_size,
                    near_lse,
                ),
                baselines={"sort": partial(sorted_top_p, q_index, k_index, near_lse)},
                goals={"sort": 2.0} if block_size == 1 else {},
            )


@benchmark
def select_index_bits(wanted: Wanted) -> Iterator[Case]:
    """One decoded token with all far keys quantised, against keys of 16 bits."""
    for keys in (32768, 131072):
        all_parameters = [{"retrieval": HEADS, "keys": keys, "bits": bits} for bits in (8, 4)]
        chosen = [parameters for parameters in all_parameters if wanted(parameters)]
        if not chosen:
            continue
        q_index, k_index, near_lse = index_tensors(1, keys)
        mask = list(range(HEADS)), P, WINDOW, SINKS, MIN_TOKENS, 1, near_lse
        far = (keys - WINDOW) // BLOCK * BLOCK
        for parameters in chosen:
            codes, ranges = ops.quantize_index(k_index[:, :, :far], parameters["bits"])
            tail = k_index[:, :, far:].contiguous()
            yield Case(
                parameters=parameters,
                run=partial(ops.select, q_index, tail, *mask, codes=codes, ranges=ranges),
                baselines={"16 bits": partial(ops.select, q_index, k_index, *mask)},
                goals={"16 bits": 1.0},
            )


@benchmark
def select_tiles(wanted: Wanted) -> Iterator[Case]:
    """Block lists of a whole prefill; the baseline stops at the pooled shares of the blocks."""
    for rows, keys in ((8192, 8192), (2048, 32768)):
        for rank in ("sum", "max"):
            parameters = {"retrieval": HEADS, "rows": rows, "keys": keys, "rank": rank}
            if not wanted(parameters):
                continue
            q_index, k_index, near_lse = index_tensors(rows, keys)
            yield Case(
                parameters=parameters,
                run=partial(
                    ops.select_tiles,
                    q_index,
                    k_index,
                    list(range(HEADS)),
                    torch.full((HEADS,), P),
                    WINDOW,
                    SINKS,
                    4,
                    TILE,
                    BLOCK,
                    near_lse,
                    rank=rank,
                ),
                baselines={
                    "eager": partial(
                        pooled_shares, q_index, k_index, near_lse, WINDOW, SINKS, TILE, BLOCK
                    )
                },
                goals={"eager": 2.0},
            )

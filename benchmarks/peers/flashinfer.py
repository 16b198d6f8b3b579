"""FlashInfer 0.7 on Hopper: block lists as paged prefill (FA3); decode by token lists and dense.

Plans are made outside of its times, as is a prefill's copy of keys and values, head after head. A
run holds its wrapper and its output, as a graph of it reads and writes what these own.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.peers.peer import fastest
from benchmarks.peers.problems import Lists, Token, near_tokens
from rtpurbo.tiles import TILE, TILE_BLOCK

WORKSPACE = 512 << 20
PAGE = 64
"""Keys of a page of a dense step; 16 were slower at all shapes tried but one."""


@cache
def workspace(device: torch.device) -> Tensor:
    """One for all runs, which follow each other; it asks for zeros."""
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def planned(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, indices: Tensor, tensor_cores: bool
) -> Callable[[], Tensor]:
    """q [requests, H, D]; k, v: whole pages [pages, Hk, size, D], `indices` of them by request."""
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(q.device), "HND", use_tensor_cores=tensor_cores
    )
    (requests, heads, dim), (kv_heads, size) = q.shape, k.shape[1:3]
    filled = torch.full((requests,), size, dtype=torch.int32)
    wrapper.plan(
        begins, indices, filled, heads, kv_heads, dim, size, q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )  # fmt: skip
    out = torch.empty_like(q)
    return lambda: wrapper.run(q, (k, v), out=out)


def in_pages(x: Tensor) -> Tensor:
    """[pages, Hk, PAGE, D] of [B, Hk, N, D] where it is; between sequences are pages of no use."""
    assert x.is_contiguous()
    batches, heads, keys, dim = x.shape
    count = ((batches - 1) * heads + 1) * (keys // PAGE)
    return x.as_strided((count, heads, PAGE, dim), (PAGE * dim, keys * dim, dim, 1))


def dense_decode(problem: Token) -> Callable[[], Tensor]:
    """All heads see all keys, which are whole pages."""
    q, (kv_heads, keys) = problem.q, problem.k.shape[1:3]
    own = keys // PAGE
    sequence = torch.arange(len(q), device=q.device)
    indices = sequence[:, None] * kv_heads * own + torch.arange(own, device=q.device)
    run = planned(
        q[:, :, 0], in_pages(problem.k), in_pages(problem.v),
        torch.arange(len(q) + 1, dtype=torch.int32) * own, indices.flatten().int(), True,
    )  # fmt: skip
    return lambda: run()[:, :, None]


def decode(problem: Token) -> Callable[[], Tensor]:
    """Each head is a sequence with pages of one key, so that heads do not share reads."""
    q = problem.q
    (batches, heads, _, dim), (kv_heads, keys) = q.shape, problem.k.shape[1:3]
    near = near_tokens(keys, problem.window, problem.sinks, q.device).nonzero()[:, 0]
    tokens = []
    for batch in range(batches):
        lists = dict(zip(problem.heads, problem.chosen[batch], strict=True))
        for head in range(heads):
            own = lists[head].nonzero()[:, 0] if head in lists else near
            tokens.append(own + (batch * kv_heads + head * kv_heads // heads) * keys)
    begins = torch.tensor([0, *map(len, tokens)]).cumsum(0).int()
    k, v = (x.view(-1, 1, 1, dim) for x in (problem.k, problem.v))
    rows, indices = q.view(-1, 1, dim), torch.cat(tokens).int()
    run = fastest(planned(rows, k, v, begins, indices, cores) for cores in (False, True))
    return lambda: run().view(q.shape)


def attention(problem: Lists) -> Callable[[], Tensor]:
    """Each tile of a head is a request, its blocks are pages; its own are last, where it is causal.

    Requests have one head, as pages are those of all heads.
    """
    import flashinfer

    q, dim = problem.q, problem.q.shape[-1]
    (batches, heads), (kv_heads, keys) = q.shape[:2], problem.k.shape[1:3]
    owner = torch.arange(batches * heads, device=q.device) // (heads // kv_heads)
    first = (owner * (keys // TILE_BLOCK)).view(batches, heads, 1, 1)
    used = torch.arange(problem.indices.shape[-1], device=q.device) < problem.counts[..., None]
    requests = problem.counts.numel()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace(q.device), "NHD", backend="fa3"
    )
    wrapper.plan(
        torch.arange(requests + 1, dtype=torch.int32) * TILE,
        pad(problem.counts.flatten().cumsum(0), (1, 0)).int().cpu(),
        (problem.indices + first)[used].int(),
        torch.full((requests,), TILE_BLOCK, dtype=torch.int32),
        1, 1, dim, TILE_BLOCK, causal=True, q_data_type=q.dtype, kv_data_type=problem.k.dtype,
    )  # fmt: skip
    rows = q.reshape(-1, 1, dim)
    k, v = (x.reshape(-1, TILE_BLOCK, 1, dim) for x in (problem.k, problem.v))
    out = torch.empty_like(rows)
    return lambda: wrapper.run(rows, (k, v), out=out).view(q.shape)

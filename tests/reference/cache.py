"""The headwise KV storage, one token at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.index_project import index_project
from tests.reference.masks import starts


def cache_append(
    k: Tensor,
    v: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    full_heads: Sequence[int],
    position: int,
    sinks: int,
    start: Tensor | None = None,
    k_index: Tensor | None = None,
    index_pages: Tensor | None = None,
    index_slot: int = -1,
) -> None:
    if k_index is not None and index_pages is not None:
        cache_append_index(k_index, index_pages, position if index_slot < 0 else index_slot)
    batch, kv_heads, tokens, _ = k.shape
    full = list(full_heads)
    local = [head for head in range(kv_heads) if head not in full]
    window = k_ring.shape[2] - sinks
    first = starts(start, batch).tolist()
    for new, ring, pages in ((k, k_ring, k_pages), (v, v_ring, v_pages)):
        for b in range(batch):
            for i in range(tokens):
                pages[b, :, position + i] = new[b, full, i]
                t = position + i - first[b]
                if t >= 0:
                    slot = t if t < sinks else sinks + (t - sinks) % window
                    ring[b, :, slot] = new[b, local, i]


def cache_append_index(k_index: Tensor, index_pages: Tensor, position: int) -> None:
    index_pages[:, :, position : position + k_index.shape[2]] = k_index


def cache_append_projected(
    k: Tensor,
    v: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    full_heads: Sequence[int],
    position: int,
    sinks: int,
    q_pre: Tensor,
    k_pre: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    q_heads: Sequence[int],
    k_heads: Sequence[int],
    index_pages: Tensor,
    start: Tensor | None = None,
    index_slot: int = -1,
) -> Tensor:
    q_index, k_index = index_project(q_pre, k_pre, w_q, w_k, q_heads, k_heads)
    cache_append(
        k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, start,
        k_index, index_pages, index_slot,
    )  # fmt: skip
    return q_index


def cache_unroll(
    ring: Tensor,
    new: Tensor,
    local_heads: Sequence[int],
    position: int,
    sinks: int,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, slots, dim = ring.shape
    window = slots - sinks
    keys = torch.zeros(batch, heads, slots + new.shape[2], dim, dtype=ring.dtype)
    start_local = torch.zeros(batch, dtype=torch.int64)
    for b, first in enumerate(starts(start, batch).tolist()):
        cached = position - first
        kept = [t for t in range(max(cached, 0)) if t < sinks or t >= cached - window]
        start_local[b] = max(slots - cached, 0)
        for place, t in enumerate(kept, start=slots - len(kept)):
            slot = t if t < sinks else sinks + (t - sinks) % window
            keys[b, :, place] = ring[b, :, slot]
        keys[b, :, slots:] = new[b, list(local_heads)]
    return keys, start_local

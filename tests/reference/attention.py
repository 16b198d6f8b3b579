"""Headwise attention: local heads see near keys, retrieval heads all visible or listed ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.masks import last_positions, near, visible
from tests.reference.softmax import masked_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieval_heads: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    start: Tensor | None = None,
    k_local: Tensor | None = None,
    v_local: Tensor | None = None,
    start_local: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: Tensor | None = None,
    tile: int = 128,
    block_size: int = 64,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    batch, query_heads, rows, _ = q.shape
    kv_heads = k.shape[1] + (0 if k_local is None else k_local.shape[1])
    group = query_heads // kv_heads
    full = sorted({head // group for head in retrieval_heads})
    local = [head for head in range(kv_heads) if head not in full]
    outs, lses = [], []
    for head in range(query_heads):
        kv = head // group
        if k_local is None or v_local is None:
            keys, values, first = k[:, kv], v[:, kv], start
        elif kv in full:
            keys, values, first = k[:, full.index(kv)], v[:, full.index(kv)], start
        else:
            keys, values = k_local[:, local.index(kv)], v_local[:, local.index(kv)]
            first = start_local
        positions = last_positions(rows, keys.shape[1], batch)
        if head in retrieval_heads:
            seen = visible(positions, keys.shape[1], first)
            if block_indices is not None and block_counts is not None:
                entry = list(retrieval_heads).index(head)
                seen = seen & listed(
                    block_indices[:, entry],
                    block_counts[:, entry],
                    rows,
                    keys.shape[1],
                    tile,
                    block_size,
                )
        else:
            seen = near(positions, keys.shape[1], first, window, sinks)
        out, lse = masked_attention(
            q[:, head].to(compute), keys.to(compute), values.to(compute), seen, scale
        )
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs, 1), torch.stack(lses, 1)


def listed(
    indices: Tensor, counts: Tensor, rows: int, keys: int, tile: int, block_size: int
) -> Tensor:
    """bool [B, M, N] from indices [B, T, C] and counts [B, T]: the tile of m lists n's block."""
    batch, tiles, _ = indices.shape
    allowed = torch.zeros(batch, tiles, -(-keys // block_size), dtype=torch.bool)
    for b in range(batch):
        for t in range(tiles):
            count = int(counts[b, t])
            allowed[b, t, slice(None) if count < 0 else indices[b, t, :count].long()] = True
    by_row = allowed.repeat_interleave(tile, 1)[:, :rows]
    return by_row.repeat_interleave(block_size, 2)[..., :keys]

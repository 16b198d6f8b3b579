"""One query row: near keys and, in retrieval heads, the far keys listed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.masks import near, starts, visible
from tests.reference.softmax import masked_attention


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieval_heads: Sequence[int],
    window: int,
    near_window: int,
    sinks: int,
    scale: float,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    block_size: int = 1,
    k_local: Tensor | None = None,
    v_local: Tensor | None = None,
    start: Tensor | None = None,
    length: int = -1,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    batch, query_heads, _, _ = q.shape
    kv_heads = k.shape[1] + (0 if k_local is None else k_local.shape[1])
    group = query_heads // kv_heads
    full = sorted({head // group for head in retrieval_heads})
    local = [head for head in range(kv_heads) if head not in full]
    total = k.shape[2] if k.shape[1] > 0 else length
    position = torch.full((batch, 1), total - 1)
    outs, lses = [], []
    for head in range(query_heads):
        kv = head // group
        if k_local is not None and v_local is not None and kv not in full:
            keys, values = k_local[:, local.index(kv)], v_local[:, local.index(kv)]
            stored = (total - starts(start, batch)).clamp(max=keys.shape[1])
            seen = (torch.arange(keys.shape[1]) < stored[:, None])[:, None]
        else:
            stored_at = kv if k_local is None else full.index(kv)
            keys, values = k[:, stored_at], v[:, stored_at]
            if head in retrieval_heads:
                entry = list(retrieval_heads).index(head)
                seen = visible(position, total, start)
                if indices is not None and counts is not None:
                    close = near(position, total, start, near_window, sinks)
                    members = listed(indices[:, entry, 0], counts[:, entry, 0], total, block_size)
                    seen = close | (seen & members[:, None])
            else:
                seen = near(position, total, start, window, sinks)
        out, lse = masked_attention(
            q[:, head].to(compute), keys.to(compute), values.to(compute), seen, scale
        )
        outs.append(out)
        lses.append(lse[:, 0])
    return torch.stack(outs, 1), torch.stack(lses, 1)[..., None]


def listed(indices: Tensor, counts: Tensor, keys: int, block_size: int) -> Tensor:
    """bool [B, N] from indices [B, C] and counts [B]; -1 lists every key."""
    members = torch.zeros(indices.shape[0], -(-keys // block_size), dtype=torch.bool)
    for b in range(indices.shape[0]):
        count = int(counts[b])
        members[b, slice(None) if count < 0 else indices[b, :count].long()] = True
    return members.repeat_interleave(block_size, 1)[:, :keys]

"""sparse_decode: near_lse, select and decode one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.decode import decode, listed
from tests.reference.near_lse import near_lse
from tests.reference.select import select

WORD = 64


def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieval_heads: Sequence[int],
    q_index: Tensor,
    k_index: Tensor,
    index_map: Sequence[int],
    p: float,
    window: int,
    near_window: int,
    sinks: int,
    min_tokens: int,
    scale: float,
    block_size: int = 1,
    beyond_window: bool = True,
    offset: Tensor | None = None,
    k_local: Tensor | None = None,
    v_local: Tensor | None = None,
    start: Tensor | None = None,
    length: int = -1,
    codes: Tensor | None = None,
    ranges: Tensor | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    near = None
    if beyond_window:
        kv_heads = k.shape[1] + (0 if k_local is None else k_local.shape[1])
        owners = [head * kv_heads // q.shape[1] for head in retrieval_heads]
        full = sorted(set(owners)) if k_local is not None else list(range(kv_heads))
        places = [full.index(owner) for owner in owners]
        near = near_lse(q, k, retrieval_heads, places, near_window, sinks, scale, start)
    indices, counts, mass = select(
        q_index, k_index, index_map, p, near_window, sinks, min_tokens, block_size, near, offset,
        start, codes=codes, ranges=ranges,
    )  # fmt: skip
    out, lse = decode(
        q, k, v, retrieval_heads, window, near_window, sinks, scale, indices, counts, block_size,
        k_local, v_local, start, length,
    )  # fmt: skip
    return out, lse, key_mask(indices, counts, k.shape[2], block_size), counts, mass


def key_mask(indices: Tensor, counts: Tensor, keys: int, block_size: int) -> Tensor:
    """int64 [B, R, 1, ceil(N / 64)] with the bits of the keys of the listed members."""
    words = -(-keys // WORD)
    masks = [
        listed(indices[:, j, 0], counts[:, j, 0], words * WORD, block_size)
        for j in range(indices.shape[1])
    ]
    bits = torch.stack(masks, 1).unflatten(-1, (words, WORD)).long() << torch.arange(WORD)
    return bits.sum(-1)[:, :, None]

"""A whole decode step: selection by the index, and attention to what it selects."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops
from rtpurbo.ops.attention import accumulation_dtype
from rtpurbo.ops.select import accumulation_dtype as mass_dtype

WORD_KEYS = 64


def unpacked(selected: Tensor, keys: int) -> Tensor:
    """bool [..., N] from the words [..., ceil(N / 64)] of a mask of keys."""
    shifts = torch.arange(WORD_KEYS, device=selected.device)
    return (selected[..., None] >> shifts & 1).flatten(-2)[..., :keys].bool()


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
    """`near_lse`, `select` and `decode` of the query at position m = N - 1, in one call.

    Every retrieval head selects by its index query the smallest set of far keys whose mass reaches
    p together with the near keys', and attends to both; local heads attend to their near keys. On
    CUDA with 16-bit q, D of 64, 128 or 256 and half index keys of r = 16 this is one launch.

    Args:
        q, k, v, retrieval_heads, window, near_window, sinks, scale: as in `decode`; at least one
            retrieval head.
        q_index: [B, R, 1, r] float32, float64, bfloat16 or float16.
        k_index: [B, Rk, N, r] of any of these dtypes; with codes keys [Q, N).
        index_map, p, min_tokens, block_size, offset, codes, ranges, exact: as in `select`. On CUDA
            exact=False spares the cut of the threshold's bin, 2 to 17 % of the time.
        beyond_window: near keys count with their true logits; False: with those of the index.
        k_local, v_local, start, length: as in `decode`.

    Returns:
        out [B, Hq, 1, D] and lse [B, Hq, 1] as in `decode`; selected int64 [B, R, 1, ceil(N / 64)],
        where bit i of word j tells whether key 64 j + i is in a selected member; counts int32
        [B, R, 1] of members; mass [B, R, 1], the share recovered, as in `select`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.sparse_decode(
        q,
        k,
        v,
        retrieval_heads,
        q_index,
        k_index,
        index_map,
        p,
        window,
        near_window,
        sinks,
        min_tokens,
        scale,
        block_size,
        beyond_window,
        offset,
        k_local,
        v_local,
        start,
        length,
        codes,
        ranges,
        exact,
    )


@torch.library.register_fake("rtpurbo::sparse_decode")
def _(
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
    batch, heads, rows, dim = q.shape
    chosen = q_index.shape[:2]
    keys = k.shape[2] if k.shape[1] else length
    return (
        q.new_empty((batch, rows, heads, dim)).transpose(1, 2),
        q.new_empty((batch, heads, rows), dtype=accumulation_dtype(q)),
        q_index.new_empty((*chosen, rows, -(-keys // WORD_KEYS)), dtype=torch.int64),
        q_index.new_empty((*chosen, rows), dtype=torch.int32),
        q_index.new_empty((*chosen, rows), dtype=mass_dtype(q_index, k_index)),
    )

"""Attention of one new token over sinks, window and the selected keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops
from rtpurbo.ops.attention import accumulation_dtype


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
) -> tuple[Tensor, Tensor]:
    """Attention of the query at position m = N - 1, split over the keys and merged by lse.

    Local heads see the near keys, n - start < sinks or m - n < window. Retrieval heads see those
    with near_window and the far keys of the listed members, or without lists all visible keys.

    Args:
        q: [B, Hq, 1, D], D a multiple of 8; float32, float64, bfloat16 or float16.
        k, v: [B, Hk, N, D] of q's dtype, last dimension contiguous; with k_local only the KV heads
            that hold a retrieval head, in order.
        retrieval_heads: ascending query heads.
        window, near_window, sinks: >= 1, >= 1, >= 0.
        scale: of the logits, D^-0.5 normally.
        indices: int32 [B, R, 1, C], members n // block_size of each retrieval head (`select`). An
            entry adds its far keys: outside [0, N), in the padding or near it adds none.
        counts: int32 [B, R, 1]; -1 makes the head see all visible keys.
        k_local, v_local: [B, L, sinks + window, D], the rings of the other KV heads in any order of
            slots; the first min(N - start, sinks + window) are valid.
        start: int64 [B], first real key of each sequence (left padding).
        length: N, where k has no head to tell it; otherwise -1.

    Returns:
        out [B, Hq, 1, D], stored as [B, 1, Hq, D]; lse [B, Hq, 1] float32 (float64 for float64). A
        row that sees no key has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.decode(
        q,
        k,
        v,
        retrieval_heads,
        window,
        near_window,
        sinks,
        scale,
        indices,
        counts,
        block_size,
        k_local,
        v_local,
        start,
        length,
    )


@torch.library.register_fake("rtpurbo::decode")
def _(
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
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    out = q.new_empty((batch, rows, heads, dim)).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=accumulation_dtype(q))

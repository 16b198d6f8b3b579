"""Index projections and cache append of new tokens together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops


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
    """`index_project` and `cache_append` of M new tokens, with the bits of these.

    Keys and values go to rings and pages, the index keys that k_pre makes to index_pages, in place;
    what q_pre makes is returned. On CUDA one launch does all of it for M up to 16, two for more.

    Not differentiable. What is read must not overlap what is written.

    Args:
        k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, start: as in
            `cache_append`.
        q_pre: [B, Hq, M, D] queries before RoPE, after QK-norm; last dimension contiguous.
        k_pre: [B, Hk, M, D] keys before RoPE, of q_pre's dtype, which need not be k's.
        w_q: [R, r, D], WQ_h of the query heads q_heads.
        w_k: [Rk, r, D], WK_h that read the KV heads k_heads; of w_q's dtype.
        q_heads, k_heads: head numbers; one may stand several times.
        index_pages: [B, Rk, capacity, r] float32, float64, bfloat16 or float16. Sums run in float32
            (float64 for float64).
        index_slot: slot of the first new index key, -1: position.

    Returns:
        q_index [B, R, M, r] of index_pages's dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype; nothing is
            written then.
    """
    return rtpurbo_ops.cache_append_projected(
        k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks,
        q_pre, k_pre, w_q, w_k, q_heads, k_heads, index_pages, start, index_slot,
    )  # fmt: skip


@torch.library.register_fake("rtpurbo::cache_append_projected")
def _(
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
    shape = q_pre.shape[0], w_q.shape[0], q_pre.shape[2], w_q.shape[1]
    return q_pre.new_empty(shape, dtype=index_pages.dtype)

"""Log-mass of the near keys, which index form `beyond_window` takes from the true logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops
from rtpurbo.ops.attention import accumulation_dtype


def near_lse(
    q: Tensor,
    k: Tensor,
    q_heads: Sequence[int],
    k_heads: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    start: Tensor | None = None,
) -> Tensor:
    """log sum exp(scale q_m . k_n) over visible n with n - start < sinks or m - n < window.

    Args:
        q: [B, Hq, M, D], D a multiple of 8, last dimension contiguous.
        k: [B, Hk, N, D] of q's dtype, N >= M; row i of q stands at position N - M + i.
        q_heads: query heads, in any order.
        k_heads: for each of them the head of k that it reads.
        window, sinks: >= 1 and >= 0.
        scale: of the logits, D^-0.5 normally.
        start: int64 [B], first real key of each sequence (left padding).

    Returns:
        [B, len(q_heads), M] float32 (float64 for float64); -inf for a row that sees no key.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.near_lse(q, k, q_heads, k_heads, window, sinks, scale, start)


@torch.library.register_fake("rtpurbo::near_lse")
def _(
    q: Tensor,
    k: Tensor,
    q_heads: Sequence[int],
    k_heads: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    start: Tensor | None = None,
) -> Tensor:
    batch, _, rows, _ = q.shape
    return q.new_empty((batch, len(q_heads), rows), dtype=accumulation_dtype(q))

"""The headwise KV cache: rings of sinks and window for local KV heads, pages for the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops


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
    """Appends the tokens at positions position .. position + M - 1 in place, on CUDA in one launch.

    KV heads in full_heads go to the pages, slot = position. The others go to the ring: with
    t = n - start, t < sinks to slot t, later ones to sinks + (t - sinks) % window; padding (t < 0)
    is not stored.

    Args:
        k, v: [B, Hk, M, D], last dimension contiguous; any dtype.
        k_ring, v_ring: [B, Hk - F, sinks + window, D] of that dtype.
        k_pages, v_pages: [B, F, capacity, D], position + M <= capacity.
        full_heads: the F ascending KV heads that keep every token.
        position: of the first new token.
        sinks: the first keys of a sequence, which stay.
        start: int64 [B], first real key of each sequence (left padding).
        k_index: [B, Rk, M, r], index keys of the tokens, any dtype.
        index_pages: [B, Rk, capacity, r] of k_index's dtype; given with k_index.
        index_slot: slot of the first of them, -1: position.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    rtpurbo_ops.cache_append(
        k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, start,
        k_index, index_pages, index_slot,
    )  # fmt: skip


def cache_append_index(k_index: Tensor, index_pages: Tensor, position: int) -> None:
    """Appends codes, ranges or index keys [B, Rk, M, r] in place to index_pages.

    Args:
        k_index: [B, Rk, M, r], any dtype.
        index_pages: [B, Rk, capacity, r] of that dtype, position + M <= capacity.
        position: slot of the first row.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    rtpurbo_ops.cache_append_index(k_index, index_pages, position)


def cache_unroll(
    ring: Tensor,
    new: Tensor,
    local_heads: Sequence[int],
    position: int,
    sinks: int,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys (or values) that local KV heads see in chunked prefill, in order of position.

    Call it before cache_append. With t = position - start tokens cached, t <= sinks + window stand
    right-aligned behind zeros; of more, the sinks and the latest `window`. The new ones follow.

    Args:
        ring: [B, L, sinks + window, D], the tokens before `position`.
        new: [B, Hk, M, D] of ring's dtype, read at the L KV heads local_heads.
        local_heads: ascending KV heads.
        position: of the first new token.
        sinks: the first keys of a sequence.
        start: int64 [B], first real key of each sequence (left padding).

    Returns:
        keys [B, L, sinks + window + M, D]; start_local int64 [B], the first real one of them,
        max(0, sinks + window - t).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.cache_unroll(ring, new, local_heads, position, sinks, start)


@torch.library.register_fake("rtpurbo::cache_append")
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
    start: Tensor | None = None,
    k_index: Tensor | None = None,
    index_pages: Tensor | None = None,
    index_slot: int = -1,
) -> None:
    return None


@torch.library.register_fake("rtpurbo::cache_append_index")
def _(k_index: Tensor, index_pages: Tensor, position: int) -> None:
    return None


@torch.library.register_fake("rtpurbo::cache_unroll")
def _(
    ring: Tensor,
    new: Tensor,
    local_heads: Sequence[int],
    position: int,
    sinks: int,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, slots, dim = ring.shape
    return (
        ring.new_empty((batch, heads, slots + new.shape[2], dim)),
        ring.new_empty((batch,), dtype=torch.int64),
    )

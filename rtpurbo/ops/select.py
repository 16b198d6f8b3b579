"""Scoring and top-p over the far keys of every query row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops


def select(
    q_index: Tensor,
    k_index: Tensor,
    index_map: Sequence[int],
    p: float,
    window: int,
    sinks: int,
    min_tokens: int,
    block_size: int = 1,
    near_lse: Tensor | None = None,
    offset: Tensor | None = None,
    start: Tensor | None = None,
    capacity: int = 0,
    exact: bool = True,
    codes: Tensor | None = None,
    ranges: Tensor | None = None,
    refine: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The far keys that reach softmax mass p under the index: S_h(m) of the paper, never M x N.

    Row i stands at m = N - M + i. Near keys (n - start < sinks or m - n < window, n visible) are
    attended anyway: their mass counts towards p, and they are never listed. Logits are
    r^-0.5 q_index . k_index + offset. Others join by decreasing mass, ties by lower position.

    Args:
        q_index: [B, R, M, r] float32, float64, bfloat16 or float16; last dimension contiguous.
        k_index: [B, Rk, N, r], N >= M, of any of these dtypes.
        index_map: the head of k_index that each of the R queries reads.
        p: share of the mass, in (0, 1]; 1 selects every far key.
        window, sinks: what is near.
        min_tokens: far keys that join by rank even when p is reached; in blocks rounded up.
        block_size: 1, 16, 32 or 64; members are then blocks n // block_size, weighed by the
            exp-sum of their far keys.
        near_lse: [B, R, M], log-mass of the near keys from the true logits (index form
            `beyond_window`). Without it the index logits of the near keys count (form `full`).
        offset: [R], added to the logits.
        start: int64 [B], first real key of each sequence (left padding).
        capacity: room for members, 0 for ceil(N / block_size).
        exact: False may add members whose weights lie within 2.2 % of the last one's: the rest of
            the threshold's histogram bin, where this has at most 32 members more than a quarter of
            those above it; not to refined rows. On CUDA weights are rounded either way, as by
            `top_p` without it.
        codes, ranges: keys [0, Q) as `quantize_index` returns them; k_index then holds keys [Q, N).
        refine: with codes and block_size 1: k_index holds all N keys. Of a row whose smallest set
            has c members the 2 c best are scored again from k_index; only they can be members, the
            others keep their share of all mass. If those 2 c do not reach p, all of them are
            members. With p = 1 or a NaN or +inf logit nothing is refined.

    Returns:
        indices int32 [B, R, M, capacity], ascending and padded with -1; counts int32 [B, R, M], -1
        where capacity does not suffice (attend densely); mass [B, R, M] float32 (float64 for
        float64), the share recovered. A NaN or +inf logit selects every far key and makes the mass
        NaN; a row that sees no key has count 0 and mass 1.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.select(
        q_index,
        k_index,
        index_map,
        p,
        window,
        sinks,
        min_tokens,
        block_size,
        near_lse,
        offset,
        start,
        capacity,
        exact,
        codes,
        ranges,
        refine,
    )


def accumulation_dtype(q_index: Tensor, k_index: Tensor) -> torch.dtype:
    """float64 when one of the two is, otherwise float32."""
    double = torch.float64 in (q_index.dtype, k_index.dtype)
    return torch.float64 if double else torch.float32


@torch.library.register_fake("rtpurbo::select")
def _(
    q_index: Tensor,
    k_index: Tensor,
    index_map: Sequence[int],
    p: float,
    window: int,
    sinks: int,
    min_tokens: int,
    block_size: int = 1,
    near_lse: Tensor | None = None,
    offset: Tensor | None = None,
    start: Tensor | None = None,
    capacity: int = 0,
    exact: bool = True,
    codes: Tensor | None = None,
    ranges: Tensor | None = None,
    refine: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = q_index.shape
    keys = k_index.shape[2] + (0 if codes is None or refine else codes.shape[2])
    room = capacity or -(-keys // block_size)
    return (
        q_index.new_empty((batch, heads, rows, room), dtype=torch.int32),
        q_index.new_empty((batch, heads, rows), dtype=torch.int32),
        q_index.new_empty((batch, heads, rows), dtype=accumulation_dtype(q_index, k_index)),
    )

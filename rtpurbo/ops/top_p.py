"""The smallest set of scores that holds a share p of the softmax mass."""

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops


def top_p(
    scores: Tensor,
    p: float,
    min_members: int = 0,
    forced_lse: Tensor | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects, per row, the smallest set with softmax mass >= p: S_h(m) of the paper.

    Args:
        scores: [rows, N] logits, float32, float64 (CPU only), bfloat16 or float16. -inf marks a
            position that cannot be selected.
        p: share of the mass, in (0, 1]. 1 selects every candidate.
        min_members: so many candidates join by rank even when p is reached.
        forced_lse: [rows] float32 (float64 for float64 scores), the log-mass of members that stand
            outside the row and are always in; it counts towards p.
        exact: the set of a stable descending sort. On CUDA that takes the sort, in float64. False
            is quicker: as in `select` it may add members whose weights lie within 2.2 % of the last
            one's, and on CUDA weights are rounded to 17 bits below the edge of their bin, so that
            where none are added what is selected may hold 2^-17 less than p.

    Returns:
        indices int32 [rows, N], ascending and padded with -1; counts int32 [rows]; mass [rows], the
        share recovered. A NaN or +inf score selects every candidate and makes the mass NaN; a row
        without any mass has count 0 and mass 1.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.top_p(scores, p, min_members, forced_lse, exact)


@torch.library.register_fake("rtpurbo::top_p")
def _(
    scores: Tensor,
    p: float,
    min_members: int = 0,
    forced_lse: Tensor | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = scores.shape[0]
    accum = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return (
        scores.new_empty(scores.shape, dtype=torch.int32),
        scores.new_empty((rows,), dtype=torch.int32),
        scores.new_empty((rows,), dtype=accum),
    )

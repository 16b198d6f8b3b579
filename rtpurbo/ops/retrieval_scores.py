"""How much each query head looks back from a needle's repetition to the needle."""

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops
from rtpurbo.ops.attention import accumulation_dtype


def retrieval_scores(
    q: Tensor,
    k: Tensor,
    pre_begin: int,
    pre_end: int,
    scale: float,
    start: Tensor | None = None,
) -> Tensor:
    """Mean over the rows of q of the attention mass on keys [pre_begin, pre_end): R_h of the paper.

    Args:
        q: [B, Hq, P, D], the rows of the needle's repetition, which stand at the last P positions;
            D a multiple of 8, last dimension contiguous.
        k: [B, Hk, N, D] of q's dtype, N >= P, Hq a multiple of Hk.
        pre_begin, pre_end: the keys of the first needle.
        scale: of the logits, D^-0.5 normally.
        start: int64 [B], first real key of each sequence (left padding).

    Returns:
        [B, Hq] float32 (float64 for float64), in [0, 1]. A row that sees no key counts 0.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.retrieval_scores(q, k, pre_begin, pre_end, scale, start)


@torch.library.register_fake("rtpurbo::retrieval_scores")
def _(
    q: Tensor,
    k: Tensor,
    pre_begin: int,
    pre_end: int,
    scale: float,
    start: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))

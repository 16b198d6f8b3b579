"""Softmax attention of one head over any set of keys, and the log-sum-exp of its logits."""

import torch
from torch import Tensor


def log_sum_exp(logits: Tensor, seen: Tensor) -> Tensor:
    """Over the last dimension, -inf where nothing is seen; gradients stay finite there."""
    nothing = ~seen.any(-1)
    kept = logits.masked_fill(~seen, -torch.inf).masked_fill(nothing[..., None], 0.0)
    return kept.logsumexp(-1).masked_fill(nothing, -torch.inf)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, M, D], k and v [B, N, D], seen bool [B, M, N] -> out [B, M, D], lse [B, M]."""
    logits = scale * torch.einsum("bmd,bnd->bmn", q, k)
    lse = log_sum_exp(logits, seen)
    nothing = ~seen.any(-1, keepdim=True)
    kept = logits.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0.0)
    weights = kept.softmax(-1).masked_fill(~seen, 0.0)
    if not v.isfinite().all():
        shares = torch.where(seen[..., None], weights[..., None] * v[:, None], 0.0)
        return shares.sum(2), lse
    return torch.einsum("bmn,bnd->bmd", weights, v), lse

"""What operators are compared with where nothing else computes the same: eager PyTorch."""

import torch
from torch import Tensor


def pooled_shares(
    q_index: Tensor, k_index: Tensor, near_lse: Tensor, window: int, sinks: int, tile: int,
    block: int,
) -> Tensor:  # fmt: skip
    """[B, R, tiles, blocks]: the mean share of each block in each tile; one head at a time."""
    (rows, dim), keys = q_index.shape[2:], k_index.shape[2]
    n = torch.arange(keys, device=k_index.device)
    m = n[keys - rows :, None]
    hidden = (n > m) | (n < sinks) | (m - n < window)
    dtype = torch.promote_types(q_index.dtype, k_index.dtype)
    shares = []
    for q, k, near in zip(q_index.unbind(1), k_index.unbind(1), near_lse.unbind(1), strict=True):
        scores = (q.to(dtype) @ k.to(dtype).mT).float() * dim**-0.5
        scores = scores.masked_fill_(hidden, -torch.inf)
        total = torch.logaddexp(scores.logsumexp(-1), near)[..., None]
        of_rows = (scores - total).exp_().unflatten(-1, (-1, block)).sum(-1)
        shares.append(of_rows.unflatten(1, (-1, tile)).mean(2))
    return torch.stack(shares, 1)

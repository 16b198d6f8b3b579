"""R_h: the mean attention mass that the last P rows put on keys [pre_begin, pre_end)."""

import torch
from torch import Tensor

from tests.reference.masks import last_positions, visible


def retrieval_scores(
    q: Tensor,
    k: Tensor,
    pre_begin: int,
    pre_end: int,
    scale: float,
    start: Tensor | None = None,
) -> Tensor:
    batch, query_heads, rows, _ = q.shape
    keys = k.double().repeat_interleave(query_heads // k.shape[1], dim=1)
    logits = scale * torch.einsum("bhmd,bhnd->bhmn", q.double(), keys)
    seen = visible(last_positions(rows, k.shape[2], batch), k.shape[2], start)[:, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    weights = torch.where(seen, weights, 0.0)
    return weights[..., pre_begin:pre_end].sum(-1).mean(-1)

"""Log-sum-exp of the true logits over the near keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.masks import last_positions, near
from tests.reference.softmax import log_sum_exp


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
    queries, keys = q[:, list(q_heads)].double(), k[:, list(k_heads)].double()
    logits = scale * torch.einsum("bjmd,bjnd->bjmn", queries, keys)
    positions = last_positions(q.shape[2], k.shape[2], q.shape[0])
    seen = near(positions, k.shape[2], start, window, sinks)
    return log_sum_exp(logits, seen[:, None].expand_as(logits))

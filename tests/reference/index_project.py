"""Index queries and keys: linear maps of the pre-RoPE features, head by head."""

from collections.abc import Sequence

import torch
from torch import Tensor


def index_project(
    q: Tensor,
    k: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    q_heads: Sequence[int],
    k_heads: Sequence[int],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    q_index = torch.einsum("bjmd,jrd->bjmr", q[:, list(q_heads)].double(), w_q.double())
    k_index = torch.einsum("bjnd,jrd->bjnr", k[:, list(k_heads)].double(), w_k.double())
    return q_index, k_index

"""Stage-1 loss: KL of the true attention from what the index would attend, and its gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.masks import near, visible


def index_kl(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    rows: Tensor,
    retrieval_heads: Sequence[int],
    index_map: Sequence[int],
    offset: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    beyond_window: bool,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    keys, heads = k.shape[2], len(retrieval_heads)
    group = q.shape[1] // k.shape[1]
    queries = q[:, list(retrieval_heads)].double()
    true_keys = k[:, [head // group for head in retrieval_heads]].double()
    true = scale * torch.einsum("bjmd,bjnd->bjmn", queries, true_keys)

    leaf_q = q_index.detach().double().requires_grad_()
    leaf_k = k_index.detach()[:, list(index_map)].double().requires_grad_()
    shift = torch.zeros(heads) if offset is None else offset.detach()
    leaf_offset = shift.double().requires_grad_()
    index = torch.einsum("bjmr,bjnr->bjmn", leaf_q, leaf_k) * q_index.shape[-1] ** -0.5
    index = index + leaf_offset[:, None, None]
    if beyond_window:
        index = torch.where(near(rows, keys, start, window, sinks)[:, None], true, index)

    sees = visible(rows, keys, start)
    valid = sees.any(-1)
    sees = sees[:, None] & valid[:, None, :, None]
    nothing = ~valid[:, None, :, None]
    log_a = true.masked_fill(~sees, -torch.inf).masked_fill(nothing, 0.0).log_softmax(-1)
    log_b = index.masked_fill(~sees, -torch.inf).masked_fill(nothing, 0.0).log_softmax(-1)
    difference = log_a.masked_fill(~sees, 0.0) - log_b.masked_fill(~sees, 0.0)
    kl_rows = (log_a.exp() * difference).sum(-1)
    kl = kl_rows.sum((0, 2)) / max(int(valid.sum()), 1)
    grad_q, grad_k, grad_offset = torch.autograd.grad(kl.sum(), [leaf_q, leaf_k, leaf_offset])
    return kl.detach(), kl_rows.detach(), grad_q, grad_k, grad_offset

"""The loss of stage 1 and its gradients, in one pass over the keys."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops


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
    """KL(a_full(m) || a_index(m)) of given query rows, without an M x N matrix.

    a_full is the softmax of scale q . k over the visible keys, a_index that of the index logits
    r^-0.5 q_index . k_index + offset; with beyond_window the near keys (n - start < sinks or
    m - n < window) keep their true logits. kl is differentiable in q_index, k_index and offset.

    Args:
        q: [B, Hq, Mr, D], the rows; D a multiple of 8, last dimension contiguous.
        k: [B, Hk, N, D] of q's dtype.
        q_index: [B, R, Mr, r] and k_index: [B, Rk, N, r], of any floating dtypes.
        rows: int64 [B, Mr], the positions m < N of the rows; one with m < start is ignored.
        retrieval_heads: the R ascending query heads.
        index_map: the head of k_index that each of them reads.
        offset: [R] or None.
        window, sinks: what is near.
        scale: of the true logits, D^-0.5 normally.
        beyond_window: the index form; False is the paper's (`full`).
        start: int64 [B], first real key of each sequence (left padding).

    Returns:
        kl [R], the mean over the rows not ignored; kl_rows [B, R, Mr]; the gradients of kl[j] by
        q_index [B, R, Mr, r], by the index keys that head j reads [B, R, N, r] and by offset [R].
        kl and kl_rows are float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.index_kl(
        q,
        k,
        q_index,
        k_index,
        rows,
        retrieval_heads,
        index_map,
        offset,
        window,
        sinks,
        scale,
        beyond_window,
        start,
    )


@torch.library.register_fake("rtpurbo::index_kl")
def _(
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
    double = torch.float64 in (q.dtype, q_index.dtype, k_index.dtype)
    accum = torch.float64 if double else torch.float32
    batch, heads, length, dim = q_index.shape
    return (
        q.new_empty((heads,), dtype=accum),
        q.new_empty((batch, heads, length), dtype=accum),
        q_index.new_empty((batch, heads, length, dim)),
        k_index.new_empty((batch, heads, k_index.shape[2], dim)),
        q.new_empty((heads,), dtype=accum if offset is None else offset.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k_index, index_map, offset = inputs[3], inputs[6], inputs[7]
    ctx.index_map, ctx.key_heads, ctx.has_offset = index_map, k_index.shape[1], offset is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad_kl: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_kl is None:
        return (None,) * 13
    by_q, by_k, by_offset = ctx.saved_tensors
    upstream = grad_kl[None, :, None, None]
    grad_q = (by_q * upstream).to(by_q.dtype)
    per_head = (by_k * upstream).to(by_k.dtype)
    grad_k = per_head.new_zeros((per_head.shape[0], ctx.key_heads, *per_head.shape[2:]))
    grad_k = grad_k.index_add(
        1, torch.tensor(ctx.index_map, dtype=torch.int64, device=by_k.device), per_head
    )
    grad_offset = (by_offset * grad_kl).to(by_offset.dtype) if ctx.has_offset else None
    return None, None, grad_q, grad_k, None, None, None, grad_offset, *[None] * 5


torch.library.register_autograd("rtpurbo::index_kl", _backward, setup_context=_setup_context)

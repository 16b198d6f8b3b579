"""Index queries and index keys from the features before RoPE."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops


def index_project(
    q: Tensor,
    k: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    q_heads: Sequence[int],
    k_heads: Sequence[int],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """q_index[b, j] = q[b, q_heads[j]] w_q[j]^T, k_index[b, j] = k[b, k_heads[j]] w_k[j]^T.

    Differentiable in q, k, w_q and w_k.

    Args:
        q: [B, Hq, Mq, D] queries before RoPE, after QK-norm; last dimension contiguous.
        k: [B, Hk, Mk, D] keys before RoPE, of q's dtype.
        w_q: [R, r, D], WQ_h of the query heads q_heads.
        w_k: [Rk, r, D], WK_h that read the KV heads k_heads; of w_q's dtype.
        q_heads, k_heads: head numbers; one may stand several times.
        dtype: of the results, w_q's by default. Sums run in float32 (float64 for float64).

    Returns:
        q_index [B, R, Mq, r] and k_index [B, Rk, Mk, r].

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.index_project(q, k, w_q, w_k, q_heads, k_heads, dtype)


@torch.library.register_fake("rtpurbo::index_project")
def _(
    q: Tensor,
    k: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    q_heads: Sequence[int],
    k_heads: Sequence[int],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = dtype or w_q.dtype
    return (
        q.new_empty((q.shape[0], w_q.shape[0], q.shape[2], w_q.shape[1]), dtype=dtype),
        k.new_empty((k.shape[0], w_k.shape[0], k.shape[2], w_k.shape[1]), dtype=dtype),
    )


@torch.library.register_fake("rtpurbo::index_project_backward")
def _(
    grad: Tensor, x: Tensor, w: Tensor, heads: Sequence[int], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wanted[0] else (0,)),
        w.new_empty(w.shape if wanted[1] else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, w_q, w_k, ctx.q_heads, ctx.k_heads, _ = inputs
    ctx.save_for_backward(q, k, w_q, w_k)


def _backward(ctx: Any, grad_q_index: Tensor, grad_k_index: Tensor) -> tuple[Tensor | None, ...]:
    q, k, w_q, w_k = ctx.saved_tensors
    need_q, need_k, need_w_q, need_w_k = ctx.needs_input_grad[:4]
    backward = rtpurbo_ops.index_project_backward
    grad_q, grad_w_q = backward(grad_q_index, q, w_q, ctx.q_heads, [need_q, need_w_q])
    grad_k, grad_w_k = backward(grad_k_index, k, w_k, ctx.k_heads, [need_k, need_w_k])
    return (
        grad_q if need_q else None,
        grad_k if need_k else None,
        grad_w_q if need_w_q else None,
        grad_w_k if need_w_k else None,
        None,
        None,
        None,
    )


torch.library.register_autograd("rtpurbo::index_project", _backward, setup_context=_setup_context)

"""Headwise attention of prefill and training, with its gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieval_heads: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    start: Tensor | None = None,
    k_local: Tensor | None = None,
    v_local: Tensor | None = None,
    start_local: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: Tensor | None = None,
    tile: int = 128,
    block_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, local heads over sinks and window, retrieval heads over everything.

    Query row i stands at position m = N - M + i and sees keys start <= n <= m. Local heads see of
    those n - start < sinks or m - n < window; retrieval heads see all, or the blocks listed.

    Args:
        q: [B, Hq, M, D], D a multiple of 8, last dimension contiguous; float32, float64, bfloat16
            or float16.
        k, v: [B, Hk, N, D] of q's dtype, N >= M; with k_local only the KV heads that hold a
            retrieval head, in order.
        retrieval_heads: ascending query heads.
        window, sinks: >= 1 and >= 0.
        scale: of the logits, D^-0.5 normally.
        start: int64 [B], first real key of each sequence (left padding).
        k_local, v_local: [B, L, Nl, D], the other KV heads of a headwise cache: sinks and latest
            keys in order; the queries are the last M of its Nl positions. Forward only.
        start_local: int64 [B], first real key in k_local.
        block_indices: int32 [B, R, T, C], T = ceil(M / tile): key blocks (n // block_size) of each
            tile and retrieval head, each once and ascending, which is not checked: their values
            would have to be read. One that stands twice may count twice.
        block_counts: int32 [B, R, T]; -1 makes the tile see all visible keys.

    Returns:
        out [B, Hq, M, D], stored as [B, M, Hq, D]; lse [B, Hq, M] float32 (float64 for float64),
        not differentiable. A row that sees no key has out 0 and lse -inf.

    On Hopper, 16-bit types with rows of whole 16 bytes have kernels of their own; with lists only
    at tile 128 and block_size 64. All others run, more slowly, on those of sm_80 and newer.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.attention(
        q,
        k,
        v,
        retrieval_heads,
        window,
        sinks,
        scale,
        start,
        k_local,
        v_local,
        start_local,
        block_indices,
        block_counts,
        tile,
        block_size,
    )


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that the operators accumulate in: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.library.register_fake("rtpurbo::attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieval_heads: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    start: Tensor | None = None,
    k_local: Tensor | None = None,
    v_local: Tensor | None = None,
    start_local: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: Tensor | None = None,
    tile: int = 128,
    block_size: int = 64,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    out = q.new_empty((batch, rows, heads, dim)).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=accumulation_dtype(q))


@torch.library.register_fake("rtpurbo::attention_backward")
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    retrieval_heads: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    start: Tensor | None,
    block_indices: Tensor | None,
    block_counts: Tensor | None,
    tile: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    def empty_like_heads(tensor: Tensor) -> Tensor:
        return torch.empty_like(
            tensor.transpose(1, 2), memory_format=torch.contiguous_format
        ).transpose(1, 2)

    return empty_like_heads(q), empty_like_heads(k), empty_like_heads(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, heads, window, sinks, scale, start, k_local, _, _, blocks, counts, tile, block = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, start, blocks, counts)
    ctx.mask = (list(heads), window, sinks, scale)
    ctx.blocks = (tile, block)
    ctx.headwise = k_local is not None


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.headwise:
        raise NotImplementedError(
            "rtpurbo::attention: k_local is forward only; train without a headwise cache"
        )
    q, k, v, out, lse, start, blocks, counts = ctx.saved_tensors
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grads = rtpurbo_ops.attention_backward(
        grad_out, q, k, v, out, lse, *ctx.mask, start, blocks, counts, *ctx.blocks
    )
    return (*grads, *[None] * 12)


torch.library.register_autograd("rtpurbo::attention", _backward, setup_context=_setup_context)

"""The run-time path of a sparse model: one page, from q, k, v of a layer to its output.

| tokens in the cache | query rows | what runs |
|---|---|---|
| none | any | `ops.attention` on the given k and v, then append |
| some | one | append, then `sparse_decode`, or `decode` of all keys of short inputs; |
|      |     | with `refine` `near_lse`, `select` and `decode` |
| some | more | `cache_unroll`, append, then `ops.attention` on pages and unrolled rings |

Retrieval heads see every key in prefill, or with `prefill="sparse"` the blocks of `select_tiles`;
what a short input is says `short_inputs`.
Appending to a cache with tokens projects index queries and keys, too: `cache_append_projected`.
Rows score the keys of their window in 16 bits: the cache quantises at the end of a forward
(`settle`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from rtpurbo import ops
from rtpurbo.cache import INDEX_DTYPE, HeadwiseLayer, IndexKeys
from rtpurbo.context import KEY, LastForward, LayerContext, NoBackward
from rtpurbo.index import LayerIndex
from rtpurbo.short_inputs import decode_selects, prefill_selects
from rtpurbo.tiles import TILE, TILE_BLOCK, TILE_RANK, min_tile_blocks, tile_capacity

IMPLEMENTATION = "rtpurbo"


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: q [B, Hq, M, D] to [B, M, Hq, D].

    `attention_mask` is what `mask_forward` made: int64 [B], the first real key of each sequence.
    Under autocast RoPE leaves q and k wider than v; they are rounded back.
    """
    context: LayerContext = module.__dict__[KEY]
    query, key = query.to(value.dtype), key.to(value.dtype)
    _refuse(attention_mask, dropout, kwargs)
    try:
        if context.state.observer is not None:
            context.state.observer(context, query.detach(), key.detach(), attention_mask)
            out = _dense(query, key, value, attention_mask, scaling)
        else:
            out = _sparse(context, query, key, value, attention_mask, scaling)
    finally:
        context.release()
    return out.transpose(1, 2), None


def mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask interface of transformers: the first real key of each sequence instead of a mask.

    Returns:
        int64 [B], or None if nothing is padded.

    Raises:
        ValueError: the mask is not left padding, or its length does not fit.
        NotImplementedError: another mask than causal, packed sequences for example.
    """
    if mask_function is not causal_mask_function:
        raise NotImplementedError(
            "rtpurbo: only causal attention with left padding is available, got a custom mask or "
            "packed sequences; pad them instead"
        )
    if attention_mask is None:
        return None
    length = q_offset + q_length
    if attention_mask.shape != (batch_size, length):
        raise ValueError(
            f"rtpurbo: attention_mask must cover cached and new tokens, [{batch_size}, {length}], "
            f"got {list(attention_mask.shape)}"
        )
    real = attention_mask.bool()
    start = length - real.sum(-1)
    positions = torch.arange(length, device=real.device)
    if not torch.equal(real, positions >= start[:, None]):
        raise ValueError(
            "rtpurbo: attention_mask must be left padding (zeros, then ones), got zeros after "
            'ones; set tokenizer.padding_side = "left"'
        )
    return start if start.any() else None


def _refuse(attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None and attention_mask.dim() != 1:
        raise NotImplementedError(
            "rtpurbo: attention_mask must be a 2-D mask of left padding, got one of shape "
            f"{list(attention_mask.shape)}"
        )
    if dropout:
        raise NotImplementedError(
            f"rtpurbo: attention dropout must be 0, got {dropout}; set "
            "model.config.attention_dropout = 0 before building the model, or call model.eval()"
        )
    sliding_window = kwargs.get("sliding_window")
    if sliding_window is not None:
        raise NotImplementedError(
            f"rtpurbo: the model's own sliding_window must be None, got {sliding_window}; set "
            "it so in model.config before patching: RTPurboConfig.window is that of local heads"
        )


def _dense(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float) -> Tensor:
    every_head = list(range(q.shape[1]))
    return ops.attention(q, k, v, every_head, window=1, sinks=0, scale=scale, start=start)[0]


def _sparse(
    context: LayerContext, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float
) -> Tensor:
    cache = context.cache
    if cache is None or cache.length == 0:
        return _whole(context, q, k, v, start, scale)
    _check_start(context, cache, start)
    step = _decode if q.shape[2] == 1 else _chunk
    with torch.no_grad():
        out = step(context, cache, q, k, v, scale)
    return NoBackward.apply(out, q, k, v) if torch.is_grad_enabled() else out


def _whole(
    context: LayerContext, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float
) -> Tensor:
    """A sequence without cached tokens: prefill and training."""
    config = context.state.config
    q_index, k_index = _project(context)
    keys = None if k_index is None else IndexKeys(k_index)
    lists = _tiles(context, q, k, context.owners, q_index, keys, start, scale)
    out, _ = ops.attention(
        q, k, v, context.heads, config.window, config.sinks, scale, start,
        block_indices=lists.indices, block_counts=lists.counts, tile=TILE, block_size=TILE_BLOCK,
    )  # fmt: skip
    if context.cache is not None:
        context.cache.append(k.detach(), v.detach(), k_index, start)
        context.cache.settle()
        lists.keep(context.cache)
    return out


def _chunk(
    context: LayerContext, cache: HeadwiseLayer, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """Further rows of a sequence whose beginning is cached."""
    config = context.state.config
    k_local, v_local, start_local = cache.unroll(k, v)
    q_index = _append(context, cache, k, v)
    k_pages, v_pages = cache.pages()
    keys = cache.index_keys() if context.heads else None
    lists = _tiles(context, q, k_pages, context.page_heads, q_index, keys, cache.start, scale)
    out, _ = ops.attention(
        q, k_pages, v_pages, context.heads, config.window, config.sinks, scale, cache.start,
        k_local=k_local, v_local=v_local, start_local=start_local,
        block_indices=lists.indices, block_counts=lists.counts, tile=TILE, block_size=TILE_BLOCK,
    )  # fmt: skip
    cache.settle()
    lists.keep(cache)
    return out


def _decode(
    context: LayerContext, cache: HeadwiseLayer, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """One new token a sequence."""
    config, heads, start = context.state.config, context.heads, cache.start
    q_index = _append(context, cache, k, v)
    k_pages, v_pages = cache.pages()
    last = LastForward(1, cache.length, q.shape[0], start, scale, q=q)
    window = cache.layout.ring_capacity - config.sinks
    local = bool(cache.layout.local_heads)
    k_ring, v_ring = (cache.k_ring, cache.v_ring) if local else (None, None)
    if q_index is None or not decode_selects(context, q, cache.length):
        out, last.lse = ops.decode(
            q, k_pages, v_pages, heads, window, config.near_window, config.sinks, scale,
            k_local=k_ring, v_local=v_ring, start=start, length=cache.length,
        )  # fmt: skip
    elif config.refine:
        whole, keys = cache.whole_index_keys(), cache.index_keys()
        near = _near_lse(context, q, k_pages, context.page_heads, start, scale)
        last.tokens, last.counts, last.mass = ops.select(
            q_index, whole, context.index.index_map, config.top_p, config.near_window, config.sinks,
            config.min_tokens, near_lse=near, offset=_offset(context), start=start,
            codes=keys.codes, ranges=keys.ranges, refine=True,
        )  # fmt: skip
        out, last.lse = ops.decode(
            q, k_pages, v_pages, heads, window, config.near_window, config.sinks, scale,
            indices=last.tokens, counts=last.counts, k_local=k_ring, v_local=v_ring, start=start,
            length=cache.length,
        )  # fmt: skip
    else:
        keys = cache.index_keys()
        exact = config.exact_sets or not q.is_cuda
        out, last.lse, last.selected, last.counts, last.mass = ops.sparse_decode(
            q, k_pages, v_pages, heads, q_index, keys.keys, context.index.index_map, config.top_p,
            window, config.near_window, config.sinks, config.min_tokens, scale,
            block_size=config.block_size, beyond_window=config.index == "beyond_window",
            offset=_offset(context), k_local=k_ring, v_local=v_ring, start=start,
            length=cache.length, codes=keys.codes, ranges=keys.ranges, exact=exact,
        )  # fmt: skip
    cache.settle()
    last.keep(cache)
    context.last = last
    return out


def _append(context: LayerContext, cache: HeadwiseLayer, k: Tensor, v: Tensor) -> Tensor | None:
    """Caches further tokens; where heads retrieve with index keys, and returns index queries."""
    if not context.heads:
        cache.append(k, v, None, cache.start)
        return None
    q_pre, k_pre, index = _features(context)
    return cache.append_projected(k, v, q_pre, k_pre, index, cache.start)


def _project(context: LayerContext) -> tuple[Tensor | None, Tensor | None]:
    """Index queries [B, R, M, r] and index keys [B, Rk, M, r] of a whole sequence, where used."""
    used = context.cache is not None or context.state.config.prefill == "sparse"
    if not context.heads or not used:
        return None, None
    q, k, index = _features(context)
    with torch.no_grad():
        return ops.index_project(
            q, k, index.w_q, index.w_k, context.heads, index.kv_heads, dtype=INDEX_DTYPE
        )


def _features(context: LayerContext) -> tuple[Tensor, Tensor, LayerIndex]:
    """q and k before RoPE, and the index on their device."""
    q, k = context.q_pre, context.k_pre
    assert q is not None and k is not None
    return q, k, context.index.to(q.device)


def _near_lse(
    context: LayerContext, q: Tensor, k: Tensor, k_heads: list[int], start: Tensor | None,
    scale: float,
) -> Tensor | None:  # fmt: skip
    config = context.state.config
    if config.index == "full":
        return None
    return ops.near_lse(q, k, context.heads, k_heads, config.window, config.sinks, scale, start)


def _offset(context: LayerContext) -> Tensor | None:
    return context.index.offset if context.state.config.index == "beyond_window" else None


def _tiles(
    context: LayerContext, q: Tensor, k: Tensor, k_heads: list[int], q_index: Tensor | None,
    keys: IndexKeys | None, start: Tensor | None, scale: float,
) -> LastForward:  # fmt: skip
    """What retrieval heads see in prefill: block lists, or nothing where they run dense."""
    config = context.state.config
    last = context.last = LastForward(q.shape[2], k.shape[2], q.shape[0], start, scale)
    if q_index is not None and keys is not None and prefill_selects(context, q, last.keys, start):
        index, q, k = context.index, q.detach(), k.detach()
        last.indices, last.counts, last.mass = ops.select_tiles(
            q_index, keys.keys, index.index_map, index.threshold, config.near_window, config.sinks,
            min_tile_blocks(config), tile=TILE,
            block_size=TILE_BLOCK, near_lse=_near_lse(context, q, k, k_heads, start, scale),
            offset=_offset(context), start=start,
            capacity=tile_capacity(last.keys), rank=TILE_RANK,
            codes=keys.codes, ranges=keys.ranges,
        )  # fmt: skip
    return last


def _check_start(context: LayerContext, cache: HeadwiseLayer, start: Tensor | None) -> None:
    """The padding must be what it was when the tokens were cached; compared once a forward.

    A sequence of which only padding is cached may still begin later.
    """
    if context.number == 0 and not (start is None and cache.start is None):
        zeros = torch.zeros(cache.batch_size, dtype=torch.int64, device=cache.device)
        known = zeros if cache.start is None else cache.start
        now = zeros if start is None else start
        if not torch.equal(known, now.clamp(max=cache.length)):
            raise ValueError(
                "rtpurbo: attention_mask must keep the left padding that the cached tokens had, "
                f"{known.tolist()}, got {now.tolist()}"
            )
    cache.start = start

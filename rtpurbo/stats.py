"""What the last forward of a sparse model attended to, and what its cache weighs and counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtpurbo import ops
from rtpurbo.context import LastForward, LayerContext, state
from rtpurbo.ops.sparse_decode import unpacked
from rtpurbo.tiles import TILE, TILE_BLOCK

_SAMPLED_TILES = 8


def stats(model: Any, *, true_mass: bool = False) -> dict[str, Any]:
    """Counts of the last forward. They are computed here, from references that the forward kept.

    Only `fallbacks` goes further back: over all passes that filled the cache of the last forward,
    so that after `generate()` or chunks of a prompt it is still that of the whole prefill.
    A prefill whose retrieval heads chose blocks is counted on eight evenly spaced tiles of rows.

    Args:
        model: a sparse model that has run.
        true_mass: also computes the share of the full attention's mass that the retrieval heads
            saw, after a decode step whose cache is still alive; one dense pass over their keys.

    Returns:
        A dict: `rows` and `keys` of that forward; `attended_tokens`, the mean over query heads and
        rows, `attended_tokens_per_layer`, `attended_fraction` of the visible keys and
        `compute_sparsity`, 1 minus that; `memory_sparsity`, 1 minus the share of visible keys that
        any query head of a KV head attends; `index_mass`, the share recovered as the index sees it,
        in a sparse prefill by the largest logit of each block (None if nothing was selected);
        `true_mass` (None unless asked for and there); `selecting_layers`, layers whose retrieval
        heads selected: others read every key, see `rtpurbo.short_inputs`; `fallbacks`, tiles of
        sparse prefill that ran dense for want of room, summed over layers, sequences and retrieval
        heads; `kv_bytes` without and `index_bytes` of index keys, `dense_bytes` of a dense cache (0
        without a cache).

    Raises:
        ValueError: the model is not sparse, or has not run since it is.
    """
    found = state(model)
    ran = [context for context in found.layers if context.last is not None]
    if not ran:
        raise ValueError("rtpurbo.stats: the model has not run yet; run a forward first")
    lasts = [last for context in ran if (last := context.last) is not None]
    counts = [_count(context) for context in ran]
    masses = [last.mass.flatten() for last in lasts if last.mass is not None]
    chosen = [last.counts for last in lasts if last.counts is not None]
    true = [mass for c in ran if true_mass and (mass := _true_mass(c)) is not None]
    attended, fraction, union = (_mean([count[i] for count in counts]) for i in range(3))
    return {
        "rows": lasts[0].rows,
        "keys": lasts[0].keys,
        "attended_tokens": attended,
        "attended_tokens_per_layer": [count[0] for count in counts],
        "attended_fraction": fraction,
        "compute_sparsity": 1 - fraction,
        "memory_sparsity": 1 - union,
        "index_mass": torch.cat(masses).mean().item() if masses else None,
        "true_mass": torch.cat(true).mean().item() if true else None,
        "selecting_layers": len(chosen),
        "fallbacks": sum(map(_fallbacks, lasts)),
        "kv_bytes": sum(last.kv_bytes for last in lasts),
        "index_bytes": sum(last.index_bytes for last in lasts),
        "dense_bytes": sum(last.dense_bytes for last in lasts),
    }


def _fallbacks(last: LastForward) -> int:
    if last.fallbacks is not None:
        return int(last.fallbacks)
    return 0 if last.counts is None else int((last.counts < 0).sum())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _count(context: LayerContext) -> tuple[float, float, float]:
    """(attended keys, their share of the visible ones, the share any head of a KV head attends)."""
    last = context.last
    assert last is not None
    if last.counts is None and last.rows > 1:
        return _count_dense(context, last)
    tiles = torch.arange(-(-last.rows // TILE))
    if len(tiles) > _SAMPLED_TILES:
        tiles = torch.linspace(0, len(tiles) - 1, _SAMPLED_TILES).long()
    parts = []
    for tile in tiles.tolist():
        rows = torch.arange(tile * TILE, min((tile + 1) * TILE, last.rows))
        attended, visible = _attended(context, last, rows)
        real = visible.any(-1)
        sizes = visible.sum(-1).clamp_min(1)[:, None]
        used = attended.sum(-1)
        sizes_of = context.state.sizes
        grouped = attended.unflatten(1, (sizes_of.kv_heads, sizes_of.group)).any(2).sum(-1)
        for batch in range(last.batch):
            keep = real[batch]
            if keep.any():
                parts.append(
                    torch.stack([
                        used[batch][:, keep].double().mean(),
                        (used[batch] / sizes[batch])[:, keep].double().mean(),
                        (grouped[batch] / sizes[batch])[:, keep].double().mean(),
                    ])
                )  # fmt: skip
    if not parts:
        return 0.0, 0.0, 0.0
    attended_tokens, fraction, union = torch.stack(parts).mean(0).tolist()
    return attended_tokens, fraction, union


def _count_dense(context: LayerContext, last: LastForward) -> tuple[float, float, float]:
    """Prefill whose retrieval heads see all: the near keys of a row have a closed form."""
    config, sizes = context.state.config, context.state.sizes
    starts = torch.zeros(last.batch, 1) if last.start is None else last.start.cpu()[:, None]
    visible = torch.arange(last.keys - last.rows, last.keys)[None] - starts + 1
    visible = visible[visible > 0].double()
    if not len(visible):
        return 0.0, 0.0, 0.0
    near = visible.clamp(max=config.window + config.sinks)
    share = len(context.heads) / sizes.query_heads
    full = len(context.full_kv_heads) / sizes.kv_heads
    attended = share * visible + (1 - share) * near
    union = full * visible + (1 - full) * near
    return (
        attended.mean().item(),
        (attended / visible).mean().item(),
        (union / visible).mean().item(),
    )


def _attended(context: LayerContext, last: LastForward, rows: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, Hq, rows, N] of attended keys and [B, rows, N] of visible ones."""
    config, heads = context.state.config, context.state.sizes.query_heads
    starts = torch.zeros(last.batch, dtype=torch.long) if last.start is None else last.start.cpu()
    m = (last.keys - last.rows + rows)[None, :, None]
    n, first = torch.arange(last.keys), starts[:, None, None]
    visible = (first <= n) & (n <= m)
    sink = n - first < config.sinks
    attended = (visible & (sink | (m - n < config.window)))[:, None].repeat(1, heads, 1, 1)
    decoded = _decoded(last)
    if decoded is not None:
        chosen = decoded | (visible & (sink | (m - n < config.near_window)))
    elif last.counts is not None and last.indices is not None:
        tile = int(rows[0]) // TILE
        chosen = _listed(last.indices[:, :, tile], last.counts[:, :, tile], last.keys, TILE_BLOCK)
    else:
        chosen = torch.ones(1, 1, last.keys, dtype=torch.bool)
    attended[:, context.heads] = visible[:, None] & chosen[:, :, None, :]
    return attended, visible


def _decoded(last: LastForward) -> Tensor | None:
    """bool [B, R, N]: what a decode step selected; None where it selected nothing."""
    if last.selected is not None:
        return unpacked(last.selected[:, :, 0].cpu(), last.keys)
    if last.tokens is not None and last.counts is not None:
        return _listed(last.tokens[:, :, 0], last.counts[:, :, 0], last.keys, block_size=1)
    return None


def _listed(indices: Tensor, counts: Tensor, keys: int, block_size: int) -> Tensor:
    """bool [B, R, N]: the key's block is listed, from indices [B, R, C] and counts [B, R]."""
    indices, counts = indices.cpu().long(), counts.cpu()
    blocks = torch.zeros(*counts.shape, -(-keys // block_size) + 1, dtype=torch.bool)
    used = torch.arange(indices.shape[-1]) < counts[..., None]
    blocks.scatter_(-1, indices.masked_fill(~used, blocks.shape[-1] - 1), True)
    listed = blocks[..., :-1].repeat_interleave(block_size, dim=-1)[..., :keys]
    return listed | (counts < 0)[..., None]


def _true_mass(context: LayerContext) -> Tensor | None:
    """exp(lse of what was attended - lse of all visible keys), of each retrieval head."""
    last = context.last
    if last is None or last.q is None or last.lse is None or last.cache is None:
        return None
    cache = last.cache()
    if cache is None or not context.heads:
        return None
    keys = cache.k_pages[:, :, : last.keys]
    full = ops.near_lse(
        last.q, keys, context.heads, context.page_heads, last.keys, 0, last.scale, last.start
    )
    return (last.lse[:, context.heads] - full).exp().clamp(max=1).flatten()

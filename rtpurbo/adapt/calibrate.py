"""Thresholds of the sparse prefill: the pooled share at which the true mass reaches top_p.

A block's share comes from its largest index logit, and an index that ranks well may still misjudge
mass, so a tile that stops at share top_p keeps more or less than top_p of the attention. Here the
true mass of the lists is measured on rows of held-out sequences, as exp(LSE over the listed blocks
- LSE over all keys), and every head gets the least threshold whose mean true mass is top_p.
"""

from typing import Any

import torch
from torch import Tensor

from rtpurbo import families, ops
from rtpurbo.adapt.samples import Samples
from rtpurbo.config import RTPurboConfig
from rtpurbo.context import LayerContext
from rtpurbo.index import Index
from rtpurbo.patching import observe, state
from rtpurbo.tiles import TILE, TILE_BLOCK, TILE_RANK, min_tile_blocks

_THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
_TILES = 8


def calibrate(model: Any, tokens: Any) -> dict[str, float]:
    """Finds the thresholds of the sparse prefill anew, for prompts as long as these sequences.

    `train_index` finds them on its held-out sequences; with prompts of another length the lists
    then hold more or less than `top_p` of the attention. Each retrieval head gets the least
    threshold at which the tiles of a sequence's last 1,024 rows, or of its second half where that
    is shorter, hold `top_p` on average. One dense forward a sequence.

    Args:
        model: sparsified, with a trained index, of which nothing but the thresholds changes.
        tokens: sequences as `train_index` takes them, of 256 tokens or more. Rows that repeat what
            stood far away ask most of lists, so `rtpurbo.data.retrieval_sequences` are a good
            choice.

    Returns:
        tile_true_mass and tile_density, the share of the visible blocks that is listed, averaged
        over heads. `save_pretrained` keeps them beside the thresholds.

    Raises:
        ValueError: the index is not trained, there is no retrieval head, or a sequence is too
            short or has wrong ids.
    """
    patched = state(model)
    samples = Samples(tokens, "tokens")
    if not patched.index.trained:
        raise ValueError(
            "rtpurbo.calibrate: the index is not trained, so thresholds of its shares mean "
            "nothing; run rtpurbo.train_index first, which calibrates them, too"
        )
    if not any(layer.heads for layer in patched.index.layers.values()):
        raise ValueError("rtpurbo.calibrate: the head map names no retrieval head")
    plain = families.unwrap(model)
    embeddings = plain.get_input_embeddings()
    lengths = samples.lengths(embeddings.num_embeddings)
    for i, length in enumerate(lengths):
        if length < 2 * TILE:
            raise ValueError(
                f"rtpurbo.calibrate: tokens[{i}] has {length} tokens; thresholds are of tiles of "
                f"{TILE} rows in a sequence's second half, so give {2 * TILE} or more"
            )
    families.warn_beyond_context(
        plain, max(lengths), "rtpurbo.calibrate: the longest of the tokens"
    )
    calibration = Calibration(patched.config, patched.index)

    def look(context: LayerContext, q: Tensor, k: Tensor, start: Tensor | None) -> None:
        if context.heads:
            context.index.to(q.device)  # as sparse forwards do
            calibration.observe(context, q, k)

    decoder, device = families.decoder(plain), embeddings.weight.device
    with torch.no_grad(), observe(plain, look):
        for i in range(len(samples)):
            decoder(input_ids=samples[i].tokens[None].to(device), use_cache=False)
    metrics = calibration.store()
    patched.index.history["calibration"] = {"longest": max(lengths), **metrics}
    return metrics


class Calibration:
    """Collects, per layer, the true mass and density [thresholds, R] of the tiles it is shown."""

    def __init__(self, config: RTPurboConfig, index: Index):
        self._config = config
        self._index = index
        self._sums: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}

    def observe(self, context: LayerContext, q: Tensor, k: Tensor) -> None:
        """Measures the last tiles of a sequence, at most 8 and in its second half."""
        length = q.shape[2]
        rows = min(_TILES, length // (2 * TILE)) * TILE
        if rows == 0:
            return
        config, layer = self._config, context.index
        heads = list(range(len(layer.heads)))
        q, k = q[:, layer.heads, -rows:], k[:, context.owners]
        near = (config.near_window, config.sinks)
        scale = context.module.scaling
        q_pre, k_pre = context.q_pre, context.k_pre
        assert q_pre is not None and k_pre is not None
        q_index, k_index = ops.index_project(
            q_pre[:, :, -rows:],
            k_pre,
            layer.w_q,
            layer.w_k,
            layer.heads,
            layer.kv_heads,
        )
        beyond = config.index == "beyond_window"
        lse = ops.near_lse(q, k, heads, heads, *near, scale) if beyond else None
        dense_lse = ops.attention(q, k, k, heads, *near, scale)[1]
        position = torch.arange(length - rows, length, TILE, device=q.device) + TILE - 1
        visible = position // TILE_BLOCK + 1
        measured = []
        for threshold in _THRESHOLDS:
            blocks, counts, _ = ops.select_tiles(
                q_index,
                k_index,
                layer.index_map,
                torch.full_like(layer.threshold, threshold),
                *near,
                min_tile_blocks(config),
                TILE,
                TILE_BLOCK,
                lse,
                layer.offset if beyond else None,
                rank=TILE_RANK,
            )
            kept = ops.attention(
                q, k, k, heads, *near, scale, block_indices=blocks, block_counts=counts
            )[1]
            mass = (kept - dense_lse).exp().mean(-1)[0]
            listed = torch.where(counts < 0, visible, counts)[0]
            measured.append(torch.stack([mass, (listed / visible).mean(-1)]))
        sums = torch.stack(measured)
        self._sums[context.number] = self._sums.get(context.number, 0) + sums
        self._calls[context.number] = self._calls.get(context.number, 0) + 1

    def store(self) -> dict[str, float]:
        """Sets the thresholds; returns mean true mass and density of blocks at them."""
        masses, densities = [], []
        for number, sums in self._sums.items():
            mass, density = (sums / self._calls[number]).unbind(1)
            enough = mass >= self._config.top_p
            enough[-1] = True
            first = enough.int().argmax(0, keepdim=True)
            grid = torch.tensor(_THRESHOLDS, device=mass.device)
            self._index.layers[number].threshold.copy_(grid[first[0]])
            masses.append(mass.gather(0, first)[0])
            densities.append(density.gather(0, first)[0])
        if not masses:
            return {}
        return {
            "tile_true_mass": float(torch.cat(masses).mean()),
            "tile_density": float(torch.cat(densities).mean()),
        }

"""The short-input rule of sparse prefill: seconds with dense retrieval heads against seconds with
lists and their selection.

Attention takes as long as all its pairs of a row and a key, or where there are few as the longest
part of a tile of rows, which is one multiprocessor's. The constants were measured on an H100.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rtpurbo.context import LayerContext
from rtpurbo.short_inputs.fast import FAST_INDEX_DIM
from rtpurbo.tiles import TILE

PREFILL_SECONDS = 8e-5
"""Of the launches of `near_lse` and `select_tiles`, or of both of the latter."""
CHOICE_SECONDS = 8e-8
"""Of a tile's pooling and choice."""
LISTED_SHARE = 0.3
"""Of a head's far pairs of a row and a key that its lists keep, as short inputs want them."""

ATTENTION_SECONDS = {64: 0.61e-12, 128: 0.75e-12, 256: 1.4e-12}
"""Of a pair in 16-bit types, by head dim; others as the next larger."""
LONE_KEY_PAIRS = 13_500
"""What the whole device does while one multiprocessor, alone, does a key of a tile."""
PART_KEYS = 1536
"""Of a tile that one multiprocessor takes alone, at most, where there are few tiles."""
NEAR_LSE_SECONDS = 0.39e-12, 2.2e-15
"""Of a pair of `near_lse`, fixed and for each dimension of a head."""
FAR_SCORE_SECONDS = 0.1e-12
"""Of a far pair of `select_tiles`."""
NEAR_MASS_SECONDS = 0.4e-12, 7.6e-8
"""Of a near pair and of a tile of `select_tiles` in form `full`, which has no `near_lse`."""


@dataclass(frozen=True)
class PrefillPass:
    """A pass of a layer.

    Attributes:
        lengths: real keys of each sequence.
        rows: the last of them that are query rows, at most.
        heads, local_heads: retrieval heads and the others.
        near, window: keys of sinks and window that a row of either sees.
        dim: of a head.
        beyond_window: the index's form; False is `full`.
    """

    lengths: Sequence[int]
    rows: int
    heads: int
    local_heads: int
    near: int
    window: int
    dim: int
    beyond_window: bool

    def rows_of(self, length: int) -> int:
        """Rows of whole tiles: few of them cost as much."""
        return min(length, -(-self.rows // TILE) * TILE)

    def pairs(self, length: int, near: int) -> tuple[int, int]:
        """Pairs of a row and a key that a head has, near and far ones."""
        rows = self.rows_of(length)
        far = _triangle(length - near) - _triangle(length - near - rows)
        return _triangle(length) - _triangle(length - rows) - far, far


def prefill_selects(context: LayerContext, q: Tensor, keys: int, start: Tensor | None) -> bool:
    """Whether a pass of rows q [B, Hq, M, D] over `keys` tokens, the first real ones of which are
    start, int64 [B] or None, selects blocks."""
    config = context.state.config
    near = config.near_window + config.sinks
    if config.prefill != "sparse" or keys <= near:
        return False
    if config.select_from is not None:
        return keys - near >= config.select_from
    if q.device.type != "cuda" or q.element_size() != 2:  # others attend many times as slowly
        return True
    if config.index_dim != FAST_INDEX_DIM:
        warnings.warn(
            f'rtpurbo: prefill="sparse" of a 16-bit model reads every key on CUDA with index_dim '
            f"{config.index_dim}, as to select would take longer; use {FAST_INDEX_DIM}, or "
            "select_from to select all the same",
            stacklevel=2,
        )
        return False
    batch, heads, rows, dim = q.shape
    retrieval = len(context.heads)
    prefill = PrefillPass(
        lengths=[keys - first for first in context.state.first_keys(start, batch)],
        rows=rows,
        heads=retrieval,
        local_heads=heads - retrieval,
        near=near,
        window=config.window + config.sinks,
        dim=dim,
        beyond_window=config.index == "beyond_window",
    )
    return seconds_spared(prefill) > 0


def seconds_spared(prefill: PrefillPass) -> float:
    """What sparse prefill spares a GPU; negative where dense retrieval heads are quicker."""
    dense, listed = (attention_seconds(prefill, share) for share in (1.0, LISTED_SHARE))
    return dense - listed - selection_seconds(prefill) - PREFILL_SECONDS


def attention_seconds(prefill: PrefillPass, share: float) -> float:
    """Of all heads, where retrieval heads attend to a share of their far pairs."""
    pairs = longest = 0.0
    for length in prefill.lengths:
        near, far = prefill.pairs(length, prefill.near)
        local, _ = prefill.pairs(length, prefill.window)
        pairs += prefill.heads * (near + share * far) + prefill.local_heads * local
        beyond = max(0, length - prefill.near)
        longest = max(longest, length - (1 - share) * beyond)
    pairs = max(pairs, min(longest, PART_KEYS) * LONE_KEY_PAIRS)
    fits = (seconds for dim, seconds in ATTENTION_SECONDS.items() if prefill.dim <= dim)
    return pairs * next(fits, ATTENTION_SECONDS[256])


def selection_seconds(prefill: PrefillPass) -> float:
    """What `near_lse` and `select_tiles` of all heads take, launches aside."""
    near = far = tiles = 0
    for length in prefill.lengths:
        pairs = prefill.pairs(length, prefill.near)
        near, far = near + prefill.heads * pairs[0], far + prefill.heads * pairs[1]
        tiles += prefill.heads * -(-prefill.rows_of(length) // TILE)
    if prefill.beyond_window:
        fixed, by_dim = NEAR_LSE_SECONDS
        near = max(near, min(max(prefill.lengths, default=0), prefill.near) * LONE_KEY_PAIRS)
        near_seconds, tile_seconds = fixed + by_dim * prefill.dim, 0.0
    else:
        near_seconds, tile_seconds = NEAR_MASS_SECONDS
    of_tiles = (tile_seconds + CHOICE_SECONDS) * tiles
    return near_seconds * near + FAR_SCORE_SECONDS * far + of_tiles


def _triangle(n: int) -> int:
    return max(n, 0) * (max(n, 0) + 1) // 2

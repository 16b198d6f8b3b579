"""The short-input rule: where retrieval heads read every key, as to select would take longer.

Selecting costs launches, and what it takes to score and rank the far keys; it spares reading most
of them. On a CPU it is always done. On CUDA the constants below, measured on an H200 (those of the
sieve on an H100), decide for each pass, sparse prefill in 16-bit types; `RTPurboConfig.select_from`
decides otherwise.
"""

from __future__ import annotations

import sys

from torch import Tensor

from rtpurbo.context import LayerContext
from rtpurbo.tiles import TILE

SPARED_BYTES = 1 << 27
"""What a selection must spare a decode step to read: the time of its stages, 30 to 45 us."""
SCORE_BYTES = 32
"""What a decode step reads while it ranks one score of a retrieval head, the index key aside."""
SIFTED_SCORES = 1 << 23
"""Of all retrieval heads, from which on `sparse_decode` has a sieve (csrc/cuda/select/plan.h)."""
SIFTED_KEYS = 1 << 15
"""The same of keys."""
SIFTED_SCORE_BYTES = 8
SIFTING_BYTES = 1 << 27
"""The same with a sieve, and what this must spare beside SPARED_BYTES: its sample's stages."""

FAST_INDEX_DIM = 16
"""The one that selection has kernels for on tensor cores, and in one launch with decode."""

PREFILL_SECONDS = 1e-4
"""Of the launches and the choosing of a sparse prefill."""
LISTED_SHARE = 0.3
"""Of a head's far pairs of a row and a key that its lists keep, as short inputs want them."""

ATTENTION_SECONDS = 0.18e-12, 5.3e-15
"""Of a pair in 16-bit types, fixed and for each dimension of a head."""
NEAR_LSE_SECONDS = 0.39e-12, 2.2e-15
"""The same of `near_lse`."""
FAR_SCORE_SECONDS = 0.1e-12
"""Of a pair of `select_tiles` in form `beyond_window`."""
FULL_SCORE_SECONDS = 1.5e-12, 0.2e-12
"""In form `full`, of a near pair and of a far one."""
OTHER_SCORE_SECONDS = 8e-12
"""In both forms with another index dim: many times what attention costs."""


def decode_selects(context: LayerContext, q: Tensor, keys: int) -> bool:
    """Whether a decode step over `keys` tokens selects; q [B, Hq, 1, D]."""
    config = context.state.config
    return keys - config.near_window - config.sinks >= fewest_far_keys(context, q)


def fewest_far_keys(context: LayerContext, q: Tensor) -> int:
    """Far keys from which a decode step selects."""
    config = context.state.config
    if config.select_from is not None:
        return max(1, config.select_from)
    if q.device.type != "cuda":
        return 1
    batch, _, _, dim = q.shape
    row = 2 * dim * q.element_size()
    floor = config.min_tokens * row
    heads, read = len(context.heads), len(context.full_kv_heads) * row
    # Retrieval heads of a KV head may share an index key.
    index_keys = len(set(context.index.index_map)) if heads else 0
    index = index_keys * config.index_dim * config.index_bits // 8
    # What `sparse_decode` does in one launch; see csrc/cuda/sparse_decode.cu.
    fused = q.element_size() == 2 and dim in (64, 128, 256) and config.index_dim == FAST_INDEX_DIM
    one_launch = fused and not config.refine
    by_keys = config.block_size == 1 and config.index == "beyond_window"
    sifts = one_launch and by_keys and config.near_window >= 64 and dim <= 128
    return fewest_to_select_from(batch, heads, read, index, floor, one_launch, sifts)


def fewest_to_select_from(
    batch: int,
    heads: int,
    read: int,
    index: int,
    floor: int,
    one_launch: bool = True,
    sifts: bool = False,
) -> int:
    """Far keys from which a selection is quicker on a GPU than to read all of them.

    `read`: bytes a far key of keys and values; `index`: those of its index keys;
    `floor`: bytes of keys and values that a retrieval head reads at least; `one_launch`: instead of
    one for each of `near_lse`, `select` and `decode`; `sifts`: it has a sieve for many scores.
    """
    least = SPARED_BYTES * (1 if one_launch else 2) + batch * heads * floor

    def fewest(least: int, score: int) -> int:
        spared = batch * (read - index - heads * score)
        return least // spared + 1 if spared > 0 else sys.maxsize

    plain = fewest(least, SCORE_BYTES)
    if not sifts:
        return plain
    sifted = fewest(least + SIFTING_BYTES, SIFTED_SCORE_BYTES)
    return min(plain, max(sifted, SIFTED_SCORES // max(1, batch * heads), SIFTED_KEYS))


def prefill_selects(context: LayerContext, q: Tensor, keys: int) -> bool:
    """Whether a pass of rows q [B, Hq, M, D] over `keys` tokens selects blocks."""
    config = context.state.config
    near = config.near_window + config.sinks
    if config.prefill != "sparse" or keys <= near:
        return False
    if config.select_from is not None:
        return keys - near >= config.select_from
    if q.device.type != "cuda" or q.element_size() != 2:  # others attend many times as slowly
        return True
    batch, _, rows, dim = q.shape
    beyond_window = config.index == "beyond_window"
    heads = batch * len(context.heads)
    return seconds_spared(heads, rows, keys, near, dim, config.index_dim, beyond_window) > 0


def seconds_spared(
    heads: int, rows: int, keys: int, near: int, dim: int, index_dim: int, beyond_window: bool
) -> float:
    """What sparse prefill spares a GPU; negative where dense retrieval heads are quicker.

    `heads`: retrieval heads of all sequences; `near`: keys of the window and sinks; the `rows` are
    the last of the `keys`. Few rows cost a whole tile in either way. Padding counts as tokens, as
    only the device knows how much there is.
    """
    rows = min(keys, -(-rows // TILE) * TILE)
    far_pairs = _triangle(keys - near) - _triangle(keys - near - rows)
    near_pairs = _triangle(keys) - _triangle(keys - rows) - far_pairs
    fixed, by_dim = ATTENTION_SECONDS
    spared = (fixed + by_dim * dim) * (1 - LISTED_SHARE) * far_pairs
    spent = selection_seconds(near_pairs, far_pairs, dim, index_dim, beyond_window)
    return heads * (spared - spent) - PREFILL_SECONDS


def selection_seconds(
    near_pairs: int, far_pairs: int, dim: int, index_dim: int, beyond_window: bool
) -> float:
    """What `near_lse` and `select_tiles` of one head take, launches aside."""
    fast = index_dim == FAST_INDEX_DIM
    if beyond_window:
        fixed, by_dim = NEAR_LSE_SECONDS
        near = fixed + by_dim * dim
        far = FAR_SCORE_SECONDS if fast else OTHER_SCORE_SECONDS
    else:
        near, far = FULL_SCORE_SECONDS if fast else (OTHER_SCORE_SECONDS, OTHER_SCORE_SECONDS)
    return near * near_pairs + far * far_pairs


def _triangle(n: int) -> int:
    return max(n, 0) * (max(n, 0) + 1) // 2

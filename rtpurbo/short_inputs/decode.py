"""The short-input rule of a decode step.

Its constants were measured on an H200, those of the sieve and of refined scores on an H100.
"""

from __future__ import annotations

import sys

from torch import Tensor

from rtpurbo.context import LayerContext
from rtpurbo.short_inputs.fast import FAST_INDEX_DIM

SPARED_BYTES = 1 << 27
"""What a selection must spare a decode step to read: the time of its stages, 30 to 45 us."""
SCORE_BYTES = 32
"""What a decode step reads while it ranks one score of a retrieval head, the index key aside."""
REFINED_SCORE_BYTES = 52
"""The same where what it selects is scored again."""
SIFTED_SCORES = 1 << 23
"""Of all retrieval heads, from which on `sparse_decode` has a sieve (csrc/cuda/select/plan.h)."""
SIFTED_KEYS = 1 << 15
"""The same of keys."""
SIFTED_SCORE_BYTES = 8
SIFTING_BYTES = 1 << 27
"""The same with a sieve, and what this must spare beside SPARED_BYTES: its sample's stages."""


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
    score = REFINED_SCORE_BYTES if config.refine else SCORE_BYTES
    by_keys = config.block_size == 1 and config.index == "beyond_window"
    sifts = one_launch and by_keys and config.near_window >= 64 and dim <= 128
    return fewest_to_select_from(batch, heads, read, index, floor, one_launch, sifts, score)


def fewest_to_select_from(
    batch: int,
    heads: int,
    read: int,
    index: int,
    floor: int,
    one_launch: bool = True,
    sifts: bool = False,
    score: int = SCORE_BYTES,
) -> int:
    """Far keys from which a selection is quicker on a GPU than to read all of them.

    `read`: bytes a far key of keys and values; `index`: those of its index keys;
    `floor`: bytes of keys and values that a retrieval head reads at least; `one_launch`: instead of
    one for each of `near_lse`, `select` and `decode`; `sifts`: it has a sieve for many scores;
    `score`: bytes that a head's score stands for otherwise.
    """
    least = SPARED_BYTES * (1 if one_launch else 2) + batch * heads * floor

    def fewest(least: int, ranked: int) -> int:
        spared = batch * (read - index - heads * ranked)
        return least // spared + 1 if spared > 0 else sys.maxsize

    plain = fewest(least, score)
    if not sifts:
        return plain
    sifted = fewest(least + SIFTING_BYTES, SIFTED_SCORE_BYTES)
    return min(plain, max(sifted, SIFTED_SCORES // max(1, batch * heads), SIFTED_KEYS))

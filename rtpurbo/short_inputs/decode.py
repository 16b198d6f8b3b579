"""The short-input rule of a decode step.

A selection's costs are told as the bytes that an H200 reads meanwhile; a card with a slower memory
reads fewer.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

from rtpurbo.context import LayerContext
from rtpurbo.short_inputs.fast import FAST_INDEX_DIM

H200_RATE = 4.9e12
"""Bytes a second that its memory gives at most."""
STAGES_BYTES, APART_BYTES, REFINING_BYTES = 23 << 21, 18 << 23, 43 << 23
"""What the stages of a selection cost: in one launch, some 10 us, with `near_lse`, `select` and
`decode` apart, and with `refine`."""
EXACT_BYTES = 5 << 22
"""What it costs beside the first two to find the smallest sets."""
USUAL_TOKENS = 1024
"""Tokens that a retrieval head is taken to select at least: a real model's mean (README)."""
LIST_BYTES, LISTED_COST = 1 << 16, 1.3
"""What each list costs, and its rows, over that to read as many one after the other."""
SCORE_BYTES = 28
"""What ranking one score of a retrieval head costs, its index key aside."""
REFINED_SCORE_BYTES = 74
"""The same where what it selects is scored again."""
SIFTED_SCORES = 1 << 23
"""Of all retrieval heads, from which on `sparse_decode` has a sieve (csrc/cuda/select/plan.h)."""
SIFTED_KEYS = 1 << 15
"""The same of keys."""
SIFTED_SCORE_BYTES = 8
SIFTING_BYTES = 17 << 23
"""What a score costs with a sieve, and what this costs beside STAGES_BYTES: its sample's stages."""


@lru_cache
def memory_rate(device: torch.device) -> float:
    """Bytes a second that the device's memory gives at most; H200_RATE where none is told."""
    if device.type != "cuda":
        return H200_RATE
    card = torch.cuda.get_device_properties(device)
    per_second = 2 * card.memory_clock_rate * 1e3  # kHz, on both edges of the clock
    return per_second * card.memory_bus_width / 8 or H200_RATE


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
    heads, read = len(context.heads), len(context.full_kv_heads) * row
    # Retrieval heads of a KV head may share an index key.
    index_keys = len(set(context.index.index_map)) if heads else 0
    index = index_keys * config.index_dim * config.index_bits // 8
    # What `sparse_decode` does in one launch; see csrc/cuda/sparse_decode.cu.
    fused = q.element_size() == 2 and dim in (64, 128, 256) and config.index_dim == FAST_INDEX_DIM
    one_launch = fused and not config.refine
    by_keys = config.block_size == 1 and config.index == "beyond_window"
    sifts = one_launch and by_keys and config.near_window >= 64 and dim <= 128
    return fewest_to_select_from(
        batch,
        heads,
        read,
        index,
        row,
        config.min_tokens,
        one_launch=one_launch,
        sifts=sifts,
        refines=config.refine,
        exact=config.exact_sets,
        rate=memory_rate(q.device),
    )


def fewest_to_select_from(
    batch: int,
    heads: int,
    read: int,
    index: int,
    row: int,
    min_tokens: int,
    *,
    one_launch: bool = True,
    sifts: bool = False,
    refines: bool = False,
    exact: bool = False,
    rate: float = H200_RATE,
) -> int:
    """Far keys from which a selection is quicker on a GPU than to read all of them.

    `read`: bytes a far key of keys and values; `index`: those of its index keys;
    `row`: those of a key and value that a retrieval head selects; `one_launch`: instead of one for
    each of `near_lse`, `select` and `decode`; `sifts`: it has a sieve for many scores;
    `refines`: scores what it selects again; `exact`: finds the smallest sets; `rate`: of the
    memory.
    """
    pace = rate / H200_RATE
    stages = REFINING_BYTES
    if not refines:
        stages = (STAGES_BYTES if one_launch else APART_BYTES) + (EXACT_BYTES if exact else 0)
    rows = int(LISTED_COST * row * max(min_tokens, USUAL_TOKENS))
    least = stages + batch * heads * (LIST_BYTES + rows)

    def fewest(least: int, ranked: int) -> int:
        spared = batch * (read - index - heads * ranked * pace)
        return int(least * pace / spared) + 1 if spared > 0 else sys.maxsize

    plain = fewest(least, REFINED_SCORE_BYTES if refines else SCORE_BYTES)
    if not sifts:
        return plain
    sifted = fewest(least + SIFTING_BYTES, SIFTED_SCORE_BYTES)
    return min(plain, max(sifted, SIFTED_SCORES // max(1, batch * heads), SIFTED_KEYS))

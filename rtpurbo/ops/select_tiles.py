"""One block list for each tile of query rows, by the tile's pooled mass."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops
from rtpurbo.ops.select import accumulation_dtype


def select_tiles(
    q_index: Tensor,
    k_index: Tensor,
    index_map: Sequence[int],
    threshold: Tensor,
    window: int,
    sinks: int,
    min_blocks: int,
    tile: int = 128,
    block_size: int = 64,
    near_lse: Tensor | None = None,
    offset: Tensor | None = None,
    start: Tensor | None = None,
    capacity: int = 0,
    rank: Literal["sum", "max"] = "sum",
    codes: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block lists for sparse prefill: what `attention` takes as block_indices and block_counts.

    Row i stands at m = N - M + i; near keys and logits are as in `select`. Blocks that hold a near
    key of any row of the tile are forced. A block weighs the mean over the tile's rows of its far
    keys' share of the row's mass; others join by decreasing weight, ties by lower block, until the
    pooled share reaches the head's threshold and at least min_blocks have joined.

    Args:
        q_index: [B, R, M, r] float32, float64, bfloat16 or float16; last dimension contiguous.
        k_index: [B, Rk, N, r], N >= M, of any of these dtypes.
        index_map: the head of k_index that each of the R queries reads.
        threshold: floating [R], the pooled share at which selection stops.
        window, sinks: what is near.
        min_blocks: unforced blocks that join by weight whatever the share.
        tile: query rows of a tile. block_size: keys of a block, n // block_size.
        near_lse: [B, R, M], log-mass of the near keys from the true logits (form `beyond_window`).
            Without it the index logits of the near keys count (form `full`).
        offset: [R], added to the logits.
        start: int64 [B], first real key of each sequence (left padding).
        capacity: room for blocks, 0 for all of them.
        rank: "sum" weighs a block by its exp-sum, "max" by the exp of its largest logit.
        codes, ranges: keys [0, Q) as `quantize_index` returns them; k_index then holds keys [Q, N).

    Returns:
        block_indices int32 [B, R, T, capacity], T = ceil(M / tile), complete lists, ascending and
        padded with -1; block_counts int32 [B, R, T], -1 where capacity does not suffice (attend
        densely); mass [B, R, T] float32 (float64 for float64), the pooled share. A tile without a
        valid row has count 0 and mass 1; a NaN or +inf logit selects all visible blocks and makes
        the mass NaN.

    On CUDA tile is at most 1024, and the workspace 0.6 GB or one tile, at four bytes a row and
    block. float16 index tensors of r = 16 with blocks of 64 keys run on tensor cores. On Hopper,
    with tiles of 128 rows and rank "max", block maxima are kept in float16: a weight is off by up
    to 2^-11 of its logit, and q . k beyond 65504 counts as +inf. `RTPURBO_PORTABLE=1`
    keeps them in float32. Codes are spelt out before: in float16 where k_index is, which rounds
    them once more, otherwise in float32.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range, device or dtype.
    """
    return rtpurbo_ops.select_tiles(
        q_index,
        k_index,
        index_map,
        threshold,
        window,
        sinks,
        min_blocks,
        tile,
        block_size,
        near_lse,
        offset,
        start,
        capacity,
        rank,
        codes,
        ranges,
    )


@torch.library.register_fake("rtpurbo::select_tiles")
def _(
    q_index: Tensor,
    k_index: Tensor,
    index_map: Sequence[int],
    threshold: Tensor,
    window: int,
    sinks: int,
    min_blocks: int,
    tile: int = 128,
    block_size: int = 64,
    near_lse: Tensor | None = None,
    offset: Tensor | None = None,
    start: Tensor | None = None,
    capacity: int = 0,
    rank: str = "sum",
    codes: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = q_index.shape
    tiles = -(-rows // tile)
    keys = k_index.shape[2] + (0 if codes is None else codes.shape[2])
    room = capacity or -(-keys // block_size)
    return (
        q_index.new_empty((batch, heads, tiles, room), dtype=torch.int32),
        q_index.new_empty((batch, heads, tiles), dtype=torch.int32),
        q_index.new_empty((batch, heads, tiles), dtype=accumulation_dtype(q_index, k_index)),
    )

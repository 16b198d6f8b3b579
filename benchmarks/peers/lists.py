"""Block lists of tiles, as `attention` takes them, in the forms that peers take."""

import torch
from torch import Tensor

from benchmarks.random_lists import PER_TILE


def of_blocks(indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """A list for each TILE_BLOCK rows instead of each tile, without blocks after the rows'.

    Lists are ascending and end with the tile's own blocks, so that a count says it all.
    """
    tiles = counts.shape[-1]
    later = torch.arange(PER_TILE - 1, -1, -1, dtype=counts.dtype, device=counts.device)
    fewer = (counts[..., None] - later).flatten(-2)
    assert fewer.shape[-1] == tiles * PER_TILE
    return indices.repeat_interleave(PER_TILE, -2), fewer


def apart(indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and indices of the tile's own blocks, which a causal mask cuts, and of all others."""
    own = torch.arange(counts.shape[-1] * PER_TILE, dtype=indices.dtype, device=indices.device)
    own = own.view(-1, PER_TILE).expand(*counts.shape, -1).contiguous()
    return torch.full_like(counts, PER_TILE), own, counts - PER_TILE, indices

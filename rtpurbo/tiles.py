"""How sparse prefill cuts query rows into tiles and keys into blocks."""

from __future__ import annotations

from typing import Literal

from rtpurbo.config import RTPurboConfig

TILE = 128
TILE_BLOCK = 64
TILE_RANK: Literal["sum", "max"] = "max"
"""Lists of equal size hold as much mass by either rank; maxima cost a fifth on Hopper."""
_MIN_TILE_BLOCKS = 4
MOST_TILE_BLOCKS = 4096
"""A tile that needs more runs dense, which `stats` counts; not a share, so that it is the same in
every chunk."""


def tile_capacity(keys: int) -> int:
    """Room for the blocks that a tile of sparse prefill lists of so many keys."""
    return min(-(-keys // TILE_BLOCK), MOST_TILE_BLOCKS)


def min_tile_blocks(config: RTPurboConfig) -> int:
    """Blocks that a tile of sparse prefill lists whatever their mass."""
    return max(_MIN_TILE_BLOCKS, -(-config.min_tokens // TILE_BLOCK))

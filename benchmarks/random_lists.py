"""Random block lists of a given density, which an index with random keys cannot give."""

import torch
from torch import Tensor

from benchmarks.masks import dense_pairs
from rtpurbo.tiles import TILE, TILE_BLOCK

PER_TILE = TILE // TILE_BLOCK
TILE_PAIRS = TILE * (TILE + 1) // 2
"""Pairs of a tile's rows and the keys at their own positions."""


class ListPlan:
    """How many blocks each tile lists, the same for all heads; `keys` are whole tiles.

    As by `select_tiles`, a list holds the blocks of the sinks and of the window of any of the
    tile's rows. Of those between them each tile takes the same share, so that all lists together
    let through the share `density` of the causal pairs, which None makes the smallest there is.
    """

    def __init__(self, keys: int, window: int, sinks: int, density: float | None = None) -> None:
        if keys % TILE or not sinks <= TILE_BLOCK:
            raise ValueError(
                f"benchmarks: lists are for tiles of {TILE} rows and up to {TILE_BLOCK} sinks, got "
                f"{keys} keys and {sinks} sinks"
            )
        tile = torch.arange(keys // TILE)
        self.end = PER_TILE * (tile + 1)
        self.sink_blocks = int(sinks > 0)
        window_begin = (tile * TILE - window + 1).clamp(min=0) // TILE_BLOCK
        self.near = window_begin.clamp(min=self.sink_blocks)
        self.far = self.near - self.sink_blocks
        self.chosen = torch.zeros_like(self.far)
        if density is not None:
            missing = density * dense_pairs(keys) - self.pairs
            room = int(self.far.sum()) * TILE * TILE_BLOCK
            if not 0 <= missing <= room:
                raise ValueError(
                    f"benchmarks: {keys} keys with window {window} allow densities from "
                    f"{self.pairs / dense_pairs(keys):.3f} to 1, got {density}"
                )
            # Rounded sums, so that roundings of single tiles do not add up.
            sums = (self.far.cumsum(0).double() * (missing / max(room, 1))).round().long()
            self.chosen = sums.diff(prepend=sums.new_zeros(1))

    @property
    def counts(self) -> Tensor:
        return self.sink_blocks + self.chosen + self.end - self.near

    @property
    def pairs(self) -> int:
        """Pairs of a row and a key that a head lets through."""
        before = int(self.counts.sum()) - PER_TILE * len(self.end)
        return before * TILE * TILE_BLOCK + len(self.end) * TILE_PAIRS

    def draw(self, heads: int, device: str) -> tuple[Tensor, Tensor]:
        """Indices and counts as `attention` takes them, in the memory of one head besides.

        Chosen blocks are spread evenly: the far ones are cut into as many parts as are chosen, and
        one is drawn from each.
        """
        counts, chosen, far, near = (
            x.to(device)[:, None] for x in (self.counts, self.chosen, self.far, self.near)
        )
        slot = torch.arange(int(self.counts.max()), device=device)
        part = slot - self.sink_blocks
        begin, end = (i * far // chosen.clamp(min=1) for i in (part, part + 1))
        indices = torch.empty(
            (1, heads, len(self.end), len(slot)), dtype=torch.int32, device=device
        )
        for head in range(heads):
            drawn = begin + (torch.rand(begin.shape, device=device) * (end - begin)).long()
            lists = torch.where(part < chosen, self.sink_blocks + drawn, near + part - chosen)
            lists = torch.where(part < 0, slot, lists)
            indices[0, head] = torch.where(slot < counts, lists, -1)
        return indices, counts[:, 0].to(torch.int32).expand(1, heads, -1).contiguous()

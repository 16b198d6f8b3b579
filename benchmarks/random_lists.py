"""Random block lists of a given density, which an index with random keys cannot give."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.masks import dense_pairs, near_pairs
from rtpurbo.tiles import TILE, TILE_BLOCK

PER_TILE = TILE // TILE_BLOCK
TILE_PAIRS = TILE * (TILE + 1) // 2
"""Pairs of a tile's rows and the keys at their own positions."""


class ListPlan:
    """How many blocks each tile lists, the same for all heads.

    `keys` are whole tiles, as are `rows`, the last positions of them; None: all.
    As by `select_tiles`, a list holds the blocks of the sinks and of the window of any of the
    tile's rows. Of those between them each tile takes the same share, so that all lists together
    let through the share `density` of the causal pairs, which None makes the smallest there is.
    """

    def __init__(
        self,
        keys: int,
        window: int,
        sinks: int,
        density: float | None = None,
        rows: int | None = None,
    ) -> None:
        rows = keys if rows is None else rows
        if keys % TILE or rows % TILE or not sinks <= TILE_BLOCK:
            raise ValueError(
                f"benchmarks: lists are for tiles of {TILE} rows and up to {TILE_BLOCK} sinks, got "
                f"{rows} rows, {keys} keys and {sinks} sinks"
            )
        self.keys, self.causal_pairs = keys, dense_pairs(keys, rows)
        tile = torch.arange((keys - rows) // TILE, keys // TILE)
        self.end = PER_TILE * (tile + 1)
        self.sink_blocks = int(sinks > 0)
        window_begin = (tile * TILE - window + 1).clamp(min=0) // TILE_BLOCK
        self.near = window_begin.clamp(min=self.sink_blocks)
        self.far = self.near - self.sink_blocks
        self.chosen = torch.zeros_like(self.far)
        if density is not None:
            missing = density * self.causal_pairs - self.pairs
            room = int(self.far.sum()) * TILE * TILE_BLOCK
            if not 0 <= missing <= room:
                raise ValueError(
                    f"benchmarks: {keys} keys with window {window} allow densities from "
                    f"{self.pairs / self.causal_pairs:.3f} to 1, got {density}"
                )
            # Rounded sums, so that roundings of single tiles do not add up.
            sums = (self.far.cumsum(0).double() * (missing / max(room, 1))).round().long()
            self.chosen = sums.diff(prepend=sums.new_zeros(1))

    @classmethod
    def of_far(
        cls, keys: int, window: int, sinks: int, share: float, rows: int | None = None
    ) -> "ListPlan":
        """Lists of a share of the far pairs of a row and a key, as far as whole blocks allow it."""
        least = cls(keys, window, sinks, rows=rows)
        near = near_pairs(keys, window, sinks, rows)
        pairs = near + share * (least.causal_pairs - near)
        if pairs <= least.pairs:
            return least
        return cls(keys, window, sinks, pairs / least.causal_pairs, rows)

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


def draw_batch(plans: Sequence[ListPlan], heads: int, device: str) -> tuple[Tensor, Tensor]:
    """Lists of prompts that are padded on the left to the longest; padding lists nothing."""
    keys, tiles = max(plan.keys for plan in plans), max(len(plan.end) for plan in plans)
    width = max(int(plan.counts.max()) for plan in plans)
    indices = torch.full((len(plans), heads, tiles, width), -1, dtype=torch.int32, device=device)
    counts = torch.zeros((len(plans), heads, tiles), dtype=torch.int32, device=device)
    for sequence, plan in enumerate(plans):
        own, own_counts = plan.draw(heads, device)
        begin, padding = tiles - len(plan.end), (keys - plan.keys) // TILE_BLOCK
        indices[sequence, :, begin:, : own.shape[-1]] = torch.where(own < 0, own, own + padding)[0]
        counts[sequence, :, begin:] = own_counts[0]
    return indices, counts

"""One block list for each tile of query rows, by the tile's pooled mass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.masks import last_positions, near, visible
from tests.reference.quantize_index import all_keys
from tests.reference.select import index_logits


@dataclass(frozen=True)
class Tile:
    """What the rows of a tile that see a key make of the blocks."""

    shares: Tensor  # [rows, blocks], of a row's total in the far keys of a block
    near_shares: Tensor  # [rows], in near keys
    largest: Tensor  # [rows, blocks], r^-0.5 q . k of a far key, -inf where there is none
    forced: Tensor  # bool [blocks]
    candidate: Tensor  # bool [blocks], others that a row sees

    @property
    def weights(self) -> Tensor:
        return self.shares.mean(0)

    @property
    def near_share(self) -> float:
        return self.near_shares.mean().item()


def tile_of(
    b: int,
    j: int,
    t: int,
    q_index: Tensor,
    k_index: Tensor,
    index_map: Sequence[int],
    window: int,
    sinks: int,
    tile: int = 128,
    block_size: int = 64,
    near_lse: Tensor | None = None,
    offset: Tensor | None = None,
    start: Tensor | None = None,
    rank: str = "sum",
) -> Tile | None:
    """Tile t of head j of sequence b; None where no row of it sees a key."""
    rows, keys = q_index.shape[2], k_index.shape[2]
    block_size = min(block_size, keys)
    first = None if start is None else start[b : b + 1]
    span = slice(t * tile, min((t + 1) * tile, rows))
    positions = last_positions(rows, keys, 1)[:, span]
    sees = visible(positions, keys, first)[0]
    valid = sees.any(-1)
    if not valid.any():
        return None
    is_near = near(positions, keys, first, window, sinks)[0, valid]
    sees = sees[valid]
    rows_of_head = q_index[b : b + 1, j : j + 1, span]
    products = index_logits(rows_of_head, k_index[b : b + 1], [index_map[j]], None)[0, 0, valid]
    logits = products if offset is None else products + offset[j].double()
    close = None if near_lse is None else near_lse[b, j, span][valid].double()
    shares, near_shares = block_shares(logits, sees, is_near, close, block_size, rank)
    far = by_block(sees & ~is_near, block_size)
    forced = by_block(is_near, block_size).any(-1).any(0)
    return Tile(
        shares=shares,
        near_shares=near_shares,
        largest=by_block(products, block_size).masked_fill(~far, -torch.inf).amax(-1),
        forced=forced,
        candidate=by_block(sees, block_size).any(-1).any(0) & ~forced,
    )


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
    rank: str = "sum",
    codes: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = q_index.shape
    k_index = all_keys(k_index, codes, ranges)
    tiles, blocks = -(-rows // tile), -(-k_index.shape[2] // block_size)
    columns = capacity or blocks
    scored = (q_index, k_index, index_map, window, sinks, tile, block_size)
    options = dict(near_lse=near_lse, offset=offset, start=start, rank=rank)
    indices = torch.full((batch, heads, tiles, columns), -1, dtype=torch.int32)
    counts = torch.zeros(batch, heads, tiles, dtype=torch.int32)
    mass = torch.ones(batch, heads, tiles, dtype=torch.float64)
    for b in range(batch):
        for j in range(heads):
            for t in range(tiles):
                of_tile = tile_of(b, j, t, *scored, **options)
                if of_tile is None:
                    continue
                chosen, share = add_blocks(of_tile, float(threshold[j]), min_blocks)
                mass[b, j, t] = share
                counts[b, j, t] = len(chosen) if len(chosen) <= columns else -1
                if len(chosen) <= columns:
                    indices[b, j, t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return indices, counts, mass


def by_block(values: Tensor, block_size: int) -> Tensor:
    """[M, N] -> [M, blocks, block_size], padded with zeros (False)."""
    padding = -values.shape[1] % block_size
    return torch.nn.functional.pad(values, (0, padding)).unflatten(1, (-1, block_size))


def block_shares(
    logits: Tensor,
    sees: Tensor,
    is_near: Tensor,
    near_lse: Tensor | None,
    block_size: int,
    rank: str,
) -> tuple[Tensor, Tensor]:
    """Share of each row's total in the far keys of each block [M, blocks] and in near keys [M]."""
    largest = logits.masked_fill(~sees, -torch.inf).amax(-1, keepdim=True)
    if near_lse is not None:
        largest = torch.maximum(largest, near_lse[:, None])
    weights = (logits - largest).exp()
    far = by_block(torch.where(sees & ~is_near, weights, 0.0), block_size)
    far = far.sum(-1) if rank == "sum" else far.amax(-1)
    if near_lse is None:
        close = torch.where(is_near, weights, 0.0).sum(-1)
    else:
        close = (near_lse - largest[:, 0]).exp()
    total = far.sum(-1) + close
    return far / total[:, None], close / total


def add_blocks(tile: Tile, threshold: float, min_blocks: int) -> tuple[list[int], float]:
    """Forced blocks and, by decreasing weight, others until the share reaches the threshold."""
    weights = tile.weights
    chosen = tile.forced.nonzero()[:, 0].tolist()
    share = tile.near_share + weights[tile.forced].sum().item()
    order = weights.argsort(descending=True, stable=True).tolist()
    added = 0
    for block in order:
        if share >= threshold and added >= min_blocks:
            break
        if tile.candidate[block]:
            chosen.append(block)
            share += weights[block].item()
            added += 1
    return sorted(chosen), share


def settled(
    tile: Tile, threshold: float, min_blocks: int, rounding: float, of_logit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Blocks that are in, and those that may be, bool [blocks], whatever inexact weights do.

    Weights are off by `rounding` of themselves, and logits of whole blocks by `of_logit` of
    themselves. A block joins when those that outweigh it neither reach the threshold nor number
    min_blocks.
    """
    weights, candidate = tile.weights, tile.candidate
    moves = of_logit * tile.largest.abs().masked_fill(tile.shares == 0, 0.0)
    moved_total = (tile.shares * moves).sum(-1, keepdim=True)
    slack = (tile.shares * (moves + moved_total)).mean(0) + rounding * weights
    slack += torch.finfo(torch.float32).tiny
    share_slack = rounding + moved_total.mean().item()
    forced_share = tile.near_share + weights[tile.forced].sum().item()

    def joins(outweighs: Tensor, threshold: float) -> Tensor:
        outweighs = (outweighs & candidate).double()
        short = forced_share + outweighs @ weights < threshold
        return candidate & (short | (outweighs.sum(-1) < min_blocks))

    low, high = weights - slack, weights + slack
    surely, maybe = low > high[:, None], high >= low[:, None]
    sure = joins(maybe.fill_diagonal_(False), threshold - share_slack)
    possible = joins(surely, threshold + share_slack)
    return tile.forced | sure, tile.forced | possible

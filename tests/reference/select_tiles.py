"""One block list for each tile of query rows, by the tile's pooled mass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.masks import last_positions, near, visible
from tests.reference.quantize_index import all_keys
from tests.reference.select import index_logits


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
    keys = k_index.shape[2]
    tiles, blocks = -(-rows // tile), -(-keys // block_size)
    columns = capacity or blocks
    logits = index_logits(q_index, k_index, index_map, offset)
    positions = last_positions(rows, keys, batch)
    sees = visible(positions, keys, start)
    is_near = near(positions, keys, start, window, sinks)
    indices = torch.full((batch, heads, tiles, columns), -1, dtype=torch.int32)
    counts = torch.zeros(batch, heads, tiles, dtype=torch.int32)
    mass = torch.ones(batch, heads, tiles, dtype=torch.float64)
    for b in range(batch):
        for j in range(heads):
            for t in range(tiles):
                valid = [
                    row for row in range(t * tile, min((t + 1) * tile, rows)) if sees[b, row].any()
                ]
                if not valid:
                    continue
                shares, near_shares = block_shares(
                    logits[b, j, valid],
                    sees[b, valid],
                    is_near[b, valid],
                    None if near_lse is None else near_lse[b, j, valid].double(),
                    block_size,
                    rank,
                )
                forced = by_block(is_near[b, valid], block_size).any(-1).any(0)
                candidate = by_block(sees[b, valid], block_size).any(-1).any(0) & ~forced
                chosen, share = add_blocks(
                    shares.mean(0),
                    forced,
                    candidate,
                    near_shares.mean().item(),
                    float(threshold[j]),
                    min_blocks,
                )
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


def add_blocks(
    weights: Tensor,
    forced: Tensor,
    candidate: Tensor,
    near_share: float,
    threshold: float,
    min_blocks: int,
) -> tuple[list[int], float]:
    """Forced blocks and, by decreasing weight, others until the share reaches the threshold."""
    chosen = forced.nonzero()[:, 0].tolist()
    share = near_share + weights[forced].sum().item()
    order = weights.argsort(descending=True, stable=True).tolist()
    added = 0
    for block in order:
        if share >= threshold and added >= min_blocks:
            break
        if candidate[block]:
            chosen.append(block)
            share += weights[block].item()
            added += 1
    return sorted(chosen), share

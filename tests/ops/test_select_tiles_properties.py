"""select_tiles over random odd shapes: complete lists, large enough, smallest, in order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests.properties import ROUNDING, selections
from tests.reference.select_tiles import Tile, tile_of


def check_list(
    tile: Tile, threshold: float, min_blocks: int, chosen: list[int], mass: float
) -> None:
    weights, forced, candidate = tile.weights, tile.forced, tile.candidate
    assert chosen == sorted(set(chosen))
    assert set(forced.nonzero()[:, 0].tolist()) <= set(chosen)
    added = [block for block in chosen if not forced[block]]
    assert candidate[added].all()
    share = tile.near_share + weights[chosen].sum().item()
    assert abs(mass - share) < ROUNDING
    left = [block for block in candidate.nonzero()[:, 0].tolist() if block not in set(chosen)]
    if not left:
        return
    assert share >= threshold - ROUNDING and len(added) >= min_blocks
    if not added:
        return
    last = min(added, key=lambda block: (weights[block].item(), -block))
    assert weights[left].max() <= weights[last] + ROUNDING
    if len(added) > min_blocks:
        assert share - weights[last].item() < threshold + ROUNDING


@given(
    arguments=selections(max_rows=60, max_keys=200),
    threshold=st.floats(0.05, 1.0),
    min_blocks=st.integers(0, 4),
    tile=st.sampled_from([1, 7, 16, 64]),
    block_size=st.sampled_from([8, 16, 64]),
    rank=st.sampled_from(["sum", "max"]),
    room=st.none() | st.floats(0, 1),
)
def test_tile_lists(arguments, threshold, min_blocks, tile, block_size, rank, room):
    q_index, k_index = arguments["q_index"], arguments["k_index"]
    batch, heads, rows, _ = q_index.shape
    keys = k_index.shape[2]
    blocks = -(-keys // block_size)
    capacity = 0 if room is None else max(1, int(room * blocks))
    thresholds = torch.linspace(threshold, threshold * 0.8, heads)
    more = dict(
        threshold=thresholds, min_blocks=min_blocks, tile=tile, block_size=block_size, rank=rank
    )
    indices, counts, mass = ops.select_tiles(**arguments, **more, capacity=capacity)
    _, needed, _ = ops.select_tiles(**arguments, **more)
    assert indices.shape == (batch, heads, -(-rows // tile), capacity or blocks)

    scored = arguments | dict(tile=tile, block_size=block_size, rank=rank)
    for b in range(batch):
        for j in range(heads):
            for t in range(indices.shape[2]):
                count = int(counts[b, j, t])
                of_tile = tile_of(b, j, t, **scored)
                if of_tile is None:
                    assert count == 0 and (indices[b, j, t] == -1).all()
                    continue
                if count == -1:
                    assert needed[b, j, t] > capacity
                    continue
                assert count == needed[b, j, t] and (indices[b, j, t, count:] == -1).all()
                chosen = indices[b, j, t, :count].tolist()
                check_list(of_tile, float(thresholds[j]), min_blocks, chosen, float(mass[b, j, t]))

"""What the masks of the benchmarks let through, against masks of single pairs."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import flex
from benchmarks.masks import dense_pairs, near_pairs
from benchmarks.random_lists import ListPlan, draw_batch
from rtpurbo import ops
from rtpurbo.tiles import TILE, TILE_BLOCK
from tests.reference.attention import listed
from tests.reference.masks import last_positions, near, visible

SINKS = 4


def near_mask(keys, window, sinks):
    n = torch.arange(keys)
    distance = n[:, None] - n
    return (distance >= 0) & ((distance < window) | (n < sinks))


def listed_mask(indices, counts, keys):
    """[heads, keys, keys] of lists for whole tiles."""
    mask = torch.zeros(indices.shape[1], keys, keys, dtype=torch.bool)
    for head, tile in torch.cartesian_prod(*map(torch.arange, counts.shape[1:])).tolist():
        for block in indices[0, head, tile, : counts[0, head, tile]].tolist():
            rows = slice(tile * TILE, (tile + 1) * TILE)
            mask[head, rows, block * TILE_BLOCK : (block + 1) * TILE_BLOCK] = True
    return mask & torch.ones(keys, keys, dtype=torch.bool).tril()


@pytest.mark.parametrize("keys, window, sinks", [(9, 3, 2), (9, 8, 4), (9, 9, 4), (5, 20, 4),
                                                 (40, 7, 0), (40, 1, 4), (1, 1, 1)])  # fmt: skip
def test_near_pairs(keys, window, sinks):
    mask = near_mask(keys, window, sinks)
    assert near_pairs(keys, window, sinks) == int(mask.sum())
    for rows in range(keys + 1):
        assert near_pairs(keys, window, sinks, rows) == int(mask[keys - rows :].sum())
        assert dense_pairs(keys, rows) == sum(range(keys - rows + 1, keys + 1))


@pytest.mark.parametrize("window, sinks", [(1, 4), (100, 4), (128, 0), (300, 4), (2000, 4)])
def test_the_smallest_lists_are_those_that_select_tiles_forces(window, sinks):
    keys = 1024
    index = torch.randn(2, 1, 1, keys, 16)
    near_lse = torch.full((1, 1, keys), 8.0)
    indices, counts, _ = ops.select_tiles(
        *index, [0], torch.full((1,), 1e-9), window, sinks, 0, near_lse=near_lse
    )
    plan = ListPlan(keys, window, sinks)
    drawn, drawn_counts = plan.draw(1, "cpu")
    assert torch.equal(drawn_counts, counts)
    assert torch.equal(drawn, indices[..., : drawn.shape[-1]])
    assert plan.pairs == int(listed_mask(indices, counts, keys).sum())


@pytest.mark.parametrize("lengths, rows", [([1024, 640, 128], 1024), ([1024, 1024], 384)])
@pytest.mark.parametrize("window", [1, 300, 2000])
def test_the_smallest_lists_of_prompts_are_those_that_select_tiles_forces(lengths, rows, window):
    batch, keys = len(lengths), 1024
    q, k = (torch.randn(batch, 2, n, 16) for n in (rows, keys))
    lse, start = torch.full((batch, 2, rows), 8.0), keys - torch.tensor(lengths)
    indices, counts, _ = ops.select_tiles(
        q, k, [0, 1], torch.full((2,), 1e-9), window, SINKS, 0, near_lse=lse, start=start
    )
    plans = [ListPlan(n, window, SINKS, rows=min(n, rows)) for n in lengths]
    drawn, drawn_counts = draw_batch(plans, 2, "cpu")
    assert torch.equal(drawn_counts, counts)
    assert torch.equal(drawn, indices[..., : drawn.shape[-1]])


@pytest.mark.parametrize("lengths, rows", [([2048, 1280, 512], 2048), ([2048], 384)])
@pytest.mark.parametrize("window, share", [(1, 0.2), (200, 0.2), (200, 0.7), (600, 1.0)])
def test_lists_of_prompts_hold_a_share_of_the_far_pairs(lengths, rows, window, share):
    plans = [ListPlan.of_far(n, window, SINKS, share, min(n, rows)) for n in lengths]
    indices, counts = draw_batch(plans, 2, "cpu")
    batch, keys, start = len(lengths), 2048, 2048 - torch.tensor(lengths)
    positions = last_positions(rows, keys, batch)
    causal = visible(positions, keys, start)
    mask = listed(indices[:, 0], counts[:, 0], rows, keys, TILE, TILE_BLOCK) & causal
    assert mask.sum((1, 2)).tolist() == [plan.pairs for plan in plans]
    near_ones = near(positions, keys, start, window, SINKS)
    assert mask[near_ones].all()
    far = (causal & ~near_ones).sum((1, 2))
    held = (mask & ~near_ones).sum((1, 2))
    least = torch.tensor([ListPlan(n, window, SINKS, rows=min(n, rows)).pairs for n in lengths])
    expected = torch.maximum(share * far, (least - near_ones.sum((1, 2))).double())
    assert ((held - expected).abs() < TILE * TILE_BLOCK).all()
    assert not torch.equal(indices[0, 0], indices[0, 1]) or share == 1.0


@pytest.mark.parametrize("window, density", [(1, 0.2), (1, 0.5), (200, 0.5), (200, 1.0)])
def test_lists_of_a_density(window, density):
    keys, heads = 2048, 3
    plan = ListPlan(keys, window, SINKS, density)
    indices, counts = plan.draw(heads, "cpu")
    mask = listed_mask(indices, counts, keys)
    assert mask.sum((1, 2)).tolist() == [plan.pairs] * heads
    assert abs(plan.pairs / dense_pairs(keys) - density) < TILE * TILE_BLOCK / dense_pairs(keys)
    assert mask[:, near_mask(keys, window, SINKS)].all()
    for head, tile in torch.cartesian_prod(*map(torch.arange, counts.shape[1:])).tolist():
        count = counts[0, head, tile]
        blocks = indices[0, head, tile].tolist()
        assert all(a < b for a, b in pairwise(blocks[:count]))
        assert set(blocks[count:]) <= {-1}
    assert torch.equal(mask[0], mask[1]) == (density == 1.0)


def test_a_density_that_the_window_exceeds_is_refused():
    with pytest.raises(ValueError, match=r"densities from 0\.813 to 1, got 0\.3"):
        ListPlan(1024, 400, SINKS, 0.3)
    with pytest.raises(ValueError, match="tiles of 128"):
        ListPlan(1000, 400, SINKS)
    with pytest.raises(ValueError, match="got 100 rows, 1024 keys"):
        ListPlan(1024, 400, SINKS, rows=100)


@pytest.mark.parametrize("window", [1, 128, 200, 4096])
def test_the_block_mask_is_that_of_single_pairs(window):
    keys, heads = 1024, 3
    reach = torch.tensor([window, keys, window], dtype=torch.int32)
    mask = flex.block_mask(reach, keys, SINKS)
    expected = create_block_mask(mask.mask_mod, 1, heads, keys, keys, "cpu")
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert torch.equal(mask.to_dense(), expected.to_dense())

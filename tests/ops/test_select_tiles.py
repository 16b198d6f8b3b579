"""select_tiles against the float64 reference, and what its lists promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests import reference


def inputs(seed: int, batch: int, heads: int, rows: int, keys: int, dim: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "q_index": torch.randn(batch, heads, rows, dim, generator=generator) * 2,
        "k_index": torch.randn(batch, heads, keys, dim, generator=generator),
        "index_map": list(range(heads)),
        "threshold": torch.rand(heads, generator=generator),
        "near_lse": torch.randn(batch, heads, rows, generator=generator) + 3,
        "offset": torch.randn(heads, generator=generator),
        "start": torch.randint(0, keys // 2 + 1, (batch,), generator=generator),
    }


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 70),
    past=st.integers(0, 90),
    window=st.integers(1, 50),
    sinks=st.integers(0, 5),
    min_blocks=st.integers(0, 3),
    tile=st.sampled_from([1, 16, 33, 128]),
    block_size=st.sampled_from([1, 8, 16, 64]),
    full=st.booleans(),
    padded=st.booleans(),
    rank=st.sampled_from(["sum", "max"]),
)
def test_equals_the_reference(
    seed, rows, past, window, sinks, min_blocks, tile, block_size, full, padded, rank
):
    case = inputs(seed, 2, 3, rows, rows + past, 8)
    if full:
        case["near_lse"] = None
    if not padded:
        case["start"] = None
    sizes = (window, sinks, min_blocks, tile, block_size)
    options = {"rank": rank, "near_lse": case.pop("near_lse"), "offset": case.pop("offset")}
    options["start"] = case.pop("start")
    found = ops.select_tiles(*case.values(), *sizes, **options)
    wanted = reference.select_tiles(*case.values(), *sizes, **options)
    same = (found[0] == wanted[0]).all(-1) & (found[1] == wanted[1])
    threshold = case["threshold"][None, :, None].expand_as(wanted[2])
    near_tie = (wanted[2] - threshold).abs() < 1e-4
    assert (same | near_tie).all()
    assert torch.allclose(found[2].double()[same], wanted[2][same], atol=2e-5)
    reached = found[2] >= threshold - 1e-5
    whole = found[1] == (found[1].amax())
    assert (reached | whole | same).all()


def test_low_capacity_asks_for_dense():
    case = inputs(0, 1, 2, 40, 200, 8)
    case["threshold"] = torch.ones(2)
    indices, counts, _ = ops.select_tiles(
        *(case[n] for n in ("q_index", "k_index", "index_map", "threshold")), 8, 2, 0, 16, 16,
        capacity=3,
    )  # fmt: skip
    assert (counts == -1).all() and (indices == -1).all()


def test_bad_logits_select_every_visible_block():
    case = inputs(0, 1, 1, 8, 64, 8)
    case["k_index"][0, 0, 5] = math.nan
    _, counts, mass = ops.select_tiles(
        *(case[n] for n in ("q_index", "k_index", "index_map", "threshold")), 4, 0, 0, 8, 8
    )
    assert counts.item() == 8 and mass.isnan().all()


def test_lists_drive_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 96, 16)
    case = inputs(0, 1, 2, 96, 96, 8)
    lists = ops.select_tiles(
        *(case[n] for n in ("q_index", "k_index", "index_map")), torch.ones(2) * 2, 16, 2, 0, 32, 16
    )
    out, _ = ops.attention(
        q, k, v, [0, 1], 16, 2, 0.25, block_indices=lists[0], block_counts=lists[1], tile=32,
        block_size=16,
    )  # fmt: skip
    dense, _ = ops.attention(q, k, v, [0, 1], 16, 2, 0.25)
    assert torch.allclose(out, dense, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": "mean"}, "rank must be 'sum' or 'max', got 'mean'"),
        ({"tile": 0}, "tile must be >= 1"),
        ({"threshold": torch.zeros(3)}, "threshold must"),
        ({"min_blocks": -1}, "min_blocks must be >= 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    case = inputs(0, 1, 2, 8, 64, 8) | {"window": 4, "sinks": 1, "min_blocks": 0} | change
    with pytest.raises(ValueError, match=message):
        ops.select_tiles(**case)


def test_opcheck():
    case = inputs(1, 2, 2, 20, 70, 8)
    torch.library.opcheck(
        torch.ops.rtpurbo.select_tiles.default,
        (*(case[n] for n in ("q_index", "k_index", "index_map", "threshold")), 9, 2, 1, 16, 16),
    )

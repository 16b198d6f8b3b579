"""select over random odd shapes: are the sets legal, large enough, smallest and in order."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rtpurbo import ops
from tests.properties import check_set, seen_near_and_forced, selections
from tests.reference.select import block_scores, index_logits


@given(
    arguments=selections(),
    p=st.floats(0.01, 1.0) | st.just(1.0),
    min_tokens=st.integers(0, 70),
    block_size=st.sampled_from([1, 16, 32, 64]),
    room=st.none() | st.floats(0, 1),
    exact=st.booleans(),
)
def test_select_sets(arguments, p, min_tokens, block_size, room, exact):
    q_index, k_index = arguments["q_index"], arguments["k_index"]
    batch, heads, rows, _ = q_index.shape
    keys = k_index.shape[2]
    blocks = -(-keys // block_size)
    capacity = 0 if room is None else max(1, int(room * blocks))
    more = dict(p=p, min_tokens=min_tokens, block_size=block_size, exact=exact)
    indices, counts, mass = ops.select(**arguments, **more, capacity=capacity)
    unlimited, needed, _ = ops.select(**arguments, **more)
    assert indices.shape[-1] == (capacity or blocks)

    logits = index_logits(q_index, k_index, arguments["index_map"], arguments["offset"])
    seen, close, forced = seen_near_and_forced(arguments, logits)
    far = seen & ~close
    floor = -(-min_tokens // block_size)
    for b in range(batch):
        for j in range(heads):
            for row in range(rows):
                count = int(counts[b, j, row])
                if not seen[b, row].any():
                    assert count == 0 and (indices[b, j, row] == -1).all()
                    continue
                if count == -1:
                    assert needed[b, j, row] > capacity
                    continue
                chosen = indices[b, j, row, :count].tolist()
                assert (
                    chosen == unlimited[b, j, row, :count].tolist() and count == needed[b, j, row]
                )
                assert (indices[b, j, row, count:] == -1).all()
                scores = block_scores(logits[b, j, row], far[b, row], block_size)
                outside, share = float(forced[b, j, row]), float(mass[b, j, row])
                check_set(scores, outside, p, floor, chosen, share, exact=exact)


@given(arguments=selections(), p=st.floats(0.01, 1.0), block_size=st.sampled_from([1, 16]))
def test_hidden_keys_are_never_read(arguments, p, block_size):
    more = dict(p=p, min_tokens=3, block_size=block_size)
    rows, keys = arguments["q_index"].shape[2], arguments["k_index"].shape[2]
    expected = ops.select(**arguments, **more)
    if arguments["start"] is not None:
        for b, first in enumerate(arguments["start"].tolist()):
            arguments["k_index"][b, :, :first] = torch.nan
    assert_equal(ops.select(**arguments, **more), expected)
    row = rows // 2
    arguments["k_index"][:, :, keys - rows + row + 1 :] = torch.nan
    got = ops.select(**arguments, **more)
    assert_equal([t[:, :, : row + 1] for t in got], [t[:, :, : row + 1] for t in expected])


def assert_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@given(
    arguments=selections(max_rows=1),
    p=st.floats(0.01, 1.0),
    where=st.sampled_from(["q_index", "k_index", "near_lse"]),
    block_size=st.sampled_from([1, 16]),
)
def test_a_nan_selects_every_far_key(arguments, p, where, block_size):
    keys = arguments["k_index"].shape[2]
    arguments |= dict(window=1, sinks=1, start=None)
    if where == "near_lse":
        arguments[where] = torch.full(arguments["q_index"].shape[:3], torch.nan)
    elif keys > 2:
        arguments[where][:, :, 0 if where == "q_index" else keys // 2, 0] = torch.nan
    else:
        return
    _, counts, mass = ops.select(**arguments, p=p, min_tokens=0, block_size=block_size)
    far = torch.arange(1, keys - 1) if keys > 2 else torch.arange(0)
    assert (counts == len((far // block_size).unique())).all() and mass.isnan().all()


@given(
    arguments=selections(),
    p=st.floats(0.01, 1.0) | st.just(1.0),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_keys_of_minus_infinity_are_no_candidates(arguments, p, share, seed):
    q_index, k_index = arguments["q_index"], arguments["k_index"]
    q_index.abs_().add_(0.1)
    lost = torch.rand(k_index.shape[2], generator=torch.Generator().manual_seed(seed)) < share
    k_index[:, :, lost, 0] = -torch.inf
    indices, counts, mass = ops.select(**arguments, p=p, min_tokens=1)
    logits = index_logits(q_index, k_index, arguments["index_map"], arguments["offset"])
    seen, close, _ = seen_near_and_forced(arguments, logits)
    candidates = (seen & ~close & ~lost).sum(-1)[:, None].expand_as(counts)
    assert not mass[candidates > 0].isnan().any() and not lost[indices[indices >= 0]].any()
    assert (counts == candidates).all() if p == 1.0 else (counts <= candidates).all()
    assert ((counts > 0) == (candidates > 0)).all()


def test_a_floor_of_any_size_takes_everything():
    q_index, k_index = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 100, 4)
    _, counts, _ = ops.select(q_index, k_index, [0], 0.1, 1, 0, 2**63 - 1, block_size=16)
    assert counts.item() == 7

"""top_p against a stable descending sort in float64, and its corner cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests import reference
from tests.properties import BIN


@given(
    n=st.integers(1, 700),
    p=st.floats(0.01, 0.999),
    floor=st.integers(0, 20),
    forced=st.sampled_from([-math.inf, 0.0, 3.0]),
    spread=st.sampled_from([0.1, 1.0, 8.0, 200.0]),
    seed=st.integers(0, 10_000),
)
def test_equals_a_stable_sort(n, p, floor, forced, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, n, generator=generator) * spread
    scores[torch.rand(3, n, generator=generator) < 0.1] = -math.inf
    scores[:, 0] = 0.5
    arguments = scores, p, floor, torch.full((3,), forced)
    indices, counts, mass = ops.top_p(*arguments)
    wanted, wanted_counts, _ = reference.top_p(*arguments)
    for row in range(3):
        count = int(counts[row])
        got = indices[row, :count].tolist()
        assert got == sorted(got)
        assert (indices[row, count:] == -1).all()
        assert mass[row] >= p - 1e-6
        want = set(wanted[row, : wanted_counts[row]].tolist())
        difference = set(got) ^ want
        assert len(difference) <= 1 and all(
            abs(scores[row, i] - min(scores[row, j] for j in want | {i})) < 1e-5 for i in difference
        )


@given(n=st.integers(1, 300), p=st.floats(0.05, 1.0), seed=st.integers(0, 1000))
def test_fast_mode_adds_at_most_one_bin(n, p, seed):
    scores = torch.randn(1, n, generator=torch.Generator().manual_seed(seed)) * 3
    exact, exact_count, _ = ops.top_p(scores, p)
    fast, fast_count, _ = ops.top_p(scores, p, exact=False)
    chosen = set(exact[0, : exact_count[0]].tolist())
    more = set(fast[0, : fast_count[0]].tolist())
    assert chosen <= more
    threshold = min(scores[0, i].item() for i in chosen)
    assert all(scores[0, i] >= threshold - BIN - 1e-6 for i in more)


@pytest.mark.parametrize("n, more", [(8, 8), (32, 32), (33, 17), (1000, 500)])
def test_fast_mode_adds_a_bin_of_few_members_only(n, more):
    _, counts, mass = ops.top_p(torch.zeros(1, n), 0.5, exact=False)
    assert counts.item() == more and mass.item() == pytest.approx(more / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_ties_join_by_lower_position(dtype):
    indices, counts, mass = ops.top_p(torch.zeros(1, 10, dtype=dtype), 0.45)
    assert counts.tolist() == [5]
    assert indices[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert mass.item() == pytest.approx(0.5)


def test_corner_rows():
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[-inf, -inf, -inf], [0, nan, -inf], [0, inf, -inf], [50, 0, 0]])
    indices, counts, mass = ops.top_p(rows, 0.9)
    assert counts.tolist() == [0, 2, 2, 1]
    assert mass[0] == 1 and mass[1].isnan() and mass[2].isnan() and mass[3] == 1
    assert indices[1].tolist() == [0, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_with_the_lowest_finite_score(dtype):
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    rows = torch.tensor([[0, 1, low], [high, 1, low]], dtype=dtype)
    indices, counts, _ = ops.top_p(rows, 0.99)
    assert counts.tolist() == [2, 1]
    assert indices.tolist() == [[0, 1, -1], [0, -1, -1]]


def test_forced_mass_that_suffices_leaves_only_the_floor():
    scores = torch.tensor([[0.0, 2.0, 1.0]])
    assert ops.top_p(scores, 0.9, 0, torch.tensor([30.0]))[1].item() == 0
    indices, counts, _ = ops.top_p(scores, 0.9, 2, torch.tensor([30.0]))
    assert counts.item() == 2 and indices[0, :2].tolist() == [1, 2]


def test_p_one_selects_every_candidate():
    scores = torch.tensor([[0.0, -500.0, -math.inf]])
    assert ops.top_p(scores, 1.0)[0][0].tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(scores=torch.zeros(3), p=0.9), r"scores must have shape \[rows, N\]"),
        (dict(scores=torch.zeros(3, 4), p=0.0), r"p must be in \(0, 1\], got 0"),
        (dict(scores=torch.zeros(3, 4), p=1.5), r"p must be in \(0, 1\], got 1.5"),
        (dict(scores=torch.zeros(4, 3).T, p=0.5), r"contiguous in its last dimension"),
        (dict(scores=torch.zeros(3, 4), p=0.5, min_members=-1), r"min_members must be >= 0"),
        (
            dict(scores=torch.zeros(3, 4), p=0.5, forced_lse=torch.zeros(2)),
            r"forced_lse must have shape \[rows\] = \[3\], got \[2\]",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.top_p(**arguments)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="scores must be float32"):
        ops.top_p(torch.zeros(2, 3, dtype=torch.int64), 0.5)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.rtpurbo.top_p.default, (torch.randn(3, 40), 0.8, 2, torch.randn(3), True)
    )

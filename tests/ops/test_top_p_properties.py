"""top_p over random rows: are the sets legal, large enough, smallest and in order."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests.properties import check_set


@given(
    n=st.integers(1, 400),
    rows=st.integers(1, 4),
    p=st.floats(1e-6, 1.0),
    floor=st.integers(0, 500),
    spread=st.sampled_from([0.0, 0.1, 3.0, 100.0, 1e6]),
    levels=st.booleans(),
    forced=st.none() | st.floats(-20, 20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    exact=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_top_p_sets(n, rows, p, floor, spread, levels, forced, dtype, exact, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n, generator=generator) * spread
    if levels:
        scores = scores.round()
    scores = scores.to(dtype)
    scores[torch.rand(rows, n, generator=generator) < 0.2] = -torch.inf
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    forced_lse = None if forced is None else torch.full((rows,), forced, dtype=accumulated)
    scores[scores == torch.inf] = 0
    indices, counts, mass = ops.top_p(scores, p, floor, forced_lse, exact)
    for row in range(rows):
        count = int(counts[row])
        assert (indices[row, count:] == -1).all()
        outside = -math.inf if forced_lse is None else float(forced_lse[row])
        chosen = indices[row, :count].tolist()
        check_set(scores[row].double(), outside, p, floor, chosen, float(mass[row]), exact=exact)

"""decode against its float64 reference, and against attention."""

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.ops.attention_cases import TOLERANCE, Case, assert_near, draw


def arguments(case: Case) -> tuple[tuple, dict]:
    query = case.tensor(case.heads, 1)
    keywords: dict = {"start": case.start}
    stored = case.kv_heads
    if case.rng.random() < 0.5:
        stored = case.full_heads
        slots = case.sinks + case.window
        keywords["k_local"] = case.tensor(case.kv_heads - stored, slots)
        keywords["v_local"] = case.tensor(case.kv_heads - stored, slots)
        keywords["length"] = case.keys if stored == 0 else -1
    if case.rng.random() < 0.6:
        block_size = case.rng.choice([1, 16, 64])
        keywords["indices"], keywords["counts"] = case.lists(
            case.batch, len(case.retrieval_heads), 1, blocks=-(-case.keys // block_size)
        )
        keywords["block_size"] = block_size
    near_window = case.rng.choice([1, 7, 64, 2000])
    positional = (
        query,
        case.tensor(stored, case.keys),
        case.tensor(stored, case.keys),
        case.retrieval_heads,
        case.window,
        near_window,
        case.sinks,
        case.scale,
    )
    return positional, keywords


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(30))
def test_matches_reference(seed: int, dtype: torch.dtype) -> None:
    positional, keywords = arguments(draw(seed, dtype, rows=1))
    out, lse = ops.decode(*positional, **keywords)
    assert_near((out, lse), reference.decode(*positional, **keywords))
    assert out.transpose(1, 2).is_contiguous()


def test_dense_heads_equal_attention() -> None:
    q, k, v = torch.randn(2, 6, 1, 64), torch.randn(2, 3, 5000, 64), torch.randn(2, 3, 5000, 64)
    start = torch.tensor([0, 1234])
    dense = ops.attention(q, k, v, [0, 3], 900, 4, 0.125, start)
    torch.testing.assert_close(ops.decode(q, k, v, [0, 3], 900, 64, 4, 0.125, start=start), dense)


def test_bits_do_not_depend_on_threads() -> None:
    q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 40_000, 64), torch.randn(1, 2, 40_000, 64)
    first = ops.decode(q, k, v, [0, 5], 1000, 64, 4, 0.125)
    torch.set_num_threads(2)
    for _ in range(20):
        again = ops.decode(q, k, v, [0, 5], 1000, 64, 4, 0.125)
        assert again[0].equal(first[0]) and again[1].equal(first[1])
    torch.set_num_threads(1)


def test_unselected_keys_are_never_read() -> None:
    k, v = torch.full((1, 1, 500, 64), torch.nan), torch.full((1, 1, 500, 64), torch.nan)
    members = [10, 77, 300]
    for keys in (k, v):
        keys[:, :, [0, 1, *members, *range(480, 500)]] = torch.randn(1, 1, 5 + 20, 64)
    indices = torch.tensor(members, dtype=torch.int32).view(1, 1, 1, 3)
    counts = torch.tensor([[[3]]], dtype=torch.int32)
    out, lse = ops.decode(
        torch.randn(1, 2, 1, 64), k, v, [1], 20, 20, 2, 0.125, indices=indices, counts=counts
    )
    assert out.isfinite().all() and lse.isfinite().all()


def test_nan_reaches_the_heads_that_see_it() -> None:
    q, k, v = torch.randn(1, 2, 1, 64), torch.randn(1, 1, 500, 64), torch.randn(1, 1, 500, 64)
    k[0, 0, 100] = torch.nan
    out, lse = ops.decode(q, k, v, [1], 20, 20, 2, 0.125)
    assert out[0, 0].isfinite().all() and out[0, 1].isnan().all() and lse[0, 1].isnan()


def test_errors_name_the_argument() -> None:
    q, k = torch.randn(1, 2, 1, 64), torch.randn(1, 1, 50, 64)
    with pytest.raises(ValueError, match="q must have one row, got M = 2"):
        ops.decode(torch.randn(1, 2, 2, 64), k, k, [1], 20, 20, 2, 0.125)
    with pytest.raises(ValueError, match="k_local must have sinks \\+ window = 22 slots, got 21"):
        ring = torch.randn(1, 1, 21, 64)
        ops.decode(
            q, k[:, :0], k[:, :0], [], 20, 20, 2, 0.125, k_local=ring, v_local=ring, length=9
        )
    with pytest.raises(ValueError, match="length must be the number of keys"):
        ring = torch.randn(1, 1, 22, 64)
        ops.decode(q, k[:, :0], k[:, :0], [], 20, 20, 2, 0.125, k_local=ring, v_local=ring)
    with pytest.raises(ValueError, match="indices must have shape"):
        ops.decode(
            q,
            k,
            k,
            [1],
            20,
            20,
            2,
            0.125,
            indices=torch.zeros(1, 1, 3, dtype=torch.int32),
            counts=torch.zeros(1, 1, 1, dtype=torch.int32),
        )

"""Quantised index keys: how far off they are, and that selection reads them as what they mean."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests import reference
from tests.properties import check_set, seen_near_and_forced, selections
from tests.reference.quantize_index import BLOCK, all_keys, dequantize
from tests.reference.select import block_scores, index_logits

BITS = st.sampled_from([4, 8])


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(0, 3), st.integers(0, 5), st.integers(1, 33)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    bits=BITS,
    spread=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 300.0]),
    centre=st.sampled_from([0.0, -1e-6, 0.7, -40.0, 3000.0]),
    seed=st.integers(0, 10_000),
)
def test_off_by_at_most_half_a_step(shape, dtype, bits, spread, centre, seed):
    batch, heads, blocks, dim = shape
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, blocks * BLOCK, dim, generator=generator) * spread + centre
    keys = keys.to(dtype)
    codes, ranges = ops.quantize_index(keys, bits)
    assert codes.dtype == torch.uint8 and ranges.dtype == torch.float16
    assert codes.shape == (*keys.shape[:3], dim if bits == 8 else -(-dim // 2))
    assert ranges.shape == (batch, heads, blocks, 2 * dim)
    low, step = ranges.double().repeat_interleave(BLOCK, dim=2).split(dim, -1)
    error = (dequantize(codes, ranges) - keys.double()).abs()
    rounding = 1e-6 * step + 2**-22 * keys.double().abs()  # of sums in float32
    assert (error <= step / 2 + rounding).all()
    assert (low <= keys.double()).all()
    exact_low, exact_step = reference.quantize_index(keys, bits)[1].split(dim, -1)
    torch.testing.assert_close(ranges.double()[..., :dim], exact_low, atol=0, rtol=0)
    torch.testing.assert_close(
        ranges.double()[..., dim:], exact_step, atol=torch.finfo(torch.float16).tiny * 2**-10,
        rtol=1.1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -1e6])
def test_a_bad_key_spoils_its_block_and_dimension_only(bits, bad):
    keys = torch.randn(1, 2, 192, 6)
    clean = dequantize(*ops.quantize_index(keys, bits))
    for place in (64, 100, 127):
        spoilt = keys.clone()
        spoilt[0, 1, place, 3] = bad
        got = dequantize(*ops.quantize_index(spoilt, bits))
        expected = clean.clone()
        expected[0, 1, 64:128, 3] = torch.nan
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


def split_keys(arguments, bits, blocks):
    """The arguments with `blocks` blocks of random codes before their keys, and the same in full.

    The second has float32 keys, of which each is what its codes mean, rounded once.
    """
    generator = torch.Generator().manual_seed(blocks)
    k_index = arguments["k_index"]
    batch, heads, _, dim = k_index.shape
    far = torch.randn(batch, heads, blocks * BLOCK, dim, generator=generator)
    if blocks and bits == 4:
        far[..., 0] *= 3
    codes, ranges = ops.quantize_index(far, bits)
    start = arguments["start"]
    if start is not None:
        start = (start * (1 + blocks * BLOCK / k_index.shape[2])).long()
    coded = arguments | dict(start=start, codes=codes, ranges=ranges)
    plain = torch.cat([dequantize(codes, ranges).float(), k_index.float()], 2)
    return coded, arguments | dict(start=start, k_index=plain)


@given(
    arguments=selections(), bits=BITS, blocks=st.integers(0, 9), p=st.floats(0.01, 1.0),
    block_size=st.sampled_from([1, 16, 64]), min_tokens=st.integers(0, 70),
)  # fmt: skip
def test_select_equals_select_on_dequantised_keys(
    arguments, bits, blocks, p, block_size, min_tokens
):
    coded, plain = split_keys(arguments, bits, blocks)
    more = dict(p=p, block_size=block_size, min_tokens=min_tokens)
    for got, want in zip(ops.select(**coded, **more), ops.select(**plain, **more), strict=True):
        assert torch.equal(got, want)


@given(
    arguments=selections(max_rows=80), bits=BITS, blocks=st.integers(0, 6),
    tile=st.sampled_from([16, 33]), rank=st.sampled_from(["sum", "max"]),
)  # fmt: skip
def test_select_tiles_equals_select_tiles_on_dequantised_keys(arguments, bits, blocks, tile, rank):
    coded, plain = split_keys(arguments, bits, blocks)
    threshold = torch.full((len(arguments["index_map"]),), 0.7)
    more = dict(threshold=threshold, min_blocks=1, tile=tile, rank=rank)
    got, want = ops.select_tiles(**coded, **more), ops.select_tiles(**plain, **more)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@given(
    arguments=selections(max_rows=2), bits=BITS, blocks=st.integers(1, 4), p=st.floats(0.01, 1.0),
    min_tokens=st.integers(0, 20),
)  # fmt: skip
def test_sets_are_those_of_the_float64_scores(arguments, bits, blocks, p, min_tokens):
    coded, _ = split_keys(arguments, bits, blocks)
    indices, counts, mass = ops.select(**coded, p=p, min_tokens=min_tokens)
    keys = all_keys(coded["k_index"], coded["codes"], coded["ranges"])
    logits = index_logits(coded["q_index"], keys, coded["index_map"], coded["offset"])
    batch, heads, rows, _ = logits.shape
    seen, close, forced = seen_near_and_forced(coded, logits)
    for b, j, row in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        if seen[b, row].any():
            scores = block_scores(logits[b, j, row], (seen & ~close)[b, row], 1)
            chosen = indices[b, j, row, : counts[b, j, row]].tolist()
            check_set(
                scores, float(forced[b, j, row]), p, min_tokens, chosen, float(mass[b, j, row])
            )


def test_a_spoilt_block_selects_every_far_key():
    keys = torch.randn(1, 1, 128, 4)
    keys[0, 0, 70, 2] = torch.inf
    codes, ranges = ops.quantize_index(keys, 4)
    _, counts, mass = ops.select(
        torch.ones(1, 1, 1, 4), torch.randn(1, 1, 10, 4), [0], 0.5, 5, 2, 0, codes=codes,
        ranges=ranges,
    )  # fmt: skip
    assert counts.item() == 138 - 5 - 2 and mass.isnan().all()

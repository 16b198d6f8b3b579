"""The short-input rule: where retrieval heads read every key."""

from types import SimpleNamespace

import pytest
import torch

import rtpurbo
from benchmarks.masks import dense_pairs, near_pairs
from rtpurbo.patching import state
from rtpurbo.short_inputs import (
    PREFILL_SECONDS,
    SCORE_BYTES,
    SIFTED_SCORE_BYTES,
    SIFTED_SCORES,
    SIFTING_BYTES,
    SPARED_BYTES,
    fewest_far_keys,
    fewest_to_select_from,
    prefill_selects,
    seconds_spared,
    selection_seconds,
)
from tests.models.tiny import config, in_pieces, tiny, tokens

pytestmark = pytest.mark.families
WINDOW, SINKS = 8, 2


def test_few_far_keys_are_all_read():
    """80 far keys are read, of 81 some are selected."""
    ids, logits = tokens(91), {}
    near = {"window": WINDOW, "sinks": SINKS, "min_tokens": 1}
    for settings in ({"top_p": 1.0}, {"top_p": 0.05, "select_from": 81}):
        model = rtpurbo.sparsify(tiny(), config(**near, **settings))
        logits[settings["top_p"]] = in_pieces(model, ids, [89, 1, 1])
    torch.testing.assert_close(logits[0.05][:, :90], logits[1.0][:, :90], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0.05][:, 90], logits[1.0][:, 90], atol=1e-2)
    last = state(model).layers[0].last
    assert last.keys == 91 and (last.counts < 81).all()
    model = rtpurbo.sparsify(tiny(), config(**near, top_p=0.05, select_from=81))
    in_pieces(model, ids[:, :90], [89, 1])
    assert state(model).layers[0].last.counts is None
    assert rtpurbo.stats(model)["attended_tokens"] == pytest.approx((3 * 90 + 3 * 10) / 6)


def test_a_gpu_selects_where_reading_all_keys_costs_more():
    model = rtpurbo.sparsify(tiny(), config(index_bits=8, min_tokens=1000))
    context = state(model).layers[0]
    q = SimpleNamespace(shape=(2, 6, 1, 128), device=torch.device("cuda"), element_size=lambda: 2)
    least = fewest_far_keys(context, q)
    assert len(context.full_kv_heads) == 2
    # Batch; KV heads, K and V, D, bf16; retrieval heads, index dim, a byte. Twice what one launch
    # must spare, which an index dim of 16 has.
    spared = 2 * (2 * 2 * 128 * 2 - 3 * (8 + SCORE_BYTES))
    listed = 2 * 3 * 1000 * 2 * 128 * 2
    assert (least - 1) * spared <= 2 * SPARED_BYTES + listed < least * spared
    for refine, launches in ((False, 1), (True, 2)):
        wider = dict(index_bits=8, index_dim=16, min_tokens=1000, refine=refine)
        context = state(rtpurbo.sparsify(tiny(), config(**wider))).layers[0]
        least = fewest_far_keys(context, q)
        spared = 2 * (2 * 2 * 128 * 2 - 3 * (16 + SCORE_BYTES))
        assert (least - 1) * spared <= launches * SPARED_BYTES + listed < least * spared
    q.device = torch.device("cpu")
    assert fewest_far_keys(context, q) == 1
    q.device, q.shape = torch.device("cuda"), (2, 6, 1, 2)
    assert fewest_far_keys(context, q) > 2**31  # an index key weighs more than a key


@pytest.mark.parametrize(
    "bits, keys, speed",
    [
        (16, 131_072, 0.58), (16, 262_144, 0.76), (16, 1_048_576, 1.36), (4, 131_072, 0.73),
        (4, 524_288, 1.9), (4, 1_048_576, 2.7),
    ],
)  # fmt: skip
def test_a_sieve_serves_many_heads(bits, keys, speed):
    """`speed`: of 32 of 32 retrieval heads against reading every key, on an H100."""
    row = 2 * 128 * 2
    shape = 1, 32, 4 * row, 32 * 16 * bits // 8, 8192 * row
    assert (keys >= fewest_to_select_from(*shape, sifts=True)) == (speed > 1)


def test_a_sieve_is_for_many_scores():
    row = 2 * 128 * 2
    least = fewest_to_select_from(1, 28, 4 * row, 28 * 32, 0, sifts=True)
    spared = 4 * row - 28 * (32 + SIFTED_SCORE_BYTES)
    assert least == SIFTED_SCORES // 28 > (SPARED_BYTES + SIFTING_BYTES) // spared
    assert fewest_to_select_from(32, 32, 4 * row, 32 * 32, 0, sifts=True) == 1 << 15
    assert fewest_to_select_from(0, 32, 4 * row, 32 * 32, 0, sifts=True) > 1 << 40


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 63}, {"block_size": 16}, {"index": "full"}, {"refine": True, "index_bits": 8}],
)
def test_a_sieve_is_for_single_keys_of_the_index(settings):
    """Of these heads the scores without one take as long as the keys."""
    roles, size = torch.ones(2, 6, dtype=torch.bool), {"index_dim": 16, "window": 64, "recent": 64}
    model = rtpurbo.sparsify(tiny(num_key_value_heads=1), config(roles, **{**size, **settings}))
    context = state(model).layers[0]
    q = SimpleNamespace(shape=(4096, 6, 1, 64), device=torch.device("cuda"), element_size=lambda: 2)
    assert (fewest_far_keys(context, q) > 1 << 20) == (settings != {})


@pytest.mark.parametrize(
    "heads, dim, keys, window, speed",
    [
        (5, 128, 4096, 1024, 0.70), (5, 128, 12288, 256, 1.15), (5, 128, 16384, 8192, 0.87),
        (5, 128, 24576, 1024, 1.31), (5, 128, 65536, 8192, 1.12), (1, 64, 8192, 256, 0.74),
        (1, 64, 16384, 1024, 0.76), (1, 64, 32768, 256, 1.33), (1, 64, 32768, 8192, 0.92),
        (1, 64, 65536, 4096, 1.20),
    ],
)  # fmt: skip
def test_the_rule_of_sparse_prefill_is_what_was_measured(heads, dim, keys, window, speed):
    """`speed`: of a layer's sparse prefill against dense retrieval heads, on an H200, as graphs."""
    spared = seconds_spared(heads, keys, keys, window + 4, dim, 16, beyond_window=True)
    assert (spared > 0) == (speed > 1)
    assert seconds_spared(heads, keys, keys, window + 4, dim, 24, beyond_window=True) < 0
    chunk = keys // 2
    before = seconds_spared(heads, chunk, chunk, window + 4, dim, 16, beyond_window=True)
    rest = seconds_spared(heads, chunk, keys, window + 4, dim, 16, beyond_window=True)
    assert before + rest == pytest.approx(spared - PREFILL_SECONDS)


@pytest.mark.parametrize(
    "keys, window, index_dim, beyond_window, measured",
    [
        (32768, 8192, 16, True, 1034e-6), (65536, 1024, 16, True, 1296e-6),
        (65536, 8192, 16, True, 2530e-6), (32768, 8192, 16, False, 2037e-6),
        (65536, 1024, 16, False, 2591e-6), (65536, 8192, 16, False, 5416e-6),
        (32768, 1024, 24, True, 20.1e-3), (32768, 8192, 24, False, 21.2e-3),
    ],
)  # fmt: skip
def test_selection_takes_what_was_measured(keys, window, index_dim, beyond_window, measured):
    """`near_lse` and `select_tiles` of 5 heads of dim 128 on an H200; launches are 60 us of it."""
    near, far = near_pairs(keys, window, 4), dense_pairs(keys) - near_pairs(keys, window, 4)
    seconds = 5 * selection_seconds(near, far, 128, index_dim, beyond_window)
    assert seconds == pytest.approx(measured, rel=0.1)


def test_a_batch_launches_once():
    one, four = (seconds_spared(n * 5, 8192, 8192, 1028, 128, 16, True) for n in (1, 4))
    assert one < 0 < four == pytest.approx(4 * one + 3 * PREFILL_SECONDS)


def test_few_rows_cost_a_tile():
    one, tile, more = (seconds_spared(5, m, 1 << 20, 8196, 128, 16, True) for m in (1, 128, 129))
    assert 0 < one == tile < more


def test_a_short_prefill_sees_every_key():
    ids = tokens(200)
    dense = rtpurbo.sparsify(tiny(), config(window=WINDOW, sinks=SINKS))
    far = 200 - WINDOW - SINKS
    for select_from, lists in ((far + 1, False), (far, True), (None, True)):
        model = rtpurbo.sparsify(
            tiny(), config(window=WINDOW, sinks=SINKS, prefill="sparse", select_from=select_from)
        )
        out = model(ids).logits
        assert (state(model).layers[0].last.counts is not None) == lists
        if not lists:
            torch.testing.assert_close(out, dense(ids).logits, atol=0, rtol=0)


def test_a_gpu_prefills_sparsely_where_that_spares_time():
    def rule(keys, device="cuda", size=2, batch=1, **settings):
        settings = dict(window=WINDOW, sinks=SINKS, prefill="sparse", index_dim=16) | settings
        context = state(rtpurbo.sparsify(tiny(), config(**settings))).layers[0]
        q = SimpleNamespace(
            shape=(batch, 6, keys, 128), device=torch.device(device), element_size=lambda: size
        )
        return prefill_selects(context, q, keys)

    assert [rule(keys) for keys in (4096, 65536)] == [False, True]
    assert [rule(8192, batch=batch) for batch in (1, 4)] == [False, True]
    assert [rule(keys, index="full", recent=64) for keys in (4096, 65536)] == [False, True]
    assert rule(4096, "cpu") and rule(4096, size=4)
    assert not rule(65536, index_dim=24) and rule(4096, index_dim=24, select_from=0)
    assert not rule(65536, prefill="dense") and not rule(WINDOW + SINKS, select_from=0)

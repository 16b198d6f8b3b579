"""The short-input rule of decode: where retrieval heads read every key."""

from types import SimpleNamespace

import pytest
import torch

import rtpurbo
from rtpurbo.patching import state
from rtpurbo.short_inputs.decode import (
    APART_BYTES,
    EXACT_BYTES,
    H200_RATE,
    LIST_BYTES,
    LISTED_COST,
    REFINED_SCORE_BYTES,
    REFINING_BYTES,
    SCORE_BYTES,
    SIFTED_SCORE_BYTES,
    SIFTED_SCORES,
    SIFTING_BYTES,
    STAGES_BYTES,
    USUAL_TOKENS,
    fewest_far_keys,
    fewest_to_select_from,
    memory_rate,
)
from tests.models.tiny import config, in_pieces, tiny, tokens

pytestmark = pytest.mark.families
WINDOW, SINKS = 8, 2
ROW = 2 * 128 * 2  # bytes of a key and its value, of 128 elements of two bytes
H100_RATE = 3.35e12


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch):
    monkeypatch.setattr("rtpurbo.short_inputs.decode.memory_rate", lambda device: H200_RATE)


def lists_bytes(lists, tokens):
    """What lists cost beside the stages."""
    return lists * (LIST_BYTES + int(LISTED_COST * ROW * tokens))


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
    found = rtpurbo.stats(model)
    assert found["attended_tokens"] == pytest.approx((3 * 90 + 3 * 10) / 6)
    assert found["selecting_layers"] == 0


def test_a_gpu_selects_where_reading_all_keys_costs_more():
    model = rtpurbo.sparsify(tiny(), config(index_bits=8, min_tokens=2000))
    context = state(model).layers[0]
    q = SimpleNamespace(shape=(2, 6, 1, 128), device=torch.device("cuda"), element_size=lambda: 2)
    least = fewest_far_keys(context, q)
    assert len(context.full_kv_heads) == 2
    # Batch; KV heads, K and V, D, bf16; retrieval heads, index dim, a byte. An index dim of 16 has
    # one launch.
    spared = 2 * (2 * 2 * 128 * 2 - 3 * (8 + SCORE_BYTES))
    listed = lists_bytes(2 * 3, 2000)
    assert (least - 1) * spared <= APART_BYTES + listed < least * spared
    for options, stages, score in (
        ({}, STAGES_BYTES, SCORE_BYTES),
        ({"exact_sets": True}, STAGES_BYTES + EXACT_BYTES, SCORE_BYTES),
        ({"refine": True}, REFINING_BYTES, REFINED_SCORE_BYTES),
        ({"refine": True, "exact_sets": True}, REFINING_BYTES, REFINED_SCORE_BYTES),
    ):
        wider = dict(index_bits=8, index_dim=16, min_tokens=2000, **options)
        context = state(rtpurbo.sparsify(tiny(), config(**wider))).layers[0]
        least = fewest_far_keys(context, q)
        spared = 2 * (2 * 2 * 128 * 2 - 3 * (16 + score))
        assert (least - 1) * spared <= stages + listed < least * spared
    q.device = torch.device("cpu")
    assert fewest_far_keys(context, q) == 1
    q.device, q.shape = torch.device("cuda"), (2, 6, 1, 2)
    assert fewest_far_keys(context, q) > 2**31  # an index key weighs more than a key


@pytest.mark.parametrize(
    "rate, bits, keys, speed",
    [
        (H200_RATE, 16, 262_144, 0.81), (H200_RATE, 16, 1_048_576, 1.31),
        (H200_RATE, 4, 131_072, 0.82), (H200_RATE, 4, 262_144, 1.08),
        (H100_RATE, 16, 262_144, 0.87), (H100_RATE, 16, 524_288, 1.14),
        (H100_RATE, 4, 131_072, 0.9), (H100_RATE, 4, 262_144, 1.22),
    ],
)  # fmt: skip
def test_a_sieve_serves_many_heads(rate, bits, keys, speed):
    """`speed`: of 32 of 32 retrieval heads against reading every key, above 1 on an H200 against
    cuDNN."""
    shape = 1, 32, 4 * ROW, 32 * 16 * bits // 8, ROW, 8192
    fewest = fewest_to_select_from(*shape, sifts=True, rate=rate)
    assert (keys - 8196 >= fewest) == (speed > 1)


@pytest.mark.parametrize(
    "layer, batch, keys, speed",
    [
        ((5, 4, 128), 1, 32_768, 0.87), ((5, 4, 128), 1, 65_536, 1.32),
        ((5, 4, 128), 4, 16_384, 0.93), ((5, 4, 128), 4, 32_768, 1.54),
        ((5, 4, 128), 16, 16_384, 1.25), ((4, 1, 128), 16, 32_768, 1.20),
        ((1, 1, 128), 1, 65_536, 0.79), ((1, 1, 128), 1, 131_072, 1.09),
        ((5, 4, 64), 1, 65_536, 0.91), ((5, 4, 64), 1, 131_072, 1.28),
        ((1, 1, 64), 1, 131_072, 0.72), ((1, 1, 64), 4, 131_072, 1.44),
        ((3, 3, 64), 4, 16_384, 0.68), ((3, 3, 64), 4, 65_536, 1.54),
        ((1, 1, 256), 4, 16_384, 0.94), ((1, 1, 256), 4, 32_768, 1.13),
    ],
)  # fmt: skip
def test_layers_select_where_that_is_quicker(layer, batch, keys, speed):
    """`speed`: with 1,024 tokens a head and a window of 8,192 against reading every key, on an
    H200; of a layer's retrieval heads, their KV heads, and the head dim."""
    heads, kv_heads, dim = layer
    row = 2 * dim * 2
    shape = batch, heads, kv_heads * row, heads * 32, row, 64
    fewest = fewest_to_select_from(*shape, sifts=dim <= 128)
    assert (keys - 8196 >= fewest) == (speed > 1)


@pytest.mark.parametrize(
    "heads, keys, speed",
    [
        (5, 131_072, 0.64), (5, 200_000, 0.9), (5, 262_144, 1.1), (5, 1_048_576, 3.06),
        (32, 131_072, 0.31), (32, 262_144, 0.41), (32, 524_288, 0.50), (32, 1_048_576, 0.60),
    ],
)  # fmt: skip
def test_refined_scores_cost_more(heads, keys, speed):
    """`speed`: with 4 bits, of 5 or 32 of 32 heads against reading every key, on an H200; of 5
    at 200,000 and 262,144 it lies between those beside it."""
    shape = 1, heads, 4 * ROW, heads * 16 * 4 // 8, ROW, 8192
    fewest = fewest_to_select_from(*shape, one_launch=False, refines=True)
    assert (keys - 8196 >= fewest) == (speed > 1)


@pytest.mark.parametrize(
    "batch, keys, tokens, speed",
    [
        (1, 39_936, 64, 1.07), (1, 131_072, 8192, 1.80), (4, 18_432, 64, 1.05),
        (8, 32_768, 8192, 1.25), (16, 15_360, 64, 1.11), (16, 32_768, 8192, 1.34),
        (32, 32_768, 8192, 1.35), (64, 9728, 64, 0.82), (64, 12_544, 64, 1.02),
        (64, 32_768, 8192, 1.38),
    ],
)  # fmt: skip
def test_batches_select_where_that_is_quicker(batch, keys, tokens, speed):
    """`speed`: of 5 of 32 heads against cuDNN, on an H200; with 64 `min_tokens` a head selected
    1,024. Of 9,728, 12,544 and 15,360 tokens with exact sets, which take longer."""
    shape = batch, 5, 4 * ROW, 5 * 32, ROW, tokens
    assert (keys - 8196 >= fewest_to_select_from(*shape, sifts=True)) == (speed > 1)


def test_a_cards_memory_has_a_rate(monkeypatch):
    cards = (H200_RATE, 3_201_000, 6144), (H100_RATE, 2_619_000, 5120), (H200_RATE, 0, 0)
    for rate, clock, width in cards:  # kHz, bits; the last does not tell
        card = SimpleNamespace(memory_clock_rate=clock, memory_bus_width=width)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert memory_rate.__wrapped__(torch.device("cuda")) == pytest.approx(rate, rel=0.01)
    assert memory_rate(torch.device("meta")) == H200_RATE


def test_a_slower_memory_has_a_layer_select_earlier(monkeypatch):
    context = state(rtpurbo.sparsify(tiny(), config(index_dim=16))).layers[0]
    q = SimpleNamespace(shape=(2, 6, 1, 128), device=torch.device("cuda"), element_size=lambda: 2)
    least = fewest_far_keys(context, q)
    monkeypatch.setattr("rtpurbo.short_inputs.decode.memory_rate", lambda device: H100_RATE)
    assert fewest_far_keys(context, q) < least


def test_a_sieve_is_for_many_scores():
    for heads, keys in ((30, SIFTED_SCORES // 30), (32, None)):
        least = fewest_to_select_from(1, heads, 4 * ROW, heads * 32, ROW, 0, sifts=True)
        spared = 4 * ROW - heads * (32 + SIFTED_SCORE_BYTES)
        saved = (STAGES_BYTES + SIFTING_BYTES + lists_bytes(heads, USUAL_TOKENS)) // spared
        assert least == keys > saved if keys else least == saved + 1 > SIFTED_SCORES // heads
    assert fewest_to_select_from(64, 32, 5 * ROW, 32 * 32, ROW, 0, sifts=True) == 1 << 15
    assert fewest_to_select_from(0, 32, 4 * ROW, 32 * 32, ROW, 0, sifts=True) > 1 << 40


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

"""The short-input rule of sparse prefill: where retrieval heads read every key."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rtpurbo
from rtpurbo.patching import state
from rtpurbo.short_inputs import prefill_selects
from rtpurbo.short_inputs.prefill import (
    PREFILL_SECONDS,
    PrefillPass,
    attention_seconds,
    seconds_spared,
    selection_seconds,
)
from tests.models.tiny import config, tiny, tokens

pytestmark = pytest.mark.families
WINDOW, SINKS = 8, 2
LARGE, SMALL, WIDE = (5, 32, 128), (1, 9, 64), (3, 16, 256)  # retrieval heads, all, head dim


def of(layer, lengths, window, rows=None, near=None, **others):
    """A pass; `near` is the window of form `full`."""
    retrieval, heads, dim = layer
    lengths = [lengths] if isinstance(lengths, int) else lengths
    return PrefillPass(
        lengths=lengths,
        rows=max(lengths) if rows is None else rows,
        heads=retrieval,
        local_heads=heads - retrieval,
        near=(window if near is None else near) + 4,
        window=window + 4,
        dim=dim,
        **{"beyond_window": near is None, **others},
    )


@pytest.mark.parametrize(
    "layer, lengths, rows, window, near, spared",
    [
        (LARGE, 4096, None, 256, None, -52), (LARGE, 8192, None, 1024, None, -52),
        (LARGE, 16384, None, 1024, None, 87), (LARGE, 16384, None, 8192, None, -342),
        (LARGE, 32768, None, 4096, None, 350), (LARGE, 32768, None, 8192, None, -201),
        (LARGE, 65536, None, 8192, None, 2059), (LARGE, 32768, None, 1024, 64, 754),
        (SMALL, 16384, None, 256, None, -23), (SMALL, 32768, None, 256, None, 140),
        (SMALL, 65536, None, 8192, None, 264), (SMALL, 32768, None, 1024, 64, 51),
        (WIDE, 8192, None, 256, None, -9), (WIDE, 32768, None, 1024, None, 1277),
        (LARGE, [8192] * 4, None, 256, None, 84), (LARGE, [8192] * 4, None, 1024, None, -35),
        (LARGE, [4096] * 16, None, 256, None, -70), (LARGE, [8192] * 16, None, 256, None, 491),
        (LARGE, [8192, 1024, 1024, 1024], None, 256, None, -38),
        (LARGE, [32768, 1024, 1024, 1024], None, 256, None, 898),
        (SMALL, [16384, 1024, 1024, 1024], None, 256, None, -53),
        (LARGE, 16384, 512, 1024, None, -66), (LARGE, 16384, 512, 4096, None, -101),
        (LARGE, 65536, 512, 8192, None, -56), (LARGE, 262144, 512, 8192, None, 185),
        (LARGE, 65536, 4096, 4096, None, 403), (SMALL, 65536, 512, 256, None, -72),
        (SMALL, 16384, 4096, 8192, None, -129), (SMALL, 65536, 4096, 8192, None, -46),
        (SMALL, 262144, 512, 1024, None, -58), (SMALL, 262144, 4096, 1024, None, 366),
    ],
)  # fmt: skip
def test_the_rule_is_what_was_measured(layer, lengths, rows, window, near, spared):
    """`spared`: us of a layer by lists against dense retrieval heads, on an H100, as graphs; by
    an earlier run, of slower attention, whose signs are those of the kept one."""
    given = of(layer, lengths, window, rows, near)
    assert (seconds_spared(given) > 0) == (spared > 0)


@pytest.mark.parametrize(
    "keys, window, beyond_window, measured",
    [
        (32768, 8192, True, 1034e-6), (65536, 1024, True, 1296e-6), (65536, 8192, True, 2530e-6),
        (32768, 1024, False, 455e-6), (32768, 8192, False, 803e-6),
    ],
)  # fmt: skip
def test_selection_takes_what_was_measured(keys, window, beyond_window, measured):
    """`near_lse` and `select_tiles` of 5 heads of dim 128 on an H200, launches and all; in form
    `full` `select_tiles` on an H100."""
    given = of(LARGE, keys, window, beyond_window=beyond_window)
    assert selection_seconds(given) == pytest.approx(measured, rel=0.15)


def test_a_batch_launches_once():
    one, four = (seconds_spared(of(LARGE, [65536] * n, 1024)) for n in (1, 4))
    assert four == pytest.approx(4 * one + 3 * PREFILL_SECONDS)


def test_no_sequence_selects_nothing():
    for near in (None, 64):
        assert seconds_spared(of(LARGE, [], 1024, rows=10, near=near)) < 0


def test_few_rows_cost_a_tile():
    one, tile, more = (seconds_spared(of(LARGE, 1 << 20, 8192, rows=m)) for m in (1, 128, 12801))
    assert 0 < one == tile < more


def test_attention_takes_as_long_as_its_longest_part():
    """Of few rows a head more costs nothing, and neither do more keys; of many rows both do."""
    few, many = (of((1, 9, 64), 65536, 1024, rows=rows) for rows in (128, 65536))
    for given, factor in ((few, 1.0), (many, 2.0)):
        more = replace(given, heads=2, local_heads=16)
        ratio = attention_seconds(more, 1.0) / attention_seconds(given, 1.0)
        assert ratio == pytest.approx(factor)
    assert attention_seconds(few, 0.3) == attention_seconds(few, 1.0)
    short = replace(few, lengths=[1024])
    assert attention_seconds(short, 1.0) < attention_seconds(few, 1.0)


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
    def rule(keys, device="cuda", size=2, batch=1, start=None, rows=None, **settings):
        settings = dict(window=WINDOW, sinks=SINKS, prefill="sparse", index_dim=16) | settings
        context = state(rtpurbo.sparsify(tiny(), config(**settings))).layers[0]
        q = SimpleNamespace(
            shape=(batch, 6, rows or keys, 128),
            device=torch.device(device),
            element_size=lambda: size,
        )
        return prefill_selects(context, q, keys, start)

    assert [rule(keys) for keys in (4096, 65536)] == [False, True]
    assert [rule(8192, batch=batch) for batch in (1, 4)] == [False, True]
    assert [rule(keys, index="full", recent=64) for keys in (4096, 65536)] == [False, True]
    padded = torch.tensor([0, 8000, 8000, 8000])
    assert not rule(8192, batch=4, start=padded) and rule(8192, batch=4, start=0 * padded)
    assert [rule(keys, rows=512) for keys in (65536, 262_144)] == [False, True]
    assert rule(4096, "cpu") and rule(4096, size=4)
    with pytest.warns(UserWarning, match="reads every key on CUDA with index_dim 24"):
        assert not rule(65536, index_dim=24)
    assert rule(4096, index_dim=24, select_from=0)
    assert not rule(65536, prefill="dense") and not rule(WINDOW + SINKS, select_from=0)


def test_padding_is_read_once_a_forward():
    class Start:
        reads, is_cuda = 0, False

        def tolist(self):
            self.reads += 1
            return [3, 0]

    shared = state(rtpurbo.sparsify(tiny(), config()))
    first, second = Start(), Start()
    for start in (first, first, second):
        assert shared.first_keys(start, 2) == [3, 0]
    assert (first.reads, second.reads) == (1, 1) and shared.first_keys(None, 2) == [0, 0]

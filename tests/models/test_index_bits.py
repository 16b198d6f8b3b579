"""Index keys of 8 and 4 bits: what the cache holds of them, what it weighs, and what comes out."""

import copy
import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rtpurbo._C import HeadwiseLayout

import rtpurbo
from rtpurbo import ops
from rtpurbo.cache import HeadwiseLayer
from rtpurbo.patching import state
from rtpurbo.stats import _decoded
from tests.models.tiny import (
    HEADS,
    LAYERS,
    MIXED,
    cache_of,
    config,
    in_pieces,
    padded,
    tiny,
    tokens,
    whole,
)

pytestmark = pytest.mark.families
EVERY_HEAD = torch.ones(LAYERS, HEADS, dtype=torch.bool)
bits = pytest.mark.parametrize("bits", [8, 4])
refine = pytest.mark.parametrize("refine", [False, True])


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def layer(bits, window, index_dim=6, refine=False):
    layout = HeadwiseLayout(
        kv_heads=1, full_heads=[0], window=8, sinks=2, head_dim=8, index_heads=3,
        index_dim=index_dim, index_bits=bits, index_window=window, index_refine=refine,
    )  # fmt: skip
    return HeadwiseLayer(layout, 2, "", bits, refine)


def held(made):
    """Bytes of its index tensors."""
    tensors = [t for name, t in made.tensors.items() if name.startswith("index")]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@given(
    bits=st.sampled_from([8, 4]),
    window=st.sampled_from([1, 2, 63, 64, 65]) | st.integers(1, 300),
    chunks=st.lists(st.sampled_from([1, 1, 2, 63, 64, 65]) | st.integers(1, 400), max_size=12),
    steps=st.integers(0, 70),
    refine=st.booleans(),
)
def test_the_same_keys_are_quantised_whatever_the_chunks(bits, window, chunks, steps, refine):
    chunks = [*chunks, *[1] * steps]
    length = sum(chunks)
    k_index = torch.randn(2, 3, length, 6, generator=torch.Generator().manual_seed(length)).half()
    kv = torch.zeros(2, 1, length, 8)
    made, done = layer(bits, window, refine=refine), 0
    for chunk in chunks:
        new, done = slice(done, done + chunk), done + chunk
        made.append(kv[:, :, new], kv[:, :, new], k_index[:, :, new], None)
        for settled in (False, True):
            if settled:
                made.settle()
                assert made.layout.coded == max(0, done - window + 1) // 64 * 64
                assert held(made) == made.layout.index_bytes(2) == made.weigh()[1]
            keys, codes, ranges = made.index_keys()
            coded = codes.shape[2]
            assert not refine or torch.equal(made.whole_index_keys(), k_index[:, :, :done])
            assert torch.equal(keys, k_index[:, :, coded:done])
            expected = ops.quantize_index(k_index[:, :, :coded], bits)
            assert torch.equal(codes, expected[0]) and torch.equal(ranges, expected[1])


@pytest.mark.parametrize("bits, index_dim, bytes_a_key", [(8, 16, 17), (4, 16, 9), (4, 5, 3.3125)])
def test_bytes_of_a_long_text(bits, index_dim, bytes_a_key):
    made = layer(bits, 8192, index_dim).layout
    made.reserve(2**20)
    made.advance(2**20)
    assert made.settle() == 2**20 - 8192
    exact = (2**20 - 8192) * bytes_a_key + 8192 * 2 * index_dim
    assert 3 * exact <= made.index_bytes(1) <= 3 * exact * 1.02
    whole = layer(16, 8192, index_dim).layout
    whole.reserve(2**20)
    assert whole.index_bytes(1) == 3 * 2**20 * 2 * index_dim
    both = layer(bits, 8192, index_dim, refine=True).layout
    both.reserve(2**20)
    both.advance(2**20)
    both.settle()
    codes = 3 * (2**20 - 8192) * bytes_a_key
    assert codes <= both.index_bytes(1) - whole.index_bytes(1) <= codes * 1.02


def test_layout_refuses_other_bits():
    with pytest.raises(ValueError, match="index_bits must be 4, 8 or 16"):
        layer(5, 8)
    with pytest.raises(ValueError, match="index_window must be >= 1"):
        layer(4, 0)
    with pytest.raises(ValueError, match="index_refine must be false with index_bits 16"):
        layer(16, 8, refine=True)


@bits
@refine
def test_a_cache_forgets_and_is_copied_and_reordered(bits, refine):
    model, ids = tiny(), tokens(170, 3)
    expected = whole(model, ids)
    rtpurbo.sparsify(model, config(EVERY_HEAD, window=8, index_bits=bits, refine=refine))
    with torch.no_grad():
        cache = cache_of(model(ids[:, :150]))
    kept = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    close(in_pieces(model, ids[[2, 0], 150:], [1] * 20, cache=cache), expected[[2, 0], 150:])
    close(in_pieces(model, ids[:, 150:], [1, 9, 10], cache=kept), expected[:, 150:])
    kept.reset()
    assert kept.nbytes() == kept.get_seq_length() == 0
    close(in_pieces(model, ids, [7, 63, 100], cache=kept), expected)


@bits
@pytest.mark.parametrize("settings", [
    {}, {"index": "full"}, {"block_size": 16}, {"share_index_keys": True},
    {"prefill": "sparse", "min_tokens": 4096}, {"refine": True},
    {"refine": True, "index": "full"}, {"refine": True, "prefill": "sparse", "min_tokens": 4096},
], ids=lambda s: "-".join(map(str, s.values())) or "default")  # fmt: skip
def test_everything_selected_is_dense(bits, settings):
    """p = 1 in a window of 8: what the index misjudges does not matter, what it loses would."""
    model, (ids, mask) = tiny(), padded((150, 64, 90))
    dense = whole(model, ids, mask)
    with rtpurbo.sparse(model, config(EVERY_HEAD, window=8, index_bits=bits, **settings)):
        for pieces in ([140, *[1] * 10], [30, 50, 1, 1, 60, *[1] * 8], [71, 1, 1, 77]):
            close(in_pieces(model, ids, pieces, mask)[mask.bool()], dense[mask.bool()])
        assert state(model).layers[0].last.cache is not None


@bits
@refine
def test_generate_is_dense(bits, refine):
    model, (ids, mask) = tiny(), padded((90, 40, 77))
    options = dict(attention_mask=mask, max_new_tokens=50, do_sample=False)
    dense = model.generate(ids, **options)
    with rtpurbo.sparse(model, config(EVERY_HEAD, window=8, index_bits=bits, refine=refine)):
        assert torch.equal(model.generate(ids, **options), dense)


@bits
@pytest.mark.parametrize("index", ["beyond_window", "full"])
def test_selection_stays_near_that_of_16_bits(bits, index):
    ids, logits, masses = tokens(300, 2), {}, {}
    for width in (16, bits):
        model = rtpurbo.sparsify(
            tiny(), config(EVERY_HEAD, window=8, top_p=0.9, index=index, index_bits=width)
        )
        logits[width] = in_pieces(model, ids, [290, *[1] * 10])
        last = state(model).layers[0].last
        assert (last.counts < 290).any()
        masses[width] = rtpurbo.stats(model)["index_mass"]
    assert masses[bits] == pytest.approx(masses[16], abs=0.01)
    assert not torch.equal(logits[16], logits[bits])


@bits
@pytest.mark.parametrize("index", ["beyond_window", "full"])
def test_refine_selects_what_16_bits_select(bits, index):
    """Nearly: what differs is a tenth of what codes alone change, at most."""
    (ids, mask), pieces, sets, statistics = padded((2000, 1500)), [1990, *[1] * 10], {}, {}
    settings = {"window": 100, "top_p": 0.9, "index": index, "index_dim": 16}
    cases = {
        "16": {},
        "codes": {"index_bits": bits},
        "refine": {"index_bits": bits, "refine": True},
    }
    for name, case in cases.items():
        model = rtpurbo.sparsify(tiny(), config(EVERY_HEAD, **settings, **case))
        in_pieces(model, ids, pieces, mask)
        last = state(model).layers[0].last  # whose input does not depend on selections before
        sets[name], statistics[name] = _decoded(last), rtpurbo.stats(model)
        assert torch.equal(sets[name].sum(-1), last.counts[..., 0].long())
    assert statistics["refine"]["index_mass"] >= 0.9
    off = {name: (sets[name] ^ sets["16"]).sum().item() for name in ("codes", "refine")}
    assert off["refine"] <= 0.01 * sets["16"].sum() and 10 * off["refine"] < off["codes"]
    for name in ("attended_tokens", "memory_sparsity"):
        assert statistics["refine"][name] == pytest.approx(statistics["16"][name], rel=0.05)


def recorded(monkeypatch, name):
    """(keys in 16 bits, keys in fewer) of every call of the operator from now on."""
    calls, operator = [], getattr(ops, name)

    def wrapper(*args, **kwargs):
        given = inspect.signature(operator).bind(*args, **kwargs).arguments
        codes = given.get("codes")
        calls.append((given["k_index"].shape[2], 0 if codes is None else codes.shape[2]))
        return operator(*args, **kwargs)

    monkeypatch.setattr(ops, name, wrapper)
    return calls


def test_chunks_of_sparse_prefill_read_the_codes(monkeypatch):
    calls = recorded(monkeypatch, "select_tiles")
    settings = config(window=100, top_p=0.5, prefill="sparse", index_bits=4)
    model = rtpurbo.sparsify(tiny(), settings)
    in_pieces(model, tokens(600), [300, 200, 100])
    assert calls[::LAYERS] == [(300, 0), (500 - 192, 192), (600 - 384, 384)]
    assert 0.5 <= rtpurbo.stats(model)["index_mass"] <= 1


def test_decode_reads_near_keys_in_16_bits(monkeypatch):
    """The row at 162 still sees key 63 as near; the next one has the block quantised."""
    calls = recorded(monkeypatch, "sparse_decode")
    model = rtpurbo.sparsify(tiny(), config(window=100, index_bits=4))
    in_pieces(model, tokens(164), [162, 1, 1])
    assert calls[::LAYERS] == [(163, 0), (100, 64)]


def test_decode_with_refine_reads_all_keys_in_16_bits(monkeypatch):
    calls = recorded(monkeypatch, "select")
    model = rtpurbo.sparsify(tiny(), config(window=100, index_bits=4, refine=True))
    in_pieces(model, tokens(164), [162, 1, 1])
    assert calls[::LAYERS] == [(163, 0), (164, 64)]


@bits
@refine
def test_bytes_of_a_model(bits, refine):
    model, length, window = tiny(), 3000, 100
    chosen = config(MIXED, window=window, index_dim=16, index_bits=bits, refine=refine)
    rtpurbo.sparsify(model, chosen)
    for pieces in ([length], [length - 1, 1], [1000, 2000]):
        cache = rtpurbo.RTPurboCache(model)
        in_pieces(model, tokens(length, 2), pieces, cache=cache)
        tensors = [t for layer in cache.layers for t in layer.tensors.values()]
        assert cache.nbytes() == sum(t.untyped_storage().nbytes() for t in tensors)
        found = rtpurbo.stats(model)
        assert found["index_bytes"] == sum(held(layer) for layer in cache.layers)
        assert found["kv_bytes"] + found["index_bytes"] == cache.nbytes()
        keys, a_key = LAYERS * 2 * 3, 17 if bits == 8 else 9
        coded = (length - window + 1) // 64 * 64
        exact = keys * ((length if refine else length - coded) * 32 + coded * a_key)
        assert exact <= found["index_bytes"] <= exact * 1.1

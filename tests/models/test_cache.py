"""The headwise cache: its bytes, its bookkeeping, and what it refuses."""

import copy

import pytest
import torch
from rtpurbo._C import HeadwiseLayout
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import rtpurbo
from tests.models.tiny import (
    DIM,
    LAYERS,
    MIXED,
    cache_name,
    cache_of,
    config,
    in_pieces,
    tiny,
    tokens,
    whole,
)

pytestmark = pytest.mark.families


def layout(**changes):
    sizes = {"kv_heads": 3, "full_heads": [1], "window": 100, "sinks": 4, "head_dim": 16}
    return HeadwiseLayout(**{**sizes, "index_heads": 2, "index_dim": 8, **changes})


def test_layout_grows_by_pages_and_the_ring_stops():
    made = layout()
    assert (made.full_heads, made.local_heads) == ([1], [0, 2])
    assert made.reserve(1) and (made.page_capacity, made.ring_capacity) == (64, 64)
    made.advance(1)
    assert not made.reserve(63)
    made.advance(63)
    assert made.reserve(1) and (made.page_capacity, made.ring_capacity) == (128, 104)
    assert made.reserve(9937) and made.page_capacity == 10048
    made.advance(9937)
    assert made.reserve(48) and made.page_capacity == 10048 + 64 * 3
    assert made.ring_capacity == 104
    made.reset()
    assert (made.length, made.page_capacity, made.ring_capacity) == (0, 0, 0)


def test_layout_counts_bytes():
    made = layout()
    made.reserve(640)
    made.advance(640)
    assert made.kv_bytes(2, 4) == 2 * 2 * 4 * 16 * (640 + 2 * 104)
    assert made.index_bytes(2) == 2 * 2 * 2 * 8 * 640
    assert made.dense_bytes(2, 4) == 2 * 2 * 4 * 16 * 3 * 640


def test_layout_has_room_for_many_sinks():
    made = layout(sinks=100, window=10)
    made.reserve(5)
    assert made.ring_capacity > 100


@pytest.mark.parametrize("changes", [
    {"full_heads": [1, 1]}, {"full_heads": [3]}, {"full_heads": [-1]}, {"window": 0}, {"sinks": -1},
    {"kv_heads": 0}, {"index_dim": -1},
])  # fmt: skip
def test_layout_refuses(changes):
    with pytest.raises(ValueError, match="rtpurbo::HeadwiseLayout"):
        layout(**changes)


def test_layout_refuses_to_overflow():
    made = layout()
    made.reserve(64)
    with pytest.raises(IndexError, match="call reserve first"):
        made.advance(65)


def test_bytes_are_what_the_roles_imply():
    model, length, window = tiny(), 3000, 100
    rtpurbo.sparsify(model, config(window=window))
    with torch.no_grad():
        cache = cache_of(model(tokens(length, 2)))
    full, local, keys = 2, 1, 3
    kv = LAYERS * 2 * 2 * 4 * DIM * (full * length + local * (2 + window))
    index = LAYERS * 2 * 2 * keys * 8 * length
    assert cache.nbytes() == pytest.approx(kv + index, rel=0.03)
    assert cache.nbytes() >= kv + index
    assert cache.nbytes_dense() == LAYERS * 2 * 2 * 4 * DIM * 3 * length
    held = [t for layer in cache.layers for t in layer.tensors.values()]
    assert cache.nbytes() == sum(t.untyped_storage().nbytes() for t in held)


def test_growth_keeps_the_slack_small():
    model = rtpurbo.sparsify(tiny(), config())
    with torch.no_grad():
        cache = cache_of(model(tokens(4096)))
        step = model(tokens(1), **{cache_name(model): cache})
    layer = cache_of(step).layers[0]
    assert layer.length == 4097
    assert layer.k_pages.shape[2] <= 4097 * 1.016 + 64


class Recorder(TorchDispatchMode):
    """Names of the operators of rtpurbo that run inside it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rtpurbo":
            self.names.append(func._schema.name.removeprefix("rtpurbo::"))
        return func(*args, **(kwargs or {}))


def test_a_decode_step_is_two_operators_a_layer():
    """Layer 0 has no retrieval head."""
    roles = MIXED.clone()
    roles[0] = False
    model = rtpurbo.sparsify(tiny(), config(roles, window=8))
    with torch.no_grad():
        cache = cache_of(model(tokens(30)))
        with Recorder() as recorder:
            model(tokens(1), **{cache_name(model): cache})
    assert recorder.names == ["cache_append", "decode", "cache_append_projected", "sparse_decode"]


def test_an_empty_dynamic_cache_becomes_the_cache_in_place():
    model, ids = rtpurbo.sparsify(tiny(), config()), tokens(30)
    expected = whole(model, ids)
    cache = DynamicCache()
    found = in_pieces(model, ids, [20], cache=cache)
    assert isinstance(cache, rtpurbo.RTPurboCache)
    assert cache.get_seq_length() == 20
    found = torch.cat([found, in_pieces(model, ids[:, 20:], [1, 9], cache=cache)], 1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_a_cache_goes_on_over_several_generate_calls():
    model, ids = tiny(), tokens(30)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    rtpurbo.sparsify(model, config())
    options = {cache_name(model): rtpurbo.RTPurboCache(model), "do_sample": False}
    first = model.generate(ids, max_new_tokens=5, **options)
    second = model.generate(first, max_new_tokens=7, **options)
    assert torch.equal(second, expected)


def test_foreign_caches_are_refused():
    model, ids = tiny(), tokens(10)
    with torch.no_grad():
        filled = cache_of(model(ids))
    rtpurbo.sparsify(model, config())
    own = rtpurbo.RTPurboCache(model)
    with pytest.raises(ValueError, match="with tokens in it"):
        model(ids, **{cache_name(model): filled})
    with pytest.raises(ValueError, match="StaticCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    rtpurbo.restore(model)
    with pytest.raises(RuntimeError, match="only the sparse model"):
        model(ids, **{cache_name(model): own})
    rtpurbo.sparsify(model, config())
    with pytest.raises(ValueError, match="another model or before"):
        model(ids, **{cache_name(model): own})


def test_going_back_is_refused():
    model, ids = rtpurbo.sparsify(tiny(), config()), tokens(10)
    for helper in ({"assistant_model": tiny(seed=2)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises((NotImplementedError, ValueError), match=r"taken back|cropped"):
            model.generate(ids, max_new_tokens=8, do_sample=False, **helper)
    with torch.no_grad():
        cache = cache_of(model(ids))
    with pytest.raises(NotImplementedError, match="taken back"):
        cache.crop(-1)


def test_sequences_can_be_reordered_repeated_selected_copied_and_forgotten():
    model, ids = rtpurbo.sparsify(tiny(), config(window=8)), tokens(30, 3)
    expected = whole(model, ids)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :20]))
    kept = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    found = in_pieces(model, ids[[2, 0], 20:], [10], cache=cache)
    torch.testing.assert_close(found, expected[[2, 0], 20:], atol=2e-3, rtol=1e-3)
    found = in_pieces(model, ids[:, 20:], [1, 9], cache=kept)
    torch.testing.assert_close(found, expected[:, 20:], atol=2e-3, rtol=1e-3)
    kept.reset()
    assert kept.nbytes() == kept.get_seq_length() == 0
    found = in_pieces(model, ids, [7, 23], cache=kept)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)

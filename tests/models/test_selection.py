"""What sparse decode selects and gives, against the references; what `stats` says about it."""

import copy

import pytest
import torch

import rtpurbo
from rtpurbo import ops
from rtpurbo.patching import state
from tests import reference
from tests.models.tiny import (
    DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MIXED,
    cache_name,
    cache_of,
    config,
    in_pieces,
    padded,
    tiny,
    tokens,
    whole,
)

pytestmark = pytest.mark.families
WINDOW, SINKS, P = 8, 2, 0.6


def captured(model):
    """Per layer, (input, output) of every call of each projection, filled as the model runs."""
    layers = []
    for layer in model.model.layers:
        calls = {name: [] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        for name, found in calls.items():
            getattr(layer.self_attn, name).register_forward_hook(
                lambda module, args, output, found=found: found.append((args[0], output))
            )
        layers.append(calls)
    return layers


def heads_first(x, heads):
    return x.view(*x.shape[:2], heads, DIM).transpose(1, 2)


@pytest.mark.parametrize("settings", [
    {}, {"index": "full"}, {"block_size": 16}, {"share_index_keys": True}, {"min_tokens": 30},
    {"top_p": 0.05, "min_tokens": 0}, {"index_bits": 8}, {"index_bits": 4, "index": "full"},
    {"index_bits": 4, "refine": True}, {"index_bits": 8, "refine": True, "index": "full"},
], ids=lambda s: "-".join(map(str, s.values())) or "default")  # fmt: skip
def test_decode_of_the_first_layer(settings):
    """The operators' references, fed from the model's own projections, give o_proj's input."""
    model, (ids, mask) = tiny(), padded((90, 60, 3))
    chosen = config(**{"window": WINDOW, "sinks": SINKS, "top_p": P, **settings})
    rtpurbo.sparsify(model, chosen)
    for layer in state(model).index.layers.values():
        layer.offset.normal_()
    layers = captured(model)
    in_pieces(model, ids, [88, 1, 1], mask)
    found = layers[0]
    q_pre, k_pre, v = (
        heads_first(torch.cat([output for _, output in found[name]], 1), heads)
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS))
    )
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cos, sin = model.model.rotary_emb(q_pre, positions)
    q, k = (x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (q_pre, k_pre))
    start, scale = (mask == 0).sum(-1), DIM**-0.5
    index, owners = state(model).index.layers[0], [1, 2, 2]
    heads = MIXED[0].nonzero().flatten().tolist()
    near = None
    if chosen.index == "beyond_window":
        near = reference.near_lse(q[:, :, -1:], k, heads, owners, WINDOW, SINKS, scale, start)
    q_index, k_index = reference.index_project(
        q_pre[:, :, -1:], k_pre, index.w_q, index.w_k, heads, index.kv_heads
    )
    stored = dict(k_index=k_index.half())
    if chosen.index_bits < 16:  # all but the last token is settled
        far, tail = stored["k_index"].split([64, 26], 2)
        stored["codes"], stored["ranges"] = reference.quantize_index(far, chosen.index_bits)
        stored |= dict(refine=True) if chosen.refine else dict(k_index=tail)
    indices, counts, mass = reference.select(
        q_index.half(), index_map=index.index_map, p=chosen.top_p, window=chosen.near_window,
        sinks=SINKS, min_tokens=chosen.min_tokens, block_size=chosen.block_size,
        near_lse=near, start=start, **stored,
        offset=index.offset if near is not None else None,
    )  # fmt: skip
    out, _ = reference.decode(
        q[:, :, -1:], k, v, heads, WINDOW, chosen.near_window, SINKS, scale, indices, counts,
        chosen.block_size, start=start,
    )  # fmt: skip
    expected = out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(found["o_proj"][-1][0].double(), expected, atol=1e-4, rtol=1e-4)
    last = state(model).layers[0].last
    assert torch.equal(last.counts, counts.int())
    torch.testing.assert_close(last.mass.double(), mass, atol=1e-3, rtol=1e-3)


def test_tiles_that_need_too_many_blocks_run_dense(monkeypatch):
    """Of a sequence of 600 the last tile sees ten blocks; lists of three are too short for some."""
    ids, mask = padded((600, 350))
    dense = whole(tiny(), ids, mask)
    model = rtpurbo.sparsify(tiny(), config(window=64, top_p=0.99, prefill="sparse"))
    whole(model, ids, mask)
    assert rtpurbo.stats(model)["fallbacks"] == 0
    monkeypatch.setattr("rtpurbo.tiles.MOST_TILE_BLOCKS", 3)
    got = whole(model, ids, mask)
    counts = torch.stack([context.last.counts for context in state(model).layers])
    fallbacks = rtpurbo.stats(model)["fallbacks"]
    assert 0 < fallbacks == (counts < 0).sum() < counts.numel() and counts.max() <= 3
    assert state(model).layers[0].last.indices.shape[-1] == 3
    monkeypatch.setattr("rtpurbo.tiles.MOST_TILE_BLOCKS", 0)
    rtpurbo.restore(model)
    near = dict(window=600, recent=1000, prefill="sparse")
    wide = rtpurbo.sparsify(model, config(**near))
    torch.testing.assert_close(whole(wide, ids, mask)[mask.bool()], dense[mask.bool()])
    assert state(wide).layers[0].last.indices is None  # nothing lies outside its window
    assert not torch.equal(got[mask.bool()], dense[mask.bool()])


def short_lists(monkeypatch, most=3):
    """A model whose tiles list so many blocks at most, and the counts of every later selection."""
    monkeypatch.setattr("rtpurbo.tiles.MOST_TILE_BLOCKS", most)
    counts, select_tiles = [], ops.select_tiles

    def recorded(*args, **kwargs):
        found = select_tiles(*args, **kwargs)
        counts.append(found[1])
        return found

    monkeypatch.setattr(ops, "select_tiles", recorded)
    chosen = config(window=64, top_p=0.99, prefill="sparse")
    return rtpurbo.sparsify(tiny(), chosen), counts


def dense_tiles(counts):
    return sum((count < 0).sum().item() for count in counts)


@pytest.mark.parametrize("pieces", [[256, 128, 216], [256, 343, 1], [400, 200]], ids=str)
def test_fallbacks_of_every_chunk_are_counted(pieces, monkeypatch):
    (ids, mask), (model, counts) = padded((600, 350)), short_lists(monkeypatch)
    in_pieces(model, ids, pieces, mask)
    passes = [dense_tiles(counts[i : i + LAYERS]) for i in range(0, len(counts), LAYERS)]
    assert len(passes) > 1 and all(passes)
    assert rtpurbo.stats(model)["fallbacks"] == sum(passes)
    whole(model, ids, mask)
    assert rtpurbo.stats(model)["fallbacks"] == dense_tiles(counts[-LAYERS:])


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 256}], ids=str)
def test_fallbacks_are_counted_after_generate(options, monkeypatch):
    (ids, mask), (model, counts) = padded((600, 350)), short_lists(monkeypatch)
    for _ in range(2):  # each call has its own cache
        counts.clear()
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **options)
        found = rtpurbo.stats(model)
        assert found["rows"] == 1 and found["fallbacks"] == dense_tiles(counts) > 0
    assert len(counts) == LAYERS * (3 if options else 1)


def test_fallbacks_are_those_of_a_cache(monkeypatch):
    """What other caches count, and what a cache counted before a reset, is left out."""
    ids, (model, counts) = tokens(600), short_lists(monkeypatch)
    first, second = rtpurbo.RTPurboCache(model), rtpurbo.RTPurboCache(model)
    in_pieces(model, ids, [400], cache=first)
    kept = copy.deepcopy(first)
    monkeypatch.setattr("rtpurbo.tiles.MOST_TILE_BLOCKS", 100)
    in_pieces(model, ids, [400], cache=second)
    assert rtpurbo.stats(model)["fallbacks"] == 0
    monkeypatch.setattr("rtpurbo.tiles.MOST_TILE_BLOCKS", 3)
    in_pieces(model, ids[:, 400:], [200], cache=first)
    third = dense_tiles(counts[-LAYERS:])
    assert rtpurbo.stats(model)["fallbacks"] == dense_tiles(counts[:LAYERS]) + third > third > 0
    in_pieces(model, ids[:, 400:], [1], cache=kept)
    assert rtpurbo.stats(model)["fallbacks"] == dense_tiles(counts[:LAYERS]) > 0
    first.reset()
    in_pieces(model, ids, [300], cache=first)
    assert rtpurbo.stats(model)["fallbacks"] == dense_tiles(counts[-LAYERS:]) > 0


def test_fallbacks_are_counted_in_and_out_of_inference_mode(monkeypatch):
    ids, (model, counts) = tokens(600), short_lists(monkeypatch)
    cache = rtpurbo.RTPurboCache(model)
    for upto, inference in ((256, True), (512, False), (600, True)):
        with torch.inference_mode(inference), torch.no_grad():
            model(ids[:, cache.get_seq_length() : upto], **{cache_name(model): cache})
    assert rtpurbo.stats(model)["fallbacks"] == dense_tiles(counts) > 0


def test_fallbacks_are_counted_on_the_device_in_one_place():
    """A meta tensor cannot be read; a graph's replay adds where its capture added."""
    layer = rtpurbo.RTPurboCache(rtpurbo.sparsify(tiny(), config())).layers[0]
    counts = torch.empty(2, 3, 5, dtype=torch.int32, device="meta")
    layer.count_fallbacks(counts)
    counter = layer.fallbacks
    layer.count_fallbacks(counts)
    assert layer.fallbacks is counter and counter.device.type == "meta"
    assert (counter.dtype, counter.shape) == (torch.int64, ())


@pytest.mark.parametrize("index", ["beyond_window", "full"])
def test_sparse_prefill_keeps_to_its_tiles(index):
    """Chunks that end where tiles do select what one forward selects, and less than everything."""
    model, (ids, mask) = tiny(), padded((600, 350))
    dense = whole(model, ids, mask)
    chosen = config(window=64, top_p=0.5, min_tokens=64, prefill="sparse", index=index)
    rtpurbo.sparsify(model, chosen)
    found = whole(model, ids, mask)
    statistics = rtpurbo.stats(model)
    assert 0.5 <= statistics["index_mass"] <= 1
    assert 0.1 < statistics["compute_sparsity"] < 1
    chunks = in_pieces(model, ids, [256, 128, 216], mask)
    torch.testing.assert_close(chunks[mask.bool()], found[mask.bool()], atol=2e-3, rtol=1e-3)
    assert not torch.allclose(found[mask.bool()], dense[mask.bool()], atol=1e-2)


@pytest.mark.parametrize("index", ["beyond_window", "full"])
def test_sparse_prefill_of_the_first_layer(index):
    model, (ids, mask) = tiny(), padded((900, 410))
    chosen = config(window=32, sinks=SINKS, top_p=0.4, min_tokens=0, prefill="sparse", index=index)
    rtpurbo.sparsify(model, chosen)
    state(model).index.layers[0].threshold.copy_(torch.tensor([0.3, 0.6, 0.9]))
    found = captured(model)[0]
    whole(model, ids, mask)
    q_pre, k_pre, v = (
        heads_first(found[name][0][1], heads)
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS))
    )
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cos, sin = model.model.rotary_emb(q_pre, positions)
    q, k = (x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (q_pre, k_pre))
    start, scale = (mask == 0).sum(-1), DIM**-0.5
    layer, owners = state(model).index.layers[0], [1, 2, 2]
    heads = MIXED[0].nonzero().flatten().tolist()
    near = None
    if index == "beyond_window":
        near = reference.near_lse(q, k, heads, owners, 32, SINKS, scale, start)
    q_index, k_index = reference.index_project(
        q_pre, k_pre, layer.w_q, layer.w_k, heads, layer.kv_heads
    )
    lists, others = (
        reference.select_tiles(
            q_index.half(), k_index.half(), layer.index_map, layer.threshold, chosen.near_window,
            SINKS, 4, near_lse=near, start=start, rank=rank,
            offset=layer.offset if near is not None else None,
        )
        for rank in ("max", "sum")
    )  # fmt: skip
    assert not torch.equal(lists[0], others[0])
    out, _ = reference.attention(
        q, k, v, heads, 32, SINKS, scale, start, block_indices=lists[0], block_counts=lists[1]
    )
    expected = out.transpose(1, 2).flatten(2)[mask.bool()]
    result = found["o_proj"][0][0][mask.bool()].double()
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(state(model).layers[0].last.counts, lists[1].int())


def rotate_half(x):
    return torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)


def counted(model, ids, mask, pieces):
    with torch.no_grad():
        in_pieces(model, ids, pieces, mask)
    return rtpurbo.stats(model)


def test_stats_of_a_decode_step():
    model, (ids, mask) = tiny(), padded((90, 60))
    rtpurbo.sparsify(model, config(window=WINDOW, sinks=SINKS, top_p=P, index="full", recent=4))
    with pytest.raises(ValueError, match="has not run yet"):
        rtpurbo.stats(model)
    found = counted(model, ids, mask, [89, 1])
    counts = torch.stack([c.last.counts for c in state(model).layers]).double()[..., 0]
    local, near = WINDOW + SINKS, 4 + SINKS
    per_layer = [(3 * local + c.mean().item() * 3 + 3 * near) / 6 for c in counts]
    assert found["attended_tokens_per_layer"] == pytest.approx(per_layer)
    assert found["attended_tokens"] == pytest.approx(sum(per_layer) / 2)
    assert (found["rows"], found["keys"]) == (1, 90)
    assert found["compute_sparsity"] == 1 - found["attended_fraction"]
    assert 0 < found["memory_sparsity"] < found["compute_sparsity"] < 1
    assert P <= found["index_mass"] <= 1
    assert found["fallbacks"] == 0 and found["selecting_layers"] == 2
    assert found["true_mass"] is None


def test_true_mass_and_bytes():
    model, (ids, mask) = tiny(), padded((90, 60))
    rtpurbo.sparsify(model, config(window=WINDOW, top_p=1.0))
    with torch.no_grad():
        output = model(ids[:, :89], attention_mask=mask[:, :89])
        options = {cache_name(model): cache_of(output)}
        cache = cache_of(model(ids[:, 89:], attention_mask=mask, **options))
    found = rtpurbo.stats(model, true_mass=True)
    assert found["true_mass"] == pytest.approx(1, abs=1e-5)
    assert found["kv_bytes"] + found["index_bytes"] == cache.nbytes()
    assert found["dense_bytes"] == cache.nbytes_dense()
    del cache, output, options
    assert rtpurbo.stats(model, true_mass=True)["true_mass"] is None


@pytest.mark.parametrize("window", [8, 400])
def test_stats_of_a_dense_prefill(window):
    model, (ids, mask) = tiny(), padded((90, 60))
    rtpurbo.sparsify(model, config(window=window, sinks=SINKS))
    whole(model, ids, mask)
    found = rtpurbo.stats(model)
    visible = torch.cat([torch.arange(1, 91), torch.arange(1, 61)]).double()
    near = visible.clamp(max=window + SINKS)
    assert found["attended_tokens"] == pytest.approx(((visible + near) / 2).mean().item())
    assert found["attended_fraction"] == pytest.approx((0.5 + near / visible / 2).mean().item())
    union = (2 * visible + near) / 3 / visible
    assert found["memory_sparsity"] == pytest.approx(1 - union.mean().item())
    assert found["index_mass"] is None
    assert found["kv_bytes"] == found["dense_bytes"] == 0


def test_selection_is_free_of_positions_beyond_what_padding_shifts():
    """The same text with more padding gives the same logits, to rounding."""
    model, (ids, mask) = tiny(), padded((70, 70))
    rtpurbo.sparsify(model, config(window=WINDOW, sinks=SINKS, top_p=P))
    plain = in_pieces(model, ids, [60, *[1] * 10])
    shift = torch.zeros(2, 13, dtype=torch.long)
    moved = in_pieces(
        model, torch.cat([shift, ids], 1), [73, *[1] * 10], torch.cat([shift, mask], 1)
    )
    torch.testing.assert_close(moved[:, 13:], plain, atol=2e-3, rtol=1e-3)

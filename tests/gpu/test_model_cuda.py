"""A whole sparse model on CUDA against the same model on the CPU."""

import pytest
import torch

import rtpurbo
from rtpurbo.patching import state
from tests.models.tiny import config, in_pieces, padded, tiny, whole

# float32, and refine, go through near_lse, select and decode; 16 bits, D = 64 and r = 16 through
# one launch.
KINDS = {"float32": {}, "bfloat16": {"head_dim": 64}}
SETTINGS = [
    {}, {"index": "full"}, {"block_size": 16}, {"index_bits": 4},
    {"index_bits": 8, "index": "full"}, {"prefill": "sparse"},
    {"prefill": "sparse", "index_bits": 4}, {"index_bits": 4, "refine": True},
    {"index_bits": 8, "refine": True, "index": "full"}, {"share_index_keys": True, "index_bits": 4},
]  # fmt: skip


def pair(kind: str, cuda_device, **settings):
    """The model twice, on the CPU and on CUDA; every far key may be selected, however few."""
    models = []
    for device in ("cpu", cuda_device):
        model = tiny(**KINDS[kind]).to(getattr(torch, kind)).to(device)
        options = {"index_dim": 16, "select_from": 0, "window": 70, **settings}
        models.append(rtpurbo.sparsify(model, config(**options)))
    return models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_text_is_the_cpus_where_everything_is_selected(kind, settings, cuda_device):
    ids, mask = padded((300, 190, 20))
    texts = []
    for model in pair(kind, cuda_device, **settings, top_p=1.0):
        device = next(model.parameters()).device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        text = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        texts.append(text.cpu())
        assert state(model).layers[0].last.counts is not None
    same = (texts[0] == texts[1])[:, ids.shape[1] :]
    # In bfloat16 two tokens may be as likely, and the text then goes another way.
    assert same.all() if kind == "float32" else same[:, :3].all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_selections_are_the_cpus(settings, cuda_device):
    ids, mask = padded((300, 190, 20))
    cpu, cuda = pair("float32", cuda_device, **settings, top_p=0.6, exact_sets=True)
    expected = in_pieces(cpu, ids, [290, 8, 1, 1], mask)
    got = in_pieces(cuda, ids.to(cuda_device), [290, 8, 1, 1], mask.to(cuda_device)).cpu()
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=0.05, rtol=0.05)
    ours, theirs = (state(model).layers[0].last for model in (cuda, cpu))
    assert (ours.counts.cpu() - theirs.counts).abs().max() <= 2
    torch.testing.assert_close(ours.mass.cpu(), theirs.mass, atol=0.02, rtol=0)
    for name in ("attended_tokens", "index_mass"):
        assert rtpurbo.stats(cuda)[name] == pytest.approx(rtpurbo.stats(cpu)[name], rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"index_bits": 4}, {"block_size": 16}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_selects_a_few_more_unless_sets_are_exact(kind, settings, cuda_device):
    ids, mask = (tensor.to(cuda_device) for tensor in padded((300, 190, 20)))
    found = []
    for exact in (True, False):
        more = dict(settings, top_p=0.6, min_tokens=0, exact_sets=exact)
        _, model = pair(kind, cuda_device, **more)
        in_pieces(model, ids, [299, 1], mask)
        found.append(state(model).layers[0].last)
    exact, other = found
    assert not (exact.selected & ~other.selected).any()
    assert (other.counts <= exact.counts + exact.counts // 4 + 32).all()
    assert (other.counts > exact.counts).any() or settings


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_prefill_is_dense_by_default_in_16_bits(kind, cuda_device):
    ids, mask = (tensor.to(cuda_device) for tensor in padded((300, 190, 20)))
    logits = []
    for prefill in ("sparse", "dense"):
        model = tiny(**KINDS[kind]).to(getattr(torch, kind)).to(cuda_device)
        rtpurbo.sparsify(model, config(index_dim=16, window=70, prefill=prefill))
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask).logits)
        selected = state(model).layers[0].last.counts is not None
        assert selected == (prefill == "sparse" and kind == "float32")
    assert kind == "float32" or torch.equal(*logits)


@pytest.mark.parametrize(
    ("prefill", "pieces"),
    [("dense", [7, 120, 3, 301, 1069]), ("sparse", [512, 128, 860])],
    ids=["dense", "sparse"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_a_prompt_equal_one_pass(kind, prefill, pieces, cuda_device):
    check_chunks(kind, prefill, pieces, cuda_device)


def check_chunks(kind: str, prefill: str, pieces: list[int], device: torch.device) -> None:
    """A sparse prefill in whole tiles, which select alone; in bfloat16 within its roundings."""
    ids, mask = (tensor.to(device) for tensor in padded((1500, 1100, 20)))
    options = dict(index_dim=16, window=70, top_p=0.9, select_from=0, prefill=prefill)
    passes = []
    for dtype in (getattr(torch, kind), torch.float32):
        model = tiny(**KINDS[kind]).to(getattr(torch, kind)).to(device, dtype)
        rtpurbo.sparsify(model, config(**options))
        chunks = in_pieces(model, ids, pieces, mask)
        passes.append([logits[mask.bool()].float() for logits in (whole(model, ids, mask), chunks)])
        assert (state(model).layers[0].last.counts is not None) == (prefill == "sparse")
    (one, chunks), (exact, exact_chunks) = passes
    torch.testing.assert_close(exact_chunks, exact, atol=2e-3, rtol=1e-3)
    if kind != "float32":
        assert (chunks - one).abs().mean() <= 2 * (one - exact).abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_that_need_too_many_blocks_run_dense_and_count(kind, cuda_device, monkeypatch):
    check_fallbacks(kind, cuda_device, monkeypatch)


def check_fallbacks(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for twelve blocks some tiles do; with room for one, all that see more."""
    ids, mask = (tensor.to(device) for tensor in padded((1500, 1100)))
    model = tiny(**KINDS[kind]).to(getattr(torch, kind)).to(device)
    options = dict(index_dim=16, window=64, top_p=0.9, select_from=0)
    rtpurbo.sparsify(model, config(**options, prefill="dense"))
    dense = whole(model, ids, mask)[mask.bool()].float()
    rtpurbo.restore(model)
    rtpurbo.sparsify(model, config(**options, prefill="sparse"))
    off, needed = [], None
    for most in (4096, 12, 1):
        monkeypatch.setattr("rtpurbo.tiles.MOST_TILE_BLOCKS", most)
        off.append((whole(model, ids, mask)[mask.bool()].float() - dense).abs().mean())
        counts = torch.stack([context.last.counts for context in state(model).layers])
        needed = counts[0] if needed is None else needed  # the first layer's input stays
        falls = needed > most
        assert falls.any() == (most < 4096)
        assert torch.equal(counts[0], needed.masked_fill(falls, -1))
        assert rtpurbo.stats(model)["fallbacks"] == (counts < 0).sum()
    assert off[0] > off[1] > 10 * off[2]

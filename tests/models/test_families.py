"""A sparse model that may see everything is the dense model, in every family and every mode."""

import copy

import pytest
import torch

import rtpurbo
from tests.models.tiny import (
    FAMILIES,
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
SETTINGS = [
    {},
    {"index": "full"},
    {"block_size": 16},
    {"share_index_keys": True},
    {"prefill": "sparse", "min_tokens": 4096},
]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def real(logits, mask):
    return logits[mask.bool()]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "default")
def settings(request):
    return request.param


def test_prefill(family, settings):
    model, ids = tiny(family), tokens(150, 2)
    dense = whole(model, ids)
    with rtpurbo.sparse(model, config(**settings)):
        close(whole(model, ids), dense)


def test_decode_and_chunks(family, settings):
    model, ids = tiny(family), tokens(90, 2)
    dense = whole(model, ids)
    with rtpurbo.sparse(model, config(**settings)):
        close(in_pieces(model, ids, [1] * 4 + [30, 17, 1, 1, 33, 1, 1, 1, 1]), dense)


def test_padded_batch(family, settings):
    model, (ids, mask) = tiny(family), padded((60, 1, 37, 52))
    dense = whole(model, ids, mask)
    with rtpurbo.sparse(model, config(**settings)):
        close(real(whole(model, ids, mask), mask), real(dense, mask))
        pieces = in_pieces(model, ids, [20, 21, 1, 1, 17], mask)
        close(real(pieces, mask), real(dense, mask))


@pytest.mark.parametrize("options", [
    {"do_sample": False},
    {"do_sample": True, "top_k": 5},
    {"do_sample": False, "prefill_chunk_size": 7},
    {"num_beams": 3, "do_sample": False},
    {"do_sample": True, "num_return_sequences": 2},
], ids=lambda o: "-".join(map(str, o)))  # fmt: skip
def test_generate(family, options):
    model, (ids, mask) = tiny(family), padded((40, 23, 37))

    def generate():
        torch.manual_seed(3)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True, **options
        )

    dense = generate()
    with rtpurbo.sparse(model, config()):
        sparse = generate()
        assert isinstance(cache_of(sparse), rtpurbo.RTPurboCache)
    assert torch.equal(sparse.sequences, dense.sequences)


def test_restore_is_exact(family):
    model, ids = tiny(family), tokens(50)
    before = copy.deepcopy(model)
    dense = whole(model, ids)
    rtpurbo.sparsify(model, config())
    assert rtpurbo.is_sparse(model)
    assert model.state_dict().keys() == before.state_dict().keys()
    model.generate(ids, max_new_tokens=3)
    rtpurbo.restore(model)
    assert not rtpurbo.is_sparse(model)
    assert torch.equal(whole(model, ids), dense)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.config.to_dict() == before.config.to_dict()
    assert model.config._attn_implementation == before.config._attn_implementation
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    for (name, module), other in zip(model.named_modules(), before.modules(), strict=True):
        assert module.__dict__.keys() == other.__dict__.keys(), name
        assert all(not getattr(module, hook) for hook in hooks), name


def test_another_family_is_one_entry(monkeypatch):
    from rtpurbo import families

    monkeypatch.setitem(families.FAMILIES, "arcee", families.Family("arcee"))
    model, ids = tiny("Arcee"), tokens(90, 2)
    dense = whole(model, ids)
    with rtpurbo.sparse(model, config()):
        close(in_pieces(model, ids, [60, 28, 1, 1]), dense)


def test_the_index_starts_from_the_submodules_that_the_family_names(monkeypatch):
    from rtpurbo import families
    from rtpurbo.index import Index

    expected = Index.from_weights(tiny("Qwen3", seed=2), config())
    model, other = tiny("Qwen3"), tiny("Qwen3", seed=2)
    names = {"q_projection": "q_proj", "k_projection": "k_proj"}
    norms = {"q_norm": "q_norm", "k_norm": "k_norm"}
    for layer, source in zip(model.model.layers, other.model.layers, strict=True):
        layer.first_norm = source.input_layernorm
        for name in (names | norms).values():
            layer.self_attn.add_module(f"my_{name}", getattr(source.self_attn, name))
    mine = {key: f"my_{name}" for key, name in (names | norms).items()}
    entry = families.Family("qwen3", **mine, input_norm="first_norm")
    monkeypatch.setitem(families.FAMILIES, "qwen3", entry)
    found = Index.from_weights(model, config())
    for number, layer in expected.layers.items():
        for name, tensor in layer.tensors().items():
            assert torch.equal(found.layers[number].tensors()[name], tensor), (number, name)


def test_a_fused_projection_is_refused(monkeypatch):
    from rtpurbo import families

    monkeypatch.setitem(families.FAMILIES, "phi3", families.Family("phi3"))
    model = tiny("Llama")
    model.config.model_type = "phi3"
    for layer in model.model.layers:
        layer.self_attn.qkv_proj = layer.self_attn.q_proj
        del layer.self_attn.q_proj, layer.self_attn.k_proj
    with pytest.raises(ValueError, match=r"\['q_proj', 'k_proj'\], got .*qkv_proj.*fused"):
        rtpurbo.sparsify(model, config())


@pytest.mark.parametrize("pieces", [[120], [70, 50], [50, 1, 1, 30, 1, 37], [5] + [1] * 115])
@pytest.mark.parametrize("window, sinks", [(8, 2), (1, 0), (16, 100)])
def test_local_heads_forget(family, pieces, window, sinks):
    """With p = 1 the only loss is the window's: the same as dense attention under that mask."""
    model, (ids, mask) = tiny(family), padded((120, 64, 3))
    length = ids.shape[1]
    position = torch.arange(length)
    m, n = position[:, None], position[None]
    start = (mask == 0).sum(-1)[:, None, None]
    visible = (start <= n) & (n <= m)
    near = visible & ((n - start < sinks) | (m - n < window))
    seen = torch.where(MIXED[0][None, :, None, None], visible[:, None], near[:, None])
    bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=bias, position_ids=positions, use_cache=False).logits
    with rtpurbo.sparse(model, config(window=window, sinks=sinks)):
        found = in_pieces(model, ids, pieces, mask)
    close(real(found, mask), real(expected, mask))

"""What sparsify accepts, what it refuses, and that nothing is half applied."""

import copy

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import rtpurbo
from rtpurbo import HeadMap, families
from rtpurbo.patching import dense, observe
from tests.models.tiny import (
    HEADS,
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


def test_unsupported_family_is_refused_with_the_supported_ones():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    with pytest.raises(ValueError, match=r"'llama', 'mistral', 'qwen2', 'qwen3', 'qwen3_moe'"):
        rtpurbo.sparsify(model, config())


def test_own_sliding_window_is_refused():
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        rtpurbo.sparsify(tiny("Mistral", sliding_window=8), config())


@pytest.mark.parametrize("change, error", [
    ({"roles": torch.zeros(LAYERS + 1, HEADS, dtype=torch.bool)}, ValueError),
])  # fmt: skip
def test_refusal_leaves_the_model_alone(change, error):
    model = tiny()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=r"rtpurbo\.sparsify"):
        rtpurbo.sparsify(model, config(**change))
    assert not rtpurbo.is_sparse(model)
    assert model.config._attn_implementation == before.config._attn_implementation
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_head_map_of_another_model():
    first, second = tiny(seed=1), tiny(seed=2)
    heads = HeadMap.from_roles(MIXED, model_id=families.identity(first))
    settings = rtpurbo.RTPurboConfig(heads=heads)
    with pytest.raises(ValueError, match="was found on model llama/2x6x3x16"):
        rtpurbo.sparsify(second, settings)
    with torch.no_grad():
        for weight in first.parameters():
            weight += 1e-4 * torch.randn_like(weight)
    rtpurbo.restore(rtpurbo.sparsify(first, settings))


def test_twice_and_never():
    model = tiny()
    with pytest.raises(ValueError, match="not sparse"):
        rtpurbo.restore(model)
    rtpurbo.sparsify(model, config())
    with pytest.raises(ValueError, match="sparse already"):
        rtpurbo.sparsify(model, config())


def test_sparse_context_restores_after_an_error():
    model = tiny()
    with pytest.raises(KeyError), rtpurbo.sparse(model, config()):
        raise KeyError
    assert not rtpurbo.is_sparse(model)


def test_layers_of_one_role_only():
    roles = torch.tensor([[False] * HEADS, [True] * HEADS])
    model, ids = tiny(), tokens(60, 2)
    expected = whole(model, ids)
    with rtpurbo.sparse(model, config(roles)):
        found = in_pieces(model, ids, [30, 1, 1, 20, 8])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("mask, error, message", [
    (torch.tensor([[1, 1, 1, 1, 0, 0]]), ValueError, "left padding"),
    (torch.tensor([[1, 0, 1, 1, 1, 1]]), ValueError, "left padding"),
    (torch.ones(1, 5), ValueError, "must cover"),
    (torch.ones(1, 1, 6, 6), NotImplementedError, "2-D mask"),
])  # fmt: skip
def test_masks_that_are_not_left_padding(mask, error, message):
    model = rtpurbo.sparsify(tiny(), config())
    with pytest.raises(error, match=message):
        model(tokens(6), attention_mask=mask, use_cache=False)


def test_packed_sequences_are_refused():
    model = rtpurbo.sparsify(tiny(), config())
    with pytest.raises(NotImplementedError, match="packed"):
        model(tokens(6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


def test_padding_that_changes_is_refused():
    model, ids = rtpurbo.sparsify(tiny(), config()), tokens(6)
    output = model(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    options = {cache_name(model): cache_of(output)}
    with pytest.raises(ValueError, match=r"the cached tokens had, \[2\], got \[0\]"):
        model(ids[:, :1], attention_mask=torch.ones(1, 7), **options)


def test_no_tokens_and_attention_matrices_are_refused():
    model = rtpurbo.sparsify(tiny(), config())
    with pytest.raises(ValueError, match="at least one token"):
        model(tokens()[:, :0])
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(tokens(), output_attentions=True)


def test_a_row_of_padding_and_a_single_token():
    model, ids = tiny(), tokens(5, 2)
    expected = whole(model, ids[:, :1])
    rtpurbo.sparsify(model, config())
    torch.testing.assert_close(whole(model, ids[:, :1]), expected)
    nothing = torch.tensor([[0] * 5, [1] * 5])
    assert model(ids, attention_mask=nothing).logits.isfinite().all()


def test_attention_dropout_is_refused():
    model = rtpurbo.sparsify(tiny(attention_dropout=0.1), config()).train()
    with pytest.raises(NotImplementedError, match="dropout"):
        model(tokens(6))


class Adapted(torch.nn.Module):
    """What PEFT puts in the place of a projection."""

    def __init__(self, base, delta):
        super().__init__()
        self.base, self.delta = base, delta

    def forward(self, x):
        return self.base(x) + x @ self.delta.T


def test_projections_that_are_exchanged_are_followed():
    settings = config(window=8, top_p=0.5, min_tokens=1)
    model, merged, ids = tiny(), tiny(), tokens(90)
    rtpurbo.sparsify(model, settings)
    in_pieces(model, ids, [60, 1])
    rtpurbo.sparsify(merged, settings)
    for number, layer in enumerate(model.model.layers):
        base = layer.self_attn.q_proj
        delta = torch.randn_like(base.weight)
        layer.self_attn.q_proj = Adapted(base, delta)
        with torch.no_grad():
            merged.model.layers[number].self_attn.q_proj.weight += delta
    found = in_pieces(model, ids, [60, *[1] * 30])
    torch.testing.assert_close(found, in_pieces(merged, ids, [60, *[1] * 30]), atol=2e-3, rtol=1e-3)
    rtpurbo.restore(model)
    assert all(not module._forward_hooks for module in model.modules())


def test_dense_inside_a_sparse_model():
    model, ids = tiny(), tokens(60)
    expected = whole(model, ids)
    rtpurbo.sparsify(model, config(window=4))
    sparse = whole(model, ids)
    with dense(model):
        assert torch.equal(whole(model, ids), expected)
        generated = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
        assert type(cache_of(generated)) is DynamicCache
    assert torch.equal(whole(model, ids), sparse)
    assert not torch.equal(sparse, expected)


def test_dense_and_observe_nest():
    model, ids = rtpurbo.sparsify(tiny(), config(window=8, top_p=0.5)), tokens(60)
    sparse = whole(model, ids)
    with dense(model):
        full = whole(model, ids)
        with dense(model):
            pass
        assert torch.equal(whole(model, ids), full)
    assert not torch.equal(sparse, full)
    assert torch.equal(whole(model, ids), sparse)
    outer, inner = [], []
    with observe(model, lambda context, *_: outer.append(context.number)):
        with observe(model, lambda context, *_: inner.append(context.number)):
            whole(model, ids)
        whole(model, ids)
    whole(model, ids)
    assert outer == inner == [0, 1]


def test_restore_inside_dense_stays():
    model, ids = tiny(), tokens()
    full = whole(model, ids)
    with dense(rtpurbo.sparsify(model, config())):
        rtpurbo.restore(model)
    assert torch.equal(whole(model, ids), full)


def test_observe_shows_q_and_k_and_runs_dense():
    model, ids = tiny("Qwen3"), tokens(30, 2)
    expected = whole(model, ids)
    rtpurbo.sparsify(model, config(window=4))
    seen = []

    def observer(context, q, k, start):
        seen.append((context.number, q, k, context.q_pre, context.k_pre))

    with observe(model, observer):
        found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert [entry[0] for entry in seen] == [0, 1]
    for _, q, k, q_pre, k_pre in seen:
        assert q.shape == q_pre.shape == (2, 6, 30, 16)
        assert k.shape == k_pre.shape == (2, 3, 30, 16)
        # RoPE rotates: it keeps lengths, and leaves position 0 alone.
        torch.testing.assert_close(q.norm(dim=-1), q_pre.norm(dim=-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(k[:, :, 0], k_pre[:, :, 0], atol=1e-5, rtol=1e-5)


def test_copies_are_independent():
    model, ids = rtpurbo.sparsify(tiny(), config(window=8)), tokens(40)
    expected = whole(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(whole(other, ids), expected)
    rtpurbo.restore(other)
    assert rtpurbo.is_sparse(model)
    assert torch.equal(whole(model, ids), expected)


def test_gradients_reach_the_weights_and_not_through_a_cache():
    model, ids = rtpurbo.sparsify(tiny(), config(window=8)), tokens(30)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    output = model(ids)
    later = model(ids[:, :1], **{cache_name(model): cache_of(output)})
    with pytest.raises(RuntimeError, match="filled cache"):
        later.logits.sum().backward()


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = rtpurbo.sparsify(tiny(), config(window=8)), tokens(30)
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for p, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected)

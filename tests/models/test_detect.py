"""detect_heads finds the heads that copy, and reports how stable the ranking is."""

import pytest
import torch

import rtpurbo
from tests.models.tiny import FAMILIES, tiny
from tests.tokenizers import byte_tokenizer

pytestmark = pytest.mark.families
TEXT = ["The quick brown fox jumps over the lazy dog. " * 40, "Lorem ipsum dolor sit amet. " * 60]
SIZES = {"documents": TEXT, "length": 160, "num_documents": 3, "needle_length": 8}


def detect(model, **options):
    return rtpurbo.detect_heads(model, byte_tokenizer(), **{**SIZES, "share": 0.25, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_attention_weights(family):
    model = tiny(family, vocab_size=258)
    inputs = []
    hook = model.model.register_forward_pre_hook(
        lambda m, args, kwargs: inputs.append(kwargs["input_ids"]), with_kwargs=True
    )
    heads = detect(model, num_documents=1)
    hook.remove()
    assert inputs[0].shape == (1, 160)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(inputs[0], output_attentions=True).attentions
    # Eager weights of the last 8 rows on the first needle, which follows the <s>.
    expected = torch.stack([w[0, :, -8:, 1:9].sum(-1).mean(-1) for w in weights])
    assert inputs[0][0, 1:9].tolist() == inputs[0][0, -8:].tolist()
    torch.testing.assert_close(heads.scores, expected, atol=1e-5, rtol=1e-4)
    assert int(heads.roles.sum()) == round(0.25 * expected.numel())


def test_the_model_is_left_as_it_was_and_the_seed_decides():
    model = tiny(vocab_size=258).train()
    calls = []
    first = detect(model, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(1, 6)]
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all("detect" not in key for m in model.modules() for key in m.__dict__)
    assert detect(model) == first
    assert not torch.equal(detect(model, seed=1).scores, first.scores)


def spearman(a, b):
    """Of scores without ties."""
    ranks = torch.stack([x.flatten().argsort().argsort() for x in (a, b)]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def overlap(a, b, kept):
    first, second = (set(x.flatten().topk(kept).indices.tolist()) for x in (a, b))
    return len(first & second) / kept


def test_stability_compares_documents_and_lengths(monkeypatch):
    model, seen = tiny(vocab_size=258), []

    def remember(*arguments, score=rtpurbo.ops.retrieval_scores):
        seen.append(score(*arguments)[0])
        return seen[-1][None]

    monkeypatch.setattr(rtpurbo.ops, "retrieval_scores", remember)
    found = detect(model).stability
    maps = torch.stack(seen).view(5, 2, 6)
    documents, means = maps[:3], (maps[:3].mean(0), maps[3:].mean(0))
    pairs = [(documents[i], documents[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    for kind, expected in (("documents", pairs), ("lengths", [means])):
        count = len(expected)
        correlation = sum(spearman(a, b) for a, b in expected) / count
        assert found[kind]["rank_correlation"] == pytest.approx(correlation)
        assert found[kind]["overlap"] == pytest.approx(
            sum(overlap(a, b, 3) for a, b in expected) / count
        )
        assert found[kind]["pairs"] == count
    assert (found["num_documents"], found["length"], found["half_length"]) == (3, 160, 80)


def test_identity():
    model = tiny(vocab_size=258)
    heads = detect(model)
    assert heads.kv_heads == 3
    assert heads.model_id == rtpurbo.families.identity(model)
    rtpurbo.sparsify(model, rtpurbo.RTPurboConfig(heads=heads))


def test_a_threshold_in_place_of_a_share():
    model = tiny(vocab_size=258)
    ranked = detect(model)
    least = ranked.scores.flatten().sort(descending=True).values[4].item()
    heads = detect(model, share=None, threshold=least)
    assert torch.equal(heads.scores, ranked.scores)
    assert torch.equal(heads.roles, ranked.scores >= least) and int(heads.roles.sum()) == 5
    assert heads.stability["documents"]["pairs"] == 3


def test_agreement_of_known_maps():
    from rtpurbo.detect import _agreement

    a = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    assert _agreement([a, a], 2) == {"rank_correlation": pytest.approx(1), "overlap": 1, "pairs": 1}
    reverse = _agreement([a, -a], 2)
    assert reverse["rank_correlation"] == pytest.approx(-1)
    assert reverse["overlap"] == 0
    tied = _agreement([torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 3.0])], 1)
    assert tied["rank_correlation"] == pytest.approx(1)


@pytest.mark.parametrize("options, message", [
    ({"length": 20}, "length at least 36"), ({"share": 1.5}, "share must be"),
    ({"threshold": 0.5}, "share or threshold, not both"),
    ({"num_documents": 0}, "must be >= 1"), ({"documents": ["short"]}, "must hold 480 tokens"),
    ({"documents": "a string " * 400}, "non-empty list of strings, got one string"),
    ({"documents": [1]}, "non-empty list of strings"),
])  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        detect(tiny(vocab_size=258), **options)


def test_a_length_beyond_the_context_warns():
    model = tiny(vocab_size=258, max_position_embeddings=128)
    with pytest.warns(
        UserWarning, match="length is 160 tokens, beyond this model's context of 128"
    ):
        detect(model)


def test_a_sparse_model_is_refused():
    model = tiny(vocab_size=258)
    rtpurbo.sparsify(model, rtpurbo.RTPurboConfig(heads=detect(model)))
    with pytest.raises(ValueError, match=r"call rtpurbo\.restore first"):
        detect(model)

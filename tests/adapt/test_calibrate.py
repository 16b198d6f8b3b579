"""Thresholds of the sparse prefill, found anew."""

from dataclasses import replace

import pytest
import torch

import rtpurbo
from rtpurbo.patching import state
from tests.adapt import tiny

LENGTH = 640


@pytest.fixture
def trained():
    model = tiny.model(prefill="sparse")
    tokens = tiny.sequences(3, LENGTH)
    result = rtpurbo.train_index(model, tokens, steps=4, lr=1e-2, rows=64, progress=False)
    return model, tokens, result


def index_tensors(model):
    layers = state(model).index.layers.items()
    return {(n, name): t.clone() for n, layer in layers for name, t in layer.tensors().items()}


def changed(before, model):
    now = index_tensors(model)
    return {name for (n, name), tensor in before.items() if not torch.equal(tensor, now[n, name])}


def test_the_held_out_sequence_gives_what_stage_1_found(trained):
    model, tokens, result = trained
    found = index_tensors(model)
    for layer in state(model).index.layers.values():
        layer.threshold.fill_(0.123)
    metrics = rtpurbo.calibrate(model, tokens[-1:])
    assert not changed(found, model)
    assert metrics == {name: result.metrics[name] for name in metrics} and len(metrics) == 2


def test_only_thresholds_move_and_are_kept(trained, tmp_path):
    model, _, _ = trained
    weights, before = tiny.weights(model), index_tensors(model)
    state(model).config = replace(state(model).config, top_p=0.5)
    metrics = rtpurbo.calibrate(model, tiny.sequences(2, 1024))
    assert changed(before, model) == {"threshold"} and tiny.same(weights, tiny.weights(model))
    assert metrics["tile_true_mass"] >= 0.5 and 0 < metrics["tile_density"] < 1
    assert state(model).index.history["calibration"] == {"longest": 1024, **metrics}
    rtpurbo.save_pretrained(model, tmp_path / "sparse")
    again, _ = rtpurbo.from_pretrained(tmp_path / "sparse")
    assert not changed(index_tensors(model), again)
    assert state(again).index.history == state(model).index.history


def test_what_it_cannot_use_is_named_before_anything_changes(trained):
    model, tokens, _ = trained
    before = index_tensors(model)
    short = tokens[0][:255]
    with pytest.raises(ValueError, match=r"tokens\[1\] has 255 tokens; .* give 256 or more"):
        rtpurbo.calibrate(model, [tokens[0], short])
    with pytest.raises(ValueError, match=r"tokens\[0\] holds token ids outside"):
        rtpurbo.calibrate(model, [[tiny.VOCABULARY] * 300])
    with pytest.raises(TypeError, match="tokens must be a list of token sequences"):
        rtpurbo.calibrate(model, "text")
    assert not changed(before, model)
    with pytest.raises(ValueError, match="index is not trained"):
        rtpurbo.calibrate(tiny.model(), tokens)
    with pytest.raises(ValueError, match="sparsify"):
        rtpurbo.calibrate(tiny.model(sparse=False), tokens)

"""Stage 1: the index learns, everything else stays."""

import inspect

import pytest
import torch

from rtpurbo import ops
from rtpurbo.adapt import train_index
from rtpurbo.data import RetrievalSequence
from rtpurbo.patching import state
from tests.adapt import tiny


def train(model, output_dir=None, **options):
    settings = {"steps": 24, "lr": 1e-2, "rows": 64, "checkpoint_every": 10, **options}
    tokens = settings.pop("tokens", tiny.sequences())
    return train_index(model, tokens, output_dir=output_dir, progress=False, **settings)


def index_tensors(model):
    return {
        f"{number}.{name}": tensor.clone()
        for number, layer in state(model).index.layers.items()
        for name, tensor in layer.tensors().items()
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"index": "full", "recent": 16}, {"share_index_keys": True}],
    ids=["beyond_window", "full", "shared"],
)
def test_the_kl_falls_and_the_backbone_stays(options):
    model = tiny.model(**options)
    before = tiny.weights(model)
    result = train(model)
    assert result.metrics["kl_after"] < 0.9 * result.metrics["kl_before"]
    assert result.metrics["kl_retrieval_after"] < result.metrics["kl_retrieval_before"]
    assert len(result.losses) == result.steps == 24
    assert result.tokens == 24 * 320
    assert tiny.same(before, tiny.weights(model))
    assert not any(weight.grad is not None for weight in model.parameters())
    found = state(model)
    assert found.index.trained
    assert found.index.history["stage 1"]["kl_after"] == result.metrics["kl_after"]
    moved = index_tensors(model)
    assert any(layer.offset.any() for layer in found.index.layers.values()) == (
        found.config.index == "beyond_window"
    )
    assert all(torch.isfinite(tensor).all() for tensor in moved.values())


def test_the_first_step_starts_from_the_data(tmp_path):
    fitted = train(tiny.model(), steps=1, lr=1e-12)
    assert fitted.metrics["kl_before"] == pytest.approx(fitted.metrics["kl_after"], rel=1e-5)
    patched = tiny.model()
    raw = index_tensors(patched)
    train(patched, steps=1, lr=1e-12)
    assert not torch.allclose(raw["1.w_q"], index_tensors(patched)["1.w_q"])


@pytest.mark.parametrize("updates", [1, 4])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path, monkeypatch, updates):
    from rtpurbo.adapt import stage1

    whole = tiny.model()
    expected = train(whole, updates=updates)
    clip, calls = stage1.IndexTask.clip, []

    def dies(task):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return clip(task)

    monkeypatch.setattr(stage1.IndexTask, "clip", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.model(), tmp_path, updates=updates)
    monkeypatch.setattr(stage1.IndexTask, "clip", clip)
    again = tiny.model()
    result = train(again, tmp_path, updates=updates)
    assert result.resumed_from == 10
    assert tiny.same(index_tensors(whole), index_tensors(again))
    assert expected.losses[10:] == result.losses
    assert expected.metrics == result.metrics


def test_the_run_of_another_model_is_not_continued(tmp_path):
    train(tiny.model(), tmp_path, steps=2)
    other = tiny.model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    before = index_tensors(other)
    with pytest.raises(ValueError, match="from a model of other weights"):
        train(other, tmp_path, steps=2)
    assert tiny.same(before, index_tensors(other))


def test_several_updates_run_the_model_less():
    result = train(tiny.model(), updates=4)
    assert result.tokens == 6 * 320
    assert result.metrics["kl_after"] < 0.9 * result.metrics["kl_before"]


def test_autocast_runs_and_stays_close():
    exact = train(tiny.model(), steps=4)
    rounded = train(tiny.model(), steps=4, mixed_precision="bf16")
    assert rounded.losses == pytest.approx(exact.losses, rel=0.1)
    assert rounded.losses != exact.losses


def test_heads_train_independently():
    """A head's projections do not depend on which other heads retrieve."""
    from rtpurbo import HeadMap, RTPurboConfig, restore, sparsify

    model = tiny.model()
    train(model)
    together = index_tensors(model)
    restore(model)
    alone = torch.zeros_like(tiny.ROLES)
    alone[1, 3] = True
    config = RTPurboConfig(heads=HeadMap.from_roles(alone), window=32, index_dim=8, min_tokens=8)
    sparsify(model, config)
    train(model)
    torch.testing.assert_close(index_tensors(model)["1.w_q"][0], together["1.w_q"][1])


def test_thresholds_reach_the_true_mass():
    model = tiny.model(top_p=0.9)
    result = train(model, tokens=tiny.sequences(3, 1024), steps=4)
    assert 0.9 <= result.metrics["tile_true_mass"] <= 1
    assert 0 < result.metrics["tile_density"] <= 1
    before = {n: layer.threshold.clone() for n, layer in state(model).index.layers.items()}
    lax = tiny.model(top_p=0.3)
    assert train(lax, tokens=tiny.sequences(3, 1024), steps=4).metrics["tile_true_mass"] >= 0.3
    after = state(lax).index.layers
    assert sum(float((before[n] - after[n].threshold).sum()) for n in before) > 0


def test_thresholds_are_of_the_tiles_that_the_model_selects(monkeypatch):
    """Calibration and sparse prefill choose blocks by the same rule, but for the threshold."""
    operator, rules = ops.select_tiles, []

    def recorded(*args, **options):
        given = inspect.signature(operator).bind(*args, **options)
        given.apply_defaults()
        names = "window", "sinks", "min_blocks", "tile", "block_size", "rank"
        rules.append([given.arguments[name] for name in names])
        return operator(*args, **options)

    monkeypatch.setattr(ops, "select_tiles", recorded)
    model, tokens = tiny.model(prefill="sparse"), tiny.sequences(2, 1024)
    train(model, tokens=tokens, steps=1)
    calibrated = rules.copy()
    rules.clear()
    model(torch.tensor(tokens[:1]))
    assert calibrated and rules
    assert all(rule == rules[0] for rule in calibrated + rules)


def test_half_of_the_rows_retrieve():
    from rtpurbo.adapt.samples import Samples
    from rtpurbo.adapt.stage1 import IndexTask

    tokens = tiny.sequences(1)[0]
    given = [40, 50, 60, 300]
    for item, expected in ((RetrievalSequence(tokens, [3, *given]), set(given)), (tokens, None)):
        samples = Samples([item], "tokens")
        task = IndexTask(tiny.model(), samples, rows=64, updates=2, seed=0)
        rows, retrieval = task._draw_rows(samples[0], 0, 0)
        assert rows.shape == retrieval.shape == (2, 64)
        assert int(rows.min()) >= 36
        if expected is None:
            assert int(retrieval.sum()) == 2 * 32
            assert int(rows[retrieval].min()) >= 213
        else:
            assert set(rows[retrieval].tolist()) == expected
        assert not torch.equal(rows[0], rows[1])


def test_forms_of_tokens_give_the_same(tmp_path):
    datasets = pytest.importorskip("datasets")
    plain = tiny.sequences()
    forms = {
        "lists": plain,
        "tensors": [torch.tensor(tokens) for tokens in plain],
        "mappings": [{"input_ids": tokens} for tokens in plain],
        "dataset": datasets.Dataset.from_dict({"input_ids": plain}),
    }
    losses = [train(tiny.model(), tokens=form, steps=2).losses for form in forms.values()]
    assert all(loss == losses[0] for loss in losses)


def test_memory_grows_with_the_length_not_its_square():
    """At N = 8192 one N x N float32 matrix would take 256 MiB."""
    model = tiny.model()
    train(model, tokens=tiny.sequences(2, 1024), steps=1)
    resident = reset_peak()
    train(model, tokens=tiny.sequences(2, 8192), steps=1)
    assert peak() - resident < 128 << 20


def reset_peak():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")
    return peak()


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": [[1, 2, 3]]}, "all within the window"),
        ({"tokens": "a text"}, "list of token sequences"),
        ({"tokens": ["a text"]}, "no token sequence"),
        ({"tokens": [[0.5] * 400]}, "1-D sequence of token ids"),
        ({"tokens": [[1] * 399 + [64]]}, r"outside \[0, 64\)"),
        ({"tokens": [{"text": "a"}]}, "input_ids"),
        ({"tokens": [RetrievalSequence([1] * 400, [400])]}, r"rows must lie in \[0, 400\)"),
        ({"steps": 0}, "steps"),
        ({"lr": float("nan")}, "lr"),
        ({"rows": 1}, "rows"),
        ({"updates": 0}, "updates"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
    ],
)
def test_bad_arguments_are_named_and_nothing_changes(arguments, message):
    model = tiny.model()
    before = index_tensors(model)
    with pytest.raises((ValueError, TypeError), match=message):
        train(model, **arguments)
    assert tiny.same(before, index_tensors(model))


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="not sparse"):
        train(tiny.model(sparse=False))


def test_sequences_beyond_the_context_warn():
    model = tiny.model()
    model.config.max_position_embeddings = 128
    with pytest.warns(UserWarning, match="is 320 tokens, beyond this model's context of 128"):
        train(model, steps=1)

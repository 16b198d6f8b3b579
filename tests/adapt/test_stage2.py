"""Stage 2: the sparse model moves towards the dense one; the index stays."""

import json

import pytest
import torch

from rtpurbo import restore
from rtpurbo.adapt import distill, stage2, teacher
from rtpurbo.adapt.samples import Samples, fingerprint
from rtpurbo.patching import dense, state
from tests.adapt import tiny


def run(model, output_dir=None, **options):
    settings = {"steps": 12, "lr": 3e-4, "batch_size": 2, "checkpoint_every": 5, **options}
    samples = settings.pop("samples", tiny.sequences(4, 192))
    return distill(model, samples, output_dir=output_dir, progress=False, **settings)


def test_the_loss_falls_and_the_index_stays(tmp_path):
    model = tiny.model()
    before = tiny.weights(model)
    index = {n: layer.tensors() for n, layer in state(model).index.layers.items()}
    kept = {(n, k): v.clone() for n, tensors in index.items() for k, v in tensors.items()}
    result = run(model, tmp_path)
    assert result.metrics["loss_last"] < 0.8 * result.metrics["loss_first"]
    assert result.tokens == 24 * 192
    assert all(torch.equal(index[n][k], value) for (n, k), value in kept.items())
    after = tiny.weights(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not model.training and not model.is_gradient_checkpointing
    assert all(weight.grad is None for weight in model.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-00000010",
        "checkpoint-00000012",
        "metrics.jsonl",
        "teacher",
    ]


def test_the_loss_is_that_of_the_definition():
    model = tiny.model()
    tokens = tiny.sequences(1, 192)[0]
    labels = [-100] * 150 + tokens[150:]
    result = run(
        model, samples=[{"input_ids": tokens, "labels": labels}], steps=1, batch_size=1, lr=1e-12
    )
    ids = torch.tensor([tokens])
    with torch.no_grad():
        student = model(ids, use_cache=False).logits[0, 149:-1].double()
        with dense(model):
            full = model(ids, use_cache=False).logits[0, 149:-1].double()
    best, places = full.topk(10)
    target, guess = best.log_softmax(-1), student.gather(1, places).log_softmax(-1)
    expected = (target.exp() * (target - guess)).sum(-1).mean().item()
    assert expected > 1e-3
    assert result.losses[0] == pytest.approx(expected, rel=1e-4)


def test_slices_of_the_head_change_nothing(monkeypatch):
    whole = run(tiny.model(), steps=2)
    monkeypatch.setattr(stage2, "_POSITIONS", 50)
    monkeypatch.setattr(teacher, "_ROWS", 33)
    assert run(tiny.model(), steps=2).losses == pytest.approx(whole.losses, rel=1e-4)


def test_gradient_checkpointing_changes_nothing():
    losses = [run(tiny.model(), steps=3, gradient_checkpointing=on).losses for on in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path, monkeypatch, lora):
    whole = tiny.model()
    expected = run(whole, tmp_path / "whole", lora=lora)
    clip, calls = stage2.DistillTask.clip, []

    def dies(task):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return clip(task)

    monkeypatch.setattr(stage2.DistillTask, "clip", dies)
    cut = tiny.model()
    with pytest.raises(KeyboardInterrupt):
        run(cut, tmp_path / "cut", lora=lora)
    assert cut.state_dict().keys() == whole.state_dict().keys()
    monkeypatch.setattr(stage2.DistillTask, "clip", clip)
    if lora:
        assert tiny.same(tiny.weights(cut), tiny.weights(tiny.model()))
    else:
        with pytest.raises(ValueError, match="load the original model again"):
            run(cut, tmp_path / "cut")
    again = tiny.model()
    result = run(again, tmp_path / "cut", lora=lora)
    assert result.resumed_from == 5
    assert expected.losses[5:] == result.losses
    assert tiny.same(tiny.weights(whole), tiny.weights(again))


def test_lora_trains_the_projections_alone_and_merges(tmp_path):
    model = tiny.model()
    before, flags = tiny.weights(model), [w.requires_grad for w in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    result = run(model, tmp_path, lora=4, lr=5e-3, steps=20)
    assert result.metrics["loss_last"] < result.metrics["loss_first"]
    after = tiny.weights(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [w.requires_grad for w in model.parameters()] == flags
    for name in before:
        projects = any(f"{letter}_proj" in name for letter in "qkvo")
        assert torch.equal(before[name], after[name]) != projects, name
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.bin"))
    restore(model)
    model(torch.tensor([[1, 2, 3]]))


def test_lora_takes_a_peft_configuration():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["down_proj"], lora_dropout=0.1)
    model = tiny.model()
    before = tiny.weights(model)
    run(model, lora=config, steps=2, lr=1e-2)
    after = tiny.weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "down_proj" in name}
    with pytest.raises(TypeError, match="lora must be None, a rank or a peft"):
        run(tiny.model(), lora="all")
    with pytest.raises(ValueError, match="rank must be >= 1"):
        run(tiny.model(), lora=0)


def test_the_teacher_cache_is_used_again(tmp_path, monkeypatch):
    cache = tmp_path / "teacher"
    first = run(tiny.model(), teacher_cache=cache, steps=2)
    monkeypatch.setattr(teacher.TeacherCache, "_write_shard", None)
    assert run(tiny.model(), teacher_cache=cache, steps=2).losses == first.losses


def test_an_interrupted_teacher_cache_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_SHARD", 1)
    cache = tmp_path / "teacher"
    first = run(tiny.model(), teacher_cache=cache, steps=2)
    (cache / "teacher.json").unlink()
    (cache / "shard-00002.safetensors").write_bytes(b"cut off")
    (cache / "shard-00003.safetensors").unlink()
    written = []
    write = teacher.TeacherCache._write_shard

    def count(self, model, samples, shard, *rest):
        written.append(shard)
        write(self, model, samples, shard, *rest)

    monkeypatch.setattr(teacher.TeacherCache, "_write_shard", count)
    assert run(tiny.model(), teacher_cache=cache, steps=2).losses == first.losses
    assert written == [2, 3]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "newer"])
def test_a_damaged_teacher_cache_is_refused(tmp_path, damage):
    cache = tmp_path / "teacher"
    run(tiny.model(), teacher_cache=cache, steps=1)
    shard, manifest = cache / "shard-00000.safetensors", cache / "teacher.json"
    content = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        shard.write_bytes(content[:-8])
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 2}))
    with pytest.raises(ValueError, match=r"teacher cache|teacher\.json|rtpurbo\.teacher"):
        run(tiny.model(), teacher_cache=cache, steps=1)


def test_the_teacher_cache_of_another_model_or_data_is_refused(tmp_path):
    cache = tmp_path / "teacher"
    run(tiny.model(), teacher_cache=cache, steps=1)
    other = tiny.model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="made with another model"):
        run(other, teacher_cache=cache, steps=1)
    with pytest.raises(ValueError, match="made with another data"):
        run(tiny.model(), teacher_cache=cache, steps=1, samples=tiny.sequences(4, 200))
    with pytest.raises(ValueError, match="made with another model"):
        run(tiny.model(theta=500.0), teacher_cache=cache, steps=1)
    with pytest.raises(ValueError, match="made with another mixed_precision"):
        run(tiny.model(), teacher_cache=cache, steps=1, mixed_precision="bf16")


def test_a_loaded_model_has_the_fingerprint_of_the_saved_one(tmp_path):
    model = tiny.model(sparse=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert fingerprint(loaded) == fingerprint(model) == fingerprint(tiny.model())


def test_teacher_logits_are_the_dense_model_s(tmp_path):
    model, samples = tiny.model(), tiny.sequences(2, 100)
    run(model, teacher_cache=tmp_path, samples=samples, steps=1, lr=1e-12)
    cache = teacher.TeacherCache(tmp_path, {}, 2)
    with torch.no_grad(), dense(model):
        logits = model(torch.tensor([samples[1]])).logits[0]
    rows = teacher.label_rows(Samples(samples, "samples")[1].tokens, None)
    assert rows.tolist() == list(range(24, 99))
    values, tokens = cache[1]
    torch.testing.assert_close(values, logits[rows].topk(10).values)
    assert torch.equal(tokens, logits[rows].topk(10).indices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": [[1] * 30]}, "equals the dense one"),
        ({"samples": [{"input_ids": [1] * 64, "labels": [-100] * 64}]}, "no label token"),
        ({"samples": [{"input_ids": [1] * 64, "labels": [1] * 63}]}, "length of input_ids"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model = tiny.model()
    before = tiny.weights(model)
    with pytest.raises(ValueError, match=message):
        run(model, **arguments)
    assert tiny.same(before, tiny.weights(model))


def test_autocast_runs_and_stays_close():
    exact = run(tiny.model(), steps=3)
    rounded = run(tiny.model(), steps=3, mixed_precision="bf16")
    assert rounded.losses == pytest.approx(exact.losses, rel=0.2)
    assert rounded.losses != exact.losses


def test_half_precision_weights_are_refused_without_lora():
    with pytest.raises(TypeError, match="round away updates"):
        run(tiny.model().bfloat16())


def test_samples_beyond_the_context_warn():
    model = tiny.model()
    model.config.max_position_embeddings = 128
    with pytest.warns(UserWarning, match="is 320 tokens, beyond this model's context of 128"):
        distill(model, tiny.sequences(2), steps=1, batch_size=1, progress=False)

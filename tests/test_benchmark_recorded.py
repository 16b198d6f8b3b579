"""Real selections in the benchmarks: what is recorded of a model, and the cases made of it."""

from dataclasses import replace

import pytest
import torch

from benchmarks import decode_model_cuda as bench
from benchmarks.decode_layer import WINDOW, Step
from benchmarks.gathers import as_members, groups, mean_run, random_like
from benchmarks.recorded import SPARSE_DECODE, Recorder, recorded, selection_facts, texts
from rtpurbo import ops
from rtpurbo.patching import state
from tests.front import DOCUMENTS, network, saved
from tests.tokenizers import byte_tokenizer


@pytest.fixture
def prose(monkeypatch):
    monkeypatch.setattr("benchmarks.recorded.data.prose", lambda split: DOCUMENTS)


@pytest.fixture
def folder(tmp_path, prose, monkeypatch):
    monkeypatch.setattr(bench, "LENGTHS", (160, 200))
    monkeypatch.setattr(bench, "ROUNDS", 2)
    return saved(tmp_path / "sparse", sparse=True)


def lists(*positions):
    return [torch.tensor(p, dtype=torch.long) for p in positions]


def test_the_last_group_is_filled_from_the_first_lists():
    a, b, c = lists([1], [2], [3])
    assert groups([a, b, c], 2) == [[a, b], [c, a]]
    assert groups([a], 3) == [[a, a, a]]


def test_random_lists_have_as_many_positions_in_the_range():
    drawn = random_like(lists(range(5), [], range(20)), begin=7, end=27)
    assert [len(x) for x in drawn] == [5, 0, 20]
    assert drawn[2].tolist() == list(range(7, 27))
    assert drawn[0].min() >= 7 and (drawn[0].diff() > 0).all()


def test_lists_become_members():
    indices, counts = as_members(lists([3, 9], [], [4]))
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.tolist() == [[[[3, 9]], [[-1, -1]], [[4, -1]]]]
    assert counts.tolist() == [[[2], [0], [1]]]


def test_runs_are_stretches_of_adjacent_keys():
    assert mean_run(lists([3, 4, 5, 9], [7])) == 5 / 3
    assert mean_run(lists([])) == 0


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("form", ["beyond_window", "full"])
def test_recorded_calls_are_the_models(bits, form):
    model = network(sparse=True, index_bits=bits, index=form, recent=8)
    calls = recorded(model, torch.randint(256, (300,)).tolist())
    lasts = [context.last for context in state(model).layers]
    assert len(calls) == 2
    for call, last in zip(calls, lasts, strict=True):
        assert (call.arguments.get("codes") is not None) == (bits == 4)
        assert call.arguments["k"].shape[2] == 300
        out, lse, selected, counts, mass = call()
        assert torch.equal(selected, last.selected) and torch.equal(mass, call.mass)
        assert torch.equal(lse, last.lse)
        assert [len(p) for p in call.far_positions()] == counts[0, :, 0].tolist()

        names = [argument.name for argument in torch.ops.rtpurbo.decode.default._schema.arguments]
        same = {name: value for name, value in call.arguments.items() if name in names}
        indices, counts = as_members(call.far_positions())
        listed, _ = ops.decode(**same, indices=indices, counts=counts)
        torch.testing.assert_close(listed, out)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_call_must_read_what_a_step_does(bits):
    torch.manual_seed(0)
    step = Step(1, WINDOW + 1024, bits=bits, selected=200, device="cpu")
    with Recorder() as recorder:
        step.select_and_attend()
    (call,) = recorder.calls
    assert call.bytes == step.bytes("sparse_decode")
    halves = call.arguments | {"k_local": call.arguments["k"][:, :2], "k": step.k[:, :2]}
    assert replace(call, arguments=halves).bytes == call.bytes


def test_nothing_else_is_recorded():
    model = network(sparse=True)
    calls = recorded(model, list(range(40)))
    assert all(call() is not None for call in calls) and len(calls) == 2
    assert SPARSE_DECODE.name() == "rtpurbo::sparse_decode"


def test_facts_of_calls():
    model = network(sparse=True, min_tokens=11, top_p=0.01)
    facts = selection_facts(recorded(model, torch.randint(256, (100,)).tolist()))
    assert facts["selected"] == facts["selected_max"] == 11
    assert 0 < facts["mass_min"] <= facts["mass"] <= 1


@pytest.mark.parametrize("kind", ["needles", "prose"])
def test_texts_have_the_length(prose, kind):
    found = texts(kind, byte_tokenizer(), 1500, 2)
    assert len(found) == 2 and found[0] != found[1]
    assert all(1480 < len(tokens) <= 1500 for tokens in found)


def test_every_case_runs(folder, monkeypatch):
    monkeypatch.setattr(bench, "TEXTS", ("prose",))
    cases = [c for group in bench.model_cases(folder, lambda p: True, "cpu") for c in group]
    assert [(c.parameters["keys"], c.parameters["part"]) for c in cases] == [
        *[(160, "step")] * 6, *[(200, "step")] * 6, *[(200, "pattern")] * 2, *[(200, "gather")] * 2,
    ]  # fmt: skip
    for case in cases:
        names = ["flash", "cudnn"] if case.parameters["part"] == "step" else ["random keys"]
        assert list(case.baselines) == names and case.rounds == 2
        every = case.parameters.get("layer") == "all"
        assert len(case.run()) == len(case.baselines[names[0]]()) == case.rounds * (1 + every)
        assert case.facts["selected"] >= 8
    one, two, every = cases[:3]
    assert one.baselines["flash"] is two.baselines["flash"] is not every.baselines["flash"]


def test_a_model_is_loaded_for_wanted_cases_alone(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("rtpurbo.from_pretrained", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(bench.VARIABLE, str(folder))
    asked = []
    assert list(bench.decode_model_cuda(lambda parameters: asked.append(parameters))) == []
    assert {p["part"] for p in asked} == {"step", "pattern", "gather"}
    with pytest.raises(AssertionError, match="loaded"):
        list(bench.decode_model_cuda(lambda parameters: True))


def test_without_a_model_the_benchmark_says_so(monkeypatch, capsys):
    monkeypatch.delenv(bench.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(bench.decode_model_cuda(lambda parameters: True)) == []
    assert bench.VARIABLE in capsys.readouterr().err

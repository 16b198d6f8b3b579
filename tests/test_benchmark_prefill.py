"""The cases of the prefill benchmark, on the CPU."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import (
    flex,
    prefill_cuda,
    prefill_layer,
    prefill_parts_cuda,
    prefill_short_cuda,
)
from benchmarks.attention import Layer
from benchmarks.masks import dense_pairs, near_pairs
from benchmarks.prefill_layer import SINKS, Prefill
from benchmarks.random_lists import ListPlan
from rtpurbo import ops
from rtpurbo.short_inputs.prefill import PrefillPass

LAYER = Layer(4, 2, 16, (1, 2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [[], [1, 2]])
def test_flex_attention_and_attention_see_the_same(monkeypatch, heads):
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    prefill = Prefill(LAYER, 512, "cpu")
    ours, theirs = prefill.attend(heads, 200), prefill.flex(heads, 200)()
    assert (ours.float() - theirs.float()).abs().max() < 0.02
    assert (ours.float() - prefill.attend([0], 200).float()).abs().max() > 0.05


def parameters(mode, window=200, density=None):
    extra = {} if density is None else {"density": density}
    return {"mode": mode, "keys": 1024, "window": window, **extra}


CASES = [
    parameters("dense"),
    parameters("near"),
    parameters("layer"),
    parameters("lists", 1, "0.3"),
    parameters("sparse", density="0.7"),
    parameters("attention", density="0.7"),
    parameters("near_lse"),
    parameters("select_tiles"),
]


def test_every_mode_runs_and_the_slow_baselines_are_shared():
    cases = prefill_cuda.cases_at(LAYER, 1024, CASES, "cpu")
    assert [case.parameters for case in cases] == CASES
    for case in cases:
        case.run()
    assert len({case.baselines["cudnn"] for case in cases if case.baselines}) == 1
    alone = [case.parameters["mode"] for case in cases if not case.baselines]
    assert alone == ["attention", "near_lse", "select_tiles"]
    against_flex = [case.parameters["mode"] for case in cases if "flex" in case.baselines]
    assert against_flex == ["near", "layer"]


def test_flops_are_those_of_the_mask():
    near, dense, pair = near_pairs(1024, 200, SINKS), dense_pairs(1024), 4 * LAYER.dim
    half = ListPlan(1024, 200, SINKS, 0.7).pairs
    pairs = [4 * dense, 4 * near, 2 * dense + 2 * near, 4 * ListPlan(1024, 1, SINKS, 0.3).pairs,
             2 * half + 2 * near, 2 * half + 2 * near]  # fmt: skip
    cases = prefill_cuda.cases_at(LAYER, 1024, CASES, "cpu")
    assert [case.flops for case in cases] == [*(pair * p for p in pairs), None, None]


def recorded_calls(monkeypatch):
    """(name, args, kwargs) of the operators that are called."""
    calls = []
    for name in ("index_project", "near_lse", "select_tiles", "attention"):
        operator = getattr(ops, name)

        def record(*args, name=name, operator=operator, **kwargs):
            calls.append((name, args, kwargs))
            return operator(*args, **kwargs)

        monkeypatch.setattr(prefill_layer.ops, name, record)
    return calls


def test_a_sparse_layer_selects_and_attends_to_the_given_lists(monkeypatch):
    (sparse,) = prefill_cuda.cases_at(LAYER, 1024, [parameters("sparse", density="0.7")], "cpu")
    calls = recorded_calls(monkeypatch)
    sparse.run()
    names, _, options = zip(*calls, strict=True)
    assert names == ("near_lse", "select_tiles", "attention")
    assert options[1]["rank"] == "max" and options[1]["near_lse"] is not None
    counts = options[2]["block_counts"]
    assert torch.equal(counts[0, 0].long(), ListPlan(1024, 200, SINKS, 0.7).counts)


def test_every_goal_has_its_case():
    goals = [
        (p["keys"], p.get("density"), goal)
        for layer, keys in prefill_cuda.LENGTHS
        for p in prefill_cuda.parameters_at(layer, keys)
        for goal in [prefill_cuda.goals(layer, p)]
        if goal and p["mode"] != "dense"
    ]
    expected = {(keys, None, goal) for keys, goal in prefill_cuda.LAYER_GOALS.items()}
    expected |= {(k, str(d), goal) for (k, d), goal in prefill_cuda.SPARSE_GOALS.items()}
    expected.add((32768, "0.19", 3.0))
    assert {(k, d, *goal.values()) for k, d, goal in goals} == expected
    assert len(goals) == len(expected)


def test_lists_that_peers_can_take():
    cases = [
        p for layer, keys in prefill_cuda.LENGTHS for p in prefill_cuda.parameters_at(layer, keys)
    ]
    assert len({tuple(p.items()) for p in cases}) == len(cases)
    lists = [p for p in cases if p["mode"] == "lists"]
    longest = [p["density"] for p in lists if p["keys"] == 1 << 20]
    assert longest == ["0.05", "0.12"]
    small = [(p["window"], p["density"]) for p in lists if p["heads"] == "9/3/64"]
    assert small == [(1024, "0.12"), (1024, "0.19"), (1024, "0.3")]


def test_rates_and_selections_have_goals():
    goals = {
        (p["mode"], p["keys"]): goal
        for layer, keys in prefill_cuda.LENGTHS
        for p in prefill_cuda.parameters_at(layer, keys)
        for goal in [prefill_cuda.goal_seconds(layer, p, 5.5e14)]
        if goal is not None
    }
    assert {goals.pop(("near", 2**i * 1024)) for i in range(6, 11)} == {1.0}
    assert goals == {("select_tiles", 131_072): 5 * 0.45e-3, ("select_tiles", 1 << 20): 0.15}


@pytest.mark.parametrize(
    "index, lengths, rows, near",
    [
        ("beyond_window", [1024], 1024, 256),
        ("beyond_window", [1024, 256], 1024, 256),
        ("full", [1024] * 3, 128, prefill_short_cuda.RECENT),
    ],
)
def test_a_short_prefill_runs_as_the_rule_says(monkeypatch, index, lengths, rows, near):
    prefill, asked = Prefill(LAYER, 1024, "cpu", lengths=lengths, rows=rows), []
    parameters, calls = {"index": index, "window": 256}, recorded_calls(monkeypatch)
    for spared, way in ((-1.0, "dense retrieval heads"), (1.0, "listed retrieval heads")):

        def answer(given, spared=spared):
            asked.append(given)
            return spared

        monkeypatch.setattr(prefill_short_cuda, "seconds_spared", answer)
        case = prefill_short_cuda.case_of(prefill, parameters, {})
        form = index == "beyond_window"
        heads, window, dim = (2, LAYER.heads - 2), 256 + SINKS, LAYER.dim
        assert asked.pop() == PrefillPass(
            tuple(lengths), rows, *heads, near + SINKS, window, dim, form
        )
        assert case.run is case.baselines[way]
        assert case.facts == {"selects": float(spared > 0)}
        calls.clear()
        case.run()
        selected = [(args, kwargs) for name, args, kwargs in calls if name == "select_tiles"]
        assert len(selected) == (spared > 0)
        for args, kwargs in selected:
            assert args[4] == near and (kwargs["near_lse"] is None) == (index == "full")
        assert calls[-1][1][4] == 256


@pytest.mark.parametrize("keys, listed", [(256, False), (384, True)])
def test_a_prefill_without_far_keys_has_no_lists(monkeypatch, keys, listed):
    monkeypatch.setattr(prefill_short_cuda, "seconds_spared", lambda given: 1.0)
    parameters = {"index": "beyond_window", "window": 256}
    case = prefill_short_cuda.case_of(Prefill(LAYER, keys, "cpu"), parameters, {})
    assert case.facts == {"selects": float(listed)}
    assert ("listed retrieval heads" in case.baselines) == listed
    case.run()


def test_heads_of_a_role_alone_do_what_they_do_in_the_layer():
    whole = Prefill(LAYER, 1024, "cpu")
    lists = ListPlan(1024, 200, SINKS, 0.7).draw(2, "cpu")
    retrieval, local = whole.role(retrieval=True), whole.role(retrieval=False)
    for given in (None, lists):
        out = whole.attend(whole.retrieval, 200, given)
        assert torch.equal(retrieval.attend(retrieval.retrieval, 200, given), out[:, [1, 2]])
        assert torch.equal(local.attend(local.retrieval, 200), out[:, [0, 3]])
    assert [part.q.stride() for part in (retrieval, local)] == [(2048 * 16, 16, 2 * 16, 1)] * 2
    assert retrieval.k is local.k is whole.k and retrieval.v is local.v is whole.v


def test_a_role_has_as_many_heads_of_each_kv_head():
    even = Prefill(prefill_parts_cuda.EVEN, 128, "cpu")
    assert [even.role(retrieval).q.shape[1] for retrieval in (True, False)] == [4, 28]
    with pytest.raises(ValueError, match=r"layer must have as many .*, got \[1\] of 4/2/16"):
        Prefill(Layer(4, 2, 16, (1,)), 128, "cpu").role(retrieval=True)
    with pytest.raises(ValueError, match=r"layer must have as many .*, got \[0, 1\] of 4/2/16"):
        Prefill(Layer(4, 2, 16, (0, 1)), 128, "cpu").role(retrieval=False)


PARTS = [parameters("layer"), parameters("attention", density="0.7")]


def test_one_launch_and_one_a_role(monkeypatch):
    cases = prefill_parts_cuda.cases_at(LAYER, 1024, PARTS, "cpu")
    calls = recorded_calls(monkeypatch)
    for case, listed in zip(cases, (False, True), strict=True):
        case.run()
        (apart,) = case.baselines.values()
        assert [out.shape[1] for out in apart()] == [2, 2]
        launches = [
            (name, *args[3:5], kwargs.get("block_indices") is not None)
            for name, args, kwargs in calls
        ]
        assert launches == [
            ("attention", [1, 2], 200, listed),
            ("attention", [0, 1], 200, listed),
            ("attention", [], 200, False),
        ]
        calls.clear()


def test_a_sparse_layer_against_its_selection(monkeypatch):
    sparse = parameters("sparse", density="0.7")
    (case,) = prefill_parts_cuda.cases_at(LAYER, 1024, [sparse], "cpu")
    assert case.parameters == sparse
    calls = recorded_calls(monkeypatch)
    case.run()
    of_run = [name for name, *_ in calls]
    assert of_run == ["near_lse", "select_tiles", "attention"]
    calls.clear()
    results = {name: run() for name, run in case.baselines.items()}
    assert list(results) == [name for name, *_ in calls] == ["index_project", *of_run[:2]]
    taken = calls[-1][1][:2]
    for projected, given in zip(results["index_project"], taken, strict=True):
        assert projected.shape == given.shape and projected.dtype == given.dtype


def test_parts_are_taken_where_their_density_can_be():
    found = [
        (p["mode"], p["retrieval"], p["keys"], p["window"], p.get("density"))
        for layer in prefill_parts_cuda.MODES
        for keys in prefill_parts_cuda.LENGTHS
        for p in prefill_parts_cuda.parameters_at(layer, keys)
    ]
    sparse = [(32768, 1024, "0.08"), (131_072, 1024, "0.08"), (131_072, 8192, "0.15")]
    expected = [("layer", 4, keys, window, None) for keys, window in
                [(32768, 1024), (32768, 8192), (131_072, 1024), (131_072, 8192)]]  # fmt: skip
    expected += [("attention", 4, *at) for at in sparse] + [("sparse", 5, *at) for at in sparse]
    assert sorted(found, key=str) == sorted(expected, key=str)

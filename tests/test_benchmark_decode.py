"""The stages of a decode step in the benchmarks, on the CPU."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import append_cuda, decode_cuda, decode_short_cuda
from benchmarks import decode_stages_cuda as bench
from benchmarks.decode_layer import INDEX_DIM, LAYER, SINKS, WINDOW, Step, row_bytes
from benchmarks.decode_layer import SELECTED as SELECTED_TOKENS
from benchmarks.recorded import Recorder
from rtpurbo import ops
from rtpurbo.short_inputs.decode import H200_RATE, decode_selects, fewest_to_select_from

KEYS, SELECTED = WINDOW + 1024, 200
FAR = slice(SINKS, KEYS - WINDOW)
RETRIEVAL, ROW = list(LAYER.retrieval_heads), row_bytes(LAYER)


def test_steps_have_goals():
    named = {}
    for shape in decode_cuda.SHAPES:
        parameters = {"part": "step", "selected": SELECTED_TOKENS, **shape}
        goal = decode_cuda.goals(parameters)
        assert set(goal) == {"cudnn", "flash"} and goal["flash"] == 1.0
        if goal["cudnn"] > 1:
            heads = parameters.get("heads"), parameters.get("shared"), parameters.get("bits")
            named[shape["batch"], shape["keys"], *heads] = goal["cudnn"]
    assert named.pop((16, 131_072, None, None, None)) == 5.0
    assert {named.pop((1, 1 << 20, None, None, bits)) for bits in (None, 8)} == {8.0}
    assert named.pop((1, 1 << 20, None, None, 4)) == 14.0
    assert {named.pop((1, 131_072, None, None, bits)) for bits in (None, 8, 4)} == {3.4}
    assert len(named) == 12 and set(named.values()) == {1.95, 4.0, 4.5}
    assert decode_cuda.goals({"part": "select"}) == {}


@pytest.mark.parametrize("other", [dict(form="full"), dict(window=1024)])
def test_named_goals_are_those_of_the_default_window_and_form(other):
    parameters = {"part": "step", "selected": SELECTED_TOKENS, "batch": 1, "keys": 131_072}
    assert decode_cuda.goals(parameters)["cudnn"] == 3.4
    assert decode_cuda.goals(parameters | other)["cudnn"] == 1.0


def test_steps_differ_and_fit_a_card():
    seen = []
    for shape in decode_cuda.SHAPES:
        parts = decode_cuda.parts_of(shape)
        seen += [tuple(sorted({"part": part, **shape}.items())) for part in parts]
        step = decode_cuda.step_of(shape, "meta")
        tensors = step.k, step.v, step.every_index
        assert decode_cuda.rounds_of(shape) * sum(x.nbytes for x in tensors) < 40e9
    assert len(seen) == len(set(seen))


OTHERS = [
    dict(heads="9/3/64", selected=200, min_tokens=64),
    dict(heads="16/4/256", selected=200, min_tokens=64),
    dict(form="full", selected=200),
    dict(window=1024, selected=200),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_a_step_selects_as_its_parts_do(other):
    torch.manual_seed(0)
    step = decode_cuda.step_of(dict(batch=2, keys=KEYS, **other), "cpu")
    with Recorder() as recorder:
        out = step.select_and_attend()
    (call,) = recorder.calls
    assert torch.equal(out, step.attend())
    assert {len(positions) for positions in call.far_positions()} == {200}
    near = 64 if "form" in other else other.get("window", WINDOW)
    given = call.arguments
    assert (given["window"], given["near_window"]) == (other.get("window", WINDOW), near)
    assert given.get("beyond_window", True) == ("form" not in other)


def test_what_is_selected_in_form_full_goes_by_the_index_alone():
    torch.manual_seed(0)
    step = Step(1, KEYS, form="full", selected=200, device="cpu")
    lists, scanned = step.lists, step.bytes("scan")
    step.near = step.near + 100
    assert all(map(torch.equal, step.select(), lists))
    assert scanned == step.k_index.nbytes
    assert "near_lse" not in decode_cuda.parts_of(dict(batch=1, keys=131_072, form="full"))


def test_a_step_asks_the_rule_as_a_model_does(monkeypatch):
    for module in ("rtpurbo.short_inputs.decode", "benchmarks.decode_layer"):
        monkeypatch.setattr(f"{module}.memory_rate", lambda device: 0.7 * H200_RATE)
    for shape in decode_cuda.SHAPES:
        step = decode_cuda.step_of(shape, "meta")
        layer, keys = step.layer, shape["keys"]
        config = SimpleNamespace(
            select_from=None, window=step.window, near_window=step.near_window, sinks=SINKS,
            index=shape.get("form", "beyond_window"), index_dim=INDEX_DIM, index_bits=step.bits,
            min_tokens=step.min_tokens, block_size=1, refine=False, exact_sets=False,
        )  # fmt: skip
        context = SimpleNamespace(
            heads=layer.retrieval_heads, full_kv_heads=set(layer.owners),
            index=SimpleNamespace(index_map=step.index_map), state=SimpleNamespace(config=config),
        )  # fmt: skip
        on_cuda = SimpleNamespace(
            shape=step.q.shape, device=torch.device("cuda"), element_size=step.q.element_size
        )
        assert decode_selects(context, on_cuda, keys) == step.selects


@pytest.mark.parametrize("selects", [False, True])
def test_the_rule_runs_one_of_both_ways(monkeypatch, selects):
    monkeypatch.setattr(Step, "selects", property(lambda step: selects))
    case = decode_short_cuda.case_of(decode_short_cuda.SMALL, 1, 2 * KEYS, "cpu")
    dense, listed = (case.baselines[f"{way} retrieval heads"]() for way in ("dense", "listed"))
    assert case.facts == {"selects": float(selects)} and case.rounds == len(dense) == 6
    for out, taken, left in zip(case.run(), *(listed, dense)[:: 1 if selects else -1], strict=True):
        assert torch.equal(out, taken) and not torch.equal(out, left)


def test_cases_of_the_rule_differ():
    seen = [str(decode_short_cuda.parameters_of(*shape)) for shape in decode_short_cuda.SHAPES]
    assert len(seen) == len(set(seen)) > 90


def test_steps_of_default_models_begin_where_the_rule_does():
    for batch, keys in decode_cuda.DEFAULTS_SELECT:
        shape = batch, len(RETRIEVAL), 4 * ROW, len(RETRIEVAL) * INDEX_DIM * 2, ROW, 64
        far = keys - WINDOW - SINKS
        assert 1 <= far / fewest_to_select_from(*shape, sifts=True) < 1.2


@pytest.fixture(params=[16, 4])
def step(request):
    torch.manual_seed(0)
    return Step(1, KEYS, bits=request.param, selected=SELECTED, device="cpu")


def listed(step):
    """bool [retrieval heads, keys]."""
    indices, counts = step.lists
    assert counts.flatten().tolist() == [SELECTED] * len(RETRIEVAL)
    chosen = torch.zeros(len(RETRIEVAL), KEYS, dtype=torch.bool)
    return chosen.scatter_(1, indices[0, :, 0, :SELECTED].long(), True)


def test_stages_read_what_is_counted(step):
    index = step.coded.values() or [step.k_index[:, :, FAR]]
    scan = sum(tensor.nbytes for tensor in index)
    near = sum(x.nbytes - x[:, :, FAR].nbytes for x in (step.k, step.v))
    lists = int(listed(step).sum()) * ROW
    expected = {
        "near": near, "scan": scan, "top_p": step.scores.nbytes, "select": scan, "gather": lists,
        "step": near + scan + lists,
    }  # fmt: skip
    assert {stage: bench.bytes_of(step, stage) for stage in bench.STAGES} == expected


def test_a_refined_step_attends_to_what_it_refines():
    torch.manual_seed(0)
    step = Step(1, KEYS, bits=4, selected=SELECTED, device="cpu")
    layer = step.q, step.k, step.v, step.retrieval, WINDOW, WINDOW, SINKS, step.scale
    expected = ops.decode(*layer, *step.refine())[0]
    assert torch.equal(step.refine_and_attend(), expected)
    assert not torch.equal(step.attend(), expected)  # 16 bits choose others than 4 do
    parts = [step.bytes(part) for part in ("near_lse", "refine", "attend")]
    assert step.bytes("refined step") == sum(parts)


def test_a_scan_chooses_nothing(step):
    assert step.scan().tolist() == [[[-1]] * len(RETRIEVAL)]


def test_top_p_chooses_what_select_does():
    torch.manual_seed(0)
    step = Step(1, KEYS, selected=SELECTED, device="cpu")
    indices = step.top_p()
    assert torch.equal(indices[:, :SELECTED] + SINKS, step.lists[0][0, :, 0, :SELECTED])
    assert (indices[:, SELECTED:] == -1).all()


def test_near_keys_and_lists_are_read_apart(step):
    near, gathered, chosen = step.attend_near(), step.gather(), listed(step)
    owners = torch.tensor(LAYER.owners)
    read = torch.zeros(step.k.shape[1], KEYS, dtype=torch.bool)
    read.index_put_((owners,), chosen, accumulate=True)
    read[:, -1] = True
    unread = ~read[None, :, :, None]
    for tensor in (step.k, step.v):
        tensor.masked_fill_(unread, 9.0)
    assert torch.equal(step.gather(), gathered) and not torch.equal(step.attend_near(), near)
    near = step.attend_near()
    for tensor in (step.k, step.v):
        tensor[:, :, FAR] = 7.0
    assert torch.equal(step.attend_near(), near)
    changed = (step.gather() != gathered).any(-1).flatten()
    assert changed.nonzero().flatten().tolist() == RETRIEVAL  # others see the last key alone


@pytest.mark.parametrize("bits", [16, 4])
def test_every_stage_runs_against_a_copy_of_as_many_bytes(monkeypatch, bits):
    monkeypatch.setattr(bench, "ROTATED", 50_000)
    chosen = list(bench.parameters_at(KEYS, bits))
    cases = bench.cases_at(KEYS, bits, chosen, "cpu")
    assert [case.parameters for case in cases] == chosen
    least = min(case.bytes for case in cases)
    (rounds,) = {case.rounds for case in cases}
    assert (rounds - 1) * least < 50_000 <= rounds * least
    for case in cases:
        assert len(case.run()) == rounds
        targets = case.baselines["floor"]()
        assert len({target.data_ptr() for target in targets}) == rounds
        assert {0 <= 2 * x.nbytes - case.bytes < 2 * bench.ALIGNED for x in targets} == {True}
    scan, select = (case for case in cases if case.parameters["stage"] in ("scan", "select"))
    assert select.baselines["scan"] is scan.run
    assert select.baselines["floor"] is scan.baselines["floor"]
    besides = {"select": {"floor", "scan"}, "top_p": {"floor", "sort"}}
    for case in cases:
        stage = case.parameters["stage"]
        assert set(case.baselines) == besides.get(stage, {"floor"})
        if stage == "top_p":  # exact on a CPU, too
            assert all(map(torch.equal, case.run(), case.baselines["sort"]()))


def test_every_goal_has_its_case():
    parameters = [
        (p["stage"], p["bits"], p["keys"])
        for keys in bench.LENGTHS
        for bits in bench.STAGES_OF_BITS
        for p in bench.parameters_at(keys, bits)
    ]
    assert len(parameters) == len(set(parameters)) == 18
    assert set(bench.GOALS) < set(parameters)


def test_a_goal_is_that_of_its_case(monkeypatch):
    monkeypatch.setattr(bench, "ROTATED", 1)
    monkeypatch.setattr(bench, "GOALS", {("scan", 4, KEYS): 5e-6, ("scan", 16, KEYS): 9e-6})
    cases = bench.cases_at(KEYS, 4, list(bench.parameters_at(KEYS, 4)), "cpu")
    assert [case.goal_seconds for case in cases] == [5e-6, None, None]


@pytest.mark.parametrize("rows", [1, 40])
def test_one_launch_stores_what_two_do(rows):
    layer = append_cuda.Append(2, rows, "cpu")
    stored = [*layer.stores[2:6], layer.index_pages]
    before = [tensor.clone() for tensor in stored]
    results = []
    for run in (layer.together, layer.apart):
        for tensor, old in zip(stored, before, strict=True):
            tensor.copy_(old)
        results.append([run(), *(tensor.clone() for tensor in stored)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert not any(torch.equal(*pair) for pair in zip(before, stored, strict=True))

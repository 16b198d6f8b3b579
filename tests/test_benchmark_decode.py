"""The stages of a decode step in the benchmarks, on the CPU."""

import pytest
import torch

from benchmarks import append_cuda, decode_cuda
from benchmarks import decode_stages_cuda as bench
from benchmarks.decode_layer import INDEX_DIM, RETRIEVAL, ROW, SCALE, SINKS, WINDOW, Step
from benchmarks.decode_layer import SELECTED as SELECTED_TOKENS
from rtpurbo import ops
from rtpurbo.short_inputs.decode import fewest_to_select_from

KEYS, SELECTED = WINDOW + 1024, 200
FAR = slice(SINKS, KEYS - WINDOW)


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


def test_steps_of_default_models_begin_where_the_rule_does():
    for batch, keys in decode_cuda.DEFAULTS_SELECT:
        shape = batch, len(RETRIEVAL), 4 * ROW, len(RETRIEVAL) * INDEX_DIM * 2, ROW, 64
        far = keys - WINDOW - SINKS
        assert 1 <= far / fewest_to_select_from(*shape, sifts=True) < 1.2


@pytest.fixture(params=[16, 4])
def step(request):
    torch.manual_seed(0)
    return Step(1, KEYS, RETRIEVAL, request.param, selected=SELECTED, device="cpu")


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
    step = Step(1, KEYS, RETRIEVAL, 4, selected=SELECTED, device="cpu")
    layer = step.q, step.k, step.v, step.retrieval, WINDOW, WINDOW, SINKS, SCALE
    expected = ops.decode(*layer, *step.refine())[0]
    assert torch.equal(step.refine_and_attend(), expected)
    assert not torch.equal(step.attend(), expected)  # 16 bits choose others than 4 do
    parts = [step.bytes(part) for part in ("near_lse", "refine", "attend")]
    assert step.bytes("refined step") == sum(parts)


def test_a_scan_chooses_nothing(step):
    assert step.scan().tolist() == [[[-1]] * len(RETRIEVAL)]


def test_top_p_chooses_what_select_does():
    torch.manual_seed(0)
    step = Step(1, KEYS, RETRIEVAL, selected=SELECTED, device="cpu")
    indices = step.top_p()
    assert torch.equal(indices[:, :SELECTED] + SINKS, step.lists[0][0, :, 0, :SELECTED])
    assert (indices[:, SELECTED:] == -1).all()


def test_near_keys_and_lists_are_read_apart(step):
    near, gathered, chosen = step.attend_near(), step.gather(), listed(step)
    owners = torch.tensor(step.owners)
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
    assert [len(case.baselines) for case in cases if case is not select] == [1] * (len(cases) - 1)


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

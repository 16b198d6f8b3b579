"""Which benchmark cases run, how often they are timed, and what is written."""

import importlib
import json
import pkgutil
from dataclasses import replace

import pytest
import torch

import benchmarks
from benchmarks import measure
from benchmarks.__main__ import main
from benchmarks.choice import Choice
from benchmarks.registry import BENCHMARKS, Case

for module in pkgutil.iter_modules(benchmarks.__path__):
    if module.name not in ("__main__", "plot"):
        importlib.import_module(f"benchmarks.{module.name}")


def test_where_names_values():
    choice = Choice.parse(["keys=4096,mode=near", "keys=8192"], [])
    assert choice.wants({"keys": 4096, "mode": "near", "window": 9})
    assert choice.wants({"keys": 8192, "mode": "near"})
    assert not choice.wants({"keys": 8192, "mode": "dense"})
    assert not choice.wants({"keys": 16384, "mode": "near"})
    assert not choice.wants({"mode": "near"})
    assert Choice.parse([], []).wants({"keys": 1})
    with pytest.raises(ValueError, match="NAME=VALUE, got 'near'"):
        Choice.parse(["keys=4096", "near"], [])


def test_baselines_are_chosen_with_their_goals():
    case = Case({}, int, {"flash": int, "cudnn": int}, goals={"flash": 2.0, "cudnn": 3.0})
    narrowed = Choice.parse([], ["cudnn"]).narrowed(case)
    assert list(narrowed.baselines) == ["cudnn"] and narrowed.goals == {"cudnn": 3.0}
    assert Choice.parse([], []).narrowed(case) == case


# Without a model there are no cases of decode_model_cuda; test_benchmark_recorded has them.
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "decode_model_cuda"])
def test_no_tensor_is_made_for_cases_that_are_not_wanted(monkeypatch, name):
    def refuse(*args, **kwargs):
        raise AssertionError("a tensor for nothing")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for function in ("randn", "randint", "rand", "full"):
        monkeypatch.setattr(torch, function, refuse)
    asked = []
    assert list(BENCHMARKS[name](lambda parameters: asked.append(parameters))) == []
    assert len(asked) > 1
    with pytest.raises(AssertionError, match="for nothing"):
        list(BENCHMARKS[name](lambda parameters: True))


def clocked(monkeypatch, times):
    """Callables that a false clock finds to take `times`, by name, and how often they ran."""
    calls = dict.fromkeys(times, 0)

    def named(name):
        def run():
            calls[name] += 1

        run.takes = times[name]
        return run

    monkeypatch.setattr(measure, "seconds", lambda run: run() or run.takes)
    monkeypatch.setattr(measure, "cuda_seconds", lambda run: run() or run.takes)
    monkeypatch.setattr(measure, "peak_extra_bytes", lambda run: run() or 7)
    monkeypatch.setattr(measure, "captured", lambda run, pool: run)
    for name in ("synchronize", "reset_peak_memory_stats", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    return {name: named(name) for name in times}, calls


def test_a_baseline_that_cases_share_is_timed_once(monkeypatch):
    runs, calls = clocked(monkeypatch, {"a": 2.0, "b": 4.0, "shared": 8.0, "own": 1.0})
    shared = {"shared": runs["shared"]}
    rows = measure.measure(
        [
            Case({"n": 1}, runs["a"], shared, goals={"shared": 4.0}),
            Case({"n": 2}, runs["b"], {**shared, "own": runs["own"]}, 1e9, 4e9, {"shared": 2.1}, 2),
        ],
        repeats=3,
    )
    assert calls == {"a": 4, "b": 4, "shared": 4, "own": 4}
    assert [row["n"] for row in rows] == [1, 2]
    assert [row["ratios"] for row in rows] == [{"shared": 4.0}, {"shared": 2.0, "own": 0.25}]
    assert [row["reached"] for row in rows] == [True, False]
    assert [row["seconds"] for row in rows] == [2.0, 2.0]  # of a round
    assert [row["baseline_seconds"]["shared"] for row in rows] == [8.0, 4.0]
    assert [row["gflops_per_second"] for row in rows] == [None, 0.5]
    assert [row["bytes"] for row in rows] == [None, 4e9]
    assert [row["gbytes_per_second"] for row in rows] == [None, 2.0]
    assert rows[0]["peak_extra_bytes"] == {"ours": 7, "shared": 7}


def test_a_baseline_that_cannot_run_is_noted(monkeypatch):
    runs, _ = clocked(monkeypatch, {"a": 2.0})

    def fails():
        raise RuntimeError("no compiler\nand more")

    (row,) = measure.measure([Case({}, runs["a"], {"flex": fails}, goals={"flex": 1.0})], 1)
    assert row["notes"] == {"flex": "RuntimeError: no compiler"}
    assert row["ratios"] == {} and not row["reached"]
    with pytest.raises(RuntimeError, match="no compiler"):
        measure.measure([Case({}, fails, {})], 1)


def test_seconds_are_of_a_round(monkeypatch):
    runs, _ = clocked(monkeypatch, {"a": 4e-5})
    (row,) = measure.measure([Case({}, runs["a"], {}, rounds=4, device="cuda")], 1)
    assert row["seconds"] == row["eager_seconds"]["ours"] == 1e-5
    assert row["reached"] is None


@pytest.mark.parametrize("goal, reached", [(1e-5, True), (0.9e-5, False), (None, True)])
def test_a_goal_may_be_a_time_of_a_round(monkeypatch, goal, reached):
    runs, _ = clocked(monkeypatch, {"a": 4e-5, "b": 8e-5})
    case = Case({}, runs["a"], {"b": runs["b"]}, goals={"b": 2.0}, rounds=4, goal_seconds=goal)
    (row,) = measure.measure([case], 1)
    assert row["goal_seconds"] == goal and row["reached"] == reached
    (row,) = measure.measure([replace(case, goals={"b": 2.1})], 1)
    assert not row["reached"]


def test_a_copy_reads_and_writes(monkeypatch):
    cuda = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: cuda(8, dtype=dtype))
    monkeypatch.setattr(measure, "cuda_seconds", lambda run: run() is None or 2.0)
    assert measure.copy_rate.__wrapped__() == 8.0


@pytest.mark.parametrize(
    "seconds, timed, ran", [(20.0, 2, 3), (0.6, 2, 3), (0.3, 3, 4), (0.1, 10, 17), (1e-5, 30, 37)]
)
def test_slow_runs_are_repeated_less(monkeypatch, seconds, timed, ran):
    """A run warms up and shows its memory; long ones are timed at that already."""
    runs, calls = clocked(monkeypatch, {"a": seconds})
    monkeypatch.setattr(measure, "copy_rate", lambda: 1e12)
    (row,) = measure.measure([Case({}, runs["a"], {}, bytes=1e6, device="cuda")], repeats=3)
    assert row["repeats"] == {"ours": timed} and calls["a"] == ran
    assert row["eager_seconds"] == ({} if seconds > measure.LONG else {"ours": seconds})
    assert row["copy_share"] == pytest.approx(1e-6 / seconds)
    assert row["seconds"] == seconds


def test_the_command_runs_what_is_chosen(monkeypatch, tmp_path, capsys):
    runs, calls = clocked(monkeypatch, {"a": 1.0, "b": 2.0, "slow": 3.0})

    def fake(wanted):
        baselines = {"slow": runs["slow"]}
        facts = {"selected": 64.25}
        yield Case({"keys": 1}, runs["a"], baselines, facts=facts, goal_seconds=1.5)
        yield [Case({"keys": 2}, runs["b"], baselines), Case({"keys": 3}, runs["b"], baselines)]

    monkeypatch.setitem(BENCHMARKS, "fake_cuda", lambda wanted: iter([Case({}, runs["a"], {})]))
    output = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "fake", "--output", str(output)])
    for names in (["fake_cuda"], ["fake", "fake_cuda"]):  # of a CPU's and a GPU's, what there is
        main()
        assert list(json.loads(output.read_text())["results"]) == names
        monkeypatch.setitem(BENCHMARKS, "fake", fake)
    monkeypatch.delitem(BENCHMARKS, "fake_cuda")
    capsys.readouterr()

    def command(*words):
        monkeypatch.setattr("sys.argv", ["benchmarks", "fake", "--output", str(output), *words])
        main()
        return json.loads(output.read_text())["results"]["fake"]

    rows = command()
    assert [row["keys"] for row in rows] == [1, 2, 3]
    printed = capsys.readouterr().out
    assert rows[0]["facts"] == {"selected": 64.25} and "selected 64.25" in printed
    assert "1000 ms (goal 1500), 3.00x slow" in printed
    calls["a"] = 0
    (row,) = command("--where", "keys=2", "--baselines", "none")
    assert row["seconds"] == 2.0 and row["ratios"] == {} and calls["a"] == 0
    assert "fake keys=2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no case was run"):
        command("--where", "keys=4")
    with pytest.raises(SystemExit, match="no case has the baseline slwo"):
        command("--baselines", "slow", "slwo")

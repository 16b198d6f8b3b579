"""The loop and its checkpoints, on a task of two numbers and dropout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rtpurbo.adapt.loop import Loop, Schedule


class Noisy:
    """Least squares with dropout; counts what it was asked."""

    loss_name = "loss"

    def __init__(self):
        self.parameters = {"a": torch.zeros(3).requires_grad_(), "b.c": torch.ones(2, 2)}
        self.parameters["b.c"].requires_grad_()
        self.seen = []

    def backward(self, step, sample, weight):
        self.seen.append(sample)
        a, b = self.parameters.values()
        target = torch.arange(3.0) + sample
        loss = (torch.dropout(a + b.sum(), 0.3, True) - target).square().mean()
        (loss * weight).backward()
        return {"loss": loss.item(), "tokens": 7.0}

    def clip(self):
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0))


def run(output_dir, steps=20, stop_after=None, seed=0, **options):
    settings = {"batch_size": 2, "repeats": 1, "lr": 0.1, **options}
    loop = Loop(
        "toy",
        Schedule(steps, warmup=3, decay="cosine", **settings),
        samples=5,
        device=torch.device("cpu"),
        output_dir=output_dir,
        identity={"data": "d"},
        seed=seed,
        checkpoint_every=6,
        progress=False,
    )
    task = Noisy()
    if stop_after is not None:
        task = Dying(stop_after)
    resume = loop.latest()
    return task, loop.run(task, resume, extra=resume.extra if resume else {"kl": 1.5})


class Dying(Noisy):
    def __init__(self, after):
        super().__init__()
        self.left = after

    def clip(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().clip()


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=15)
    again, result = run(tmp_path / "cut")
    assert result.resumed_from == 12
    assert result.steps == 20
    assert len(result.losses) == 8
    for name, value in whole.parameters.items():
        assert torch.equal(value, again.parameters[name])
    lines = [metrics(tmp_path / folder) for folder in ("whole", "cut")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert [line["step"] for line in lines[1]] == list(range(1, 21))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_is_not_run_again(tmp_path):
    first, _ = run(tmp_path)
    second, result = run(tmp_path)
    assert second.seen == []
    assert result.steps == 20
    assert torch.equal(first.parameters["a"], second.parameters["a"])


def test_every_epoch_sees_every_sample_once(tmp_path):
    task, _ = run(None, steps=10)
    assert [sorted(task.seen[i : i + 5]) for i in (0, 5, 10, 15)] == [[0, 1, 2, 3, 4]] * 4
    repeated, _ = run(None, steps=4, repeats=2)
    assert repeated.seen[:2] == repeated.seen[2:4]
    assert repeated.seen[4:6] == repeated.seen[6:]


def test_the_last_two_checkpoints_are_kept_and_scratch_is_ignored(tmp_path):
    run(tmp_path)
    (tmp_path / ".checkpoint-00000099").mkdir()
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-00000018", "checkpoint-00000020"]
    assert run(tmp_path)[1].steps == 20
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state", "no state"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    run(tmp_path)
    folder = tmp_path / "checkpoint-00000020"
    file = folder / ("state.json" if "state" in damage else "optimizer.safetensors")
    content = file.read_bytes()
    if damage in ("remove", "no state"):
        file.unlink()
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"checkpoint-00000020.* (missing|cut off|changed)"):
        run(tmp_path)
    shutil.rmtree(folder)
    assert run(tmp_path)[1].resumed_from == 18


def test_newer_checkpoints_are_refused(tmp_path):
    run(tmp_path)
    file = tmp_path / "checkpoint-00000020" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        run(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"version": 0}, "version must be 1 to 1, got 0"),
    ({"format": "else"}, r"not a rtpurbo\.training"),
    ({"files": {}}, "lists no parameters; delete"),
    ({"files": {"../metrics.jsonl": {"bytes": 1, "sha256": ""}}}, "files must lie in"),
    ({"step": "2"}, "step must be a JSON whole number, got '2'"),
])  # fmt: skip
def test_odd_checkpoints_are_refused(tmp_path, change, message):
    run(tmp_path)
    file = tmp_path / "checkpoint-00000020" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        run(tmp_path)


def test_another_run_is_not_continued(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another run \(lr: 0\.1 -> 0\.2\)"):
        run(tmp_path, lr=0.2)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    task = Noisy()
    task.backward = lambda *_: {"loss": float("nan"), "tokens": 1.0}
    for leaf in task.parameters.values():
        leaf.grad = torch.zeros_like(leaf)
    schedule = Schedule(3, 0.1, 0, "constant")
    loop = Loop(
        "toy",
        schedule,
        samples=1,
        device=torch.device("cpu"),
        output_dir=None,
        identity={},
        seed=0,
        checkpoint_every=1,
        progress=False,
    )
    with pytest.raises(FloatingPointError, match="step 1"):
        loop.run(task, None, {})
    assert torch.equal(task.parameters["a"], torch.zeros(3))


def test_rates_rise_and_fall():
    cosine = Schedule(600, 1e-3, 100, "cosine")
    assert cosine.rate(0) == pytest.approx(1e-5)
    assert cosine.rate(99) == cosine.rate(100) == 1e-3
    assert cosine.rate(350) == pytest.approx(5e-4)
    assert cosine.rate(599) < 1e-7
    constant = Schedule(600, 3e-6, 200, "constant")
    assert constant.rate(99) == pytest.approx(1.5e-6)
    assert constant.rate(599) == 3e-6
    with pytest.raises(ValueError, match="steps"):
        Schedule(0, 1e-3, 0, "cosine")


TWO_PROCESSES = """
import json, os, sys, torch
from tests.adapt.test_loop import Noisy, metrics, run
from pathlib import Path
torch.dropout = lambda x, p, train: x
task, result = run(Path(sys.argv[1]))
if os.environ.get("RANK", "0") == "0":
    print(json.dumps({"a": task.parameters["a"].tolist(), "tokens": result.tokens}))
"""


def test_two_processes_do_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    launches = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"],
    }
    printed = {}
    for name, launcher in launches.items():
        if name == "two":
            launcher = [*launcher, "--master-port=29713"]
        command = [*launcher, str(script), str(tmp_path / name)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, cwd=root
        )
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout.strip().splitlines()
    assert len(printed["two"]) == 1
    one, two = (json.loads(printed[name][0]) for name in launches)
    assert one["tokens"] == two["tokens"] == 20 * 2 * 7
    assert one["a"] == pytest.approx(two["a"])
    last = tmp_path / "two" / "checkpoint-00000020"
    assert sorted(path.name for path in last.glob("rng-*")) == [
        "rng-00000.safetensors",
        "rng-00001.safetensors",
    ]
    assert len(metrics(tmp_path / "two")) == 20

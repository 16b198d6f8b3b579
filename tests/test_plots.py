"""Pictures are drawn and complete; without matplotlib the message says what to do."""

import json
import sys

import pytest
import torch

from rtpurbo import HeadMap, TrainResult
from rtpurbo.evaluate import EvalReport, EvalRow
from rtpurbo.plots import plot_heads, plot_lengths, plot_training

PNG = b"\x89PNG"


def test_head_map_outlines_every_retrieval_head(tmp_path):
    heads = HeadMap.from_scores(torch.rand(5, 4), share=0.25)
    figure = heads.plot(tmp_path / "heads.png")
    axes = figure.axes[0]
    assert {(p.get_x() + 0.5, p.get_y() + 0.5) for p in axes.patches} == {
        (float(head), float(layer)) for layer, head in heads.roles.nonzero().tolist()
    }
    assert axes.images[0].get_array().tolist() == heads.scores.tolist()
    assert (tmp_path / "heads.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["heads.png"]


def test_a_map_without_retrieval_heads_is_drawn():
    assert not plot_heads(HeadMap.from_roles([[0, 0]])).axes[0].patches


def test_training_curve_from_a_result_a_file_and_a_folder(tmp_path):
    losses = [3.0, 2.0, 1.5]
    lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = TrainResult(steps=13, losses=losses)
    for source, steps in (
        (result, [11, 12, 13]),
        (losses, [1, 2, 3]),
        (tmp_path, [1, 2, 3]),
        (tmp_path / "metrics.jsonl", [1, 2, 3]),
    ):
        drawn = plot_training(source).axes[0].lines[0]
        assert list(drawn.get_xdata()) == steps and list(drawn.get_ydata()) == losses


def test_an_empty_run_is_refused():
    with pytest.raises(ValueError, match="no training step"):
        plot_training([])


def test_lengths_has_a_panel_a_task_and_one_for_the_budget(tmp_path):
    rows = [
        EvalRow(task, length, mode, 0.5, 4, [0.5], attended_fraction=1.0)
        for task in ("niah", "kl")
        for length in (1024, 2048)
        for mode in ("dense", "sparse")
    ]
    figure = EvalReport(rows).plot(tmp_path / "lengths.svg")
    assert [axes.get_title() for axes in figure.axes] == ["niah", "kl", "decode"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2]
    assert "<svg" in (tmp_path / "lengths.svg").read_text()


def test_lengths_without_decode_tasks_has_no_budget_panel():
    row = EvalRow("prefill_kl", 1024, "dense", 0.5, 4, [0.5])
    assert [axes.get_title() for axes in plot_lengths(EvalReport([row])).axes] == ["prefill_kl"]


def test_without_matplotlib_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"rtpurbo\[plots\]"):
        plot_heads(HeadMap.from_roles([[0, 1]]))

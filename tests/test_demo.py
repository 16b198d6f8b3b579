"""The demo, start to finish on a tiny model, and what it does about models that do not fit."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

import rtpurbo
from rtpurbo.demo import Plan, run
from rtpurbo.loading import load_dense
from tests.front import saved

TINY = Plan(
    detect_length=300,
    detect_documents=2,
    index_length=1024,
    index_sequences=3,
    index_steps=4,
    updates=2,
    distill_length=256,
    distill_steps=2,
    distill_lr=1e-4,
    kl_length=256,
    kl_texts=1,
    needles={1024: 1},
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    console = Console(record=True, width=120)
    model = saved(folder / "dense")
    figures = run(TINY, model=str(model), output=folder / "out", console=console)
    return folder / "out", figures, console.export_text()


def test_writes_what_it_says(demo):
    folder, _, printed = demo
    for name in ("heads.png", "heads.json", "index.png", "report.json", "report.md", "demo.json"):
        assert (folder / name).stat().st_size > 100
        assert name in printed
    heads = rtpurbo.HeadMap.load(folder / "heads.json")
    model, tokenizer = rtpurbo.from_pretrained(folder / "model")
    assert rtpurbo.patching.state(model).config.heads == heads and tokenizer is not None
    assert rtpurbo.patching.state(model).index.trained


def test_figures_are_those_of_the_report(demo):
    folder, figures, printed = demo
    assert json.loads((folder / "demo.json").read_text()) == json.loads(json.dumps(figures))
    report = rtpurbo.EvalReport.load(folder / "report.json")
    assert [(r.task, r.length, r.mode) for r in report.rows] == [
        (task, 1024, mode) for mode in ("dense", "sparse") for task in ("niah", "mk8")
    ]
    (needles,) = figures["needles"]
    assert needles["dense"]["asked"] == needles["sparse"]["asked"] == 2
    assert needles["sparse"]["window"] == 128
    assert needles["sparse"]["attended_fraction"] < needles["dense"]["attended_fraction"] == 1
    stage_1 = figures["stage_1"]
    assert f"{stage_1['kl_before']:.2f} → {stage_1['kl_after']:.2f}" in printed
    assert figures["stage_2"]["kl_before"] > 0
    assert figures["stage_2"]["kl_before"] != figures["stage_2"]["kl_after"]


def test_stage_2_is_judged_against_the_original_model(demo):
    folder, figures, _ = demo
    model, tokenizer = rtpurbo.from_pretrained(folder / "model")
    original, _ = load_dense(folder.parent / "dense")
    (row,) = rtpurbo.evaluate(
        model, tokenizer, ["prefill_kl"], [256], texts_per_seed=1, window_divisor=8,
        modes=["sparse"], reference=original,
    ).rows  # fmt: skip
    assert figures["stage_2"]["kl_after"] == pytest.approx(row.score, rel=1e-5)


def test_a_short_context_shortens_the_plan(tmp_path):
    model = saved(tmp_path / "dense")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    with pytest.raises(ValueError, match="context must hold 1024 tokens, got 512"):
        run(TINY, model=str(model), output=tmp_path / "out", console=Console(quiet=True))


def test_every_length_has_the_window_that_the_plan_says(demo, tmp_path):
    _, figures, _ = demo
    model = saved(tmp_path / "dense")
    plan = replace(TINY, window_divisor=4, needles={1024: 1, 800: 1})
    with_four = run(plan, model=str(model), output=tmp_path / "out", console=Console(quiet=True))
    assert [needle["sparse"]["window"] for needle in with_four["needles"]] == [256, 200]
    assert [needle["sparse"]["window"] for needle in figures["needles"]] == [128]
    made, _ = rtpurbo.from_pretrained(tmp_path / "out" / "model")
    assert rtpurbo.patching.state(made).config.window == 256


def test_a_missing_asset_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("rtpurbo.demo._ASSETS", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="--model"):
        run(replace(TINY), output=tmp_path / "out", console=Console(quiet=True))

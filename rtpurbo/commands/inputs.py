"""What the commands read: models, prompts, texts; and where they may write."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rtpurbo
from rtpurbo.checkpoint import MANIFEST
from rtpurbo.commands.app import console, fail
from rtpurbo.commands.options import DType, Prefill, element_type
from rtpurbo.loading import load_dense
from rtpurbo.outputs import check_file
from rtpurbo.patching import state
from rtpurbo.plots import check_picture


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The one that is given; "-" stands for what comes in on stdin."""
    if (prompt is None) == (file is None):
        fail("give either a PROMPT or --file")
    if file is not None:
        text = file.read_text(encoding="utf-8")
    else:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text:
        fail("the prompt is empty; give at least a character to continue")
    return text


def load_model(
    model: str,
    dtype: DType,
    device: torch.device,
    select_from: int | None = None,
    prefill: Prefill | None = None,
) -> tuple[Any, Any]:
    """A saved sparse model, or any other as transformers loads it.

    `select_from` and `prefill` take the place of what a sparse model was saved with, if not None.
    """
    if (Path(model) / MANIFEST).is_file():
        network, tokenizer = rtpurbo.from_pretrained(model, dtype=element_type(dtype))
        if tokenizer is None:
            fail(f"{model} was saved without a tokenizer")
    else:
        network, tokenizer = load_dense(model, element_type(dtype))
    options = {"select_from": select_from, "prefill": prefill and prefill.value}
    changes: dict[str, Any] = {n: value for n, value in options.items() if value is not None}
    if changes and not rtpurbo.is_sparse(network):
        option = next(iter(changes)).replace("_", "-")
        fail(f"--{option} is for a sparse model, and {model} is dense; leave it out")
    if changes:
        found = state(network)
        found.config = replace(found.config, **changes)
    return network.to(device), tokenizer


def load_to_adapt(model: str, dtype: DType) -> tuple[Any, Any]:
    """A dense model and its tokenizer, on the CPU."""
    if torch.cuda.is_available():
        console.print("`detect` and `adapt` run on the CPU for now; the GPU is not used.")
    return load_dense(model, element_type(dtype))


def check_files(*files: Path | None, picture: Path | None = None) -> None:
    """Refuses now what could not be written later."""
    for path in (*files, picture):
        if path is not None:
            check_file(path)
    if picture is not None:
        check_picture(picture)


def read_texts(texts: list[Path] | None) -> list[str] | None:
    """What the files hold; None for no files."""
    return [path.read_text(encoding="utf-8") for path in texts] if texts else None

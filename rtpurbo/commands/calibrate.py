"""The command `rtpurbo calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import rtpurbo
from rtpurbo.checkpoint import check_destination
from rtpurbo.commands.app import console
from rtpurbo.commands.inputs import load_model, read_texts
from rtpurbo.commands.options import (
    DeviceOption,
    DType,
    DTypeOption,
    ModelArgument,
    SeedOption,
    TextsOption,
)
from rtpurbo.commands.tables import figures_table
from rtpurbo.device import checked_device
from rtpurbo.outputs import check_folder


def calibrate(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model.")],
    length: Annotated[int, typer.Option(help="Tokens of a sequence: those of your prompts.")],
    sequences: Annotated[int, typer.Option(help="Sequences, each run once.")] = 2,
    texts: TextsOption = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = "cpu",
    seed: SeedOption = 1,  # not `adapt`'s, whose sequences the index was trained on
) -> None:
    """Find a sparse prefill's thresholds anew, for prompts of this length."""
    check_destination(output)
    check_folder(output.absolute().parent)
    place = checked_device(device)
    documents = read_texts(texts) or rtpurbo.data.prose()
    network, tokenizer = load_model(model, dtype, place)
    tokens = rtpurbo.data.retrieval_sequences(tokenizer, documents, length, sequences, seed)
    console.print(figures_table("Thresholds", rtpurbo.calibrate(network, tokens)))
    rtpurbo.save_pretrained(network, output, tokenizer)
    console.print(f"Sparse model written to {output}")

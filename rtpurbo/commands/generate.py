"""The command `rtpurbo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import rtpurbo
from rtpurbo.commands.app import console, fail
from rtpurbo.commands.inputs import load_model, prompt_text
from rtpurbo.commands.options import (
    DeviceOption,
    DType,
    DTypeOption,
    ModelArgument,
    PrefillOption,
    SeedOption,
    SelectFromOption,
)
from rtpurbo.commands.tables import last_step
from rtpurbo.device import checked_device


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Run full attention.")] = False,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = "cpu",
    select_from: SelectFromOption = None,
    prefill: PrefillOption = None,
    seed: SeedOption = 0,
) -> None:
    """Continue a prompt, and say what was attended to."""
    from transformers import TextStreamer

    text = prompt_text(prompt, file)
    if dense and (select_from is not None or prefill is not None):
        fail("--dense runs full attention, without --select-from and --prefill; leave one out")
    place = checked_device(device)
    network, tokenizer = load_model(model, dtype, place, select_from, prefill)
    if chat and not tokenizer.chat_template:
        fail(f"--chat needs a chat template, and the tokenizer of {model} has none; leave it out")
    if dense and rtpurbo.is_sparse(network):
        rtpurbo.restore(network)
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(place)
    torch.manual_seed(seed)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    sampling = {"do_sample": True, "temperature": temperature} if temperature else greedy
    network.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        **sampling,
    )
    if rtpurbo.is_sparse(network):
        console.print(last_step(rtpurbo.stats(network)))

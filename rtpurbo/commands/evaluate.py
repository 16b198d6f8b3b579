"""The command `rtpurbo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import rtpurbo
from rtpurbo.commands.app import console
from rtpurbo.commands.inputs import check_files, load_model, read_texts
from rtpurbo.commands.options import (
    DeviceOption,
    DType,
    DTypeOption,
    Mode,
    ModelArgument,
    PrefillOption,
    SelectFromOption,
    TextsOption,
    element_type,
)
from rtpurbo.console import progress_bar
from rtpurbo.device import checked_device
from rtpurbo.evaluate.run import check_sizes
from rtpurbo.files import write_text
from rtpurbo.loading import load_dense


def evaluate(
    model: ModelArgument,
    task: Annotated[
        list[str] | None,
        typer.Option(help="niah, mkN, kl, nll, prefill_kl, prefill_nll; repeatable."),
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of a needle task.")] = 20,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; repeatable.")] = None,
    texts_per_seed: Annotated[int, typer.Option(help="Texts of the other tasks.")] = 3,
    rows: Annotated[int, typer.Option(help="Decode steps of a text.")] = 128,
    window: Annotated[int | None, typer.Option(help="Window for all lengths.")] = None,
    window_divisor: Annotated[
        int | None, typer.Option(help="Window = length // this, e.g. 8.")
    ] = None,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="dense, sparse; repeatable [default: both].")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Dense model of the KL [default: this one, dense].")
    ] = None,
    texts: TextsOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Report, JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Table, Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture over lengths.")] = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = "cpu",
    select_from: SelectFromOption = None,
    prefill: PrefillOption = None,
) -> None:
    """Score a model on needles and text, dense and sparse side by side."""
    what: dict[str, Any] = {
        "tasks": task or ("niah", "mk8", "kl", "nll"),
        "lengths": length or (4096, 8192),
        "prompts": prompts,
        "seeds": seed or (0,),
        "texts_per_seed": texts_per_seed,
        "rows": rows,
        "window": window,
        "window_divisor": window_divisor,
    }
    check_sizes(**what)
    check_files(output, markdown, picture=plot)
    place = checked_device(device)
    documents = read_texts(texts)
    network, tokenizer = load_model(model, dtype, place, select_from, prefill)
    teacher = load_dense(reference, element_type(dtype))[0].to(place) if reference else None
    with progress_bar(console, "evaluating") as tick:
        report = rtpurbo.evaluate(
            network,
            tokenizer,
            **what,
            documents=documents,
            modes=[entry.value for entry in mode] if mode else None,
            reference=teacher,
            progress=lambda label, done, total: tick(done, total, label),
        )
    if console.is_terminal:
        console.print(report.table(console.width))
    else:
        typer.echo(report.to_markdown())
    if output is not None:
        report.save(output)
    if markdown is not None:
        write_text(markdown, report.to_markdown() + "\n")
    if plot is not None:
        report.plot(plot)

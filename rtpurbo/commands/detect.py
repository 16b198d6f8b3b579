"""The command `rtpurbo detect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import rtpurbo
from rtpurbo.commands.app import console
from rtpurbo.commands.inputs import check_files, load_to_adapt, read_texts
from rtpurbo.commands.options import DType, DTypeOption, ModelArgument, SeedOption, TextsOption
from rtpurbo.commands.tables import stability_table
from rtpurbo.console import progress_bar
from rtpurbo.files import write_json
from rtpurbo.heads import check_choice
from rtpurbo.outputs import check_folder


def detect(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Head map, JSON.")] = Path(
        "heads.json"
    ),
    length: Annotated[int, typer.Option(help="Tokens of a document.")] = 8192,
    documents: Annotated[int, typer.Option(help="Number of documents.")] = 8,
    needle_length: Annotated[int, typer.Option(help="Tokens of the needle.")] = 32,
    share: Annotated[
        float | None, typer.Option(help="Share of the heads that retrieve [default: 0.15].")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Instead: the least score of a head that retrieves.")
    ] = None,
    texts: TextsOption = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the map there.")] = None,
    rtp_llm: Annotated[Path | None, typer.Option(help="Also write rtp-llm's config.")] = None,
    duo_attention: Annotated[
        Path | None, typer.Option(help="Also write DuoAttention's files into that folder.")
    ] = None,
    dtype: DTypeOption = DType.float32,
    seed: SeedOption = 0,
) -> None:
    """Find the retrieval heads of a model and write the head map."""
    check_choice("rtpurbo detect", share, threshold)
    check_files(output, rtp_llm, picture=plot)
    if duo_attention is not None:
        check_folder(duo_attention)
    given = read_texts(texts)
    network, tokenizer = load_to_adapt(model, dtype)
    with progress_bar(console, "documents") as tick:
        heads = rtpurbo.detect_heads(
            network,
            tokenizer,
            documents=given,
            length=length,
            num_documents=documents,
            needle_length=needle_length,
            share=share,
            threshold=threshold,
            seed=seed,
            progress=tick,
        )
    heads.save(output)
    if plot is not None:
        heads.plot(plot)
    if rtp_llm is not None:
        write_json(rtp_llm, {"headwise_config": heads.to_headwise_config()})
    if duo_attention is not None:
        heads.to_duo_attention(duo_attention)
    console.print(stability_table(heads))
    written = [path for path in (output, plot, rtp_llm, duo_attention) if path is not None]
    console.print(f"{heads!r}, written to {', '.join(map(str, written))}")

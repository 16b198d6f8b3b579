"""The command `rtpurbo adapt`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import rtpurbo
from rtpurbo.checkpoint import check_destination
from rtpurbo.commands.app import console
from rtpurbo.commands.inputs import load_to_adapt, read_texts
from rtpurbo.commands.options import (
    DType,
    DTypeOption,
    IndexForm,
    ModelArgument,
    Prefill,
    SeedOption,
    SelectFromOption,
    TextsOption,
)
from rtpurbo.commands.tables import figures_table
from rtpurbo.console import progress_bar
from rtpurbo.outputs import check_folder

NO_MAP_YET = rtpurbo.HeadMap.from_roles([[True]])


def adapt(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the sparse model.")],
    heads: Annotated[Path | None, typer.Option(help="Head map [default: detected here].")] = None,
    share: Annotated[float, typer.Option(help="Share of heads, when detecting.")] = 0.15,
    window: Annotated[int, typer.Option(help="Window of the local heads.")] = 8192,
    sinks: Annotated[int, typer.Option(help="First keys that every head sees.")] = 4,
    index: Annotated[IndexForm, typer.Option(help="Form of the index.")] = IndexForm.beyond_window,
    index_dim: Annotated[int, typer.Option(help="Dimensions of the index.")] = 16,
    top_p: Annotated[float, typer.Option(help="Mass that a selection reaches.")] = 0.9,
    min_tokens: Annotated[int, typer.Option(help="Floor of a selection.")] = 64,
    recent: Annotated[int, typer.Option(help="Recent keys that index=full always takes.")] = 64,
    block_size: Annotated[
        int, typer.Option(help="Tokens that decode selects together: 1, 16, 32, 64.")
    ] = 1,
    prefill: Annotated[Prefill, typer.Option(help="Prefill of retrieval heads.")] = Prefill.dense,
    share_index_keys: Annotated[
        bool, typer.Option("--share-index-keys", help="One index key a KV head.")
    ] = False,
    index_bits: Annotated[
        int, typer.Option(help="Bits of an index-key dimension in the cache: 16, 8, 4.")
    ] = 16,
    refine: Annotated[
        bool, typer.Option("--refine", help="Score what 8 or 4 bits select again in 16.")
    ] = False,
    select_from: SelectFromOption = None,
    exact_sets: Annotated[
        bool, typer.Option("--exact-sets", help="Decode on CUDA selects the smallest sets.")
    ] = False,
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 32768,
    sequences: Annotated[int, typer.Option(help="Training sequences of each stage.")] = 600,
    index_steps: Annotated[int, typer.Option(help="Steps of stage 1, 0 for none.")] = 600,
    index_lr: Annotated[float, typer.Option(help="Peak learning rate of stage 1.")] = 1e-3,
    rows: Annotated[int, typer.Option(help="Rows sampled from a sequence.")] = 512,
    distill_steps: Annotated[int, typer.Option(help="Steps of stage 2, 0 for none.")] = 600,
    distill_lr: Annotated[float, typer.Option(help="Learning rate of stage 2.")] = 3e-6,
    batch_size: Annotated[int, typer.Option(help="Sequences a step of stage 2.")] = 8,
    lora: Annotated[
        int, typer.Option(help="Rank of a LoRA for stage 2, 0 trains all weights.")
    ] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16 autocast.")] = False,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints and metrics; the same command resumes from it."),
    ] = None,
    texts: TextsOption = None,
    dtype: DTypeOption = DType.float32,
    seed: SeedOption = 0,
) -> None:
    """Make a model sparse, train its index, distil it, and save it."""
    config = rtpurbo.RTPurboConfig(
        heads=rtpurbo.HeadMap.load(heads) if heads is not None else NO_MAP_YET,
        window=window,
        sinks=sinks,
        index_dim=index_dim,
        index=index.value,
        top_p=top_p,
        min_tokens=min_tokens,
        recent=recent,
        block_size=block_size,
        prefill=prefill.value,
        share_index_keys=share_index_keys,
        index_bits=index_bits,
        refine=refine,
        select_from=select_from,
        exact_sets=exact_sets,
    )
    check_destination(output)
    for folder in (output.absolute().parent, work):
        if folder is not None:
            check_folder(folder)
    documents = read_texts(texts) or rtpurbo.data.prose()
    network, tokenizer = load_to_adapt(model, dtype)
    if heads is None:
        with progress_bar(console, "detecting heads") as tick:
            found = rtpurbo.detect_heads(
                network, tokenizer, documents=documents, share=share, seed=seed,
                length=min(length, 8192), progress=tick,
            )  # fmt: skip
        config = replace(config, heads=found)
    rtpurbo.sparsify(network, config)
    precision: Any = "bf16" if bf16 else "no"
    if index_steps:
        tokens = rtpurbo.data.retrieval_sequences(tokenizer, documents, length, sequences, seed)
        result = rtpurbo.train_index(
            network,
            tokens,
            steps=index_steps,
            lr=index_lr,
            rows=rows,
            mixed_precision=precision,
            output_dir=work and work / "index",
            seed=seed,
        )
        console.print(figures_table("Stage 1", result.metrics))
    if distill_steps:
        samples = rtpurbo.data.excerpts(tokenizer, documents, length, sequences, seed)
        result = rtpurbo.distill(
            network,
            samples,
            steps=distill_steps,
            lr=distill_lr,
            lora=lora or None,
            batch_size=batch_size,
            mixed_precision=precision,
            output_dir=work and work / "distill",
            seed=seed,
        )
        console.print(figures_table("Stage 2", result.metrics))
    rtpurbo.save_pretrained(network, output, tokenizer)
    console.print(f"Sparse model written to {output}")

"""The commands of `rtpurbo`: detect, adapt, eval, generate, bench, demo, info."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

import rtpurbo
from rtpurbo.checkpoint import MANIFEST, check_destination, read_manifest
from rtpurbo.console import progress_bar
from rtpurbo.device import checked_device
from rtpurbo.environment import environment
from rtpurbo.evaluate.run import check_sizes
from rtpurbo.files import write_json, write_text
from rtpurbo.heads import check_choice
from rtpurbo.loading import load_dense
from rtpurbo.outputs import check_file, check_folder
from rtpurbo.plots import check_picture
from rtpurbo.units import human_bytes

app = typer.Typer(
    help="Turn a full-attention Hugging Face model into a sparse one, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
_NO_MAP_YET = rtpurbo.HeadMap.from_roles([[True]])


class DType(StrEnum):
    """Element types of loaded weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class IndexForm(StrEnum):
    """Forms of the index; see RTPurboConfig."""

    beyond_window = "beyond_window"
    full = "full"


class Prefill(StrEnum):
    """How retrieval heads prefill."""

    dense = "dense"
    sparse = "sparse"


class Mode(StrEnum):
    """How a model is evaluated."""

    dense = "dense"
    sparse = "sparse"


ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a model.")]
TextsOption = Annotated[
    list[Path] | None,
    typer.Option("--texts", help="Text files to use, repeatable [default: prose of this machine]."),
]
DTypeOption = Annotated[DType, typer.Option(help="Element type of the weights.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]


@app.command()
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
    _check_files(output, rtp_llm, picture=plot)
    if duo_attention is not None:
        check_folder(duo_attention)
    given = _read(texts)
    network, tokenizer = _load_to_adapt(model, dtype)
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
    console.print(_stability(heads))
    written = [path for path in (output, plot, rtp_llm, duo_attention) if path is not None]
    console.print(f"{heads!r}, written to {', '.join(map(str, written))}")


@app.command()
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
        heads=rtpurbo.HeadMap.load(heads) if heads is not None else _NO_MAP_YET,
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
    )
    check_destination(output)
    for folder in (output.absolute().parent, work):
        if folder is not None:
            check_folder(folder)
    documents = _read(texts) or rtpurbo.data.prose()
    network, tokenizer = _load_to_adapt(model, dtype)
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
        console.print(_figures("Stage 1", result.metrics))
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
        console.print(_figures("Stage 2", result.metrics))
    rtpurbo.save_pretrained(network, output, tokenizer)
    console.print(f"Sparse model written to {output}")


@app.command("eval")
def eval_command(
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
    _check_files(output, markdown, picture=plot)
    place = checked_device(device)
    documents = _read(texts)
    network, tokenizer = _load(model, dtype, place)
    teacher = load_dense(reference, _type(dtype))[0].to(place) if reference else None
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


@app.command()
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
    seed: SeedOption = 0,
) -> None:
    """Continue a prompt, and say what was attended to."""
    from transformers import TextStreamer

    text = _prompt(prompt, file)
    place = checked_device(device)
    network, tokenizer = _load(model, dtype, place)
    if chat and not tokenizer.chat_template:
        _fail(f"--chat needs a chat template, and the tokenizer of {model} has none; leave it out")
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
        console.print(_last_forward(rtpurbo.stats(network)))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks [default: all].")] = None,
    repeats: Annotated[int, typer.Option(help="Runs, of which the median counts.")] = 3,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Results, JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Times over keys, .png or .svg.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only cases with these parameters, NAME=VALUE.")
    ] = None,
    baselines: Annotated[list[str] | None, typer.Option(help="Only against these.")] = None,
) -> None:
    """Run the operator benchmarks of a source checkout."""
    root = Path(rtpurbo.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        _fail("the benchmarks come with a source checkout; clone the repository and `make bench`")
    _check_files(output, picture=plot)
    command = [sys.executable, "-m", "benchmarks", *(names or []), "--repeats", str(repeats)]
    if output is not None:
        command += ["--output", str(output.resolve())]
    if plot is not None:
        command += ["--plot", str(plot.resolve())]
    if where:
        command += ["--where", *where]
    if baselines:
        command += ["--baselines", *baselines]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Your own model [default: SmolLM2-135M, 32K].")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A short run.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all files.")] = Path(
        "out/demo"
    ),
    cache: Annotated[
        Path | None, typer.Option(help="Where the download is kept [default: ~/.cache/rtpurbo].")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Run the whole method on a small real model, start to finish."""
    from rtpurbo.demo import FAST, FULL, run

    run(FAST if fast else FULL, model=model, output=output, cache=cache, seed=seed, console=console)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="A sparse model's folder or a head map to describe.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the build and the machine, or what a saved sparse model or head map holds."""
    facts = environment() if model is None else _describe(Path(model))
    if as_json:
        typer.echo(json.dumps(facts, indent=1, default=str))
    else:
        console.print(_figures(model or "rtpurbo", facts))


def _describe(path: Path) -> dict[str, Any]:
    if path.is_file():
        heads = rtpurbo.HeadMap.load(path)
        return {"heads": repr(heads), "model": heads.model_id, "stability": heads.stability}
    if not (path / MANIFEST).is_file():
        _fail(f"{path} is neither a head map nor a folder that rtpurbo.save_pretrained wrote")
    manifest = read_manifest(path)
    config = rtpurbo.RTPurboConfig.from_dict(manifest["config"])
    settings = {k: v for k, v in config.to_dict().items() if k not in ("heads", "format")}
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    return {
        "heads": repr(config.heads),
        "model": manifest["base_model"]["identity"],
        "index trained": manifest["index"]["trained"],
        "size": human_bytes(size),
        **settings,
    }


def _fail(message: str) -> NoReturn:
    typer.echo(f"rtpurbo: {message}", err=True)
    raise typer.Exit(2)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        _fail("give either a PROMPT or --file")
    if file is not None:
        text = file.read_text(encoding="utf-8")
    else:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text:
        _fail("the prompt is empty; give at least a character to continue")
    return text


def _type(dtype: DType) -> torch.dtype:
    return getattr(torch, dtype.value)


def _load(model: str, dtype: DType, device: torch.device) -> tuple[Any, Any]:
    """A saved sparse model, or any other as transformers loads it."""
    if (Path(model) / MANIFEST).is_file():
        network, tokenizer = rtpurbo.from_pretrained(model, dtype=_type(dtype))
        if tokenizer is None:
            _fail(f"{model} was saved without a tokenizer")
    else:
        network, tokenizer = load_dense(model, _type(dtype))
    return network.to(device), tokenizer


def _load_to_adapt(model: str, dtype: DType) -> tuple[Any, Any]:
    if torch.cuda.is_available():
        console.print("`detect` and `adapt` run on the CPU for now; the GPU is not used.")
    return load_dense(model, _type(dtype))


def _check_files(*files: Path | None, picture: Path | None = None) -> None:
    for path in (*files, picture):
        if path is not None:
            check_file(path)
    if picture is not None:
        check_picture(picture)


def _read(texts: list[Path] | None) -> list[str] | None:
    return [path.read_text(encoding="utf-8") for path in texts] if texts else None


def _figures(title: str, figures: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in figures.items():
        table.add_row(str(name), f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def _stability(heads: rtpurbo.HeadMap) -> Table:
    """How far documents and lengths agree on the heads."""
    table = Table("between", "rank correlation", "overlap of the retrieval heads")
    for what in ("documents", "lengths"):
        agreement = heads.stability[what]
        table.add_row(what, f"{agreement['rank_correlation']:.2f}", f"{agreement['overlap']:.2f}")
    return table


def _last_forward(seen: dict[str, Any]) -> str:
    held = seen["kv_bytes"] + seen["index_bytes"]
    return (
        f"last step: {seen['attended_tokens']:,.0f} of {seen['keys']:,} keys attended, cache "
        f"{human_bytes(held)} against {human_bytes(seen['dense_bytes'])} dense"
    )

"""`make demo`: the whole method on a real model, from its dense weights to a saved sparse model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import rtpurbo
from rtpurbo.adapt import TrainResult
from rtpurbo.checkpoint import check_destination
from rtpurbo.console import progress_bar
from rtpurbo.environment import environment
from rtpurbo.evaluate import EvalReport, evaluate
from rtpurbo.files import write_json, write_text
from rtpurbo.loading import load_dense
from rtpurbo.outputs import check_folder
from rtpurbo.units import human_bytes

_ASSETS = Path(__file__).resolve().parents[1] / "assets" / "smollm2-135m-32k"
_QUESTION = "In two sentences: why does a long text make a language model slow?"


@dataclass(frozen=True)
class Plan:
    """Sizes of a demo.

    Attributes:
        detect_length, detect_documents: of the head detection.
        index_length, index_sequences, index_steps, updates: stage 1: `updates` steps on each run
            of the frozen model over a sequence.
        distill_length, distill_steps: stage 2, one sequence a step.
        distill_lr: its rate; above the paper's 3e-6, because there are so few steps.
        kl_length, kl_texts: the texts on which stage 2 is judged, never trained on.
        needles: prompts a task by length.
        window_divisor: the window is a length divided by this, 1024 at 8K as 8192 at 64K.
    """

    detect_length: int
    detect_documents: int
    index_length: int
    index_sequences: int
    index_steps: int
    updates: int
    distill_length: int
    distill_steps: int
    distill_lr: float
    kl_length: int
    kl_texts: int
    needles: dict[int, int] = field(default_factory=dict)
    window_divisor: int = 8


FULL = Plan(
    detect_length=4096,
    detect_documents=2,
    index_length=4096,
    index_sequences=6,
    index_steps=40,
    updates=8,
    distill_length=2048,
    distill_steps=12,
    distill_lr=1e-5,
    kl_length=2048,
    kl_texts=2,
    needles={2048: 3, 4096: 1, 8192: 1},
)
FAST = Plan(
    detect_length=2048,
    detect_documents=1,
    index_length=2048,
    index_sequences=4,
    index_steps=24,
    updates=8,
    distill_length=1024,
    distill_steps=3,
    distill_lr=1e-5,
    kl_length=1024,
    kl_texts=1,
    needles={2048: 1},
)


def run(
    plan: Plan = FULL,
    *,
    model: str | None = None,
    output: str | Path = "out/demo",
    cache: str | Path | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo and returns its figures, which also go to `output`/demo.json.

    Args:
        plan: FULL (12 minutes on 2 cores), FAST (3 minutes) or sizes of one's own.
        model: folder or Hub id; default: SmolLM2-135M-Instruct with a 32K context.
        output: receives heads.json, heads.png, index.png, report.json, report.md, demo.json and the
            sparse model in model/.
        cache: where the downloaded weights are kept; default: $XDG_CACHE_HOME/rtpurbo.
    """
    console = console or Console()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(output)
    check_folder(folder)
    check_destination(folder / "model")
    steps = _Steps(console)

    with steps("Load the model"):
        network, tokenizer = _load(model, cache)
        plan = _fit(plan, network)
        texts = rtpurbo.data.prose()
        sizes = network.config
        console.print(
            f"  {sizes.name_or_path or model}: {sizes.num_hidden_layers} layers, "
            f"{sizes.num_attention_heads} query heads, {sizes.num_key_value_heads} KV heads; "
            f"{network.num_parameters() / 1e6:.0f}M parameters, {torch.get_num_threads()} threads"
        )
        console.print(f"  prose: {len(texts)} documents; {rtpurbo.data.SOURCES['cpython']}")

    with steps("Find the retrieval heads"), progress_bar(console, "  documents") as tick:
        heads = rtpurbo.detect_heads(
            network,
            tokenizer,
            documents=texts,
            length=plan.detect_length,
            num_documents=plan.detect_documents,
            seed=seed,
            progress=tick,
        )
    heads.save(folder / "heads.json")
    heads.plot(folder / "heads.png")
    full = heads.roles.unflatten(1, (sizes.num_key_value_heads, -1)).any(-1)
    console.print(
        f"  {heads!r}; {int(full.sum())} of {full.numel()} KV heads hold one, the others keep "
        "only sinks and window"
    )

    with steps("Make the model sparse, train the index (stage 1)"):
        window = plan.index_length // plan.window_divisor
        rtpurbo.sparsify(network, rtpurbo.RTPurboConfig(heads=heads, window=window))
        index = rtpurbo.train_index(
            network,
            rtpurbo.data.retrieval_sequences(
                tokenizer, texts, plan.index_length, plan.index_sequences, seed
            ),
            steps=plan.index_steps,
            updates=plan.updates,
            lr=3e-3,
            rows=256,
            seed=seed,
        )
        from rtpurbo.plots import plot_training

        plot_training(index, folder / "index.png")

    with steps("Ask needles of the dense model"), progress_bar(console, "  needles") as tick:
        dense = _needles(network, tokenizer, plan, "dense", seed, tick)

    with steps("Distil (stage 2)"):
        before = _text_kl(network, tokenizer, plan, seed)
        distilled = _distill(network, tokenizer, texts, plan, seed)
        after = _text_kl(network, tokenizer, plan, seed, original=_load(model, cache)[0])

    with steps("Ask needles of the sparse model"), progress_bar(console, "  needles") as tick:
        sparse = _needles(network, tokenizer, plan, "sparse", seed, tick)

    with steps("Generate, save, load again"):
        answer = _generate(network, tokenizer, console)
        rtpurbo.save_pretrained(network, folder / "model", tokenizer)
        again, _ = rtpurbo.from_pretrained(folder / "model")
        if _generate(again, tokenizer) != answer:
            raise RuntimeError("rtpurbo.demo: the loaded model answers differently")
        console.print("  the loaded model gives the same answer")

    report = EvalReport([*dense.rows, *sparse.rows], sparse.model_id, sparse.settings)
    report.save(folder / "report.json")
    write_text(folder / "report.md", report.to_markdown() + "\n")
    figures = {
        "seconds": steps.seconds,
        "total_seconds": sum(steps.seconds.values()),
        "retrieval_heads": int(heads.roles.sum()),
        "stability": heads.stability,
        "stage_1": index.metrics,
        "stage_2": {**distilled.metrics, "kl_before": before, "kl_after": after},
        "needles": [_needle_figures(report, length) for length in plan.needles],
        "environment": environment(),
    }
    write_json(folder / "demo.json", figures)
    console.print(_summary(report, plan, figures))
    _say_files(console, folder, sum(steps.seconds.values()))
    return figures


def _load(model: str | None, cache: str | Path | None) -> tuple[Any, Any]:
    if model is not None:
        return load_dense(model)
    from rtpurbo.testbed import fetch_smollm2, load_smollm2_32k

    if not _ASSETS.is_dir():
        raise FileNotFoundError(
            f"rtpurbo.demo: {_ASSETS} is missing; it comes with a source checkout. Clone the "
            "repository, or give a model of your own with --model"
        )
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return load_smollm2_32k(_ASSETS, fetch_smollm2(cache or home / "rtpurbo"))


def _fit(plan: Plan, network: Any) -> Plan:
    """The plan without lengths beyond the model's context."""
    context = getattr(network.config, "max_position_embeddings", None) or max(plan.needles)
    if context >= max(plan.needles):
        return plan
    needles = {length: count for length, count in plan.needles.items() if length <= context}
    if not needles:
        raise ValueError(
            f"rtpurbo.demo: the model's context must hold {min(plan.needles)} tokens, got {context}"
        )
    return replace(
        plan,
        needles=needles,
        **{
            name: min(getattr(plan, name), context)
            for name in ("detect_length", "index_length", "distill_length", "kl_length")
        },
    )


def _needles(
    network: Any, tokenizer: Any, plan: Plan, mode: str, seed: int, tick: Callable[..., None]
) -> EvalReport:
    """NIAH and one of eight needles, at every length of the plan."""
    total = 2 * sum(plan.needles.values())
    reports: list[EvalReport] = []
    for length, prompts in plan.needles.items():
        asked = 2 * sum(report.rows[0].samples for report in reports)

        def progress(label: str, done: int, _: int, asked: int = asked) -> None:
            tick(asked + done, total, f"  {label}")

        reports.append(
            evaluate(
                network,
                tokenizer,
                ("niah", "mk8"),
                (length,),
                prompts=prompts,
                seeds=(seed,),
                window_divisor=plan.window_divisor,
                modes=(mode,),
                progress=progress,
            )
        )
    rows = [row for report in reports for row in report.rows]
    return EvalReport(rows, reports[-1].model_id, reports[-1].settings)


def _text_kl(network: Any, tokenizer: Any, plan: Plan, seed: int, original: Any = None) -> float:
    """KL of the sparse prefill to the dense model on held-out prose, in nats a token.

    `original`: the dense model, once the weights of `network` are no longer its own.
    """
    report = evaluate(
        network,
        tokenizer,
        ("prefill_kl",),
        (plan.kl_length,),
        seeds=(seed,),
        texts_per_seed=plan.kl_texts,
        window_divisor=plan.window_divisor,
        modes=("sparse",),
        reference=original,
    )
    return report.rows[0].score


def _distill(network: Any, tokenizer: Any, texts: list[str], plan: Plan, seed: int) -> TrainResult:
    from rtpurbo.evaluate.modes import mode

    samples = rtpurbo.data.excerpts(
        tokenizer, texts, plan.distill_length, plan.distill_steps, seed + 1
    )
    with mode(network, "sparse", plan.distill_length // plan.window_divisor):
        return rtpurbo.distill(
            network,
            samples,
            steps=plan.distill_steps,
            lr=plan.distill_lr,
            batch_size=1,
            warmup=plan.distill_steps // 4,
            gradient_checkpointing=False,
            seed=seed,
        )


@torch.no_grad()
def _generate(network: Any, tokenizer: Any, console: Console | None = None) -> str:
    """The greedy answer to the demo's question; printed if there is a console."""
    text = _QUESTION
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    out = network.generate(
        **inputs, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0
    )
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if console is not None:
        console.print(f"  > {_QUESTION}\n  {answer.strip()}", markup=False, highlight=False)
    return answer


class _Steps:
    """Prints the steps of the demo and keeps their seconds."""

    def __init__(self, console: Console):
        self.seconds: dict[str, float] = {}
        self._console = console

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        self._console.print(f"[bold]{len(self.seconds) + 1}. {title}[/bold]")
        began = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - began
        self._console.print(f"  [dim]{self.seconds[title]:.0f} s[/dim]")


def _needle_figures(report: EvalReport, length: int) -> dict[str, Any]:
    """What the summary says about a length, both tasks together."""
    figures: dict[str, Any] = {"length": length}
    for mode in ("dense", "sparse"):
        rows = [report.row(task, length, mode) for task in ("niah", "mk8")]
        asked = sum(row.samples for row in rows)
        figures[mode] = {
            "found": round(sum(row.score * row.samples for row in rows)),
            "asked": asked,
            "attended_tokens": sum((row.attended_tokens or 0) * row.samples for row in rows)
            / asked,
            "attended_fraction": sum((row.attended_fraction or 0) * row.samples for row in rows)
            / asked,
            "cache_bytes": max((row.kv_bytes or 0) + (row.index_bytes or 0) for row in rows),
            "window": rows[0].window,
        }
    return figures


def _summary(report: EvalReport, plan: Plan, figures: dict[str, Any]) -> Table:
    table = Table(title="Dense and sparse", show_lines=True)
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("sparse", justify="right")
    for entry in figures["needles"]:
        dense, sparse = entry["dense"], entry["sparse"]
        size = f"{entry['length'] // 1024}K"
        table.add_row(
            f"needles found, {size} (window {sparse['window']})",
            f"{dense['found']} of {dense['asked']}",
            f"{sparse['found']} of {sparse['asked']}",
        )
        table.add_row(
            f"attended tokens a head in decode, {size}",
            f"{dense['attended_tokens']:,.0f}",
            f"{sparse['attended_tokens']:,.0f} ({sparse['attended_fraction']:.1%})",
        )
        share = sparse["cache_bytes"] / dense["cache_bytes"]
        table.add_row(
            f"KV cache with index keys, {size}",
            human_bytes(dense["cache_bytes"]),
            f"{human_bytes(sparse['cache_bytes'])} ({share:.1%})",
        )
    first, second = figures["stage_1"], figures["stage_2"]
    table.add_row(
        "stage 1: KL of the index, before → after", "0",
        f"{first['kl_before']:.2f} → {first['kl_after']:.2f}",
    )  # fmt: skip
    table.add_row(
        f"stage 2: KL to dense, {plan.kl_length // 1024}K, before → after", "0",
        f"{second['kl_before']:.4f} → {second['kl_after']:.4f}",
    )  # fmt: skip
    return table


def _say_files(console: Console, folder: Path, seconds: float) -> None:
    console.print(f"Done in {seconds / 60:.1f} minutes. In {folder}/:")
    for name, what in (
        ("heads.png", "the head map, a picture"),
        ("heads.json", "the head map"),
        ("index.png", "stage 1's KL over its steps"),
        ("report.md", "needles, attended tokens and bytes; also report.json"),
        ("demo.json", "every figure of this run"),
        ("model", "the sparse model: rtpurbo.from_pretrained"),
    ):
        console.print(f"  {name:<12} {what}", highlight=False)

"""The accuracy figures of the README, on the test bed or on a model of your own.

    python examples/accuracy.py needles --form beyond_window --lengths 4096 8192 --prompts 40
    python examples/accuracy.py distil --length 2048 --window 256 --steps 150

Each writes a JSON report under --output and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

import rtpurbo
from rtpurbo.evaluate import evaluate
from rtpurbo.testbed import fetch_smollm2, load_smollm2_32k

ASSETS = Path(__file__).parent.parent / "assets" / "smollm2-135m-32k"


def load(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any]:
    return load_smollm2_32k(ASSETS, fetch_smollm2(arguments.gguf), dtype)


def show(label: str, done: int, total: int) -> None:
    if done % 20 == 0 or done == total:
        print(f"{label}: {done} of {total}", flush=True)


def found_heads(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> rtpurbo.HeadMap:
    path = arguments.output / "heads.json"
    if path.exists():
        return rtpurbo.HeadMap.load(path)
    heads = rtpurbo.detect_heads(model, tokenizer, length=4096, num_documents=6)
    heads.save(path)
    print(f"retrieval heads: {int(heads.roles.sum())}, stability {heads.stability}", flush=True)
    return heads


def needles(arguments: argparse.Namespace) -> None:
    """NIAH and mk8, dense and sparse, at window length/8, with a freshly trained index."""
    model, tokenizer = load(arguments, torch.bfloat16)
    heads = found_heads(arguments, model, tokenizer)
    train_length = max(arguments.lengths)
    config = rtpurbo.RTPurboConfig(
        heads=heads, window=train_length // 8, index=arguments.form, prefill=arguments.prefill
    )
    rtpurbo.sparsify(model, config)
    texts = rtpurbo.data.prose()
    tokens = rtpurbo.data.retrieval_sequences(
        tokenizer, texts, train_length, arguments.steps // arguments.updates + 1
    )
    result = rtpurbo.train_index(
        model, tokens, steps=arguments.steps, lr=3e-3, rows=256, updates=arguments.updates,
        progress=False,
    )  # fmt: skip
    print(f"index={arguments.form}: {result.metrics}", flush=True)
    report = evaluate(
        model, tokenizer, ["niah", "mk8"], arguments.lengths, prompts=arguments.prompts,
        window_divisor=8, progress=show, modes=arguments.modes,
    )  # fmt: skip
    report.settings["stage 1"] = result.metrics
    report.save(arguments.output / f"needles-{arguments.form}-{arguments.prefill}.json")
    print(report.to_markdown(), flush=True)


def distil(arguments: argparse.Namespace) -> None:
    """KL and loss of held-out prose before and after stage 2, against the original model."""
    model, tokenizer = load(arguments, torch.float32)
    heads = found_heads(arguments, model, tokenizer)
    original = copy.deepcopy(model)
    rtpurbo.sparsify(model, rtpurbo.RTPurboConfig(heads=heads, window=arguments.window))
    measure = {
        "tasks": ["prefill_kl", "prefill_nll", "mk8"], "lengths": [arguments.length],
        "prompts": 20, "texts_per_seed": 8, "seeds": (0, 1),
    }  # fmt: skip
    dense = evaluate(original, tokenizer, **measure)
    before = evaluate(model, tokenizer, reference=original, modes=["sparse"], **measure)
    samples = rtpurbo.data.excerpts(
        tokenizer, rtpurbo.data.prose(["cpython", "torch", "transformers"]), arguments.length,
        arguments.steps,
    )  # fmt: skip
    result = rtpurbo.distill(
        model, samples, steps=arguments.steps, batch_size=1, warmup=arguments.steps // 5,
        gradient_checkpointing=False, mixed_precision=arguments.precision, progress=False,
    )  # fmt: skip
    after = evaluate(model, tokenizer, reference=original, modes=["sparse"], **measure)
    table = {}
    for name, report in (("dense", dense), ("before", before), ("after", after)):
        mode = "dense" if name == "dense" else "sparse"
        table[name] = {t: report.row(t, arguments.length, mode).score for t in measure["tasks"]}
        print(name, table[name], flush=True)
    gap = {n: table[n]["prefill_nll"] - table["dense"]["prefill_nll"] for n in ("before", "after")}
    change = {
        "kl": table["after"]["prefill_kl"] / table["before"]["prefill_kl"] - 1,
        "nll above dense": gap["after"] / gap["before"] - 1,
    }
    print("change", change, result.metrics, flush=True)
    content = {
        "table": table,
        "change": change,
        "loss": result.metrics,
        "settings": vars(arguments),
    }
    path = arguments.output / "distil.json"
    path.write_text(json.dumps(content, indent=2, default=str))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--gguf", type=Path, default=Path("out/smollm2"))
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("needles")
    first.add_argument("--form", choices=["beyond_window", "full"], default="beyond_window")
    first.add_argument("--prefill", choices=["dense", "sparse"], default="dense")
    first.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    first.add_argument("--prompts", type=int, default=40)
    first.add_argument("--steps", type=int, default=120)
    first.add_argument("--updates", type=int, default=4)
    first.add_argument("--modes", nargs="+", default=["dense", "sparse"])
    first.set_defaults(run=needles)
    second = commands.add_parser("distil")
    second.add_argument("--length", type=int, default=2048)
    second.add_argument("--window", type=int, default=256)
    second.add_argument("--steps", type=int, default=150)
    second.add_argument("--precision", choices=["no", "bf16"], default="no")
    second.set_defaults(run=distil)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.run(arguments)


if __name__ == "__main__":
    main()

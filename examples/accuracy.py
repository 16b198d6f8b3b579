"""The accuracy figures of the README, on the test bed or on a model of your own.

    python examples/accuracy.py index --form beyond_window
    python examples/accuracy.py needles --form beyond_window --lengths 4096 8192 --device cuda
    python examples/accuracy.py greedy --device cuda --dtype bfloat16 --length 4096
    python examples/accuracy.py distil --length 2048 --window 256 --steps 150

`index` leaves its figures beside the index under --output; `needles`, `greedy` and `distil` write a
report there, with hardware, versions and arguments. `greedy` fails where the device continues a
prompt differently than the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import rtpurbo
from rtpurbo.environment import environment, hardware
from rtpurbo.evaluate import evaluate
from rtpurbo.files import write_json
from rtpurbo.patching import state
from rtpurbo.testbed import fetch_smollm2, load_smollm2_32k
from rtpurbo.tiles import TILE_RANK

ASSETS = Path(__file__).parent.parent / "assets" / "smollm2-135m-32k"
INDEX: dict[str, Any] = {
    "form": "beyond_window", "top_p": 0.9, "prefill": "dense", "index_bits": 16, "refine": False,
    "train_length": 8192, "steps": 120, "updates": 4,
}  # fmt: skip
"""What `sparse_model` is asked for, unless arguments say otherwise."""


def load(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any]:
    return load_smollm2_32k(ASSETS, fetch_smollm2(arguments.gguf), dtype)


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON, without folders."""
    return {
        k: v for k, v in vars(arguments).items() if isinstance(v, (bool, int, float, str, list))
    }


def save(arguments: argparse.Namespace, name: str, results: Any) -> None:
    """Writes results under --output, with hardware and versions as the files of benchmarks have."""
    where = environment()
    versions = {"python": where["python"], **where["packages"]}
    report = {"hardware": hardware(), "versions": versions, "settings": asked(arguments)}
    write_json(arguments.output / f"{name}.json", {**report, "results": results})


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


def sparse_model(
    arguments: argparse.Namespace, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any, dict[str, Any]]:
    """The model with its index of this form, trained on the CPU unless --output holds it."""
    model, tokenizer = load(arguments, dtype)
    heads = found_heads(arguments, model, tokenizer)
    length = arguments.train_length
    config = rtpurbo.RTPurboConfig(
        heads=heads,
        window=length // 8,
        index=arguments.form,
        prefill=arguments.prefill,
        index_bits=arguments.index_bits,
        refine=arguments.refine,
        select_from=0,
    )
    rtpurbo.sparsify(model, config)
    layers = state(model).index.layers
    path = arguments.output / f"index-{arguments.form}-{length}.safetensors"
    if path.exists():
        with safe_open(path, "pt") as file:
            for number, layer in layers.items():
                for name in layer.tensors():
                    setattr(layer, name, file.get_tensor(f"{number}.{name}"))
            state(model).index.trained = True
            metrics = json.loads(file.metadata()["stage 1"])
            if arguments.prefill == "sparse" and file.metadata().get("tile rank") != TILE_RANK:
                raise SystemExit(
                    f"{path} has thresholds for another ranking of blocks; move it away"
                )
    else:
        tokens = rtpurbo.data.retrieval_sequences(
            tokenizer, rtpurbo.data.prose(), length, arguments.steps // arguments.updates + 1
        )
        metrics = rtpurbo.train_index(
            model, tokens, steps=arguments.steps, lr=3e-3, rows=256, updates=arguments.updates,
            progress=False,
        ).metrics  # fmt: skip
        tensors = {f"{n}.{k}": t for n, layer in layers.items() for k, t in layer.tensors().items()}
        save_file(tensors, path, {"stage 1": json.dumps(metrics), "tile rank": TILE_RANK})
    state(model).config = replace(config, top_p=arguments.top_p)  # after thresholds were set
    print(f"index={arguments.form}, trained at {length}: {metrics}", flush=True)
    return model, tokenizer, metrics


def kind_of(arguments: argparse.Namespace) -> str:
    kind = f"{arguments.form}-{arguments.prefill}-{arguments.index_bits}"
    return kind + "-refined" * arguments.refine


def needles(arguments: argparse.Namespace) -> None:
    """NIAH and mk8, dense and sparse, at window length/8."""
    model, tokenizer, metrics = sparse_model(arguments)
    report = evaluate(
        model.to(arguments.device), tokenizer, arguments.tasks, arguments.lengths,
        prompts=arguments.prompts, seeds=arguments.seeds, window_divisor=8, progress=show,
        modes=arguments.modes,
    )  # fmt: skip
    report.settings.update({"stage 1": metrics, "arguments": asked(arguments)})
    mass = "" if arguments.top_p == INDEX["top_p"] else f"-{arguments.top_p}"
    report.save(arguments.output / f"needles-{kind_of(arguments)}{mass}.json")
    print(report.to_markdown(), flush=True)


def compared(mine: list[int], other: list[int], logits: Tensor, others: Tensor) -> dict[str, Any]:
    """Where two texts part, by what margin of the first one's logits, and how far logits differ."""
    parts = (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b)
    place = next(parts, None)
    common = slice(None if place is None else place + 1)
    difference = float((logits[common] - others[common]).abs().max())
    found: dict[str, Any] = {"equal": place is None, "logit_difference": difference}
    if place is not None:
        margin = logits[place, mine[place]] - logits[place, other[place]]
        found.update(parts_at=place, margin=float(margin))
    return found


def greedy(arguments: argparse.Namespace) -> None:
    """Greedy text on the CPU and on the device, token for token."""
    model, tokenizer, _ = sparse_model(arguments, getattr(torch, arguments.dtype))
    found, length = state(model), arguments.length
    found.config = replace(found.config, window=length // 8)
    prose = rtpurbo.data.prose()
    prompts = rtpurbo.data.excerpts(tokenizer, prose, length, arguments.prompts - 1)
    last = rtpurbo.data.needle_prompts(tokenizer, prose, length, needles=8)[0].tokens
    texts, logits = [], []
    for device in ("cpu", arguments.device):
        model.to(device)
        ids = [torch.as_tensor(prompt, device=device)[None] for prompt in (*prompts, last)]
        options = dict(max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0)
        options |= dict(output_logits=True, return_dict_in_generate=True)
        out = [model.generate(x, attention_mask=torch.ones_like(x), **options) for x in ids]
        texts.append([o.sequences[0, x.shape[1] :].tolist() for o, x in zip(out, ids, strict=True)])
        logits.append([torch.cat(o.logits).float().cpu() for o in out])
        print(device, [tokenizer.decode(text)[:60] for text in texts[-1]], flush=True)
    results = [compared(*pair) for pair in zip(*texts, *logits, strict=True)]
    kind = f"{kind_of(arguments)}-{arguments.dtype}-{arguments.top_p}"
    save(arguments, f"greedy-{kind}-{length}", results)
    equal = sum(result["equal"] for result in results)
    print(f"equal: {equal} of {len(results)} texts of {arguments.tokens} tokens")
    if equal < len(results):
        raise SystemExit(1)


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
        tokenizer, rtpurbo.data.prose(arguments.source), arguments.length, arguments.steps
    )  # fmt: skip
    result = rtpurbo.distill(
        model, samples, steps=arguments.steps, lr=arguments.lr, batch_size=1,
        warmup=arguments.steps // 5,
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
    save(arguments, "distil", {"table": table, "change": change, "loss": result.metrics})


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the folders of the results and of the downloaded model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--gguf", type=Path, default=Path("out/smollm2"))
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(required=True)
    parsers = {}
    for name, run in (("index", sparse_model), ("needles", needles), ("greedy", greedy)):
        parsers[name] = first = commands.add_parser(name)
        first.set_defaults(run=run, **INDEX)
        first.add_argument("--form", choices=["beyond_window", "full"])
        first.add_argument("--top-p", type=float)
        first.add_argument("--prefill", choices=["dense", "sparse"])
        first.add_argument("--index-bits", type=int, choices=[4, 8, 16])
        first.add_argument("--refine", action="store_true", help="score again in 16 bits")
        first.add_argument("--train-length", type=int)
        first.add_argument("--steps", type=int)
        first.add_argument("--updates", type=int)
    for name in ("needles", "greedy"):
        parsers[name].add_argument("--device", default="cpu")
    text = parsers["greedy"]
    text.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    text.set_defaults(top_p=1.0)
    text.add_argument("--length", type=int, default=2048)
    text.add_argument("--prompts", type=int, default=4)
    text.add_argument("--tokens", type=int, default=40)
    first = parsers["needles"]
    first.add_argument("--tasks", nargs="+", default=["niah", "mk8"])
    first.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    first.add_argument("--prompts", type=int, default=40)
    first.add_argument("--seeds", type=int, nargs="+", default=[0])
    first.add_argument("--modes", nargs="+", default=["dense", "sparse"])
    second = commands.add_parser("distil")
    second.add_argument("--length", type=int, default=2048)
    second.add_argument("--window", type=int, default=256)
    second.add_argument("--steps", type=int, default=150)
    second.add_argument("--lr", type=float, default=1e-5)
    second.add_argument("--source", nargs="+", default=["cpython"], help="prose to train on")
    second.add_argument("--precision", choices=["no", "bf16"], default="no")
    second.set_defaults(run=distil)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.run(arguments)


if __name__ == "__main__":
    main()

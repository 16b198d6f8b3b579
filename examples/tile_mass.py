"""The true mass that the lists of sparse prefill keep, of all rows, as the model runs them.

    python examples/accuracy.py index --form beyond_window
    python examples/tile_mass.py --lengths 8192 16384 32768

A row's mass is exp of its log-sum-exp over the listed keys less that over all keys. Thresholds
are those that stage 1 stored, or with `--calibrate` are found anew at each length. Density is the
share of the causal blocks that a tile lists; `near` that of sinks and window, always listed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accuracy import INDEX, parser_of, save, sparse_model
from torch import Tensor

import rtpurbo
from rtpurbo import ops
from rtpurbo.config import RTPurboConfig
from rtpurbo.patching import state
from rtpurbo.tiles import TILE, TILE_BLOCK


class Recorded:
    """Of every retrieval head that ran by lists."""

    def __init__(self) -> None:
        self.mass: list[Tensor] = []
        self.density: list[Tensor] = []

    def figures(self) -> dict[str, float]:
        rows = torch.cat(self.mass).sort().values
        return {
            "mass": float(rows.mean()),
            "worst 5 %": float(rows[: len(rows) // 20].mean()),
            "density": float(torch.cat(self.density).mean()),
        }


def visible_blocks(rows: int) -> Tensor:
    """Of each tile's last row, where no token is cached."""
    last = torch.arange(TILE, rows + TILE, TILE).clamp(max=rows) - 1
    return last // TILE_BLOCK + 1


def near_share(rows: int, config: RTPurboConfig) -> float:
    """Of the blocks that hold sinks, or the window of one of a tile's rows."""
    first = torch.arange(0, rows, TILE)
    sinks = -(-config.sinks // TILE_BLOCK)
    begin = (first - config.near_window + 1).clamp(min=0) // TILE_BLOCK
    visible = visible_blocks(rows)
    return float((visible - (begin - sinks).clamp(min=0)).sum() / visible.sum())


@contextmanager
def recorded() -> Iterator[Recorded]:
    """Every call of `attention` with lists is repeated without them."""
    found, original = Recorded(), ops.attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, heads: list[int], *args: Any, **lists: Any
    ) -> Any:
        out, lse = original(q, k, v, heads, *args, **lists)
        counts = lists.get("block_counts")
        if counts is not None:
            _, every = original(q, k, v, heads, *args)
            found.mass.append((lse - every)[:, heads].exp().float().flatten().cpu())
            visible = visible_blocks(q.shape[2])
            listed = torch.where(counts.cpu() < 0, visible, counts.cpu())
            found.density.append((listed.sum(-1) / visible.sum()).flatten())
        return out, lse

    ops.attention = attention
    try:
        yield found
    finally:
        ops.attention = original


def prefill(model: Any, tokens: list[int]) -> None:
    ids = torch.tensor([tokens], device=model.device)
    with torch.no_grad():
        model.model(input_ids=ids, use_cache=False)


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(**{**INDEX, "prefill": "sparse"})
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--form", choices=["beyond_window", "full"])
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments: argparse.Namespace = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = sparse_model(arguments)
    model.to(arguments.device)
    patched, report = state(model), {}
    held_out, count = rtpurbo.data.prose(split="held_out"), arguments.sequences
    for length in arguments.lengths:
        patched.config = replace(patched.config, window=length // 8)
        if arguments.calibrate:
            made = rtpurbo.data.retrieval_sequences(
                tokenizer, rtpurbo.data.prose(), length, 2, seed=1
            )
            rtpurbo.calibrate(model, made)
        asked = rtpurbo.data.retrieval_sequences(tokenizer, held_out, length, count, seed=2)
        for kind, sequences in (
            ("retrieval", [s.tokens for s in asked]),
            ("prose", rtpurbo.data.excerpts(tokenizer, held_out, length, count, seed=2)),
        ):
            with recorded() as found:
                for tokens in sequences:
                    prefill(model, tokens)
            row = {**found.figures(), "near": near_share(length, patched.config)}
            report[f"{length} {kind}"] = row
            shown = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
            print(f"{length} {kind}: {shown}", flush=True)
    save(arguments, f"tile-mass-{arguments.form}" + "-calibrated" * arguments.calibrate, report)


if __name__ == "__main__":
    main()

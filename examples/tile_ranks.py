"""What the blocks of sparse prefill lose, ranked by exp-sum and by largest logit, on the test bed.

    python examples/accuracy.py index --form beyond_window
    python examples/tile_ranks.py tiles --lengths 4096 8192
    python examples/tile_ranks.py needles --lengths 4096

`tiles` measures the lists of the last tiles of held-out sequences with thresholds calibrated on
others, `needles` the model with each; its way `max-equal` has thresholds that list as many blocks
of prose as sums do. Both read the head map and the index under --output.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from accuracy import INDEX, parser_of, save, show, sparse_model
from torch import Tensor
from torch.nn.functional import pad

import rtpurbo
from rtpurbo import ops
from rtpurbo.adapt.calibrate import _THRESHOLDS, Calibration
from rtpurbo.context import LayerContext
from rtpurbo.evaluate import evaluate
from rtpurbo.patching import observe, state
from rtpurbo.tiles import TILE, TILE_BLOCK, min_tile_blocks

RANKS = ("sum", "max")
# Dense near 1, where the thresholds of block maxima lie: near keys keep their whole mass there,
# far ones only their largest.
GRID = torch.cat([
    1 - torch.logspace(-0.3, -6, 300, dtype=torch.float64),
    torch.tensor(_THRESHOLDS).double(),
]).sort().values  # fmt: skip
TILES = 8
EQUAL = "max-equal"


@contextmanager
def ranked(rank: str) -> Iterator[None]:
    """Tiles are selected by this rank, in the model and in its calibration."""
    original = ops.select_tiles
    ops.select_tiles = lambda *args, **options: original(*args, **{**options, "rank": rank})
    try:
        yield
    finally:
        ops.select_tiles = original


class Tiles:
    """Per rank: true mass of every row, and blocks listed, at every threshold of the grid."""

    def __init__(self) -> None:
        self.mass: dict[str, list[Tensor]] = {rank: [] for rank in RANKS}
        self.listed: dict[str, list[Tensor]] = {rank: [] for rank in RANKS}
        self.forced: list[Tensor] = []

    def observe(self, context: LayerContext, q: Tensor, k: Tensor) -> None:
        config, layer = context.state.config, context.index
        length, heads = q.shape[2], list(range(len(layer.heads)))
        rows = TILES * TILE
        q, k = q[:, layer.heads, -rows:], k[:, context.owners]
        assert context.q_pre is not None and context.k_pre is not None
        q_index, k_index = ops.index_project(
            context.q_pre[:, :, -rows:], context.k_pre, layer.w_q, layer.w_k, layer.heads,
            layer.kv_heads,
        )  # fmt: skip
        scale = context.module.scaling
        true_near = ops.near_lse(q, k, heads, heads, config.near_window, config.sinks, scale)[0]
        k_index = k_index[0, layer.index_map].float()
        for tile in range(TILES):
            here = slice(tile * TILE, (tile + 1) * TILE)
            keys = length - rows + (tile + 1) * TILE
            m, n = torch.arange(keys - TILE, keys)[:, None], torch.arange(keys)
            near = (m - n < config.near_window) | (n < config.sinks)
            true = (q[0, :, here].float() @ k[0, :, :keys].float().mT * scale).masked_fill(
                n > m, -torch.inf
            )
            true_mass = by_block(true.softmax(-1), 0.0).sum(-1)
            seen = q_index[0, :, here].float() @ k_index[:, :keys].mT * k_index.shape[-1] ** -0.5
            near_lse = true_near[:, here]
            if config.index == "full":
                near_lse = seen.masked_fill(~near | (n > m), -torch.inf).logsumexp(-1)
            else:
                seen = seen + layer.offset[:, None, None]
            far = by_block(seen.masked_fill(near | (n > m), -torch.inf), -torch.inf)
            forced = by_block(near & (n <= m), False).any(-1).any(0)
            blocks = len(forced)
            self.forced.append((forced.sum() / blocks).expand(len(heads)))
            for rank in RANKS:
                weight = far.logsumexp(-1) if rank == "sum" else far.amax(-1)
                total = torch.logaddexp(near_lse, weight.logsumexp(-1))
                share = (weight - total[..., None]).exp().mean(1).double()
                base = (near_lse - total).exp().mean(1).double()
                base = base + share[:, forced].sum(-1)
                order = share[:, ~forced].sort(dim=-1, descending=True, stable=True).indices
                pooled = base[:, None] + pad(share[:, ~forced].gather(-1, order).cumsum(-1), (1, 0))
                added = (pooled[:, None] < GRID[:, None]).sum(-1)
                added = added.clamp(min_tile_blocks(config), order.shape[-1])
                added[:, -1] = order.shape[-1]
                kept = true_mass[:, :, ~forced].gather(-1, order[:, None].expand(-1, TILE, -1))
                kept = pad(kept.cumsum(-1), (1, 0)) + true_mass[:, :, forced].sum(-1, keepdim=True)
                kept = kept.gather(-1, added[:, None].expand(-1, TILE, -1))
                self.mass[rank].append(kept.half())
                self.listed[rank].append((added + forced.sum()) / blocks)


def by_block(values: Tensor, fill: float) -> Tensor:
    return pad(values, (0, -values.shape[-1] % TILE_BLOCK), value=fill).unflatten(
        -1, (-1, TILE_BLOCK)
    )


def measure(model: Any, sequences: list[list[int]], calibrations: dict[str, Calibration]) -> Any:
    """[heads, rows, thresholds] of mass, [heads, tiles, thresholds] and [heads, tiles]."""
    found = []
    for tokens in sequences:
        tiles: dict[int, Tiles] = {}

        def look(
            context: LayerContext, q: Tensor, k: Tensor, start: Tensor | None, tiles: Any = tiles
        ) -> None:
            if context.heads:
                tiles.setdefault(context.number, Tiles()).observe(context, q, k)
                for rank, calibration in calibrations.items():
                    with ranked(rank):
                        calibration.observe(context, q, k)

        with torch.no_grad(), observe(model, look):
            model.model(input_ids=torch.tensor([tokens]), use_cache=False)
        found.append(tiles.values())
    result = {
        rank: (
            torch.cat([torch.cat([torch.cat(t.mass[rank], 1) for t in one]) for one in found], 1),
            torch.cat(
                [torch.cat([torch.stack(t.listed[rank], 1) for t in one]) for one in found], 1
            ),
        )
        for rank in RANKS
    }
    forced = torch.cat([torch.cat([torch.stack(t.forced, 1) for t in one]) for one in found], 1)
    return result, float(forced.mean())


def at(mass: Tensor, listed: Tensor, entries: Tensor) -> dict[str, float]:
    """Figures of the lists at one threshold a head."""
    rows = mass.gather(-1, entries[:, None, None].expand(-1, mass.shape[1], 1)).float()
    rows = rows.flatten().sort().values
    blocks = listed.gather(-1, entries[:, None, None].expand(-1, listed.shape[1], 1))
    tail = rows[: len(rows) // 20]
    return {
        "mass": float(rows.mean()), "5 % quantile": float(tail[-1]),
        "worst 5 %": float(tail.mean()), "density": float(blocks.mean()),
    }  # fmt: skip


def least(mass: Tensor, top_p: float) -> Tensor:
    """The least threshold of the grid whose mean mass is top_p, for each head."""
    enough = mass.float().mean(1) >= top_p
    enough[:, -1] = True
    return enough.int().argmax(-1)


def calibrate(model: Any, tokenizer: Any, length: int, count: int) -> tuple[Any, dict[str, Tensor]]:
    """What `measure` gives on sequences of stage 1's kind, and the thresholds that it stores."""
    patched = state(model)
    made = rtpurbo.data.retrieval_sequences(tokenizer, rtpurbo.data.prose(), length, count, seed=1)
    calibrations = {rank: Calibration(patched.config, patched.index) for rank in RANKS}
    measured, _ = measure(model, [s.tokens for s in made], calibrations)
    thresholds = {}
    for rank, calibration in calibrations.items():
        stored = calibration.store()
        layers = patched.index.layers.values()
        thresholds[rank] = torch.cat([layer.threshold for layer in layers]).double()
        here = at(*measured[rank], entries_of(thresholds[rank]))
        print(length, rank, "calibrated:", stored, "again:", here, flush=True)
    return measured, thresholds


def entries_of(thresholds: Tensor) -> Tensor:
    return torch.searchsorted(GRID, thresholds - 1e-9).clamp(max=len(GRID) - 1)


def tiles(arguments: argparse.Namespace) -> None:
    """Mass and density with calibrated thresholds, and at equal mass."""
    model, tokenizer, _ = sparse_model(arguments)
    held_out = rtpurbo.data.prose(split="held_out")
    patched, report = state(model), {}
    first: dict[str, Tensor] = {}
    for length in arguments.lengths:
        patched.config = replace(patched.config, window=length // 8)
        count = arguments.sequences
        calibrated, thresholds = calibrate(model, tokenizer, length, count)
        asked = rtpurbo.data.retrieval_sequences(tokenizer, held_out, length, count, seed=2)
        first = first or thresholds
        tests = {
            "retrieval": [s.tokens for s in asked],
            "prose": rtpurbo.data.excerpts(tokenizer, held_out, length, count, seed=2),
        }
        for kind, sequences in tests.items():
            measured, forced = measure(model, sequences, {})
            for rank in RANKS:
                mass, listed = measured[rank]
                for how, entries in (
                    ("stored", entries_of(thresholds[rank])),
                    (f"stored of {arguments.lengths[0]}", entries_of(first[rank])),
                    ("finely", least(calibrated[rank][0], patched.config.top_p)),
                    ("equal mass", least(mass, patched.config.top_p)),
                ):
                    row = {"forced": forced, **at(mass, listed, entries)}
                    report[f"{length} {kind} {rank} {how}"] = row
                    shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items())
                    print(f"{length} {kind} {rank}, {how}: {shown}", flush=True)
    save(arguments, f"tile-ranks-{arguments.form}", report)


def as_many(model: Any, tokenizer: Any, length: int, thresholds: Tensor) -> Tensor:
    """Thresholds at which heads list as many blocks of prose by maxima as by sums at these."""
    held_out = rtpurbo.data.prose(split="held_out")
    prose = rtpurbo.data.excerpts(tokenizer, held_out, length, 2, seed=5)
    measured, _ = measure(model, prose, {})
    sums, maxima = (measured[rank][1].float().mean(1) for rank in RANKS)
    wanted = sums.gather(-1, entries_of(thresholds)[:, None])
    return GRID[(maxima - wanted).abs().argmin(-1)]


def needles(arguments: argparse.Namespace) -> None:
    """Needles and the KL of the prefill: dense, dense prefill, sparse prefill by either rank."""
    model, tokenizer, _ = sparse_model(arguments)
    patched, report = state(model), {}
    for length in arguments.lengths:
        patched.config = replace(patched.config, window=length // 8)
        _, thresholds = calibrate(model, tokenizer, length, arguments.sequences)
        if EQUAL in arguments.ways:
            thresholds[EQUAL] = as_many(model, tokenizer, length, thresholds["sum"])
        for task, name in product(arguments.tasks, arguments.ways):
            if (task, name) == ("prefill_kl", "dense"):
                continue
            prefill = "sparse" if name in thresholds else "dense"
            patched.config = replace(patched.config, prefill=prefill)
            if name in thresholds:
                parts = thresholds[name].split([len(c.heads) for c in patched.layers if c.heads])
                for layer, part in zip(patched.index.layers.values(), parts, strict=True):
                    layer.threshold.copy_(part)
            with ranked(name[:3]) if name in thresholds else nullcontext():
                found = evaluate(
                    model, tokenizer, [task], [length], prompts=arguments.prompts,
                    seeds=arguments.seeds, texts_per_seed=arguments.texts, window_divisor=8,
                    modes=["dense" if name == "dense" else "sparse"], progress=show,
                )  # fmt: skip
            report[f"{length} {task} {name}"] = found.to_dict()
            print(f"{length} {name}\n{found.to_markdown()}", flush=True)
            save(arguments, f"tile-ranks-needles-{arguments.name}", report)


def main() -> None:
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run in (("tiles", tiles), ("needles", needles)):
        command = commands.add_parser(name)
        command.set_defaults(run=run, **INDEX)
        command.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
        command.add_argument("--form", choices=["beyond_window", "full"])
        command.add_argument("--sequences", type=int, default=2)
    command.add_argument("--ways", nargs="+", default=[*RANKS, "dense-prefill", "dense"])
    command.add_argument("--tasks", nargs="+", default=["niah", "mk8", "prefill_kl"])
    command.add_argument("--prompts", type=int, default=20)
    command.add_argument("--texts", type=int, default=8)
    command.add_argument("--seeds", type=int, nargs="+", default=[0])
    command.add_argument("--name", default="all")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

"""What few bits an index key cost: far tokens, their true mass, and the errors of scores.

    python examples/accuracy.py index --form beyond_window
    python examples/index_bits.py --lengths 8192

Of rows of held-out sequences, dense prefill: those that retrieve, and others at equal distances.
Far keys are all quantised, also what has no whole block yet. Mass is the full attention's on near
keys and the selected ones; `same` the share of what 16 bits select that fewer bits select, too,
`inside` the share among twice as many, which `refine` scores again; `error` the root mean square of
a far key's score less that of 16 bits, before the offset.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from accuracy import INDEX, parser_of, save, sparse_model
from torch import Tensor

import rtpurbo
from rtpurbo import ops
from rtpurbo.context import LayerContext
from rtpurbo.ops.quantize_index import INDEX_BLOCK
from rtpurbo.patching import observe, state

BITS = (16, 8, 4)
ROWS = 48
"""Of each kind, of a sequence."""


class Figures:
    """Of every row of every retrieval head, by name."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, **found: Tensor) -> None:
        for name, values in found.items():
            self.rows.setdefault(name, []).append(values.flatten().float())

    def means(self) -> dict[str, float]:
        all_rows = {name: torch.cat(rows) for name, rows in self.rows.items()}
        found = {name: float(rows.mean()) for name, rows in all_rows.items()}
        found["error"] = found.pop("squared error") ** 0.5
        worst = all_rows["mass"].sort().values
        found["worst 5 %"] = float(worst[: max(1, len(worst) // 20)].mean())
        return found


def rounded(k_index: Tensor, bits: int) -> Tensor:
    """The keys [B, Rk, N, r] as so many bits hold them; the last block is filled up for it."""
    if bits == 16:
        return k_index.float()
    length, dim = k_index.shape[2:]
    missing = -length % INDEX_BLOCK
    filled = torch.cat([k_index, k_index[:, :, -1:].expand(-1, -1, missing, -1)], 2)
    codes, ranges = ops.quantize_index(filled, bits)
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)[..., :dim]
    low, step = ranges.float().repeat_interleave(INDEX_BLOCK, 2).split(dim, -1)
    return (low + step * codes)[:, :, :length]


def look(
    context: LayerContext, q: Tensor, k: Tensor, rows: Tensor, into: dict[int, Figures]
) -> None:
    """Adds the figures of rows [M] of a layer's retrieval heads, for each number of bits."""
    config, layer, length = context.state.config, context.index, k.shape[2]
    assert context.q_pre is not None and context.k_pre is not None
    logits = q[0, context.heads][:, rows].float() @ k[0, context.owners].float().mT
    logits *= context.module.scaling
    n = torch.arange(length)
    visible = n <= rows[:, None]
    near = visible & ((n > rows[:, None] - config.near_window) | (n < config.sinks))
    far = visible & ~near
    attention = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    q_index, k_index = ops.index_project(
        context.q_pre[:, :, rows].float(), context.k_pre.float(), layer.w_q, layer.w_k,
        layer.heads, layer.kv_heads, torch.float16,
    )  # fmt: skip

    def score(bits: int) -> Tensor:
        keys = rounded(k_index, bits)[0, layer.index_map]
        return q_index[0].float() @ keys.mT * q_index.shape[-1] ** -0.5

    scores = {bits: score(bits) for bits in BITS}
    exact = scores[16]
    beyond = config.index == "beyond_window"
    near_lse = (logits if beyond else exact).masked_fill(~near, -torch.inf).logsumexp(-1)

    def select(by: Tensor) -> tuple[Tensor, Tensor]:
        """Which keys, and how many."""
        shifted = by + layer.offset[:, None, None] if beyond else by
        candidates = shifted.masked_fill(~far, -torch.inf).flatten(0, 1)
        members, counts, _ = ops.top_p(
            candidates, config.top_p, config.min_tokens, near_lse.flatten()
        )
        # What pads a list goes to a column of its own.
        chosen = torch.zeros(len(members), length + 1, dtype=torch.bool)
        chosen.scatter_(1, members.long() % (length + 1), True)
        return chosen[:, :length].view_as(attention), counts

    selected = {bits: select(own) for bits, own in scores.items()}
    wanted, _ = selected[16]

    def share(found: Tensor) -> Tensor:
        """Of what 16 bits select."""
        return (found & wanted).sum(-1) / wanted.sum(-1).clamp(min=1)

    for bits, own in scores.items():
        chosen, counts = selected[bits]
        ranks = own.masked_fill(~far, -torch.inf).argsort(-1, descending=True).argsort(-1)
        found = {
            "far tokens": counts,
            "mass": (attention * (chosen | near)).sum(-1),
            "same": share(chosen),
            "inside": share(ranks < 2 * counts.view(*ranks.shape[:2], 1)),
            "squared error": ((own - exact).square() * far).sum(-1) / far.sum(-1),
        }
        into[bits].add(**found)


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(**INDEX)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--form", choices=["beyond_window", "full"])
    parser.add_argument("--sequences", type=int, default=2)
    arguments: argparse.Namespace = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = sparse_model(arguments)
    patched, report = state(model), {}
    prose = rtpurbo.data.prose(split="held_out")
    for length in arguments.lengths:
        patched.config = config = replace(patched.config, window=length // 8)
        first = config.near_window + config.sinks
        kinds = {kind: {bits: Figures() for bits in BITS} for kind in ("retrieval", "other")}
        asked = rtpurbo.data.retrieval_sequences(
            tokenizer, prose, length, arguments.sequences, seed=2
        )
        for sequence in asked:
            found = torch.tensor([row for row in sequence.rows if row > first])
            rows = {
                "retrieval": found[:: max(1, -(-len(found) // ROWS))],
                "other": torch.linspace(first + 1, length - 1, ROWS).long(),
            }

            def see(context: LayerContext, q: Tensor, k: Tensor, start: Tensor | None) -> None:
                for kind, of_kind in rows.items() if context.heads else ():  # noqa: B023
                    look(context, q, k, of_kind, kinds[kind])  # noqa: B023

            with torch.no_grad(), observe(model, see):
                model.model(input_ids=torch.tensor([sequence.tokens]), use_cache=False)
        for kind, by_bits in kinds.items():
            for bits, figures in by_bits.items():
                row = report[f"{length} {kind}, {bits} bits"] = figures.means()
                shown = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
                print(f"{length} {kind}, {bits} bits: {shown}", flush=True)
    save(arguments, f"index-bits-{arguments.form}", report)


if __name__ == "__main__":
    main()

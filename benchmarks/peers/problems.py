"""What a peer's kernel is asked for: tensors, and which keys a row sees."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rtpurbo.tiles import TILE, TILE_BLOCK

TOLERANCE = 0.02
"""Of a row's largest output; rounding of weights and outputs to bfloat16 leaves about a third."""


class Problem(Protocol):
    """q [B, H, M, D], its rows the last ones; k, v [B, Hk, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    def visible(self, batch: int, head: int, rows: Tensor) -> Tensor:
        """Whether each of the rows sees each of the keys: [rows, N]."""


@dataclass
class Windows:
    """Head h of a causal prefill sees the sinks and the latest `reach[h]` keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    reach: list[int]
    sinks: int

    def visible(self, batch: int, head: int, rows: Tensor) -> Tensor:
        key = torch.arange(self.k.shape[2], device=rows.device)
        distance = rows[:, None] - key
        return (distance >= 0) & ((distance < self.reach[head]) | (key < self.sinks))


@dataclass
class Lists:
    """Block lists of a causal prefill as `attention` takes them, each with its tile's own blocks.

    `diagonal`: keys of a row's own block that come after it are visible, too, which is what a
    kernel without a causal mask computes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    diagonal: bool = False

    def visible(self, batch: int, head: int, rows: Tensor) -> Tensor:
        tiles, blocks = rows // TILE, self.k.shape[2] // TILE_BLOCK
        lists, counts = self.indices[batch, head, tiles], self.counts[batch, head, tiles]
        listed = rows.new_zeros((len(rows), blocks + 1), dtype=torch.bool)
        used = torch.arange(lists.shape[1], device=rows.device) < counts[:, None]
        listed.scatter_(1, torch.where(used, lists.long(), blocks), True)
        key = torch.arange(self.k.shape[2], device=rows.device)
        last = rows // TILE_BLOCK * TILE_BLOCK + TILE_BLOCK - 1 if self.diagonal else rows
        return listed[:, :-1].repeat_interleave(TILE_BLOCK, 1) & (key <= last[:, None])


@dataclass
class Token:
    """One decoded token: `heads` see the keys of `chosen` [B, len(heads), N], others the near ones.

    Near are the sinks and the latest `window` keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: list[int]
    chosen: Tensor
    window: int
    sinks: int

    def visible(self, batch: int, head: int, rows: Tensor) -> Tensor:
        if head in self.heads:
            return self.chosen[batch, self.heads.index(head)][None]
        return near_tokens(self.k.shape[2], self.window, self.sinks, rows.device)[None]


def near_tokens(keys: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """Of the last position: bool [keys]."""
    key = torch.arange(keys, device=device)
    return (key >= keys - window) | (key < sinks)


def check(out: Tensor, problem: Problem, most: int = 1024) -> None:
    """Compares `most` rows with SDPA under an explicit mask, float32 throughout.

    Raises:
        RuntimeError: a row of the output is not that of the mask.
    """
    q, k, v = problem.q, problem.k, problem.v
    (batches, heads, length, _), keys = q.shape, k.shape[2]
    if out.shape != q.shape:
        raise RuntimeError(f"the output has shape {list(out.shape)}, not {list(q.shape)}")
    group = heads // k.shape[1]
    rows = torch.linspace(0, length - 1, min(length, most), device=q.device).round().long()
    for batch in {0, batches - 1}:
        for head in range(heads):
            mask = problem.visible(batch, head, rows + keys - length)
            at, of = (batch, head, rows), (batch, head // group)
            query, key, value = (x.float()[None] for x in (q[at], k[of], v[of]))
            expected = sdpa(query, key, value, attn_mask=mask)[0]
            error = (out[at].float() - expected).abs().amax(-1) / expected.abs().amax(-1)
            if not bool((error < TOLERANCE).all()):  # so that NaN fails
                raise RuntimeError(f"head {head} differs from SDPA by {float(error.max()):.3g}")

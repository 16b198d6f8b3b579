"""Scoring and top-p over the far keys, or blocks of them, of every query row."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.masks import last_positions, near, visible
from tests.reference.quantize_index import all_keys
from tests.reference.softmax import log_sum_exp
from tests.reference.top_p import top_p_row


def index_logits(
    q_index: Tensor, k_index: Tensor, index_map: Sequence[int], offset: Tensor | None
) -> Tensor:
    """[B, R, M, N]: r^-0.5 q . k + offset."""
    keys = k_index[:, list(index_map)].double()
    logits = torch.einsum("bjmr,bjnr->bjmn", q_index.double(), keys) * q_index.shape[-1] ** -0.5
    return logits if offset is None else logits + offset.double()[:, None, None]


def select(
    q_index: Tensor,
    k_index: Tensor,
    index_map: Sequence[int],
    p: float,
    window: int,
    sinks: int,
    min_tokens: int,
    block_size: int = 1,
    near_lse: Tensor | None = None,
    offset: Tensor | None = None,
    start: Tensor | None = None,
    capacity: int = 0,
    exact: bool = True,
    codes: Tensor | None = None,
    ranges: Tensor | None = None,
    refine: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = q_index.shape
    every = k_index
    if refine:
        k_index = k_index[:, :, codes.shape[2] :]
    k_index = all_keys(k_index, codes, ranges)
    keys = k_index.shape[2]
    logits = index_logits(q_index, k_index, index_map, offset)
    exact = index_logits(q_index, every, index_map, offset) if refine else None
    positions = last_positions(rows, keys, batch)
    is_near = near(positions, keys, start, window, sinks)
    is_far = visible(positions, keys, start) & ~is_near
    forced = near_lse
    if forced is None:
        forced = log_sum_exp(logits, is_near[:, None].expand_as(logits))
    blocks = -(-keys // block_size)
    floor = -(-min_tokens // block_size)
    columns = capacity or blocks
    indices = torch.full((batch, heads, rows, columns), -1, dtype=torch.int32)
    counts = torch.zeros(batch, heads, rows, dtype=torch.int32)
    mass = torch.ones(batch, heads, rows, dtype=torch.float64)
    for b in range(batch):
        for j in range(heads):
            for row in range(rows):
                scores = block_scores(logits[b, j, row], is_far[b, row], block_size)
                chosen, share = top_p_row(scores, p, floor, float(forced[b, j, row]))
                if exact is not None and p < 1 and not math.isnan(share):
                    chosen, share = refined_row(
                        scores, exact[b, j, row], p, floor, float(forced[b, j, row]), len(chosen)
                    )
                mass[b, j, row] = share
                counts[b, j, row] = len(chosen) if len(chosen) <= columns else -1
                if len(chosen) <= columns:
                    indices[b, j, row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return indices, counts, mass


def refined_row(
    scores: Tensor, exact: Tensor, p: float, floor: int, forced: float, count: int
) -> tuple[list[int], float]:
    """The choice by exact logits among the 2 `count` best by scores."""
    again, left_out = scored_again(scores, exact, count)
    return top_p_row(again, p, floor, forced, left_out)


def scored_again(scores: Tensor, exact: Tensor, count: int) -> tuple[Tensor, float]:
    """Exact logits of the 2 `count` best, -inf for others, and the log-mass of those by scores."""
    best = scores.argsort(descending=True, stable=True)[: 2 * count]
    again = torch.full_like(scores, -torch.inf)
    again[best] = exact[best]
    again[scores == -torch.inf] = -torch.inf
    rest = scores.index_fill(0, best, -torch.inf)
    return again, float(log_sum_exp(rest, rest > -torch.inf))


def block_scores(logits: Tensor, seen: Tensor, block_size: int) -> Tensor:
    """Log of the exp-sum of the keys seen in each block, -inf for a block without any."""
    keys = logits.shape[0]
    parts = [slice(n, n + block_size) for n in range(0, keys, block_size)]
    return torch.stack([log_sum_exp(logits[part], seen[part]) for part in parts])

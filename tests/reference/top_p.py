"""The smallest set that holds a share p of the softmax mass, by a stable sort of each row."""

import math

import torch
from torch import Tensor


def top_p_row(
    scores: Tensor, p: float, min_members: int, forced_lse: float, left_out_lse: float = -math.inf
) -> tuple[list[int], float]:
    """Selected positions of one row, ascending, and the recovered share.

    A mass of exp(left_out_lse) counts in the whole and cannot be selected.
    """
    candidates = (scores != -math.inf).nonzero()[:, 0]
    values = torch.cat([scores[candidates], scores.new_tensor([forced_lse, left_out_lse])])
    if values.isnan().any() or (values == math.inf).any():
        return candidates.tolist(), math.nan
    if values.max() == -math.inf:
        return [], 1.0
    weights = (values - values.max()).exp()
    total = weights.sum()
    order = scores[candidates].argsort(descending=True, stable=True)
    # The mass before each member, and that of all.
    reached = torch.cat([weights[-2:-1], weights[order]]).cumsum(0)
    missing = reached[:-1] < p * total
    joins = missing | (torch.arange(len(order)) < min_members) | (p >= 1)
    count = int(joins.sum())
    return candidates[order[:count]].sort().values.tolist(), (reached[count] / total).item()


def top_p(
    scores: Tensor,
    p: float,
    min_members: int = 0,
    forced_lse: Tensor | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = scores.shape
    indices = torch.full((rows, n), -1, dtype=torch.int32)
    counts = torch.zeros(rows, dtype=torch.int32)
    mass = torch.ones(rows, dtype=torch.float64)
    for row in range(rows):
        forced = -math.inf if forced_lse is None else float(forced_lse[row])
        chosen, mass[row] = top_p_row(scores[row].double(), p, min_members, forced)
        indices[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        counts[row] = len(chosen)
    return indices, counts, mass

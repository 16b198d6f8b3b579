"""Which keys a query sees: causal from `start` on, near or far."""

import torch
from torch import Tensor


def last_positions(rows: int, keys: int, batch: int) -> Tensor:
    """Positions [B, M] of the queries when they are the last M of N."""
    return torch.arange(keys - rows, keys).expand(batch, rows)


def starts(start: Tensor | None, batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64) if start is None else start


def visible(positions: Tensor, keys: int, start: Tensor | None) -> Tensor:
    """bool [B, M, N]: start <= n <= m."""
    first = starts(start, positions.shape[0])[:, None, None]
    m, n = positions[:, :, None], torch.arange(keys)
    return (first <= n) & (n <= m)


def near(positions: Tensor, keys: int, start: Tensor | None, window: int, sinks: int) -> Tensor:
    """bool [B, M, N]: visible, and n - start < sinks or m - n < window."""
    first = starts(start, positions.shape[0])[:, None, None]
    m, n = positions[:, :, None], torch.arange(keys)
    return visible(positions, keys, start) & ((n - first < sinks) | (m - n < window))

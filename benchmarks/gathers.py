"""Lists of single keys for `decode`: as a model selected them, and as many random ones."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def groups(lists: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """The lists in groups of `size`; the last is filled up from the first lists."""
    return [
        [lists[i % len(lists)] for i in range(begin, begin + size)]
        for begin in range(0, len(lists), size)
    ]


def random_like(lists: Sequence[Tensor], begin: int, end: int) -> list[Tensor]:
    """As many positions in [begin, end) as each list has, ascending."""
    return [
        torch.randperm(end - begin, device=positions.device)[: len(positions)].sort().values + begin
        for positions in lists
    ]


def as_members(lists: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Indices [1, R, 1, C] and counts [1, R, 1] as `decode` takes them."""
    indices = pad_sequence(list(lists), batch_first=True, padding_value=-1).to(torch.int32)
    counts = torch.tensor([len(x) for x in lists], dtype=torch.int32, device=indices.device)
    return indices[None, :, None].contiguous(), counts[None, :, None]


def mean_run(lists: Sequence[Tensor]) -> float:
    """Keys in a stretch of adjacent ones, in the mean over stretches."""
    runs = sum(int((positions.diff() != 1).sum()) + 1 for positions in lists if len(positions))
    return sum(map(len, lists)) / max(runs, 1)

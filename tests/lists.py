"""Ascending lists of picked places, as the operators take blocks and return members."""

import torch
from torch import Tensor


def lists_where(picked: Tensor, padding: int = -1) -> tuple[Tensor, Tensor]:
    """Places int32 [..., C] where bool `picked` [..., C] holds, then padding; and their counts."""
    places = picked.shape[-1]
    order = torch.where(picked, torch.arange(places), places).sort(-1).values
    indices = torch.where(order < places, order, padding).to(torch.int32)
    return indices, picked.sum(-1, dtype=torch.int32)

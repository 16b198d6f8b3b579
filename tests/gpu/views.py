"""Views whose strides and offsets survive the way to the device; .cuda() would pack them."""

from typing import Any

import torch
from torch import Tensor


def to_cuda(view: Tensor) -> Tensor:
    """The same view of a copy of its storage on the device."""
    storage = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    return storage.cuda().as_strided(view.shape, view.stride(), view.storage_offset())


def on_cuda(value: Any) -> Any:
    """`value`, or a list, tuple or dict of values, with every tensor on the device."""
    if isinstance(value, Tensor):
        return to_cuda(value)
    if isinstance(value, list | tuple):
        return type(value)(on_cuda(item) for item in value)
    if isinstance(value, dict):
        return {name: on_cuda(item) for name, item in value.items()}
    return value


def draw_features(rng, generator, batch, heads, rows, dim, dtype, before=3, behind=2):
    """[B, H, M, D]: contiguous, as Hugging Face lays it out, or cut out of something larger, in
    which `before` and `behind` elements are around a row.
    """
    layout = rng.choice(["plain", "transposed", "cut"])
    if layout == "plain":
        return torch.randn(batch, heads, rows, dim, generator=generator).to(dtype)
    if layout == "transposed":
        return torch.randn(batch, rows, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    wide = torch.randn(batch, heads + 1, rows + 2, before + dim + behind, generator=generator)
    return wide.to(dtype)[:, 1:, 1 : rows + 1, before : before + dim]

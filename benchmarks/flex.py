"""flex_attention, compiled, with a window and sinks for some heads and everything for others."""

from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

FLEX_BLOCK = 128


class Flex:
    """A call computes the attention. The block mask is made by the first one and kept.

    Row m sees the sinks and the latest `reach[h]` keys; as many as there are make head h dense.
    Reaches are data of the mask, so that all masks of one length share a compiled kernel.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, reach: Tensor, sinks: int) -> None:
        self.qkv, self.reach, self.sinks = (q, k, v), reach, sinks

    def __call__(self) -> Tensor:
        return compiled()(*self.qkv, block_mask=self.mask, enable_gqa=True)

    @cached_property
    def mask(self) -> BlockMask:
        return block_mask(self.reach, self.qkv[0].shape[2], self.sinks)


@cache
def compiled() -> Any:
    torch._dynamo.config.recompile_limit = 64  # each length is compiled for itself
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def block_mask(reach: Tensor, keys: int, sinks: int) -> BlockMask:
    """From the blocks' borders, without a look at single pairs: O((keys / 128)^2) a head."""

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & ((row - key < reach[head]) | (key < sinks))

    first = torch.arange(0, keys, FLEX_BLOCK, device=reach.device)
    row, key = first[:, None], first
    heads = reach[:, None, None]
    past = key < row
    nearest = row - (key + FLEX_BLOCK - 1)
    farthest = row + FLEX_BLOCK - 1 - key
    full = past & (farthest < heads)
    touched = (key == row) | (past & ((nearest < heads) | (key < sinks)))
    return BlockMask.from_kv_blocks(
        *ordered(touched & ~full),
        *ordered(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        compute_q_blocks=False,  # only a gradient reads them
    )


def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [1, H, Q] and indices [1, H, Q, K] of a boolean [H, Q, K], those that count first."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None]

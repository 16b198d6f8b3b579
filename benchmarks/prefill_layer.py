"""The tensors of one prefilled layer, and what runs on them."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.attention import Layer
from benchmarks.flex import Flex
from rtpurbo import ops
from rtpurbo.attention import TILE, TILE_BLOCK, TILE_RANK

SINKS, INDEX_DIM, THRESHOLD, MIN_BLOCKS = 4, 16, 0.9, 4

Lists = tuple[Tensor, Tensor]


class Prefill:
    """q, k, v of `keys` positions, laid out as transformers does."""

    def __init__(self, layer: Layer, keys: int, device: str) -> None:
        self.layer, self.keys, self.device = layer, keys, device
        self.q, self.k, self.v = layer.qkv(keys, keys, torch.bfloat16, device)
        self.retrieval = list(layer.retrieval_heads)
        self.scale = layer.dim**-0.5

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Queries and keys, with logits that spread as after training."""
        shape = 1, len(self.retrieval), self.keys, INDEX_DIM
        q, k = (torch.randn(shape, dtype=torch.float16, device=self.device) for _ in range(2))
        return q * 3, k

    @cached_property
    def threshold(self) -> Tensor:
        return torch.full((len(self.retrieval),), THRESHOLD, device=self.device)

    def flex(self, heads: Sequence[int], window: int) -> Flex:
        """The mask of `attend` without lists."""
        reach = torch.full((self.layer.heads,), window, dtype=torch.int32)
        reach[list(heads)] = self.keys
        return Flex(self.q, self.k, self.v, reach.to(self.device), SINKS)

    def attend(self, heads: Sequence[int], window: int, lists: Lists | None = None) -> Tensor:
        indices, counts = lists or (None, None)
        return ops.attention(
            self.q, self.k, self.v, heads, window, SINKS, self.scale,
            block_indices=indices, block_counts=counts, tile=TILE, block_size=TILE_BLOCK,
        )[0]  # fmt: skip

    def near_lse(self, window: int) -> Tensor:
        group = self.layer.heads // self.layer.kv_heads
        owners = [head // group for head in self.retrieval]
        return ops.near_lse(self.q, self.k, self.retrieval, owners, window, SINKS, self.scale)

    def select_tiles(self, window: int, near_lse: Tensor) -> Lists:
        q_index, k_index = self.index
        indices, counts, _ = ops.select_tiles(
            q_index, k_index, list(range(len(self.retrieval))), self.threshold, window, SINKS,
            MIN_BLOCKS, tile=TILE, block_size=TILE_BLOCK, near_lse=near_lse, rank=TILE_RANK,
        )  # fmt: skip
        return indices, counts

    def sparse(self, window: int, lists: Lists) -> Tensor:
        """As a model does it, but for the lists that it attends to."""
        self.select_tiles(window, self.near_lse(window))
        return self.attend(self.retrieval, window, lists)

"""The tensors of one prefilled layer, and what runs on them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.attention import Layer
from benchmarks.flex import Flex
from benchmarks.masks import dense_pairs, near_pairs
from benchmarks.random_lists import ListPlan
from rtpurbo import ops
from rtpurbo.tiles import TILE, TILE_BLOCK, TILE_RANK, tile_capacity

SINKS, INDEX_DIM, THRESHOLD, MIN_BLOCKS = 4, 16, 0.9, 4

Lists = tuple[Tensor, Tensor]


class Prefill:
    """q, k, v of prompts, given or drawn, laid out as transformers does.

    By default one prompt of `keys` tokens in one pass. `lengths`: of several, padded on the left to
    the longest; `rows`: of the last pass over unpadded prompts, whose other keys are cached.
    """

    def __init__(
        self,
        layer: Layer,
        keys: int,
        device: str,
        qkv: list[Tensor] | None = None,
        *,
        lengths: Sequence[int] = (),
        rows: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.layer, self.keys, self.device = layer, keys, device
        self.lengths = tuple(lengths) or (keys,)
        self.rows = keys if rows is None else rows
        if max(self.lengths) != keys or (self.is_padded and self.rows < keys):
            raise ValueError(
                "benchmarks: the longest prompt must have all keys, and each where rows are fewer, "
                f"got {self.lengths} for {self.rows} rows and {keys} keys"
            )
        self.q, self.k, self.v = qkv or layer.qkv(self.rows, keys, dtype, device, len(self.lengths))
        self.start = None
        if self.is_padded:
            self.start = torch.tensor([keys - n for n in self.lengths], device=device)
        self.retrieval = list(layer.retrieval_heads)
        self.scale = layer.dim**-0.5

    @property
    def is_padded(self) -> bool:
        return min(self.lengths) < self.keys

    def dense_pairs(self) -> int:
        """Of all prompts, as below: pairs of a row and a key that a dense head sees."""
        return sum(dense_pairs(n, min(self.rows, n)) for n in self.lengths)

    def near_pairs(self, window: int) -> int:
        return sum(near_pairs(n, window, SINKS, min(self.rows, n)) for n in self.lengths)

    def plans(self, window: int, share: float) -> list[ListPlan]:
        """Lists of a share of the far pairs; one plan a prompt."""
        return [ListPlan.of_far(n, window, SINKS, share, min(self.rows, n)) for n in self.lengths]

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Queries and keys, with logits that spread as after training."""
        batch, heads = len(self.lengths), len(self.retrieval)
        q, k = (
            torch.randn(batch, heads, n, INDEX_DIM, dtype=torch.float16, device=self.device)
            for n in (self.rows, self.keys)
        )
        return q * 3, k

    @cached_property
    def projections(self) -> tuple[Tensor, Tensor]:
        """w_q and w_k of the retrieval heads, each with an index key of its own."""
        shape = len(self.retrieval), INDEX_DIM, self.layer.dim
        w_q, w_k = (torch.randn(shape, dtype=torch.float16, device=self.device) for _ in "qk")
        return w_q, w_k

    @cached_property
    def threshold(self) -> Tensor:
        return torch.full((len(self.retrieval),), THRESHOLD, device=self.device)

    def role(self, retrieval: bool) -> "Prefill":
        """The retrieval heads alone, or the local ones, with the same keys and values.

        Raises:
            ValueError: KV heads differ in how many of them they have.
        """
        layer = self.layer
        heads = [h for h in range(layer.heads) if (h in self.retrieval) == retrieval]
        group, each = layer.heads // layer.kv_heads, len(heads) // layer.kv_heads
        if [h // group for h in heads] != [kv for kv in range(layer.kv_heads) for _ in range(each)]:
            raise ValueError(
                "benchmarks: layer must have as many retrieval heads on each KV head as on the "
                f"others, got {self.retrieval} of {layer.shape}"
            )
        chosen = torch.tensor(heads, device=self.device)
        q = self.q.transpose(1, 2).index_select(2, chosen).transpose(1, 2)
        own = tuple(range(len(heads))) if retrieval else ()
        alone = replace(layer, heads=len(heads), retrieval_heads=own)
        qkv = [q, self.k, self.v]
        return Prefill(alone, self.keys, self.device, qkv, lengths=self.lengths, rows=self.rows)

    def flex(self, heads: Sequence[int], window: int) -> Flex:
        """The mask of `attend` without lists."""
        reach = torch.full((self.layer.heads,), window, dtype=torch.int32)
        reach[list(heads)] = self.keys
        return Flex(self.q, self.k, self.v, reach.to(self.device), SINKS)

    def attend(self, heads: Sequence[int], window: int, lists: Lists | None = None) -> Tensor:
        indices, counts = lists or (None, None)
        return ops.attention(
            self.q, self.k, self.v, heads, window, SINKS, self.scale, self.start,
            block_indices=indices, block_counts=counts, tile=TILE, block_size=TILE_BLOCK,
        )[0]  # fmt: skip

    def index_project(self) -> tuple[Tensor, Tensor]:
        """Index queries and keys of the pass, of q and k as if before RoPE."""
        heads = self.retrieval, self.layer.owners
        return ops.index_project(self.q, self.k[:, :, -self.rows :], *self.projections, *heads)

    def near_lse(self, window: int) -> Tensor:
        heads = self.retrieval, self.layer.owners
        return ops.near_lse(self.q, self.k, *heads, window, SINKS, self.scale, self.start)

    def select_tiles(self, window: int, near_lse: Tensor | None) -> Lists:
        q_index, k_index = self.index
        indices, counts, _ = ops.select_tiles(
            q_index, k_index, list(range(len(self.retrieval))), self.threshold, window, SINKS,
            MIN_BLOCKS, tile=TILE, block_size=TILE_BLOCK, near_lse=near_lse, start=self.start,
            capacity=tile_capacity(self.keys), rank=TILE_RANK,
        )  # fmt: skip
        return indices, counts

    def sparse(self, window: int, lists: Lists, recent: int | None = None) -> Tensor:
        """As a model does it, but for the lists that it attends to; `recent`: in form `full`."""
        if recent is None:
            self.select_tiles(window, self.near_lse(window))
        else:
            self.select_tiles(recent, None)
        return self.attend(self.retrieval, window, lists)

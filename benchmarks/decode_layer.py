"""The tensors of one decode step of a layer, and what runs on them.

The index picks exactly `selected` far tokens a head (a floor at a tiny p), so that bytes are known.
"""

import torch
from torch import Tensor

from rtpurbo import ops
from rtpurbo.attention import fewest_to_select_from

HEADS, KV_HEADS, DIM, INDEX_DIM = 32, 4, 128, 16
ROW = 2 * DIM * 2  # bytes of a key and its value
RETRIEVAL = [1, 9, 10, 17, 30]
WINDOW, SINKS, SELECTED = 8192, 4, 8192
SCALE = DIM**-0.5
BLOCK = 64  # keys that are quantised together


class Step:
    """The tensors of one decode step and its parts; `shared`: an index key for each KV head."""

    def __init__(
        self,
        batch: int,
        keys: int,
        retrieval: list[int],
        bits: int = 16,
        shared: bool = False,
        selected: int = SELECTED,
    ) -> None:
        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=dtype)

        group = HEADS // KV_HEADS
        owners = [head // group for head in retrieval]
        self.retrieval, self.owners, self.bits = retrieval, owners, bits
        self.index_map = owners if shared else list(range(len(retrieval)))
        self.q = draw(batch, HEADS, 1, DIM)
        self.k, self.v = draw(batch, KV_HEADS, keys, DIM), draw(batch, KV_HEADS, keys, DIM)
        self.q_index = draw(batch, len(retrieval), 1, INDEX_DIM, dtype=torch.float16)
        index_heads = KV_HEADS if shared else len(retrieval)
        self.k_index = draw(batch, index_heads, keys, INDEX_DIM, dtype=torch.float16)
        self.every_index = self.k_index
        self.coded: dict[str, Tensor] = {}
        if bits < 16:
            far = max(0, keys - WINDOW) // BLOCK * BLOCK
            codes, ranges = ops.quantize_index(self.k_index[:, :, :far], bits)
            self.coded = dict(codes=codes, ranges=ranges)
            self.k_index = self.k_index[:, :, far:].contiguous()
        self.floor = min(selected, max(1, keys - WINDOW - SINKS))
        self.near = self.near_lse()
        self.lists = self.select()

    def near_lse(self) -> Tensor:
        return ops.near_lse(self.q, self.k, self.retrieval, self.owners, WINDOW, SINKS, SCALE)

    def select(self) -> tuple[Tensor, Tensor]:
        return self.lists_by(self.k_index)

    def refine(self) -> tuple[Tensor, Tensor]:
        """`select` with codes, and again among twice as many with all keys in 16 bits."""
        return self.lists_by(self.every_index, refine=True)

    def lists_by(self, k_index: Tensor, refine: bool = False) -> tuple[Tensor, Tensor]:
        indices, counts, _ = ops.select(
            self.q_index, k_index, self.index_map, 1e-9, WINDOW, SINKS, self.floor,
            near_lse=self.near, capacity=2 * self.floor, **self.coded, refine=refine,
        )  # fmt: skip
        return indices, counts

    def attend(self) -> Tensor:
        return ops.decode(
            self.q, self.k, self.v, self.retrieval, WINDOW, WINDOW, SINKS, SCALE, *self.lists
        )[0]

    @property
    def selects(self) -> bool:
        """Whether a model would select, rather than read all far keys."""
        batch, _, keys, _ = self.k.shape
        read = len(set(self.owners)) * ROW
        index_key = INDEX_DIM * self.bits // 8
        heads, floor = len(self.retrieval), self.floor * ROW
        fewest = fewest_to_select_from(batch, heads, read, index_key, floor)
        return keys - WINDOW - SINKS >= fewest

    def whole(self) -> Tensor:
        """As a model does it."""
        if self.selects:
            return self.select_and_attend()
        layer = self.q, self.k, self.v, self.retrieval
        return ops.decode(*layer, WINDOW, WINDOW, SINKS, SCALE)[0]

    def bytes(self, part: str) -> int:
        """Keys, values and index keys that a part must read; each list counts for itself."""
        batch, _, keys, _ = self.k.shape
        near, owners = min(keys, WINDOW + SINKS), len(set(self.owners))
        index = self.coded.values() or [self.k_index[:, :, near:]]
        scan = sum(tensor.numel() * tensor.element_size() for tensor in index)
        listed = batch * len(self.retrieval) * self.floor * ROW
        every = {
            "near_lse": batch * owners * near * ROW // 2,
            "select": scan,
            "refine": scan + batch * len(self.retrieval) * 2 * self.floor * INDEX_DIM * 2,
            "attend": batch * KV_HEADS * near * ROW + listed,
            "dense": batch * (owners * keys + (KV_HEADS - owners) * near) * ROW,
        }
        every["sparse_decode"] = every["attend"] + scan
        every["step"] = every["sparse_decode" if self.selects else "dense"]
        return every[part]

    def select_and_attend(self, block_size: int = 1) -> Tensor:
        return ops.sparse_decode(
            self.q, self.k, self.v, self.retrieval, self.q_index, self.k_index, self.index_map,
            1e-9, WINDOW, WINDOW, SINKS, self.floor, SCALE, block_size=block_size, **self.coded,
        )[0]  # fmt: skip

    def fixed_blocks(self) -> Tensor:
        """Quest's budget: as many tokens, in blocks of 16 by their mass under the index."""
        return self.select_and_attend(block_size=16)

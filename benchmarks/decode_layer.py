"""The tensors of one decode step of a layer, and what runs on them.

The index picks exactly `selected` far tokens a head (a floor at a tiny p), so that bytes are known.
"""

from functools import cached_property

import torch
from torch import Tensor

from rtpurbo import ops
from rtpurbo.ops.quantize_index import INDEX_BLOCK
from rtpurbo.short_inputs.decode import fewest_to_select_from

HEADS, KV_HEADS, DIM, INDEX_DIM = 32, 4, 128, 16
ROW = 2 * DIM * 2  # bytes of a key and its value
RETRIEVAL = [1, 9, 10, 17, 30]
WINDOW, SINKS, SELECTED, TINY_P = 8192, 4, 8192, 1e-9
SCALE = DIM**-0.5


class Step:
    """The tensors of one decode step and its parts.

    `shared`: an index key for each KV head; `min_tokens`: the model's, as far as its rule asks,
    where top-p is to take more.
    """

    def __init__(
        self,
        batch: int,
        keys: int,
        retrieval: list[int],
        bits: int = 16,
        shared: bool = False,
        selected: int = SELECTED,
        min_tokens: int | None = None,
        device: str = "cuda",
    ) -> None:
        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

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
            far = max(0, keys - WINDOW) // INDEX_BLOCK * INDEX_BLOCK
            codes, ranges = ops.quantize_index(self.k_index[:, :, :far], bits)
            self.coded = dict(codes=codes, ranges=ranges)
            self.k_index = self.k_index[:, :, far:].contiguous()
        self.floor = min(selected, max(1, keys - WINDOW - SINKS))
        self.min_tokens = self.floor if min_tokens is None else min_tokens
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
            self.q_index, k_index, self.index_map, TINY_P, WINDOW, SINKS, self.floor,
            near_lse=self.near, capacity=2 * self.floor, **self.coded, refine=refine,
        )  # fmt: skip
        return indices, counts

    def refine_and_attend(self) -> Tensor:
        """A step with `refine`, in a launch each."""
        self.near = self.near_lse()
        return self.attend_to(self.refine())

    def scan(self) -> Tensor:
        """The scores of `select` without a choice: p = 1 takes every key, and one has room."""
        _, counts, _ = ops.select(
            self.q_index, self.k_index, self.index_map, 1.0, WINDOW, SINKS, 0,
            near_lse=self.near, capacity=1, **self.coded,
        )  # fmt: skip
        return counts

    @cached_property
    def scores(self) -> Tensor:
        """Of far keys, by index keys in 16 bits: float32 [batch * retrieval heads, far keys]."""
        far = self.every_index[:, self.index_map, SINKS : self.k.shape[2] - WINDOW].float()
        return (self.q_index.float() @ far.mT)[:, :, 0].flatten(0, 1) * INDEX_DIM**-0.5

    def top_p(self) -> Tensor:
        exact = not self.scores.is_cuda  # there it takes a sort
        return ops.top_p(self.scores, TINY_P, self.floor, self.near.flatten(), exact)[0]

    def attend_near(self) -> Tensor:
        """All heads."""
        return ops.decode(self.q, self.k, self.v, [], WINDOW, WINDOW, SINKS, SCALE)[0]

    def gather(self) -> Tensor:
        """`attend` with one near key a head, the fewest there can be."""
        layer = self.q, self.k, self.v, self.retrieval
        return ops.decode(*layer, 1, 1, 0, SCALE, *self.lists)[0]

    def attend(self) -> Tensor:
        return self.attend_to(self.lists)

    def attend_to(self, lists: tuple[Tensor, Tensor]) -> Tensor:
        layer = self.q, self.k, self.v, self.retrieval
        return ops.decode(*layer, WINDOW, WINDOW, SINKS, SCALE, *lists)[0]

    @property
    def selects(self) -> bool:
        """Whether a model would select, rather than read all far keys."""
        batch, _, keys, _ = self.k.shape
        read = len(set(self.owners)) * ROW
        index = len(set(self.index_map)) * INDEX_DIM * self.bits // 8
        heads, tokens = len(self.retrieval), self.min_tokens
        fewest = fewest_to_select_from(batch, heads, read, index, ROW, tokens, sifts=True)
        return keys - WINDOW - SINKS >= fewest

    def whole(self) -> Tensor:
        """As a model does it."""
        if self.selects:
            return self.select_and_attend()
        layer = self.q, self.k, self.v, self.retrieval
        return ops.decode(*layer, WINDOW, WINDOW, SINKS, SCALE)[0]

    def bytes(self, part: str) -> int:
        """Keys, values, index keys or scores that a part must read; each list counts for itself."""
        batch, _, keys, _ = self.k.shape
        near, owners = min(keys, WINDOW + SINKS), len(set(self.owners))
        index = self.coded.values() or [self.k_index[:, :, near:]]
        scan = sum(tensor.numel() * tensor.element_size() for tensor in index)
        every_near = batch * KV_HEADS * near * ROW
        listed = batch * len(self.retrieval) * self.floor * ROW
        every = {
            "near_lse": batch * owners * near * ROW // 2,
            "scan": scan,
            "top_p": batch * len(self.retrieval) * (keys - near) * 4,
            "select": scan,
            "refine": scan + batch * len(self.retrieval) * 2 * self.floor * INDEX_DIM * 2,
            "near": every_near,
            "gather": listed,
            "attend": every_near + listed,
            "dense": batch * (owners * keys + (KV_HEADS - owners) * near) * ROW,
        }
        every["sparse_decode"] = every["attend"] + scan
        every["refined step"] = every["near_lse"] + every["refine"] + every["attend"]
        every["step"] = every["sparse_decode" if self.selects else "dense"]
        return every[part]

    def select_and_attend(self, block_size: int = 1) -> Tensor:
        return ops.sparse_decode(
            self.q, self.k, self.v, self.retrieval, self.q_index, self.k_index, self.index_map,
            TINY_P, WINDOW, WINDOW, SINKS, self.floor, SCALE, block_size=block_size, **self.coded,
        )[0]  # fmt: skip

    def fixed_blocks(self) -> Tensor:
        """Quest's budget: as many tokens, in blocks of 16 by their mass under the index."""
        return self.select_and_attend(block_size=16)

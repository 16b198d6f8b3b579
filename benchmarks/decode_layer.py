"""The tensors of one decode step of a layer, and what runs on them.

The index picks `selected` far tokens a head (a floor at a tiny p), so that bytes are known; without
`exact` also others of about the last one's weight, which the bytes leave out.
"""

from functools import cached_property

import torch
from torch import Tensor

from benchmarks.attention import Layer
from rtpurbo import RTPurboConfig, ops
from rtpurbo.ops.quantize_index import INDEX_BLOCK
from rtpurbo.short_inputs.decode import fewest_to_select_from, memory_rate

LAYER = Layer(32, 4, 128, (1, 9, 10, 17, 30))
INDEX_DIM, WINDOW, SINKS, SELECTED, TINY_P = 16, 8192, 4, 8192, 1e-9


def row_bytes(layer: Layer) -> int:
    """Of a key and its value, in two bytes an element."""
    return 2 * layer.dim * 2


def rounds(layer: Layer, batch: int, keys: int) -> int:
    """How many inputs take turns."""
    size = batch * keys * layer.kv_heads * row_bytes(layer)
    return 6 if size <= 1 << 30 else 3 if size <= 1 << 33 else 1


class Step:
    """The tensors of one decode step and its parts.

    `shared`: an index key for each KV head; `min_tokens`: what the rule is told, `selected` unless
    given; `form`: the index's.
    """

    def __init__(
        self,
        batch: int,
        keys: int,
        layer: Layer = LAYER,
        *,
        bits: int = 16,
        shared: bool = False,
        selected: int = SELECTED,
        min_tokens: int | None = None,
        window: int = WINDOW,
        form: str = "beyond_window",
        device: str = "cuda",
    ) -> None:
        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.layer, self.bits, self.window = layer, bits, window
        self.beyond_window = form == "beyond_window"
        self.near_window = window if self.beyond_window else RTPurboConfig.recent
        self.retrieval, self.scale = list(layer.retrieval_heads), layer.dim**-0.5
        heads = len(self.retrieval)
        self.index_map = layer.owners if shared else list(range(heads))
        self.q = draw(batch, layer.heads, 1, layer.dim)
        self.k, self.v = (draw(batch, layer.kv_heads, keys, layer.dim) for _ in range(2))
        self.q_index = draw(batch, heads, 1, INDEX_DIM, dtype=torch.float16)
        index_heads = layer.kv_heads if shared else heads
        self.k_index = draw(batch, index_heads, keys, INDEX_DIM, dtype=torch.float16)
        self.every_index = self.k_index
        self.coded: dict[str, Tensor] = {}
        if bits < 16:
            far = max(0, keys - self.near_window) // INDEX_BLOCK * INDEX_BLOCK
            codes, ranges = ops.quantize_index(self.k_index[:, :, :far], bits)
            self.coded = dict(codes=codes, ranges=ranges)
            self.k_index = self.k_index[:, :, far:].contiguous()
        self.floor = min(selected, max(1, keys - self.near_window - SINKS))
        self.min_tokens = self.floor if min_tokens is None else min_tokens
        self.near = self.near_lse()
        self.lists = self.lists_by(self.k_index)

    def near_lse(self) -> Tensor:
        heads = self.retrieval, self.layer.owners
        return ops.near_lse(self.q, self.k, *heads, self.near_window, SINKS, self.scale)

    @property
    def near_mass(self) -> Tensor | None:
        """Of the true logits; in form `full` that of the index counts."""
        return self.near if self.beyond_window else None

    @property
    def exact(self) -> bool:
        """As a model selects (`rtpurbo/attention.py`)."""
        return not self.q.is_cuda

    def select(self) -> tuple[Tensor, Tensor]:
        return self.lists_by(self.k_index, exact=self.exact)

    def refine(self) -> tuple[Tensor, Tensor]:
        """`select` with codes, and again among twice as many with all keys in 16 bits."""
        return self.lists_by(self.every_index, refine=True)

    def lists_by(
        self, k_index: Tensor, *, refine: bool = False, exact: bool = True
    ) -> tuple[Tensor, Tensor]:
        indices, counts, _ = ops.select(
            self.q_index, k_index, self.index_map, TINY_P, self.near_window, SINKS, self.floor,
            near_lse=self.near_mass, capacity=2 * self.floor, exact=exact, refine=refine,
            **self.coded,
        )  # fmt: skip
        return indices, counts

    def refine_and_attend(self) -> Tensor:
        """A step with `refine`, in a launch each."""
        self.near = self.near_lse()
        return self.attend_to(self.refine())

    def scan(self) -> Tensor:
        """The scores of `select` without a choice: p = 1 takes every key, and one has room."""
        _, counts, _ = ops.select(
            self.q_index, self.k_index, self.index_map, 1.0, self.near_window, SINKS, 0,
            near_lse=self.near_mass, capacity=1, **self.coded,
        )  # fmt: skip
        return counts

    @cached_property
    def scores(self) -> Tensor:
        """Of far keys, by index keys in 16 bits: float32 [batch * retrieval heads, far keys]."""
        far = self.every_index[:, self.index_map, SINKS : self.k.shape[2] - self.near_window]
        return (self.q_index.float() @ far.float().mT)[:, :, 0].flatten(0, 1) * INDEX_DIM**-0.5

    def top_p(self) -> Tensor:
        return self.top_p_of_scores(self.exact)

    def exact_top_p(self) -> Tensor:
        """On CUDA by a sort."""
        return self.top_p_of_scores(exact=True)

    def top_p_of_scores(self, exact: bool) -> Tensor:
        return ops.top_p(self.scores, TINY_P, self.floor, self.near.flatten(), exact)[0]

    def attend_near(self) -> Tensor:
        """All heads."""
        return self.decoded([])

    def gather(self) -> Tensor:
        """`attend` with one near key a head, the fewest there can be."""
        layer = self.q, self.k, self.v, self.retrieval
        return ops.decode(*layer, 1, 1, 0, self.scale, *self.lists)[0]

    def attend(self) -> Tensor:
        return self.attend_to(self.lists)

    def attend_to(self, lists: tuple[Tensor, Tensor]) -> Tensor:
        return self.decoded(self.retrieval, *lists)

    def decoded(self, retrieval: list[int], *lists: Tensor) -> Tensor:
        layer = self.q, self.k, self.v, retrieval
        return ops.decode(*layer, self.window, self.near_window, SINKS, self.scale, *lists)[0]

    @property
    def selects(self) -> bool:
        """Whether a model would select, rather than read all far keys."""
        (batch, _, keys, dim), row = self.k.shape, row_bytes(self.layer)
        read = len(set(self.layer.owners)) * row
        index = len(set(self.index_map)) * INDEX_DIM * self.bits // 8
        fewest = fewest_to_select_from(
            batch, len(self.retrieval), read, index, row, self.min_tokens,
            sifts=self.beyond_window and dim <= 128, rate=memory_rate(self.q.device),
        )  # fmt: skip
        return keys - self.near_window - SINKS >= fewest

    def whole(self) -> Tensor:
        """As a model does it."""
        if self.selects:
            return self.select_and_attend()
        return self.decoded(self.retrieval)

    def bytes(self, part: str) -> int:
        """Keys, values, index keys or scores that a part must read; each list counts for itself."""
        (batch, kv_heads, keys, _), row = self.k.shape, row_bytes(self.layer)
        near, local = (min(keys, window + SINKS) for window in (self.near_window, self.window))
        owners = len(set(self.layer.owners))
        if self.beyond_window:
            index = [*self.coded.values()] or [self.k_index[:, :, near:]]
        else:
            index = [*self.coded.values(), self.k_index]
        scan = sum(tensor.numel() * tensor.element_size() for tensor in index)
        every_near = batch * kv_heads * local * row
        listed = batch * len(self.retrieval) * self.floor * row
        every = {
            "near_lse": batch * owners * near * row // 2,
            "scan": scan,
            "top_p": batch * len(self.retrieval) * (keys - near) * 4,
            "select": scan,
            "refine": scan + batch * len(self.retrieval) * 2 * self.floor * INDEX_DIM * 2,
            "near": every_near,
            "gather": listed,
            "attend": every_near + listed,
            "dense": batch * (owners * keys + (kv_heads - owners) * local) * row,
        }
        every["sparse_decode"] = every["attend"] + scan
        every["exact sparse_decode"] = every["sparse_decode"]
        every["refined step"] = every["near_lse"] + every["refine"] + every["attend"]
        every["step"] = every["sparse_decode" if self.selects else "dense"]
        return every[part]

    def select_and_attend(self) -> Tensor:
        return self.sparse_decode(self.exact)

    def select_exactly_and_attend(self) -> Tensor:
        return self.sparse_decode(exact=True)

    def sparse_decode(self, exact: bool, block_size: int = 1) -> Tensor:
        return ops.sparse_decode(
            self.q, self.k, self.v, self.retrieval, self.q_index, self.k_index, self.index_map,
            TINY_P, self.window, self.near_window, SINKS, self.floor, self.scale,
            block_size=block_size, beyond_window=self.beyond_window, exact=exact, **self.coded,
        )[0]  # fmt: skip

    def fixed_blocks(self) -> Tensor:
        """Quest's budget: as many tokens, in blocks of 16 by their mass under the index.

        Without `exact` some more, as in `select_and_attend`.
        """
        return self.sparse_decode(self.exact, block_size=16)

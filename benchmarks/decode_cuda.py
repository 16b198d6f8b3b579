"""One decoded token of a layer on the GPU: scan, top-p and sparse attention against dense SDPA.

The index picks exactly `selected` far tokens a head (a floor at a tiny p), so that bytes are known.
Inputs rotate, from 64K on through more memory than the L2 cache holds; times are of graph replays.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.registry import Case, benchmark
from rtpurbo import ops

HEADS, KV_HEADS, DIM, INDEX_DIM = 32, 4, 128, 16
RETRIEVAL = [1, 9, 10, 17, 30]
WINDOW, SINKS, SELECTED = 8192, 4, 8192
SCALE = DIM**-0.5
ROTATED_BYTES = 160e6


class Step:
    """The tensors of one decode step and its parts."""

    def __init__(self, batch: int, keys: int, retrieval: list[int]) -> None:
        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=dtype)

        self.retrieval = retrieval
        self.q = draw(batch, HEADS, 1, DIM)
        self.k, self.v = draw(batch, KV_HEADS, keys, DIM), draw(batch, KV_HEADS, keys, DIM)
        self.q_index = draw(batch, len(retrieval), 1, INDEX_DIM, dtype=torch.float16)
        self.k_index = draw(batch, len(retrieval), keys, INDEX_DIM, dtype=torch.float16)
        self.near = self.near_lse()
        self.lists = self.select()

    def near_lse(self) -> Tensor:
        kv_heads = [head // (HEADS // KV_HEADS) for head in self.retrieval]
        return ops.near_lse(self.q, self.k, self.retrieval, kv_heads, WINDOW, SINKS, SCALE)

    def select(self) -> tuple[Tensor, Tensor]:
        far = max(1, self.k.shape[2] - WINDOW - SINKS)
        heads = list(range(len(self.retrieval)))
        indices, counts, _ = ops.select(
            self.q_index, self.k_index, heads, 1e-9, WINDOW, SINKS, min(SELECTED, far),
            near_lse=self.near, capacity=4 * SELECTED,
        )  # fmt: skip
        return indices, counts

    def attend(self) -> Tensor:
        return ops.decode(
            self.q, self.k, self.v, self.retrieval, WINDOW, WINDOW, SINKS, SCALE, *self.lists
        )[0]

    def whole(self) -> Tensor:
        self.near = self.near_lse()
        self.lists = self.select()
        return self.attend()

    def dense(self, backend: SDPBackend, packed: bool) -> Tensor:
        """`packed`: the query heads of a KV head as rows, which lets a kernel read K once."""
        with sdpa_kernel(backend):
            if not packed:
                return sdpa(self.q, self.k, self.v, enable_gqa=True)
            rows = self.q.view(self.q.shape[0], KV_HEADS, HEADS // KV_HEADS, DIM)
            return sdpa(rows, self.k, self.v)


BASELINES = {
    "flash": (SDPBackend.FLASH_ATTENTION, False),
    "flash, heads as rows": (SDPBackend.FLASH_ATTENTION, True),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, False),
    "cudnn, heads as rows": (SDPBackend.CUDNN_ATTENTION, True),
}
PARTS = {
    "step": Step.whole,
    "near_lse": Step.near_lse,
    "select": Step.select,
    "attend": Step.attend,
}


def all_of(steps: list[Step], call: Callable[[Step], object]) -> Callable[[], object]:
    return lambda: [call(step) for step in steps]


@benchmark
def decode_cuda() -> Iterator[Case]:
    if not torch.cuda.is_available():
        return
    shapes = [(1, 2**i * 1024) for i in (2, 3, 4, 5, 6, 7, 8, 9, 10)] + [
        (4, 131_072),
        (16, 131_072),
    ]
    for batch, keys in shapes:
        index_bytes = batch * len(RETRIEVAL) * keys * INDEX_DIM * 2
        rounds = min(8, max(1, int(ROTATED_BYTES // index_bytes)))
        steps = [Step(batch, keys, RETRIEVAL) for _ in range(rounds)]
        for part, call in PARTS.items():
            yield Case(
                parameters={"part": part, "batch": batch, "keys": keys, "selected": SELECTED},
                run=all_of(steps, call),
                baselines={
                    name: all_of(steps, lambda step, a=a: step.dense(*a))
                    for name, a in BASELINES.items()
                }
                if part == "step"
                else {},
                rounds=len(steps),
                device="cuda",
            )
        del steps
        torch.cuda.empty_cache()

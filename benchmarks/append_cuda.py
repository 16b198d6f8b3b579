"""What a decode step stores of a layer on the GPU, in one launch and in two.

`cache_append_projected` against `index_project` and `cache_append`, which it stands for.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_layer import INDEX_DIM, LAYER, SINKS
from benchmarks.registry import Case, Wanted, benchmark
from rtpurbo import ops

CAPACITY, RING, POSITION = 4096, 1028, 3000
SHAPES = [dict(batch=batch, rows=rows) for rows in (1, 16, 512) for batch in (1, 16, 64)]


class Append:
    """The new tokens of a layer with its cache, whose every KV head but the last is whole."""

    def __init__(self, batch: int, rows: int, device: str) -> None:
        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        dim, retrieval = LAYER.dim, len(LAYER.retrieval_heads)
        self.full = list(range(LAYER.kv_heads - 1))
        new = [draw(batch, LAYER.kv_heads, rows, dim) for _ in range(2)]
        rings = [draw(batch, 1, RING, dim) for _ in range(2)]
        pages = [draw(batch, len(self.full), CAPACITY, dim) for _ in range(2)]
        self.stores = (*new, *rings, *pages, self.full, POSITION, SINKS)
        self.index_pages = draw(batch, retrieval, CAPACITY, INDEX_DIM, dtype=torch.float16)
        pre = [draw(batch, heads, rows, dim) for heads in (LAYER.heads, LAYER.kv_heads)]
        weights = [draw(retrieval, INDEX_DIM, dim, dtype=torch.float32) for _ in range(2)]
        self.projected = (*pre, *weights, LAYER.retrieval_heads, LAYER.owners)

    def together(self) -> Tensor:
        return ops.cache_append_projected(*self.stores, *self.projected, self.index_pages)

    def apart(self) -> Tensor:
        q_index, k_index = ops.index_project(*self.projected, self.index_pages.dtype)
        ops.cache_append(*self.stores, None, k_index, self.index_pages)
        return q_index


def case_of(parameters: dict[str, Any], device: str) -> Case:
    layer = Append(**parameters, device=device)
    return Case(
        parameters=parameters,
        run=layer.together,
        baselines={"index_project, cache_append": layer.apart},
        device=device,
    )


@benchmark
def append_cuda(wanted: Wanted) -> Iterator[Case]:
    if not torch.cuda.is_available():
        return
    for parameters in SHAPES:
        if wanted(parameters):
            yield case_of(parameters, "cuda")

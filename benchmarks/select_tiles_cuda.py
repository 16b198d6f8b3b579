"""Block lists of a whole prefill on the GPU, by exp-sums and by maxima.

`scores` counts the pairs of a row and a key it sees: divided by the time, the rate of the index.
Where `form` is `full` it also sums up the near keys, of which it is given no masses.
The baseline is eager PyTorch for one head, where its N x N scores fit.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.eager import pooled_shares
from benchmarks.prefill_cuda import HEAD_SELECTION_SECONDS
from benchmarks.registry import Case, Run, Wanted, benchmark
from rtpurbo import ops

INDEX_DIM, WINDOW, SINKS, MIN_BLOCKS, THRESHOLD = 16, 1024, 4, 4, 0.9
TILE, BLOCK = 128, 64


@benchmark
def select_tiles_cuda(wanted: Wanted) -> Iterator[Case]:
    if not torch.cuda.is_available():
        return
    for heads, keys in ((1, 8192), (5, 8192), (1, 32768), (5, 32768), (1, 131_072), (1, 1 << 20)):
        all_parameters: list[dict[str, Any]] = [
            {"rank": rank, "heads": heads, "keys": keys, "scores": heads * keys * (keys + 1) // 2}
            for rank in ("sum", "max")
        ]
        all_parameters += [
            {**all_parameters[-1], "form": "full", "window": window} for window in (WINDOW, 8192)
        ]
        chosen = [parameters for parameters in all_parameters if wanted(parameters)]
        if not chosen:
            continue
        shape = 1, heads, keys, INDEX_DIM
        q_index = torch.randn(shape, device="cuda", dtype=torch.float16) * 3
        k_index = torch.randn(shape, device="cuda", dtype=torch.float16)
        near_lse = torch.full(shape[:3], 8.0, device="cuda")
        threshold = torch.full((heads,), THRESHOLD, device="cuda")
        arguments = q_index, k_index, list(range(heads)), threshold
        eager: dict[str, Run] = {
            "eager": partial(pooled_shares, q_index, k_index, near_lse, WINDOW, SINKS, TILE, BLOCK)
        }
        for parameters in chosen:
            rank, full = parameters["rank"], "form" in parameters
            near = parameters.get("window", WINDOW), SINKS, MIN_BLOCKS
            given = None if full else near_lse
            yield Case(
                parameters=parameters,
                run=partial(ops.select_tiles, *arguments, *near, near_lse=given, rank=rank),
                baselines=eager if rank == "sum" and heads == 1 and keys <= 32768 else {},
                goal_seconds=HEAD_SELECTION_SECONDS.get(keys) if rank == "max" else None,
                device="cuda",
            )
        del q_index, k_index, near_lse, arguments, eager
        torch.cuda.empty_cache()

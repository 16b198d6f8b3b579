"""flash-sparse-attn (HKUSTDial, Triton): windows of a size per KV head, and decode by token lists.

Both are its dense kernels, with `window_sizes` and with `gather_kv_indices`; its sparse and gated
ones choose keys by themselves. Copies of keys and values that it needs are left out of its times.
Of its autotuner's 54 tiles only those are tried that can win at 128 dimensions on Hopper.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.peer import fastest
from benchmarks.peers.problems import Token, Windows

TILES = {
    "fwd": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3),
            (64, 128, 4, 2)],
    "dec": [(16, 64, 4, 3), (16, 64, 4, 2), (16, 64, 8, 3), (16, 128, 4, 2), (16, 128, 8, 3),
            (16, 128, 8, 2)],
}  # fmt: skip
"""Rows, keys, warps, stages."""
UNTUNED = 1024
"""Up to so many keys nothing is tuned: that is for the check alone."""
PADDED = 256
"""Its kernels load whole tiles of a token list, unmasked."""


@cache
def package() -> Any:
    # It imports triton_kernels, which it does not require, for projections that are not used here.
    missing = ["triton_kernels", "triton_kernels.matmul_ogs", "triton_kernels.numerics"]
    if find_spec("triton_kernels") is not None:
        missing = []
    for name in missing:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__["__getattr__"] = lambda attribute: None
    try:
        import flash_sparse_attn
    finally:
        for name in missing:
            del sys.modules[name]
    import triton
    from flash_sparse_attn.ops.triton import autotuner, flash_dec_combine

    for kind, tiles in TILES.items():
        configs = [
            triton.Config(dict(TILE_M=m, TILE_N=n), num_warps=warps, num_stages=stages, num_ctas=1)
            for m, n, warps, stages in tiles
        ]
        setattr(autotuner, f"get_{kind}_dense_autotune_configs", lambda tile_n=None, c=configs: c)
    # Its cache of compiled kernels forgets that counts of 1 are compiled in: 32 heads after 1 are
    # summed wrongly. Triton's own cache does not.
    combine = flash_dec_combine._dec_combine_kernel
    flash_dec_combine._dec_combine_kernel = getattr(combine, "_kernel", combine)
    return flash_sparse_attn


def window_sizes(reach: list[int], sinks: int, device: torch.device) -> Tensor:
    """[KV heads, 4] as it takes them: sinks, a band, the gap behind the near keys, those.

    The whole window is a band with no gap and no near keys: near keys are masked one by one and
    are not split among the blocks of decode.
    """
    return torch.tensor([[sinks, r, 0, 0] for r in reach], dtype=torch.int32, device=device)


def prefill(problem: Windows) -> Callable[[], Tensor]:
    """Heads of a KV head that differ in reach need keys and values of their own."""
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    group = q.shape[2] // k.shape[2]
    reach = problem.reach[::group]
    if [r for r in reach for _ in range(group)] != problem.reach:
        reach, (k, v) = problem.reach, (x.repeat_interleave(group, 2) for x in (k, v))
    q, k, v = (x.contiguous() for x in (q, k, v))
    run = partial(
        package().flash_dense_attn_func, q, k, v, is_causal=True,
        window_sizes=window_sizes(reach, problem.sinks, q.device),
        is_autotune=q.shape[1] > UNTUNED,
    )  # fmt: skip
    return lambda: run().transpose(1, 2)


def token_lists(chosen: Tensor, owners: list[int], kv_heads: int) -> Tensor:
    """Positions in the keys of all sequences and KV heads, one after another: int32 [B * R, C].

    It takes a list for each sequence, the same for all heads, so each head becomes a sequence of
    those keys; padded with -1.
    """
    batches, heads, keys = chosen.shape
    longest = int(chosen.sum(-1).max())
    room = -(-longest // PADDED) * PADDED
    lists = chosen.new_full((batches, heads, room), -1, dtype=torch.int32)
    for batch in range(batches):
        for head in range(heads):
            tokens = chosen[batch, head].nonzero()[:, 0]
            begin = (batch * kv_heads + owners[head]) * keys
            lists[batch, head, : len(tokens)] = tokens + begin
    return lists.flatten(0, 1)


def splits(sequences: int, device: torch.device) -> list[int]:
    """Numbers of parts of a sequence, so that one or two blocks are there for a multiprocessor.

    Its own choice is 1 for token lists, and for windows as many as for its default window.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return sorted({max(1, processors * blocks // sequences) for blocks in (1, 2)})


def decode(problem: Token) -> Callable[[], Tensor]:
    """A launch for the lists and, where not all heads have one, one for the windows of all heads.

    Each has a second one that sums up its parts; a copy then puts the outputs together.
    """
    q, heads = problem.q, problem.heads
    batches, every, _, dim = q.shape
    kv_heads, keys = problem.k.shape[1:3]
    call = partial(package().flash_dense_attn_with_kvcache_func, is_autotune=keys > UNTUNED)
    lists = token_lists(problem.chosen, [h * kv_heads // every for h in heads], kv_heads)
    k, v = (x.reshape(1, -1, 1, dim).expand(len(lists), -1, -1, -1) for x in (problem.k, problem.v))
    listing = q[:, heads].flatten(0, 1)
    by_lists = partial(call, listing, k, v, gather_kv_indices=lists)
    far = fastest(partial(by_lists, num_splits=n) for n in splits(len(lists), q.device))
    if len(heads) == every:
        return lambda: far().view(q.shape)
    k, v = (x.transpose(1, 2) for x in (problem.k, problem.v))
    sizes = window_sizes([problem.window] * kv_heads, problem.sinks, q.device)
    by_windows = partial(call, q[:, :, 0], k, v, window_sizes=sizes)
    near = fastest(partial(by_windows, num_splits=n) for n in splits(batches * kv_heads, q.device))
    order = torch.tensor(heads, device=q.device)

    def run() -> Tensor:
        return near().index_copy_(1, order, far().view(batches, -1, dim))[:, :, None]

    return run

"""FlashAttention-4 (CuTe DSL) on Hopper: dense, and by block lists with a causal mask.

Its tiles of 128 rows are ours; lists of 64-key blocks make its key tiles 64 keys instead of 128.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from benchmarks.peers.lists import apart
from benchmarks.peers.problems import Lists, Windows
from rtpurbo.tiles import TILE, TILE_BLOCK


@cache
def causal() -> Any:
    import cutlass.cute as cute

    @cute.jit
    def causal_mask(batch, head, row, key, seqlen_info, aux_tensors):
        return key <= row

    return causal_mask


def output(result: Any) -> Tensor:
    """[B, H, M, D] of what a call returns, with its log-sum-exp or without."""
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


def attention(problem: Lists) -> Callable[[], Tensor]:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    blocks = BlockSparseTensorsTorch(
        *apart(problem.indices, problem.counts), block_size=(TILE, TILE_BLOCK)
    )
    mask = causal()

    def run() -> Tensor:
        return output(
            flash_attn_func(q, k, v, mask_mod=mask, block_sparse_tensors=blocks, pack_gqa=False)
        )

    return run


def dense(problem: Windows) -> Callable[[], Tensor]:
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))

    return lambda: output(flash_attn_func(q, k, v, causal=True))

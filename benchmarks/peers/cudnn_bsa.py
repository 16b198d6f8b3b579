"""Block-sparse attention of cudnn-frontend (CuTe DSL): blocks of 64 rows and 64 keys on Hopper.

It has no causal mask: a row sees all of its own block of 64 keys, which costs as much as a masked
one. Otherwise the lists are equal; each of a tile's is copied for either half.
"""

from collections.abc import Callable

from torch import Tensor

from benchmarks.peers.lists import of_blocks
from benchmarks.peers.peer import fastest
from benchmarks.peers.problems import Lists
from rtpurbo.tiles import TILE_BLOCK

SPLIT_FROM = 131_072
"""From so many keys on a head's keys and values outgrow the L2 cache; lists in parts can win."""


def attention(problem: Lists) -> Callable[[], Tensor]:
    import cudnn

    forward = cudnn.BSA.block_sparse_attention_forward
    q, k, v = problem.q, problem.k, problem.v
    indices, counts = of_blocks(problem.indices, problem.counts)

    def in_parts(parts: int) -> Callable[[], Tensor]:
        return lambda: forward(
            q, k, v, indices, q2k_block_nums=counts, sparse_block_size=TILE_BLOCK, kv_splits=parts
        )["o_tensor"]

    return fastest(in_parts(n) for n in ((1, 2) if k.shape[2] >= SPLIT_FROM else (1,)))

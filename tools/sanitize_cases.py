"""Small, odd cases of every CUDA operator, for compute-sanitizer.

With RTPURBO_PORTABLE=1, those of operators that have other kernels for Hopper.
"""

import os
import sys

import torch

from rtpurbo import ops

torch.manual_seed(0)
CUDA = torch.device("cuda")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(CUDA, dtype)


def top_p() -> None:
    for n in (1, 513, 2049):
        for dtype in (torch.float32, torch.bfloat16):
            ops.top_p(draw(3, n, dtype=dtype) * 3, 0.9, 4, torch.zeros(3, device=CUDA), exact=False)


def decode_step(dim: int, dtype: torch.dtype, keys: int, block_size: int) -> None:
    heads, window, sinks, scale = [0, 3, 4], 40, 3, dim**-0.5
    q, k, v = (draw(2, h, n, dim, dtype=dtype) for h, n in ((6, 1), (2, keys), (2, keys)))
    start = torch.tensor([0, keys // 3], device=CUDA)
    ops.decode(q, k, v, heads, window, window, sinks, scale, start=start)
    near = ops.near_lse(q, k, heads, [0, 1, 1], window, sinks, scale, start)
    for near_lse in (near, None):
        indices, counts, _ = ops.select(
            draw(2, 3, 1, 16, dtype=torch.float16), draw(2, 3, keys, 16, dtype=torch.float16),
            [0, 1, 2], 0.9, window, sinks, 20, block_size, near_lse=near_lse, start=start,
            capacity=0 if near_lse is None else 3,  # fewer than some select
        )  # fmt: skip
        for _ in range(2):
            ops.decode(
                q, k, v, heads, window, window, sinks, scale, indices=indices, counts=counts,
                block_size=block_size, start=start,
            )  # fmt: skip
            counts[:, 0], counts[:, 1] = -1, 0


def few_keys(dim: int, dtype: torch.dtype) -> None:
    """With a window that holds all keys."""
    for batch, keys in ((2, 1), (2, 50), (2, 100), (2, 250), (150, 400)):
        q, k, v = (draw(batch, h, n, dim, dtype=dtype) for h, n in ((6, 1), (2, keys), (2, keys)))
        start = torch.arange(batch, device=CUDA) % (keys + 1)
        rest = keys, keys, 0, dim**-0.5
        ops.decode(q, k, v, [0, 3, 4], *rest, start=start)
        none, local = k[:, :0], dict(k_local=k, v_local=v, length=keys)
        ops.decode(q, none, none, [], *rest, start=start, **local)


def coded_half(k_index: torch.Tensor, bits: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The index keys that have no codes, and the first half's codes, if there are to be some."""
    if bits == 16:
        return k_index, {}
    far = k_index.shape[2] // 2 // 64 * 64
    codes, ranges = ops.quantize_index(k_index[:, :, :far], bits)
    return k_index[:, :, far:], dict(codes=codes, ranges=ranges)


def sparse_decode(dim: int, dtype: torch.dtype, keys: int, block_size: int, bits: int) -> None:
    q, k, v = (draw(2, h, n, dim, dtype=dtype) for h, n in ((18, 1), (2, keys), (2, keys)))
    k_index, more = coded_half(draw(2, 3, keys, 16, dtype=torch.float16), bits)
    k_index[1, 2, -60:] = torch.nan
    k[0, 1, ::9, 3] = v[0, 0, ::7, 5] = torch.inf
    for p, beyond, exact in ((0.8, True, True), (0.8, True, False), (1.0, False, True)):
        ops.sparse_decode(
            q, k, v, [0, 9, 17], draw(2, 3, 1, 16, dtype=torch.float16), k_index, [0, 1, 2], p,
            40, 40, 3, 20, dim**-0.5, block_size, beyond,
            start=torch.tensor([0, keys // 3], device=CUDA), exact=exact, **more,
        )  # fmt: skip


def sifted(keys: int, bits: int, heads: int = 32, key_heads: int = 32) -> None:
    """So many keys that blocks use a sieve; of fewer key heads, one that heads share."""
    sizes = (heads, 1), (4, keys), (4, keys)
    q, k, v = (draw(1, h, n, 64, dtype=torch.bfloat16) for h, n in sizes)
    k_index, more = coded_half(draw(1, key_heads, keys, 16, dtype=torch.float16), bits)
    index_map = [head * key_heads // heads for head in range(heads)]
    for exact in (True, False):
        ops.sparse_decode(
            q, k, v, list(range(heads)), 4 * draw(1, heads, 1, 16, dtype=torch.float16), k_index,
            index_map, 0.8, 100, 100, 3, 20, 0.125, exact=exact, **more,
        )  # fmt: skip


def rings(dim: int, dtype: torch.dtype, keys: int, block_size: int) -> None:
    """KV head 0 is local. The second sequence has 7 keys: its ring is not written behind them."""
    window, sinks, scale = 40, 3, dim**-0.5
    q, k, v = (draw(2, h, n, dim, dtype=dtype) for h, n in ((6, 1), (1, keys), (1, keys)))
    ring = torch.empty(2, 1, sinks + window, dim, device=CUDA, dtype=dtype)
    ring[0], ring[1, :, :7] = draw(1, sinks + window, dim), draw(1, 7, dim)
    start = torch.tensor([0, keys - 7], device=CUDA)
    local = dict(k_local=ring, v_local=ring, start=start)
    members = torch.arange(0, 35, 7, dtype=torch.int32, device=CUDA).expand(2, 2, 1, 5)
    lists = dict(indices=members, counts=torch.full_like(members[..., 0], 5), block_size=block_size)
    for more in ({}, lists):
        ops.decode(q, k, v, [3, 5], window, window, sinks, scale, **more, **local)
    ops.decode(q[:, :3], k[:, :0], v[:, :0], [], window, window, sinks, scale, length=keys, **local)
    ops.sparse_decode(
        q, k, v, [3, 5], draw(2, 2, 1, 16, dtype=torch.float16),
        draw(2, 2, keys, 16, dtype=torch.float16), [0, 1], 0.8, window, window, sinks, 20, scale,
        block_size, **local,
    )  # fmt: skip


def refine(dim: int, keys: int, near_lse: torch.Tensor | None) -> None:
    k_index, coded = draw(2, 3, keys, dim, dtype=torch.float16), keys // 2 // 64 * 64
    k_index[1, 1, -50:, 0] = torch.nan
    codes, ranges = ops.quantize_index(k_index[:, :, :coded], 4)
    ops.select(
        draw(2, 3, 1, dim, dtype=torch.float16), k_index, [0, 1, 2], 0.8, 40, 3, 20,
        near_lse=near_lse, start=torch.tensor([0, keys // 3], device=CUDA), codes=codes,
        ranges=ranges, refine=True,
    )  # fmt: skip


def prefill(dim: int, dtype: torch.dtype) -> None:
    q, k, local = (draw(2, h, n, dim, dtype=dtype) for h, n in ((4, 70), (2, 150), (1, 113)))
    mask = 33, 3, dim**-0.5
    starts = [torch.tensor([0, first], device=CUDA) for first in (100, 20)]
    for start in (None, starts[0]):
        ops.attention(q, k, k, [1, 2], *mask, start)
        for tile, block_size in ((128, 64), (16, 8)):
            blocks = torch.tensor([0, 2], dtype=torch.int32, device=CUDA)
            blocks = blocks.expand(2, 2, -(-70 // tile), 2)
            ops.attention(
                q, k, k, [1, 2], *mask, start, block_indices=blocks,
                block_counts=torch.full_like(blocks[..., 0], 2), tile=tile, block_size=block_size,
            )  # fmt: skip
    ops.attention(q, k[:, :1], k[:, :1], [0, 1], *mask, starts[0], local, local, starts[1])
    k[0, 0, 60:90, 3], k[1, 1, ::20, 5] = torch.nan, torch.inf
    ops.attention(q, k, k, [1, 2], *mask, starts[1])
    ops.near_lse(q, k, [1, 2], [0, 1], *mask, starts[1])


def crowded(dim: int, keys: int) -> None:
    """Several tiles a multiprocessor, some without keys, of heads of every role."""
    heads, starts = [1, 7, 10], torch.tensor([0, 3, 70, keys, 0, keys - 1], device=CUDA)
    q, k = (draw(6, h, keys, dim, dtype=torch.bfloat16) for h in (16, 4))
    tiles, blocks = -(-keys // 128), -(-keys // 64)
    every = torch.arange(blocks, dtype=torch.int32, device=CUDA)
    ops.attention(
        q, k, k, heads, 200, 3, dim**-0.5, starts,
        block_indices=every.expand(6, 3, tiles, blocks).contiguous(),
        block_counts=torch.tensor([-1, blocks, 1], dtype=torch.int32, device=CUDA)[:, None]
        .expand(6, 3, tiles).contiguous(),
    )  # fmt: skip
    ops.near_lse(q, k, heads, [0, 1, 2], keys, 3, dim**-0.5, starts)


def split(dim: int) -> None:
    """Few row tiles over many keys, whose scores grow by more than the weights of a block may."""
    q, k = draw(2, 4, 70, dim, dtype=torch.bfloat16), draw(2, 2, 2500, dim, dtype=torch.bfloat16)
    ops.attention(q, k.cumsum(2), k, [1], 1700, 3, dim**-0.5, torch.tensor([0, 2400], device=CUDA))


def tiles(rank: str, near_lse: torch.Tensor | None) -> None:
    start = torch.tensor([0, 150], device=CUDA)
    cases = (16, torch.float16, 16, 0), (24, torch.float32, 16, 2), (16, torch.float16, 4, 2)
    for dim, dtype, bits, capacity in cases:
        k_index, more = coded_half(draw(2, 2, 777, dim, dtype=dtype), bits)
        ops.select_tiles(
            draw(2, 3, 300, dim, dtype=dtype), k_index, [0, 1, 1],
            torch.full((3,), 0.7, device=CUDA), 100, 3, 1, near_lse=near_lse, start=start,
            capacity=capacity, rank=rank, **more,
        )  # fmt: skip


def cache() -> None:
    """Pages are filled to their last row, so that one more lies outside."""
    k, ring, pages = draw(2, 3, 5, 16), draw(2, 2, 12, 16), draw(2, 1, 25, 16)
    ops.cache_append(
        k, k, ring, ring.clone(), pages, pages.clone(), [1], 20, 4, None, k[:, :1], pages.clone()
    )
    long, start = draw(2, 3, 15, 16), torch.tensor([0, 22], device=CUDA)
    pages = draw(2, 1, 35, 16)
    ops.cache_append(long, long, ring, ring.clone(), pages, pages.clone(), [1], 20, 4, start)
    ops.cache_append_index(k[:, :1], pages, 30)
    ops.cache_unroll(ring, k, [0, 2], 20, 4)
    ops.cache_unroll(ring, k, [0, 2], 20, 4, start)
    ops.index_project(k, k, draw(2, 8, 16), draw(1, 8, 16), [0, 2], [1])
    ops.index_project(
        draw(1, 3, 90, 16), draw(1, 3, 90, 16), draw(2, 8, 16), draw(1, 8, 16), [0, 2], [1]
    )


def append_projected(rows: int, dim: int, pre: torch.dtype) -> None:
    """Up to 16 rows are one launch, where 19 dimensions are copied by the byte."""
    k, ring, pages = (
        draw(2, heads, slots, dim, dtype=torch.bfloat16)
        for heads, slots in ((3, rows), (2, 12), (1, 120))
    )
    q_index = ops.cache_append_projected(
        k, k, ring, ring.clone(), pages, pages.clone(), [1], 20, 4,
        draw(2, 6, rows, 24, dtype=pre), draw(2, 3, rows, 24, dtype=pre), draw(2, 5, 24),
        draw(1, 5, 24), [0, 4], [1], torch.empty(2, 1, 120, 5, device=CUDA, dtype=torch.float16),
        torch.tensor([0, 22], device=CUDA), 7,
    )  # fmt: skip
    q_index.sum().item()


SIZES = (
    (64, torch.bfloat16),
    (128, torch.float16),
    (256, torch.bfloat16),
    (24, torch.float32),
)
for rank in ("sum", "max"):
    tiles(rank, None)
    tiles(rank, draw(2, 3, 300))
for dim, dtype in SIZES:
    prefill(dim, dtype)
for dim in (64, 128, 256):
    crowded(dim, 700)
    split(dim)
torch.cuda.synchronize()
if os.environ.get("RTPURBO_PORTABLE") == "1":
    sys.exit()
top_p()
cache()
for rows, dim, pre in ((1, 64, torch.bfloat16), (5, 19, torch.float32), (40, 64, torch.float16)):
    append_projected(rows, dim, pre)
ops.retrieval_scores(draw(1, 4, 5, 16), draw(1, 2, 90, 16), 3, 8, 0.25)
for dim, dtype in SIZES:
    few_keys(dim, dtype)
    decode_step(dim, dtype, 333, 1)
    rings(dim, dtype, 333, 1)
rings(64, torch.bfloat16, 700, 16)
decode_step(64, torch.bfloat16, 9000, 1)
decode_step(64, torch.bfloat16, 700, 16)
sparse_decode(64, torch.bfloat16, 9000, 1, 16)
sparse_decode(128, torch.bfloat16, 3001, 1, 4)
sparse_decode(128, torch.float16, 700, 16, 8)
sparse_decode(256, torch.float16, 333, 64, 16)
sparse_decode(24, torch.float32, 700, 1, 16)
for bits in (16, 4):
    sifted(270_001, bits)
sifted(33_001, 16, heads=152, key_heads=20)  # with a shared scan on up to 151 multiprocessors
for dim, keys in ((16, 9000), (16, 333), (24, 700)):
    for near_lse in (draw(2, 3, 1), None):
        refine(dim, keys, near_lse)
torch.cuda.synchronize()

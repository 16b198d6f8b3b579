"""Calls that take the kernels for tensor cores and for Hopper; most of tests.samples do not."""

import torch
from torch import Tensor

from rtpurbo import ops
from rtpurbo.ops.quantize_index import INDEX_BLOCK
from tests.lists import lists_where
from tests.samples import Sample, numbers


def halves(*shape: int) -> Tensor:
    return numbers(*shape, dtype=torch.float16)


def coded(k_index: Tensor, bits: int, refine: bool = False) -> dict:
    """All keys but the last 70 in codes."""
    far = k_index[:, :, : (k_index.shape[2] - 70) // INDEX_BLOCK * INDEX_BLOCK]
    codes, ranges = ops.quantize_index(far, bits)
    tail = k_index if refine else k_index[:, :, far.shape[2] :]
    return dict(k_index=tail, codes=codes, ranges=ranges)


def attention_samples(start: Tensor) -> list[Sample]:
    q, k = halves(2, 6, 200, 64), halves(2, 2, 300, 64)
    base = dict(q=q, k=k, v=-k, retrieval_heads=[1, 4], window=70, sinks=2, scale=0.125)
    indices, counts = lists_where(numbers(2, 2, 2, 5) > 0)
    lists = dict(block_indices=indices, block_counts=counts)
    local = dict(k_local=k[:, :1, :250], v_local=k[:, :1, 50:], start_local=start // 2)
    split = dict(k=k[:, :1], v=-k[:, :1], retrieval_heads=[0, 2])
    many = halves(2, 2, 3000, 64)
    near = dict(q=q, k=k, q_heads=[4, 1], k_heads=[1, 0], window=70, sinks=2, scale=0.125)
    near |= {"start": start}
    return [
        Sample("attention", "hopper", base | {"start": start}),
        Sample("attention", "hopper_blocks", base | lists),
        Sample("attention", "hopper_many_keys", base | dict(k=many, v=-many, start=start)),
        Sample("attention", "hopper_split", base | split | local | {"start": start}),
        Sample("near_lse", "hopper", near),
        Sample("near_lse", "one_row", near | {"q": q[:, :, :1]}),
    ]


def decode_samples(start: Tensor) -> list[Sample]:
    q, k, q_index, k_index = (
        halves(2, h, n, d) for h, n, d in ((6, 1, 64), (2, 900, 64), (2, 1, 16), (2, 900, 16))
    )
    base = dict(
        q=q, k=k, v=-k, retrieval_heads=[1, 4], window=20, near_window=20, sinks=2, scale=0.125,
        start=start,
    )  # fmt: skip
    ring = halves(2, 1, 22, 64)
    split = dict(k=k[:, :1], v=-k[:, :1], k_local=ring, v_local=-ring, retrieval_heads=[0, 2])
    indices, counts = lists_where(numbers(2, 2, 1, 900) > 0)
    lists = dict(indices=indices, counts=counts)
    index = dict(q_index=q_index, k_index=k_index, index_map=[0, 1], p=0.8, min_tokens=3)
    selected = index | dict(window=20, sinks=2, start=start)
    return [
        Sample("decode", "wide", base | lists),
        Sample("decode", "wide_dense", base),
        Sample("decode", "wide_ring", base | lists | split),
        Sample("sparse_decode", "fused", base | index),
        Sample("sparse_decode", "fused_codes", base | index | coded(k_index, 4)),
        Sample("sparse_decode", "fused_ring", base | index | split),
        Sample("select", "wide", selected),
        Sample("select", "wide_float32", selected | {"k_index": k_index.float()}),
        Sample("select", "wide_four_bits", selected | coded(k_index, 4)),
        Sample("select", "wide_eight_bits", selected | coded(k_index, 8)),
        Sample("select", "wide_refine", selected | coded(k_index, 4, refine=True)),
    ]


def prefill_index_samples(start: Tensor) -> list[Sample]:
    base = dict(
        q_index=halves(2, 3, 200, 16), k_index=halves(2, 2, 1536, 16), index_map=[0, 0, 1],
        threshold=torch.tensor([0.6, 0.8, 0.95]), window=20, sinks=2, min_blocks=1, start=start,
    )  # fmt: skip
    near = dict(near_lse=numbers(2, 3, 200) + 5)
    w = halves(3, 16, 64)
    projected = dict(q=halves(2, 6, 90, 64), w_q=w, q_heads=[1, 2, 5])
    projected |= dict(k=halves(2, 2, 90, 64), w_k=w[:2], k_heads=[0, 1])
    pages = [halves(2, 1, 200, 64) for _ in range(4)]
    appended = dict(zip(("k_ring", "v_ring", "k_pages", "v_pages"), pages, strict=True))
    appended |= {"index_pages": halves(2, 2, 200, 16)}
    append = dict(
        k=halves(2, 2, 90, 64), v=-halves(2, 2, 90, 64), full_heads=[1], position=70, sinks=4,
        q_pre=projected["q"], k_pre=projected["k"], start=start,
        **{name: projected[name] for name in ("w_q", "w_k", "q_heads", "k_heads")},
    )  # fmt: skip
    return [
        Sample("select_tiles", "sum", base | near),
        Sample("select_tiles", "full", base),
        Sample("select_tiles", "maxima", base | near | {"rank": "max"}),
        Sample("index_project", "many_rows", projected),
        Sample("cache_append_projected", "many_rows", append | appended, written=tuple(appended)),
    ]


def tensor_core_samples() -> list[Sample]:
    start = torch.tensor([0, 100])
    return [*attention_samples(start), *decode_samples(start), *prefill_index_samples(start)]

"""Small inputs for every operator, which the tests that hold for any operator run over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtpurbo import ops
from tests.lists import lists_where


@dataclass(frozen=True)
class Sample:
    """One call of an operator."""

    op: str
    case: str
    arguments: dict[str, Any]
    differentiable: tuple[str, ...] = ()
    written: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}-{self.case}"

    def tensors(self) -> dict[str, Tensor]:
        return {n: value for n, value in self.arguments.items() if isinstance(value, Tensor)}

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The arguments with every tensor replaced by change(tensor)."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return self.arguments | changed

    def outputs(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """Everything the call returns or writes, as a tuple."""
        result = getattr(ops, self.op)(**arguments)
        results = () if result is None else result if isinstance(result, tuple) else (result,)
        return (*results, *(arguments[name] for name in self.written))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed = sum((i + 3) * size for i, size in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lists(*shape: int, blocks: int, dense_every: int = 0) -> tuple[Tensor, Tensor]:
    """Ascending block lists [*shape, blocks] of random lengths, and their counts."""
    generator = torch.Generator().manual_seed(blocks)
    picked = torch.rand(*shape, blocks, generator=generator) < 0.4
    indices, counts = lists_where(picked)
    if dense_every:
        counts.view(-1)[::dense_every] = -1
    return indices, counts


def attention_samples(dtype: torch.dtype) -> list[Sample]:
    q, k, v = (numbers(2, h, s, 16, dtype=dtype) for h, s in ((6, 37), (2, 50), (2, 50)))
    base = dict(q=q, k=k, v=v, retrieval_heads=[1, 4], window=7, sinks=2, scale=0.25)
    start = torch.tensor([0, 21])
    indices, counts = lists(2, 2, 3, blocks=7, dense_every=5)
    blocks = dict(block_indices=indices, block_counts=counts, tile=16, block_size=8)
    local = dict(
        k_local=numbers(2, 1, 40, 16, dtype=dtype),
        v_local=numbers(2, 1, 40, 16, dtype=dtype).flip(2),
        start_local=torch.tensor([0, 11]),
    )
    split = dict(k=k[:, :1], v=v[:, :1], retrieval_heads=[0, 2])
    grads = ("q", "k", "v")
    return [
        Sample("attention", "mixed", base, grads),
        Sample("attention", "padded", base | {"start": start}, grads),
        Sample("attention", "blocks", base | blocks | {"start": start}, grads),
        Sample("attention", "local", base | {"retrieval_heads": []}, grads),
        Sample("attention", "dense", base | {"retrieval_heads": list(range(6))}, grads),
        Sample("attention", "split", base | split | local | {"start": start}),
    ]


def decode_samples(dtype: torch.dtype) -> list[Sample]:
    q, k, v = (numbers(2, h, s, 16, dtype=dtype) for h, s in ((6, 1), (2, 90), (2, 90)))
    base = dict(q=q, k=k, v=v, retrieval_heads=[1, 4], window=7, near_window=5, sinks=2, scale=0.25)
    start = torch.tensor([0, 21])
    tokens = dict(zip(("indices", "counts"), lists(2, 2, 1, blocks=90), strict=True))
    blocks = dict(
        zip(("indices", "counts"), lists(2, 2, 1, blocks=6, dense_every=3), strict=True),
        block_size=16,
    )
    ring = dict(
        k_local=numbers(2, 1, 9, 16, dtype=dtype), v_local=-numbers(2, 1, 9, 16, dtype=dtype)
    )
    split = dict(k=k[:, :1], v=v[:, :1], retrieval_heads=[0, 2])
    only_rings = dict(
        k=k[:, :0],
        v=v[:, :0],
        retrieval_heads=[],
        length=90,
        k_local=numbers(2, 2, 9, 16, dtype=dtype),
        v_local=-numbers(2, 2, 9, 16, dtype=dtype),
    )
    return [
        Sample("decode", "dense", base),
        Sample("decode", "tokens", base | tokens | {"start": start}),
        Sample("decode", "blocks", base | blocks | {"start": start}),
        Sample("decode", "ring", base | tokens | ring | split | {"start": start}),
        Sample("decode", "only_rings", base | only_rings),
    ]


def sparse_decode_samples(dtype: torch.dtype) -> list[Sample]:
    q, k, v = (numbers(2, h, s, 16, dtype=dtype) for h, s in ((6, 1), (2, 90), (2, 90)))
    base = dict(
        q=q, k=k, v=v, retrieval_heads=[1, 4], window=7, near_window=7, sinks=2, scale=0.25,
        q_index=2 * numbers(2, 2, 1, 8, dtype=dtype), k_index=numbers(2, 2, 90, 8, dtype=dtype),
        index_map=[0, 1], p=0.8, min_tokens=3,
    )  # fmt: skip
    more = {"start": torch.tensor([0, 21]), "offset": torch.tensor([0.5, -0.5])}
    ring = dict(
        k=k[:, :1],
        v=v[:, :1],
        retrieval_heads=[0, 2],
        k_local=numbers(2, 1, 9, 16, dtype=dtype),
        v_local=-numbers(2, 1, 9, 16, dtype=dtype),
    )
    codes, ranges = ops.quantize_index(numbers(2, 2, 64, 8, dtype=dtype), 8)
    coded = dict(k_index=numbers(2, 2, 26, 8, dtype=dtype), codes=codes, ranges=ranges)
    return [
        Sample("sparse_decode", "beyond", base | more),
        Sample("sparse_decode", "full", base | {"beyond_window": False, "near_window": 5}),
        Sample("sparse_decode", "blocks", base | more | {"block_size": 16, "p": 0.6}),
        Sample("sparse_decode", "ring", base | ring),
        Sample("sparse_decode", "eight_bits", base | coded),
    ]


def near_lse_samples(dtype: torch.dtype) -> list[Sample]:
    q, k = numbers(2, 6, 5, 16, dtype=dtype), numbers(2, 2, 40, 16, dtype=dtype)
    base = dict(q=q, k=k, q_heads=[4, 1], k_heads=[1, 0], window=7, sinks=2, scale=0.25)
    return [
        Sample("near_lse", "basic", base),
        Sample("near_lse", "padded", base | {"start": torch.tensor([0, 37])}),
    ]


def retrieval_scores_samples(dtype: torch.dtype) -> list[Sample]:
    q, k = numbers(2, 6, 5, 16, dtype=dtype), numbers(2, 2, 40, 16, dtype=dtype)
    base = dict(q=q, k=k, pre_begin=12, pre_end=20, scale=0.25)
    return [
        Sample("retrieval_scores", "basic", base),
        Sample("retrieval_scores", "padded", base | {"start": torch.tensor([0, 15])}),
    ]


def index_project_samples(dtype: torch.dtype) -> list[Sample]:
    base = dict(
        q=numbers(2, 6, 5, 16, dtype=dtype),
        k=numbers(2, 2, 9, 16, dtype=dtype),
        w_q=numbers(3, 4, 16, dtype=dtype),
        w_k=numbers(2, 4, 16, dtype=dtype),
        q_heads=[1, 2, 5],
        k_heads=[0, 1],
    )
    grads = ("q", "k", "w_q", "w_k")
    return [
        Sample("index_project", "basic", base, grads),
        Sample("index_project", "half", base | {"dtype": torch.float16}, grads),
    ]


def top_p_samples(dtype: torch.dtype) -> list[Sample]:
    scores = numbers(5, 70, dtype=dtype) * 3
    scores[1, ::3] = -torch.inf
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    base = dict(scores=scores, p=0.8, min_members=2)
    return [
        Sample("top_p", "basic", base),
        Sample("top_p", "forced", base | {"forced_lse": numbers(5, dtype=accumulated)}),
        Sample("top_p", "fast", base | {"exact": False}),
    ]


def index_arguments(rows: int, keys: int, dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        q_index=numbers(2, 3, rows, 4, dtype=dtype) * 2,
        k_index=numbers(2, 2, keys, 4, dtype=dtype) * 2,
        index_map=[0, 0, 1],
        window=6,
        sinks=2,
    )


def quantize_index_samples(dtype: torch.dtype) -> list[Sample]:
    base = dict(k_index=numbers(2, 2, 128, 5, dtype=dtype), bits=4)
    return [
        Sample("quantize_index", "four", base),
        Sample("quantize_index", "eight", base | {"bits": 8}),
    ]


def quantised(keys: int, dim: int, bits: int) -> dict[str, Tensor]:
    """codes and ranges that look like those of 2 x 2 heads of random keys."""
    ranges = numbers(2, 2, keys // 64, 2 * dim)
    ranges[..., dim:] = ranges[..., dim:].abs() * 4 / 2**bits
    width = dim if bits == 8 else -(-dim // 2)
    codes = numbers(2, 2, keys, width).mul(64).to(torch.int32).remainder(256).to(torch.uint8)
    return dict(codes=codes, ranges=ranges.half())


def refined(coded: int, tail: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keys in 16 bits or more, the codes of the first of them, and refine."""
    k_index = numbers(2, 2, coded + tail, 4, dtype=dtype) * 2
    codes, ranges = ops.quantize_index(k_index[:, :, :coded], 4)
    return dict(k_index=k_index, codes=codes, ranges=ranges, refine=True)


def select_samples(dtype: torch.dtype) -> list[Sample]:
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    base = index_arguments(4, 60, dtype) | dict(p=0.8, min_tokens=3)
    padded = dict(start=torch.tensor([0, 30]), offset=numbers(3))
    beyond = dict(near_lse=numbers(2, 3, 4, dtype=accumulated))
    return [
        Sample("select", "full", base),
        Sample("select", "beyond", base | padded | beyond),
        Sample("select", "blocks", base | padded | beyond | {"block_size": 16}),
        Sample("select", "capacity", base | {"capacity": 5}),
        Sample("select", "four_bits", base | padded | beyond | quantised(320, 4, 4)),
        Sample("select", "refine", base | padded | beyond | refined(320, 60, dtype)),
        Sample("select", "eight_bits", base | quantised(64, 4, 8) | {"block_size": 16}),
    ]


def select_tiles_samples(dtype: torch.dtype) -> list[Sample]:
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    base = index_arguments(37, 60, dtype) | dict(
        threshold=torch.tensor([0.6, 0.8, 0.95]), min_blocks=1, tile=16, block_size=4
    )
    padded = dict(start=torch.tensor([0, 30]), offset=numbers(3))
    beyond = dict(near_lse=numbers(2, 3, 37, dtype=accumulated))
    return [
        Sample("select_tiles", "full", base),
        Sample("select_tiles", "beyond", base | padded | beyond),
        Sample("select_tiles", "max", base | padded | beyond | {"rank": "max"}),
        Sample("select_tiles", "capacity", base | {"capacity": 6}),
        Sample("select_tiles", "four_bits", base | padded | beyond | quantised(192, 4, 4)),
    ]


def index_kl_samples(dtype: torch.dtype) -> list[Sample]:
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    base = dict(
        q=numbers(2, 6, 5, 16, dtype=dtype),
        k=numbers(2, 2, 40, 16, dtype=dtype),
        q_index=numbers(2, 3, 5, 4, dtype=dtype),
        k_index=numbers(2, 2, 40, 4, dtype=dtype),
        rows=torch.tensor([[0, 7, 20, 38, 39], [3, 9, 21, 30, 39]]),
        retrieval_heads=[0, 2, 4],
        index_map=[0, 0, 1],
        offset=numbers(3, dtype=accumulated),
        window=6,
        sinks=2,
        scale=0.25,
        beyond_window=True,
        start=torch.tensor([0, 8]),
    )
    grads = ("q_index", "k_index", "offset")
    return [
        Sample("index_kl", "beyond", base, grads),
        Sample("index_kl", "full", base | {"beyond_window": False, "offset": None}, grads[:2]),
    ]


def cache_samples(dtype: torch.dtype) -> list[Sample]:
    new = numbers(2, 3, 5, 16, dtype=dtype)
    ring, pages = numbers(2, 2, 9, 16, dtype=dtype), numbers(2, 1, 64, 16, dtype=dtype)
    append = dict(
        k=new,
        v=-new,
        k_ring=ring,
        v_ring=-ring,
        k_pages=pages,
        v_pages=-pages,
        full_heads=[1],
        position=11,
        sinks=2,
        start=torch.tensor([0, 13]),
    )
    index = dict(k_index=new[..., :4], index_pages=numbers(2, 3, 64, 4, dtype=dtype), position=11)
    unroll = dict(
        ring=ring,
        new=new,
        local_heads=[0, 2],
        position=11,
        sinks=2,
        start=torch.tensor([0, 5]),
    )
    with_index = {**append, "k_index": numbers(2, 3, 5, 4, dtype=dtype), "index_slot": 7}
    with_index["index_pages"] = numbers(2, 3, 64, 4, dtype=dtype)
    projected = append | dict(
        q_pre=numbers(2, 6, 5, 24, dtype=dtype),
        k_pre=numbers(2, 3, 5, 24, dtype=dtype),
        w_q=numbers(3, 4, 24, dtype=dtype),
        w_k=numbers(2, 4, 24, dtype=dtype),
        q_heads=[1, 2, 5],
        k_heads=[2, 0],
        index_pages=numbers(2, 2, 64, 4, dtype=dtype),
        index_slot=7,
    )
    half = {"index_slot": -1, "index_pages": projected["index_pages"].half()}
    stored = ("k_ring", "v_ring", "k_pages", "v_pages")
    with_pages = (*stored, "index_pages")
    return [
        Sample("cache_append", "basic", append, written=stored),
        Sample("cache_append", "index", with_index, written=with_pages),
        Sample(
            "cache_append",
            "index at position",
            {**with_index, "index_slot": -1},
            written=with_pages,
        ),
        Sample("cache_append_index", "basic", index, written=("index_pages",)),
        Sample("cache_append_projected", "basic", projected, written=with_pages),
        Sample("cache_append_projected", "half", projected | half, written=with_pages),
        Sample("cache_unroll", "basic", unroll),
    ]


def samples(dtype: torch.dtype = torch.float32) -> list[Sample]:
    """Every case of every operator; tensors are shared between calls, so clone what is written."""
    return [
        *attention_samples(dtype),
        *decode_samples(dtype),
        *sparse_decode_samples(dtype),
        *near_lse_samples(dtype),
        *retrieval_scores_samples(dtype),
        *index_project_samples(dtype),
        *cache_samples(dtype),
        *top_p_samples(dtype),
        *quantize_index_samples(dtype),
        *select_samples(dtype),
        *index_kl_samples(dtype),
        *select_tiles_samples(dtype),
    ]

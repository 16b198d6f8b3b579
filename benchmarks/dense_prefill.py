"""PyTorch's dense attention of a prefill: the fastest calls of a backend for its shape.

| prefill | name | what runs |
|---|---|---|
| whole prompts | cudnn, flash | causal SDPA |
| padded | cudnn with padding | the same, so that rows see the padding |
| | cudnn masked | SDPA with a boolean mask |
| | cudnn a prompt | causal SDPA of each without its padding |
| | flash varlen | `varlen_attn` of prompts that are packed before |
| the last rows | flash | SDPA with a causal mask aligned to the lower right |
| | cudnn in two | the cached keys, then the rows' own; not merged |

cuDNN aligns a causal mask of fewer rows than keys to the upper left.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from benchmarks.dense import BACKENDS, dense
from benchmarks.prefill_layer import Prefill
from benchmarks.registry import Run, in_turn

MASKED_UP_TO = 8192
CUDNN, FLASH = BACKENDS["cudnn"], BACKENDS["flash"]


def cudnn(prefill: Prefill) -> dict[str, Run]:
    qkv = prefill.q, prefill.k, prefill.v
    causal = partial(dense, CUDNN, *qkv, is_causal=True)
    if prefill.rows < prefill.keys:
        return {"cudnn in two": in_two(prefill)}
    if not prefill.is_padded:
        return {"cudnn": causal}
    alone = [partial(dense, CUDNN, *own, is_causal=True) for own in prompts(prefill)]
    runs: dict[str, Run] = {"cudnn with padding": causal, "cudnn a prompt": in_turn(alone)}
    if prefill.keys <= MASKED_UP_TO:
        runs["cudnn masked"] = partial(dense, CUDNN, *qkv, attn_mask=mask(prefill))
    return runs


def flash(prefill: Prefill) -> dict[str, Run]:
    if prefill.is_padded:
        return {"flash varlen": packed(prefill)}
    more = (
        {"attn_mask": causal_lower_right(prefill.rows, prefill.keys)}
        if prefill.rows < prefill.keys
        else {"is_causal": True}
    )
    return {"flash": partial(dense, FLASH, prefill.q, prefill.k, prefill.v, **more)}


def in_two(prefill: Prefill) -> Run:
    before = prefill.keys - prefill.rows
    k, v = prefill.k, prefill.v
    return in_turn(
        [
            partial(dense, CUDNN, prefill.q, k[:, :, :before], v[:, :, :before]),
            partial(dense, CUDNN, prefill.q, k[:, :, before:], v[:, :, before:], is_causal=True),
        ]
    )


def prompts(prefill: Prefill) -> list[list[Tensor]]:
    """q, k, v of each prompt alone."""
    return [
        [x[i : i + 1, :, prefill.keys - n :] for x in (prefill.q, prefill.k, prefill.v)]
        for i, n in enumerate(prefill.lengths)
    ]


def mask(prefill: Prefill) -> Tensor:
    """Which keys a row sees, [B, 1, N, N]; in padding itself, so that no row is empty."""
    position = torch.arange(prefill.keys, device=prefill.device)
    assert prefill.start is not None
    real = position >= prefill.start[:, None]
    causal = position[:, None] >= position
    own = torch.eye(prefill.keys, dtype=torch.bool, device=prefill.device)
    return (causal & real[:, None, :] | own)[:, None]


def packed(prefill: Prefill) -> Run:
    q, k, v = (
        torch.cat([x[0].transpose(0, 1) for x in own])
        for own in zip(*prompts(prefill), strict=True)
    )
    ends = torch.tensor(prefill.lengths, device=prefill.device).cumsum(0)
    begins = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    longest = max(prefill.lengths)
    return partial(varlen_attn, q, k, v, begins, begins, longest, longest, window_size=(-1, 0))

"""Headwise attention, forward and backward, against SDPA."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.registry import Case, benchmark
from rtpurbo import ops

LENGTH, WINDOW, SINKS = 8192, 1024, 4


@dataclass(frozen=True)
class Layer:
    heads: int
    kv_heads: int
    dim: int
    retrieval_heads: tuple[int, ...]

    def qkv(self, rows: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
        shapes = ((self.heads, rows), (self.kv_heads, keys), (self.kv_heads, keys))
        return [
            torch.randn(1, length, heads, self.dim).to(dtype).transpose(1, 2)
            for heads, length in shapes
        ]


LAYERS = (Layer(32, 4, 128, (3, 9, 14, 20, 27)), Layer(9, 3, 64, (4,)))


def visible_pairs(length: int, window: int, sinks: int) -> int:
    return sum(min(m + 1, window + min(sinks, max(0, m + 1 - window))) for m in range(length))


def masked_sdpa(layer: Layer, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor]) -> None:
    """The same heads under boolean masks: one call for the local ones, one for the others."""
    retrieval = torch.zeros(layer.heads, dtype=torch.bool)
    retrieval[list(layer.retrieval_heads)] = True
    for chosen, mask in zip((~retrieval, retrieval), masks, strict=True):
        sdpa(q[:, chosen], k[:, chosen], v[:, chosen], attn_mask=mask)


def forward_and_backward(function, *leaves: Tensor) -> None:
    out = function(*leaves)
    torch.autograd.grad(out, leaves, out.detach())


@benchmark
def attention() -> Iterator[Case]:
    """Goals: 2x SDPA with masks, and 0.6 of the masks' FLOP ratio against causal SDPA."""
    positions = torch.arange(LENGTH)
    distance = positions[:, None] - positions
    causal = distance >= 0
    masks = [causal & ((distance < WINDOW) | (positions < SINKS)), causal]
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = layer.qkv(LENGTH, LENGTH, dtype)
            group = layer.heads // layer.kv_heads
            k_repeated, v_repeated = (x.repeat_interleave(group, 1) for x in (k, v))
            retrieval = list(layer.retrieval_heads)
            dense = LENGTH * (LENGTH + 1) // 2
            pairs = visible_pairs(LENGTH, WINDOW, SINKS) * (layer.heads - len(retrieval))
            pairs += dense * len(retrieval)
            yield Case(
                parameters={
                    "dtype": str(dtype).removeprefix("torch."),
                    "heads": f"{layer.heads}/{layer.kv_heads}/{layer.dim}",
                    "length": LENGTH,
                    "window": WINDOW,
                    "retrieval_heads": len(retrieval),
                },
                run=partial(ops.attention, q, k, v, retrieval, WINDOW, SINKS, layer.dim**-0.5),
                baselines={
                    "causal sdpa": partial(sdpa, q, k, v, is_causal=True, enable_gqa=True),
                    "masked sdpa": partial(masked_sdpa, layer, q, k_repeated, v_repeated, masks),
                },
                flops=4.0 * layer.dim * pairs,
                goals={
                    "causal sdpa": 0.6 * dense * layer.heads / pairs,
                    "masked sdpa": 2.0,
                },
            )


@benchmark
def attention_training() -> Iterator[Case]:
    """Forward and backward; the goal is not to be slower than causal SDPA."""
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            leaves = [x.requires_grad_() for x in layer.qkv(LENGTH // 2, LENGTH // 2, dtype)]
            retrieval, scale = list(layer.retrieval_heads), layer.dim**-0.5

            def ours(q: Tensor, k: Tensor, v: Tensor, heads=retrieval, scale=scale) -> Tensor:
                return ops.attention(q, k, v, heads, WINDOW, SINKS, scale)[0]

            causal = partial(sdpa, is_causal=True, enable_gqa=True)
            yield Case(
                parameters={
                    "dtype": str(dtype).removeprefix("torch."),
                    "heads": f"{layer.heads}/{layer.kv_heads}/{layer.dim}",
                    "length": LENGTH // 2,
                    "window": WINDOW,
                    "retrieval_heads": len(retrieval),
                },
                run=partial(forward_and_backward, ours, *leaves),
                baselines={"causal sdpa": partial(forward_and_backward, causal, *leaves)},
                goals={"causal sdpa": 1.0},
            )

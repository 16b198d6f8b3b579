"""Headwise attention, forward and backward, against SDPA."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.masks import dense_pairs, near_pairs
from benchmarks.registry import Case, Wanted, benchmark
from rtpurbo import ops

LENGTH, WINDOW, SINKS = 8192, 1024, 4


@dataclass(frozen=True)
class Layer:
    heads: int
    kv_heads: int
    dim: int
    retrieval_heads: tuple[int, ...]

    @property
    def shape(self) -> str:
        return f"{self.heads}/{self.kv_heads}/{self.dim}"

    @property
    def owners(self) -> list[int]:
        """The KV head of each retrieval head."""
        return [head * self.kv_heads // self.heads for head in self.retrieval_heads]

    def qkv(
        self, rows: int, keys: int, dtype: torch.dtype, device: str = "cpu", batch: int = 1
    ) -> list[Tensor]:
        shapes = ((self.heads, rows), (self.kv_heads, keys), (self.kv_heads, keys))
        return [
            torch.randn(batch, length, heads, self.dim, dtype=dtype, device=device).transpose(1, 2)
            for heads, length in shapes
        ]


LARGE = Layer(32, 4, 128, (3, 9, 14, 20, 27))
SMALL = Layer(9, 3, 64, (4,))  # SmolLM2-135M's
LAYERS = LARGE, SMALL
WIDE = Layer(16, 4, 256, (1, 6, 13))


def masked_sdpa(layer: Layer, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor]) -> None:
    """The same heads under boolean masks: one call for the local ones, one for the others."""
    retrieval = torch.zeros(layer.heads, dtype=torch.bool)
    retrieval[list(layer.retrieval_heads)] = True
    for chosen, mask in zip((~retrieval, retrieval), masks, strict=True):
        sdpa(q[:, chosen], k[:, chosen], v[:, chosen], attn_mask=mask)


def forward_and_backward(function, *leaves: Tensor) -> None:
    out = function(*leaves)
    torch.autograd.grad(out, leaves, out.detach())


@cache
def boolean_masks() -> list[Tensor]:
    """Of local and of retrieval heads."""
    positions = torch.arange(LENGTH)
    distance = positions[:, None] - positions
    causal = distance >= 0
    return [causal & ((distance < WINDOW) | (positions < SINKS)), causal]


def parameters_of(layer: Layer, dtype: torch.dtype, length: int) -> dict[str, Any]:
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "heads": layer.shape,
        "length": length,
        "window": WINDOW,
        "retrieval_heads": len(layer.retrieval_heads),
    }


@benchmark
def attention(wanted: Wanted) -> Iterator[Case]:
    """Goals: 2x SDPA with masks, and 0.6 of the masks' FLOP ratio against causal SDPA."""
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            parameters = parameters_of(layer, dtype, LENGTH)
            if not wanted(parameters):
                continue
            masks = boolean_masks()
            q, k, v = layer.qkv(LENGTH, LENGTH, dtype)
            group = layer.heads // layer.kv_heads
            k_repeated, v_repeated = (x.repeat_interleave(group, 1) for x in (k, v))
            retrieval = list(layer.retrieval_heads)
            dense = dense_pairs(LENGTH)
            pairs = near_pairs(LENGTH, WINDOW, SINKS) * (layer.heads - len(retrieval))
            pairs += dense * len(retrieval)
            yield Case(
                parameters=parameters,
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
def attention_training(wanted: Wanted) -> Iterator[Case]:
    """Forward and backward; the goal is not to be slower than causal SDPA."""
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            parameters = parameters_of(layer, dtype, LENGTH // 2)
            if not wanted(parameters):
                continue
            leaves = [x.requires_grad_() for x in layer.qkv(LENGTH // 2, LENGTH // 2, dtype)]
            retrieval, scale = list(layer.retrieval_heads), layer.dim**-0.5

            def ours(q: Tensor, k: Tensor, v: Tensor, heads=retrieval, scale=scale) -> Tensor:
                return ops.attention(q, k, v, heads, WINDOW, SINKS, scale)[0]

            causal = partial(sdpa, is_causal=True, enable_gqa=True)
            yield Case(
                parameters=parameters,
                run=partial(forward_and_backward, ours, *leaves),
                baselines={"causal sdpa": partial(forward_and_backward, causal, *leaves)},
                goals={"causal sdpa": 1.0},
            )

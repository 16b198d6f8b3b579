"""PyTorch's dense attention by a named backend, the baseline on the GPU."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.registry import Run, in_turn

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v, enable_gqa=True, **more)


def dense_in_turn(inputs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Run]:
    """By backend: a call for each q, k and v."""
    each = list(inputs)
    return {
        name: in_turn([partial(dense, backend, *qkv) for qkv in each])
        for name, backend in BACKENDS.items()
    }

"""PyTorch's dense attention by a named backend, the baseline on the GPU."""

from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v, enable_gqa=True, **more)

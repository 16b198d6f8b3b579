"""Index keys in 4 or 8 bits."""

import torch
from torch import Tensor

from rtpurbo.ops._library import rtpurbo_ops

INDEX_BLOCK = 64  # keys that share a minimum and a step


def quantize_index(k_index: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """k_index ~ minimum + step * code, with both for each block of 64 keys and dimension.

    What `select` and `select_tiles` make of it is off by at most step / 2.

    Args:
        k_index: [B, Rk, N, r] float32, bfloat16, float16 or, on the CPU, float64, N a multiple of
            64; last dimension contiguous.
        bits: 4 or 8.

    Returns:
        codes uint8 [B, Rk, N, c]: with 8 bits c = r; with 4 bits c = ceil(r / 2), and byte d holds
        dimension d in its lower and d + c in its upper half. ranges float16 [B, Rk, N / 64, 2 r]:
        the minima, rounded down, then the steps, rounded up. Where one of them is no finite
        float16, for a NaN or an infinity, the minimum is NaN.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range or dtype.
    """
    return rtpurbo_ops.quantize_index(k_index, bits)


@torch.library.register_fake("rtpurbo::quantize_index")
def _(k_index: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    batch, heads, keys, dim = k_index.shape
    width = dim if bits == 8 else -(-dim // 2)
    return (
        k_index.new_empty((batch, heads, keys, width), dtype=torch.uint8),
        k_index.new_empty((batch, heads, keys // INDEX_BLOCK, 2 * dim), dtype=torch.float16),
    )

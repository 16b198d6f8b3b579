"""Index keys in 4 or 8 bits, and back."""

import numpy as np
import torch
from torch import Tensor

BLOCK = 64


def quantize_index(k_index: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    keys = k_index.double().unflatten(2, (-1, BLOCK))
    levels = 2**bits - 1
    low = round_half(keys.amin(3), up=False)
    step = round_half((keys.amax(3) - low) / levels, up=True)
    bad = ~(low.isfinite() & step.isfinite())
    low, step = low.masked_fill(bad, torch.nan), step.masked_fill(bad, 0.0)
    divisor = torch.where(step == 0, 1.0, step)
    codes = ((keys - low[:, :, :, None]) / divisor[:, :, :, None]).round().clamp(0, levels)
    codes = codes.nan_to_num(0.0).to(torch.uint8).flatten(2, 3)
    if bits == 4:
        half = -(-codes.shape[-1] // 2)
        upper = torch.zeros_like(codes[..., :half])
        upper[..., : codes.shape[-1] - half] = codes[..., half:]
        codes = codes[..., :half] + upper * 16
    return codes, torch.cat([low, step], -1)


def round_half(x: Tensor, up: bool) -> Tensor:
    """The nearest float16 on that side, as float64."""
    nearest = x.half()
    wrong = nearest.double() < x if up else nearest.double() > x
    target = torch.full_like(nearest, torch.inf if up else -torch.inf)
    beside = torch.from_numpy(np.nextafter(nearest.numpy(), target.numpy()))
    return torch.where(wrong, beside, nearest).double()


def dequantize(codes: Tensor, ranges: Tensor) -> Tensor:
    """float64 [B, Rk, Q, r]."""
    dim = ranges.shape[-1] // 2
    if codes.shape[-1] != dim:
        codes = torch.cat([codes & 15, codes >> 4], -1)[..., :dim]
    low, step = ranges.double().repeat_interleave(BLOCK, dim=2).split(dim, -1)
    return low + step * codes.double()


def all_keys(k_index: Tensor, codes: Tensor | None, ranges: Tensor | None) -> Tensor:
    """The quantised keys and those of k_index, float64 [B, Rk, N, r]."""
    if codes is None or ranges is None:
        return k_index.double()
    return torch.cat([dequantize(codes, ranges), k_index.double()], 2)

"""attention on CUDA against the float64 reference, and the rule by which a low-precision kernel
passes: at most twice the error of PyTorch."""

import torch
from torch import Tensor

from rtpurbo import ops
from tests import reference
from tests.gpu.views import on_cuda

CUDA_TYPES = [torch.float32, torch.bfloat16, torch.float16]
LSE_TOLERANCE = 1e-5
OUT_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3}


def assert_rounded(actual: Tensor, exact: Tensor, rounded: Tensor, atol: float) -> None:
    """NaN and infinities in the same places; error <= 2 x that of `rounded`, plus atol."""
    actual, rounded = actual.cpu().double(), rounded.double()
    assert actual.isnan().equal(exact.isnan())
    assert actual.isinf().equal(exact.isinf())
    finite = exact.isfinite()
    if not finite.any():
        return
    error = (actual - exact)[finite].abs().max().item()
    allowed = 2 * (rounded - exact)[finite].nan_to_num().abs().max().item() + atol
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def check(positional: tuple, keywords: dict) -> tuple[Tensor, Tensor]:
    """Runs the operator on CUDA and holds it against the reference; returns its results."""
    dtype = positional[0].dtype
    out, lse = ops.attention(*on_cuda(positional), **on_cuda(keywords))
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous()
    exact = reference.attention(*positional, **keywords)
    rounded = reference.attention(*positional, **keywords, compute=dtype)
    assert_rounded(out, exact[0], rounded[0], OUT_TOLERANCE[dtype])
    torch.testing.assert_close(
        lse.cpu().double(), exact[1], atol=LSE_TOLERANCE, rtol=LSE_TOLERANCE, equal_nan=True
    )
    return out, lse

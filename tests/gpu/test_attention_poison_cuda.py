"""attention on CUDA where keys and values are not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rtpurbo import ops
from tests.gpu.attention_check import CUDA_TYPES
from tests.gpu.views import on_cuda
from tests.lists import lists_where


def assert_like_the_cpu(*arguments: Any, **lists: Tensor) -> None:
    """NaN and infinities in the same places."""
    got = ops.attention(*on_cuda(arguments), **on_cuda(lists))
    want = ops.attention(*arguments, **lists)
    tolerance = 1e-5 if want[0].dtype == torch.float32 else 2e-2
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_poison_reaches_only_the_rows_that_see_it(
    dtype: torch.dtype, dim: int, poison: float
) -> None:
    q, k, v = (torch.randn(1, heads, 400, dim).to(dtype) for heads in (4, 2, 2))
    k[0, 0, 150, 7] = v[0, 1, 151, 9] = v[0, 1, 158, 2] = v[0, 0, 399, 5] = poison
    assert_like_the_cpu(q, k, v, [1, 3], 60, 4, dim**-0.5)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_infinite_scores_of_keys_that_all_rows_see(dtype: torch.dtype, dim: int) -> None:
    """Two heads each see -inf last, first, and at all keys, and one +inf."""
    q, k, v = (torch.rand(1, heads, 900, dim) + 0.1 for heads in (8, 4, 4))
    k[0, 0, :400, 3] = k[0, 1, 300:, 3] = k[0, 2, :, 5] = -torch.inf
    k[0, 3, 200, 1] = torch.inf
    q, k, v = q[:, :, 600:].to(dtype), k.to(dtype), v.to(dtype)
    assert_like_the_cpu(q, k, v, list(range(8)), 1, 0, dim**-0.5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_poison_in_listed_blocks_of_padded_rows(
    dtype: torch.dtype, dim: int, poison: float
) -> None:
    """In blocks that tiles list and in others, before `start`, at it, and on the diagonal."""
    q, k, v = (torch.randn(2, h, n, dim).to(dtype) for h, n in ((4, 300), (2, 700), (2, 700)))
    for key in (70, 133, 260, 333, 500, 699):
        k[0, 0, key, 3] = v[1, 1, key, 5] = poison
    indices, counts = lists_where(torch.rand(2, 2, 3, 11) < 0.5)
    counts[1, 1, 2] = -1
    lists = {"block_indices": indices, "block_counts": counts}
    start = torch.tensor([130, 260])
    assert_like_the_cpu(q, k, v, [0, 3], 60, 4, dim**-0.5, start, **lists)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_unlisted_and_padded_keys_are_never_used(dtype: torch.dtype, dim: int) -> None:
    q, k, v = (torch.randn(1, h, n, dim).to(dtype) for h, n in ((2, 256), (1, 512), (1, 512)))
    k[:, :, 64:200] = v[:, :, 70:190] = torch.nan
    k[:, :, :33] = v[:, :, :33] = torch.nan
    indices = torch.tensor([0, 4, 5, 6, 7], dtype=torch.int32).expand(1, 2, 2, 5)
    counts = torch.full((1, 2, 2), 5, dtype=torch.int32)
    lists = {"block_indices": indices.cuda(), "block_counts": counts.cuda()}
    start = torch.tensor([33]).cuda()
    out, lse = ops.attention(q.cuda(), k.cuda(), v.cuda(), [0, 1], 60, 4, 0.125, start, **lists)
    assert out.isfinite().all() and lse.isfinite().all()

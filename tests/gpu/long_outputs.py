"""Outputs of more than 2^31 elements, known because each row sees one key: they are its value."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

PIECES = 64  # to compare in, so that the float32 of the inputs take little memory


def needs_memory(gibibytes: int) -> None:
    """Skips the test where so much is not free: other tests run on the device at the same time."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gibibytes:
        pytest.skip(f"takes {gibibytes} GiB of the device's memory, of which {free} are free")


def assert_rows_see_themselves(
    q: Tensor, k: Tensor, v: Tensor, scale: float, results: Sequence[Tensor], tolerance: float
) -> None:
    """Row m of q, out [B, H, M, D] and lse [B, H, M] and key m of k, v [B, Hk, M, D], all alone."""
    axis = 0 if q.shape[0] > q.shape[2] else 2
    group = q.shape[1] // k.shape[1]
    pieces = (tensor.split(-(-q.shape[axis] // PIECES), axis) for tensor in (q, k, v, *results))
    for queries, keys, values, out, lse in zip(*pieces, strict=True):
        assert (out.unflatten(1, (-1, group)) == values[:, :, None]).all()
        products = queries.unflatten(1, (-1, group)).float() * keys[:, :, None].float()
        torch.testing.assert_close(
            lse, products.sum(-1).flatten(1, 2) * scale, atol=tolerance, rtol=1e-5
        )

"""attention on CUDA where row tiles are few and keys are many: tiles are split among
multiprocessors on sm_90, and their parts are put together."""

import random

import pytest
import torch
from torch import Tensor

from rtpurbo import ops
from tests.gpu.attention_check import check
from tests.gpu.kernels import kernels_of, skip_unless_sm90
from tests.gpu.repeats import assert_repeats
from tests.lists import lists_where

TYPES = [torch.float16, torch.bfloat16]


def tensor(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)


def on_cuda(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("seed", range(25))
def test_random_cases(seed: int, dim: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, kv_heads, group = rng.randint(1, 2), rng.randint(1, 2), rng.choice([1, 2, 3])
    rows = rng.choice([1, 17, 127, 128, 129, 200])
    keys = rng.randint(1600, 6000)
    heads = kv_heads * group
    retrieval = sorted(rng.sample(range(heads), rng.randint(0, heads)))
    more = {}
    if rng.random() < 0.4:
        more["start"] = torch.tensor([rng.randint(0, keys) for _ in range(batch)])
    if retrieval and rng.random() < 0.6:
        shape = batch, len(retrieval), -(-rows // 128), -(-keys // 64)
        picked = torch.rand(shape) < rng.choice([0.0, 0.02, 0.2, 0.6, 1.0])
        indices, counts = lists_where(picked)
        counts[torch.rand(counts.shape) < 0.2] = -1
        more |= dict(block_indices=indices, block_counts=counts)
    if rng.random() < 0.3:
        local, far_heads = rng.randint(rows, keys), len({head // group for head in retrieval})
        more |= dict(
            k_local=tensor(batch, kv_heads - far_heads, local, dim, dtype),
            v_local=tensor(batch, kv_heads - far_heads, local, dim, dtype),
        )
        kv_heads = far_heads
    window, sinks = rng.choice([1, 60, 129, 1000, 2000, 5000]), rng.choice([0, 1, 4, 70, 1500])
    q = tensor(batch, heads, rows, dim, dtype)
    k, v = (tensor(batch, kv_heads, keys, dim, dtype) for _ in range(2))
    check((q, k, v, retrieval, window, sinks, dim**-0.5), more)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_poison_in_one_part(dim: int, poison: float) -> None:
    """In a key it reaches all rows that see it, whatever part that is; unseen ones do not count."""
    q = tensor(1, 2, 100, dim, torch.bfloat16)
    k, v = (tensor(1, 1, 3000, dim, torch.bfloat16) for _ in range(2))
    v[0, 0, 700] = poison
    k[0, 0, 2960] = poison
    check((q, k, v, [1], 64, 4, dim**-0.5), {})


def test_bits_repeat_and_replay() -> None:
    q, k, v = on_cuda(1, 6, 300, 128), on_cuda(1, 2, 9000, 128), on_cuda(1, 2, 9000, 128)
    assert_repeats(lambda: ops.attention(q, k, v, [0, 4], 4000, 4, 0.09))


def test_few_tiles_are_split_and_many_are_not() -> None:
    """The rule is of shapes alone. Parts are merged by a kernel of their own."""
    skip_unless_sm90()

    def merges(rows: int, keys: int) -> int:
        q, k = on_cuda(1, 8, rows, 128), on_cuda(1, 2, keys, 128)
        names = kernels_of(lambda: ops.attention(q, k, k, [0], 512, 4, 0.09))
        return sum("merge_parts" in name for name in names)

    assert merges(128, 20_000) == 1
    assert merges(20_000, 20_000) == 0
    assert merges(128, 1000) == 0

"""Decode steps of few keys, all of which every head sees: a kernel of their own reads them."""

import random

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.gpu.repeats import assert_repeats
from tests.gpu.views import draw_features, on_cuda

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
DIMS = pytest.mark.parametrize("dim", [64, 128, 256])
EDGES = [n + more for n in (1, 16, 64, 128, 256, 512) for more in (-1, 0, 1) if n + more > 0]
KEYS = pytest.mark.parametrize("keys", [*EDGES, 40, 100, 200, 400])
"""About what its blocks have at a time, and the most."""


def assert_is_reference(arguments, poisoned):
    """`poisoned`: tensors in the place of the arguments', different where no head looks."""
    exact, exact_lse = reference.decode(**arguments)
    low, _ = reference.decode(**arguments, compute=arguments["q"].dtype)
    out, lse = ops.decode(**on_cuda(arguments | poisoned))
    allowed = 2 * (low.double() - exact).abs().max() + 1e-5
    assert (out.cpu().double() - exact).abs().max() <= allowed
    torch.testing.assert_close(lse.cpu().double(), exact_lse, atol=2e-4, rtol=1e-5)


def hidden_as(poison, tensor, start):
    """A [B, H, N, D] tensor whose rows before `start` hold `poison`."""
    hidden = torch.arange(tensor.shape[2]) < start[:, None]
    return tensor.masked_fill(hidden[:, None, :, None], poison)


@KEYS
@DIMS
@DTYPES
def test_every_head_sees_every_key(dtype, dim, keys):
    for seed in range(4):
        rng = random.Random(seed * 1000 + keys + dim)
        generator = torch.Generator().manual_seed(rng.randint(0, 1 << 30))
        batch = rng.choice([1, 2, 5, 40, 90])
        kv_heads, group = rng.randint(1, 3), rng.choice([1, 2, 3, 5, 7, 8, 9, 16])
        heads = kv_heads * group
        q = draw_features(rng, generator, batch, heads, 1, dim, dtype)
        k, v = (draw_features(rng, generator, batch, kv_heads, keys, dim, dtype) for _ in "kv")
        start = torch.randint(0, keys + 1, (batch,), generator=generator)  # some see nothing
        sinks, near_window = rng.choice([(0, keys), (4, keys), (4, max(1, keys - 4))])
        arguments = dict(
            q=q, k=k, v=v, retrieval_heads=sorted(rng.sample(range(heads), rng.randint(0, heads))),
            window=rng.choice([near_window, keys + 99]), near_window=near_window, sinks=sinks,
            scale=dim**-0.5, start=start,
        )  # fmt: skip
        poison = rng.choice([float("nan"), float("inf")])
        poisoned = {name: hidden_as(poison, arguments[name], start) for name in "kv"}
        assert_is_reference(arguments, poisoned)


@KEYS
@DIMS
@DTYPES
def test_some_heads_read_rings(dtype, dim, keys):
    """The keys of a KV head without retrieval heads stand in a ring, which holds all of them."""
    rng = random.Random(keys + dim)
    generator = torch.Generator().manual_seed(keys * dim)
    group, window = rng.choice([1, 3, 8]), keys + rng.choice([0, 1, 50])
    q = draw_features(rng, generator, 3, 3 * group, 1, dim, dtype)
    k, v = (draw_features(rng, generator, 3, 1, keys, dim, dtype) for _ in "kv")
    rings = [draw_features(rng, generator, 3, 2, window + 4, dim, dtype) for _ in "kv"]
    start = torch.tensor([0, keys // 3, keys])
    arguments = dict(
        q=q, k=k, v=v, retrieval_heads=[group], window=window, near_window=window, sinks=4,
        scale=dim**-0.5, start=start, k_local=rings[0], v_local=rings[1],
    )  # fmt: skip
    unwritten = torch.arange(window + 4) >= (keys - start)[:, None]
    poisoned = {
        name: ring.masked_fill(unwritten[:, None, :, None], float("nan"))
        for name, ring in zip(("k_local", "v_local"), rings, strict=True)
    }
    assert_is_reference(arguments, poisoned)


@DIMS
@DTYPES
def test_what_is_not_finite_stays_where_it_is(dtype, dim):
    """One query head meets an infinite key, all of one KV head an infinite value."""
    torch.manual_seed(dim)
    q, k, v = (torch.randn(1, heads, n, dim).to(dtype) for heads, n in ((4, 1), (2, 70), (2, 70)))
    v[0, 1, 69, 5] = torch.inf
    out, lse = ops.decode(*on_cuda((q, k, v, [], 70, 70, 0, 0.1)))
    exact, _ = reference.decode(q, k, v, [], 70, 70, 0, 0.1)
    assert torch.equal(out.isinf().cpu(), exact.isinf()) and exact.isinf().sum() == 2
    assert out.isnan().sum() == 0
    k[0, 0, 3] = torch.nan
    out, lse = ops.decode(*on_cuda((q, k, v, [], 70, 70, 0, 0.1)))
    assert torch.equal(out.isnan().cpu().all(-1)[0, :, 0], torch.tensor([True, True, False, False]))
    assert torch.equal(lse.isnan().cpu()[0, :, 0], torch.tensor([True, True, False, False]))


@pytest.mark.parametrize("batch, keys", [(1, 16), (1, 60), (3, 128), (1, 250), (90, 500)])
@DIMS
@DTYPES
def test_steps_repeat(dtype, dim, batch, keys, cuda_device):
    torch.manual_seed(keys)
    q = torch.randn(batch, 6, 1, dim, device=cuda_device).to(dtype)
    k, v = (torch.randn(batch, 2, keys, dim, device=cuda_device).to(dtype) for _ in "kv")
    start = torch.arange(batch, device=cuda_device) % keys
    assert_repeats(lambda: ops.decode(q, k, v, [1], keys, keys, 0, 0.1, start=start))

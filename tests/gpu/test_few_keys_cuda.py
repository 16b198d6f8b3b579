"""Decode steps of few keys, all of which every head sees: a kernel of their own reads them."""

import random
from functools import partial

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.gpu.kernels import kernels_of
from tests.gpu.repeats import assert_repeats
from tests.gpu.views import draw_features, on_cuda

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
DIMS = pytest.mark.parametrize("dim", [64, 128, 256])
EDGES = [n + more for n in (1, 16, 64, 128, 256, 512) for more in (-1, 0, 1) if n + more > 0]
KEYS = pytest.mark.parametrize("keys", [*EDGES, 40, 100, 200, 400])
"""About what its blocks have at a time, and the most."""
MANY = 90
"""A batch of which two KV heads have more blocks than there are multiprocessors."""


def drawer(seed, dim, dtype):
    """`draw(batch, heads, rows)` of tensors whose rows stand on 16 bytes, as the kernel takes them,
    and what else is drawn by.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rest = dict(dim=dim, dtype=dtype, before=8, behind=8)
    return partial(draw_features, rng, generator, **rest), rng, generator


def assert_is_reference(arguments, unseen):
    """`unseen`: by argument the rows [B, N] that no head looks at; they get NaN or infinity."""
    exact, exact_lse = reference.decode(**arguments)
    low, _ = reference.decode(**arguments, compute=arguments["q"].dtype)
    for name, rows in unseen.items():
        poison = float("nan") if name.startswith("k") else float("inf")
        arguments[name].masked_fill_(rows[:, None, :, None], poison)  # strides stay
    out, lse = ops.decode(**on_cuda(arguments))
    allowed = 2 * (low.double() - exact).abs().max() + 1e-5
    assert (out.cpu().double() - exact).abs().max() <= allowed
    torch.testing.assert_close(lse.cpu().double(), exact_lse, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("many", [False, True])
@KEYS
@DIMS
@DTYPES
def test_every_head_sees_every_key(dtype, dim, keys, many):
    for seed in range(1 if many else 4):
        draw, rng, generator = drawer(seed * 1000 + keys + dim, dim, dtype)
        batch = MANY if many else rng.randint(1, 5)
        kv_heads = 2 if many else rng.randint(1, 3)
        heads = kv_heads * (rng.choice([1, 3]) if many else rng.choice([1, 2, 3, 5, 7, 8, 9, 16]))
        q, k, v = draw(batch, heads, 1), draw(batch, kv_heads, keys), draw(batch, kv_heads, keys)
        start = torch.randint(0, keys + 2, (batch,), generator=generator)  # or see nothing
        sinks, near_window = rng.choice([(0, keys), (4, keys), (4, max(1, keys - 4))])
        arguments = dict(
            q=q, k=k, v=v, retrieval_heads=sorted(rng.sample(range(heads), rng.randint(0, heads))),
            window=rng.choice([near_window, keys + 99]), near_window=near_window, sinks=sinks,
            scale=dim**-0.5, start=start,
        )  # fmt: skip
        hidden = torch.arange(keys) < start[:, None]
        assert_is_reference(arguments, {"k": hidden, "v": hidden})


@pytest.mark.parametrize("ring", ["longer", "shorter", "alone"])
@KEYS
@DIMS
@DTYPES
def test_some_heads_read_rings(dtype, dim, keys, ring):
    """The keys of a KV head without retrieval heads stand in a ring, or the last of them."""
    draw, rng, _ = drawer(keys * dim, dim, dtype)
    group = rng.choice([1, 3, 8])
    window = max(1, keys // 2 if ring == "shorter" else keys + rng.choice([0, 1, 50]))
    whole = 0 if ring == "alone" else 1
    k, v = draw(3, whole, keys), draw(3, whole, keys)
    rings = [draw(3, 2, window + 4) for _ in "kv"]
    start = torch.tensor([0, keys // 3, keys])
    arguments = dict(
        q=draw(3, (whole + 2) * group, 1), k=k, v=v, retrieval_heads=list(range(whole * group)),
        window=window, near_window=window, sinks=4, scale=dim**-0.5, start=start,
        k_local=rings[0], v_local=rings[1], length=keys if ring == "alone" else -1,
    )  # fmt: skip
    unwritten = torch.arange(window + 4) >= (keys - start)[:, None]
    assert_is_reference(arguments, {"k_local": unwritten, "v_local": unwritten})


@pytest.mark.parametrize("kv_heads", [256, 32])
def test_256_heads(kv_heads):
    draw, *_ = drawer(kv_heads, 64, torch.bfloat16)
    q, k, v = draw(1, 256, 1), draw(1, kv_heads, 50), draw(1, kv_heads, 50)
    rest = dict(window=50, near_window=50, sinks=0, scale=0.125)
    assert_is_reference(dict(q=q, k=k, v=v, retrieval_heads=[3, 255], **rest), {})


@pytest.mark.parametrize("batch, keys", [(1, 70), (MANY, 300)])
@DIMS
@DTYPES
def test_what_is_not_finite_stays_where_it_is(dtype, dim, batch, keys):
    """All query heads of one KV head meet an infinite value, then those of the other a NaN key."""
    torch.manual_seed(dim)
    q, k, v = (torch.randn(batch, h, n, dim).to(dtype) for h, n in ((4, 1), (2, keys), (2, keys)))
    rest = [], keys, keys, 0, 0.1
    v[0, 1, keys - 1, 5] = torch.inf
    out, lse = ops.decode(*on_cuda((q, k, v, *rest)))
    exact, _ = reference.decode(q, k, v, *rest)
    assert torch.equal(out.isinf().cpu(), exact.isinf()) and exact.isinf().sum() == 2
    assert out.isnan().sum() == 0
    k[0, 0, 3] = torch.nan
    out, lse = ops.decode(*on_cuda((q, k, v, *rest)))
    poisoned = torch.zeros(batch, 4, dtype=torch.bool)
    poisoned[0, :2] = True
    assert torch.equal(out.isnan().cpu().all(-1)[:, :, 0], poisoned)
    assert torch.equal(lse.isnan().cpu()[:, :, 0], poisoned)


@pytest.mark.parametrize("batch, keys", [(1, 16), (1, 60), (3, 128), (1, 250), (MANY, 500)])
@DIMS
@DTYPES
def test_steps_repeat(dtype, dim, batch, keys, cuda_device):
    torch.manual_seed(keys)
    q = torch.randn(batch, 6, 1, dim, device=cuda_device).to(dtype)
    k, v = (torch.randn(batch, 2, keys, dim, device=cuda_device).to(dtype) for _ in "kv")
    start = torch.arange(batch, device=cuda_device) % keys
    assert_repeats(lambda: ops.decode(q, k, v, [1], keys, keys, 0, 0.1, start=start))


@pytest.mark.parametrize(
    ("dim", "batch", "keys", "few"),
    [
        *[(dim, batch, 64, True) for dim in (64, 128, 256) for batch in (1, MANY)],
        *[(dim, 1, 128, True) for dim in (64, 128, 256)],
        *[(dim, 1, keys, keys == 256) for dim in (64, 128) for keys in (256, 257)],
        *[(dim, MANY, keys, keys == 128) for dim in (64, 128) for keys in (128, 256)],
        (256, 1, 129, False),
        *[(256, MANY, keys, keys <= 512) for keys in (65, 512, 513)],
    ],
)
def test_which_steps_it_takes(dim, batch, keys, few, cuda_device):
    if not 100 <= torch.cuda.get_device_properties(cuda_device).multi_processor_count < 2 * MANY:
        pytest.skip("asks for the choice of a card with 132 multiprocessors or about as many")
    q, k = (
        torch.randn(batch, h, n, dim, device=cuda_device).half() for h, n in ((6, 1), (2, keys))
    )
    for window, takes in ((keys, few), (keys // 2, False)):  # not all see all
        names = kernels_of(lambda window=window: ops.decode(q, k, k, [1], window, keys, 0, 0.1))
        assert names and any("few_keys" in name for name in names) == takes

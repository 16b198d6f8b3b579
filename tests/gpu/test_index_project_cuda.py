"""index_project on CUDA against float64."""

import random

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.gpu.views import draw_features, on_cuda
from tests.properties import DTYPES
from tests.samples import index_project_samples, numbers

ROWS = [1, 1, 2, 15, 16, 17, 127, 128, 129, 300]
DIMS = [1, 3, 8, 16, 64, 72, 128, 130, 256]
INDEX_DIMS = [1, 4, 15, 16, 17, 20, 33]


def draw_arguments(seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 4)
    dim, index_dim = rng.choice(DIMS), rng.choice(INDEX_DIMS)
    rows = rng.choice(ROWS)
    x_dtype, w_dtype = rng.choice(DTYPES), rng.choice(DTYPES)
    q_heads = [rng.randrange(heads) for _ in range(rng.randint(0, 6))]
    k_heads = [rng.randrange(kv_heads) for _ in range(rng.randint(0, 6))]
    first = rng.randint(0, 1)  # weights that do not begin on a vector
    q = draw_features(rng, generator, batch, heads, rows, dim, x_dtype)
    k = draw_features(rng, generator, batch, kv_heads, rng.choice([rows, 40]), dim, x_dtype)
    w_q, w_k = (
        torch.randn(first + len(many) * index_dim * dim, generator=generator)
        .to(w_dtype)[first:]
        .view(len(many), index_dim, dim)
        for many in (q_heads, k_heads)
    )
    return q, k, w_q, w_k, q_heads, k_heads, rng.choice([None, *DTYPES])


def assert_close(got, exact, bound, dim):
    """One rounding of the result, and those of a float32 sum of `dim` products."""
    info = torch.finfo(got.dtype)
    allowed = info.eps * exact.abs() + info.tiny * info.eps + dim * 2.0**-24 * bound
    assert got.shape == exact.shape
    assert ((got.double().cpu() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("seed", range(240))
def test_random_cases_equal_float64(seed):
    q, k, w_q, w_k, q_heads, k_heads, dtype = arguments = draw_arguments(seed)
    got = ops.index_project(*on_cuda(arguments))
    exact = reference.index_project(*arguments)
    bounds = reference.index_project(
        q.abs(), k.abs(), w_q.abs(), w_k.abs(), q_heads, k_heads, dtype
    )
    for one, want, bound in zip(got, exact, bounds, strict=True):
        assert one.dtype == (dtype or w_q.dtype) and one.is_cuda
        assert_close(one, want, bound, q.shape[3])


def test_without_rows_or_batch(cuda_device):
    for batch, rows in ((0, 3), (2, 0)):
        q = torch.zeros(batch, 4, rows, 16, device=cuda_device)
        w = torch.zeros(2, 8, 16, device=cuda_device)
        for out in ops.index_project(q, q, w, w, [0, 3], [1, 1]):
            assert out.shape == (batch, 2, rows, 8)


@pytest.mark.parametrize("rows", [1, 500])
def test_twenty_runs_give_the_same_bits(rows, cuda_device):
    q = torch.randn(2, 8, rows, 128, device=cuda_device, dtype=torch.bfloat16)
    k = torch.randn(2, 2, rows, 128, device=cuda_device, dtype=torch.bfloat16)
    w = torch.randn(5, 16, 128, device=cuda_device)
    arguments = (q, k, w, w, [0, 2, 3, 5, 7], [0, 0, 0, 1, 1], torch.float16)
    first = ops.index_project(*arguments)
    for _ in range(20):
        for a, b in zip(first, ops.index_project(*arguments), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 200])
def test_graph_capture_replays(rows, cuda_device):
    q = torch.randn(1, 4, rows, 64, device=cuda_device)
    w = torch.randn(2, 16, 64, device=cuda_device)
    arguments = (q, q, w, w, [1, 3], [0, 2])
    ops.index_project(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.index_project(*arguments)
    q.copy_(torch.randn_like(q))
    graph.replay()
    for a, b in zip(captured, ops.index_project(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("memory_is_given_back")
def test_beyond_2_to_the_31_elements(cuda_device):
    rows, dim = 1 << 24, 136
    x = torch.zeros(1, 1, rows, dim, device=cuda_device, dtype=torch.float16)
    x[0, 0, -1] = 1
    w = torch.randint(-3, 4, (1, 4, dim), device=cuda_device).float()
    out, _ = ops.index_project(x, x[:, :, :1], w, w, [0], [0])
    assert torch.equal(out[0, 0, -1], w[0].sum(-1))
    assert not out[0, 0, :-1].any()


def test_opcheck(cuda_device):
    for sample in index_project_samples(torch.float32):
        torch.library.opcheck(
            torch.ops.rtpurbo.index_project.default,
            (),
            sample.with_tensors(torch.Tensor.cuda),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_float64_is_refused(cuda_device):
    x, w = numbers(1, 2, 3, 8).to(cuda_device), numbers(2, 4, 8).to(cuda_device)
    heads = [0, 1]
    for name, q, weights, dtype in (
        ("q", x.double(), w, None),
        ("w_q", x, w.double(), None),
        ("w_q", x, w.double(), torch.float32),
        ("dtype", x, w, torch.float64),
    ):
        with pytest.raises(TypeError, match=f"index_project: {name} on CUDA must be float32"):
            ops.index_project(q, q, weights, weights, heads, heads, dtype)


def test_more_heads_than_fit_are_refused(cuda_device):
    x, w = numbers(1, 2, 3, 8).to(cuda_device), torch.zeros(513, 4, 8, device=cuda_device)
    with pytest.raises(ValueError, match="q_heads on CUDA must be at most 512 heads, got 513"):
        ops.index_project(x, x, w, w[:1], [0] * 513, [0])


def test_weights_on_another_device_are_refused(cuda_device):
    x, w = numbers(1, 2, 3, 8), numbers(2, 4, 8)
    with pytest.raises(ValueError, match="w_q must be on the device of q"):
        ops.index_project(x.to(cuda_device), x.to(cuda_device), w, w, [0, 1], [0, 1])

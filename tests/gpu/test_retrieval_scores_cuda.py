"""retrieval_scores on CUDA against float64."""

import math
import random

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.gpu.views import on_cuda
from tests.properties import DTYPES
from tests.samples import retrieval_scores_samples


def draw_arguments(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group = rng.randint(1, 2), rng.randint(1, 3), rng.choice([1, 2, 3, 8])
    dim = rng.choice([8, 16, 24, 64, 72, 128, 256])
    rows = rng.choice([1, 2, 15, 16, 17, 32, 40])
    keys = rows + rng.choice([0, 1, 87, 127, 128, 129, 700])
    dtype, spread = rng.choice(DTYPES), rng.choice([0.5, 1.0, 3.0])
    pad = rng.choice([0, 3])
    q, k = (
        (torch.randn(batch, many, heads, dim + pad, generator=generator) * spread)
        .to(dtype)
        .transpose(1, 2)[..., pad:]
        for many, heads in ((rows, kv_heads * group), (keys, kv_heads))
    )
    begin = rng.randint(0, keys)
    start = None
    if rng.random() < 0.5:
        start = torch.tensor([rng.randint(0, keys) for _ in range(batch)])
    return dict(
        q=q,
        k=k,
        pre_begin=begin,
        pre_end=rng.randint(begin, keys),
        scale=dim**-0.5,
        start=start,
    )


@pytest.mark.parametrize("seed", range(200))
def test_random_cases_equal_float64(seed):
    arguments = draw_arguments(seed)
    device = on_cuda(arguments)
    got = ops.retrieval_scores(**device)
    assert got.dtype == torch.float32
    expected = reference.retrieval_scores(**arguments)
    torch.testing.assert_close(got.double().cpu(), expected, atol=1e-5, rtol=1e-4)
    if arguments["start"] is not None:
        for b, first in enumerate(arguments["start"].tolist()):
            device["k"][b, :, :first] = torch.nan
        assert torch.equal(ops.retrieval_scores(**device), got)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_makes_the_head_nan(poison, cuda_device):
    q = torch.ones(1, 2, 3, 16, device=cuda_device)
    k = torch.ones(1, 2, 300, 16, device=cuda_device)
    k[0, 1, 150, 0] = poison
    scores = ops.retrieval_scores(q, k, 0, 10, 0.25)
    assert scores[0, 0].isfinite() and scores[0, 1].isnan()


def test_rows_without_a_key_count_0(cuda_device):
    q = torch.randn(2, 2, 4, 16, device=cuda_device)
    k = torch.randn(2, 2, 50, 16, device=cuda_device)
    start = torch.tensor([50, 0], device=cuda_device)
    scores = ops.retrieval_scores(q, k, 0, 50, 0.25, start)
    assert (scores[0] == 0).all()
    assert torch.allclose(scores[1], torch.ones_like(scores[1]))
    k.fill_(-math.inf)
    assert (ops.retrieval_scores(q.abs(), k, 0, 50, 0.25) == 0).all()


def test_twenty_runs_give_the_same_bits(cuda_device):
    q = torch.randn(2, 8, 40, 128, device=cuda_device, dtype=torch.bfloat16)
    k = torch.randn(2, 2, 5000, 128, device=cuda_device, dtype=torch.bfloat16)
    first = ops.retrieval_scores(q, k, 100, 140, 128**-0.5)
    for _ in range(20):
        assert torch.equal(first, ops.retrieval_scores(q, k, 100, 140, 128**-0.5))


def test_graph_capture_replays(cuda_device):
    q = torch.randn(1, 4, 17, 64, device=cuda_device)
    k = torch.randn(1, 2, 500, 64, device=cuda_device)
    ops.retrieval_scores(q, k, 10, 90, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.retrieval_scores(q, k, 10, 90, 0.125)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, ops.retrieval_scores(q, k, 10, 90, 0.125))


def test_opcheck(cuda_device):
    for sample in retrieval_scores_samples(torch.float32):
        torch.library.opcheck(
            torch.ops.rtpurbo.retrieval_scores.default,
            (),
            sample.with_tensors(torch.Tensor.cuda),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_float64_is_refused(cuda_device):
    q = torch.zeros(1, 1, 1, 8, device=cuda_device, dtype=torch.float64)
    with pytest.raises(TypeError, match="q on CUDA must be float32"):
        ops.retrieval_scores(q, q, 0, 1, 1.0)

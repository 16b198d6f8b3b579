"""retrieval_scores, index_project and index_kl over random odd shapes, with their gradients."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests import reference
from tests.properties import DTYPES, layers

ALL_DTYPES = [torch.float64, *DTYPES]


@given(layer=layers(max_rows=40, dtypes=ALL_DTYPES), data=st.data())
def test_retrieval_scores_equal_the_reference(layer, data):
    q, k, _ = layer.qkv()
    begin = data.draw(st.integers(0, layer.keys))
    end = data.draw(st.integers(begin, layer.keys))
    mask = layer.mask()
    arguments = dict(pre_begin=begin, pre_end=end, scale=mask["scale"], start=mask["start"])
    got = ops.retrieval_scores(q, k, **arguments)
    expected = reference.retrieval_scores(q, k, **arguments)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)
    for b, first in enumerate(layer.start or ()):
        k[b, :, :first] = torch.nan
    torch.testing.assert_close(ops.retrieval_scores(q, k, **arguments), got, atol=0, rtol=0)


@given(
    layer=layers(max_rows=70, max_keys=140, dtypes=ALL_DTYPES),
    index_dim=st.sampled_from([1, 4, 8, 16, 20]),
    weights=st.sampled_from([torch.float32, None]),
    stored=st.sampled_from([None, torch.float16, torch.float32]),
    data=st.data(),
)
def test_index_project_equals_the_reference(layer, index_dim, weights, stored, data):
    generator = layer.generator()
    q, k, _ = layer.qkv()
    q_heads = list(layer.retrieval_heads)
    k_heads = data.draw(st.lists(st.integers(0, layer.kv_heads - 1), max_size=6))
    w_q, w_k = (
        torch.randn(len(heads), index_dim, layer.dim, generator=generator).to(
            weights or layer.dtype
        )
        for heads in (q_heads, k_heads)
    )
    results = []
    upstream = None
    for exact in (False, True):
        leaves = [t.detach().requires_grad_() for t in (q, k, w_q, w_k)]
        function = reference.index_project if exact else ops.index_project
        outputs = function(*leaves, q_heads, k_heads, stored)
        if upstream is None:
            assert outputs[0].dtype == outputs[1].dtype == (stored or w_q.dtype)
            upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
        gradients = torch.autograd.grad(
            outputs, leaves, [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)]
        )
        results.append([*outputs, *gradients])
    for got, want in zip(*results, strict=True):
        largest = want.abs().max().item() if want.numel() else 0.0
        eps = max(torch.finfo(got.dtype).eps, 1e-14)
        torch.testing.assert_close(
            got.double(), want.double(), atol=4 * eps * largest + 1e-12, rtol=4 * eps
        )

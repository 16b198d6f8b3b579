"""attention and near_lse over random odd shapes, and what they must not look at."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rtpurbo import ops
from tests import reference
from tests.properties import Layer, assert_within_twice_the_error, layers, random_lists

GRADIENTS = True  # there are none on CUDA


def check(layer: Layer, **more) -> None:
    """out, lse and the gradients of one call by FlashAttention's rule."""
    q, k, v = layer.qkv()
    arguments = layer.mask() | more | {"retrieval_heads": list(layer.retrieval_heads)}
    leaves = [tensor.detach().requires_grad_(GRADIENTS) for tensor in (q, k, v)]
    out, lse = ops.attention(*leaves, **arguments)
    upstream = torch.randn(out.shape, generator=layer.generator()).to(layer.dtype)
    results = [[out, lse]]
    if GRADIENTS:
        results[0] += torch.autograd.grad(out, leaves, upstream)
    for dtype in (torch.float64, layer.dtype):
        copies = [tensor.detach().to(dtype).requires_grad_(GRADIENTS) for tensor in (q, k, v)]
        out, lse = reference.attention(*copies, **arguments, compute=dtype)
        results.append([out, lse])
        if GRADIENTS:
            results[-1] += torch.autograd.grad(out, copies, upstream.to(dtype))
    for name, got, exact, low in zip(["out", "lse", "dq", "dk", "dv"], *results, strict=False):
        if name == "lse":
            torch.testing.assert_close(got.double(), exact, atol=1e-4, rtol=1e-5)
        else:
            floor = 1e-6 if name == "out" else 1e-5
            assert_within_twice_the_error(got, exact, low, layer.dtype, floor)


@given(layer=layers())
def test_attention_equals_the_reference(layer):
    check(layer)


@given(
    layer=layers(),
    tile=st.sampled_from([1, 16, 50, 128, 300]),
    block_size=st.sampled_from([1, 16, 24, 64]),
)
def test_attention_over_block_lists(layer, tile, block_size):
    shape = layer.batch, len(layer.retrieval_heads), -(-layer.rows // tile)
    blocks = -(-layer.keys // block_size)
    indices, counts = random_lists(layer.generator(), *shape, blocks=blocks)
    lists = dict(block_indices=indices, block_counts=counts, tile=tile, block_size=block_size)
    check(layer, **lists)


@given(layer=layers(max_rows=200), extra=st.integers(0, 70))
def test_attention_over_a_split_cache(layer, extra):
    q, k, v = layer.qkv()
    full = sorted({head // layer.group for head in layer.retrieval_heads})
    local = [head for head in range(layer.kv_heads) if head not in full]
    keys = layer.rows + extra
    generator = layer.generator()
    shape = layer.batch, len(local), keys, layer.dim
    start_local = torch.randint(0, keys, (layer.batch,), generator=generator)
    arguments = layer.mask() | dict(
        retrieval_heads=list(layer.retrieval_heads),
        k_local=torch.randn(shape, generator=generator).to(layer.dtype),
        v_local=torch.randn(shape, generator=generator).to(layer.dtype),
        start_local=start_local,
    )
    out, lse = ops.attention(q, k[:, full], v[:, full], **arguments)
    expected, expected_lse = reference.attention(q, k[:, full], v[:, full], **arguments)
    low, _ = reference.attention(q, k[:, full], v[:, full], **arguments, compute=layer.dtype)
    assert_within_twice_the_error(out, expected, low, layer.dtype)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)


@given(layer=layers(), data=st.data())
def test_near_lse_equals_the_reference(layer, data):
    q, k, _ = layer.qkv()
    q_heads = data.draw(st.lists(st.integers(0, layer.heads - 1), max_size=20))
    k_heads = [data.draw(st.integers(0, layer.kv_heads - 1)) for _ in q_heads]
    arguments = layer.mask() | dict(q_heads=q_heads, k_heads=k_heads)
    expected = reference.near_lse(q, k, **arguments)
    got = ops.near_lse(q, k, **arguments)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


def with_gradients(q, k, v, arguments: dict) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv for an upstream gradient of ones."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out, lse = ops.attention(*leaves, **arguments)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))


@given(layer=layers())
def test_padding_is_never_read(layer):
    q, k, v = layer.qkv()
    arguments = layer.mask() | {"retrieval_heads": list(layer.retrieval_heads)}
    expected = with_gradients(q, k, v, arguments)
    for b, first in enumerate(layer.start or ()):
        k[b, :, :first] = v[b, :, :first] = torch.nan
    got = with_gradients(q, k, v, arguments)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    for b, first in enumerate(layer.start or ()):
        for gradient in got[3:]:
            assert (gradient[b, :, :first] == 0).all()


@given(layer=layers(), cut=st.floats(0, 1))
def test_later_keys_do_not_move_earlier_rows(layer, cut):
    q, k, v = layer.qkv()
    arguments = layer.mask() | {"retrieval_heads": list(layer.retrieval_heads)}
    expected, expected_lse = ops.attention(q, k, v, **arguments)
    row = int(cut * layer.rows)
    k[:, :, layer.keys - layer.rows + row :] = torch.nan
    out, lse = ops.attention(q, k, v, **arguments)
    torch.testing.assert_close(out[:, :, :row], expected[:, :, :row], atol=0, rtol=0)
    torch.testing.assert_close(lse[:, :, :row], expected_lse[:, :, :row], atol=0, rtol=0)


@given(layer=layers(), tile=st.sampled_from([16, 50, 128]))
def test_blocks_that_no_tile_lists_are_never_read(layer, tile):
    q, k, v = layer.qkv()
    block_size, heads = 16, list(range(layer.heads))
    blocks = -(-layer.keys // block_size)
    shape = layer.batch, len(heads), -(-layer.rows // tile)
    indices = torch.arange(0, blocks, 2, dtype=torch.int32)
    arguments = layer.mask() | dict(
        retrieval_heads=heads,
        block_indices=indices.expand(*shape, -1),
        block_counts=torch.full(shape, len(indices), dtype=torch.int32),
        tile=tile,
        block_size=block_size,
    )
    expected = with_gradients(q, k, v, arguments)
    unlisted = torch.arange(layer.keys) // block_size % 2 == 1
    k[:, :, unlisted] = v[:, :, unlisted] = torch.nan
    got = with_gradients(q, k, v, arguments)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    for gradient in got[3:]:
        assert (gradient[:, :, unlisted] == 0).all()


@given(
    layer=layers(),
    where=st.sampled_from("qkv"),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    place=st.floats(0, 0.999),
)
def test_nan_and_inf_come_out_where_they_went_in(layer, where, value, place):
    tensors = dict(zip("qkv", layer.qkv(), strict=True))
    poisoned = tensors[where]
    poisoned[:, :, int(place * poisoned.shape[2]), 3] = value
    arguments = layer.mask() | {"retrieval_heads": list(layer.retrieval_heads)}
    out, lse = ops.attention(**tensors, **arguments)
    expected, expected_lse = reference.attention(**tensors, **arguments)
    massless = expected_lse == -torch.inf  # every logit -inf: 0, as in SDPA's safe softmax
    assert torch.equal(out.isfinite(), expected.isfinite() | massless[..., None])
    assert torch.equal(lse.isnan(), expected_lse.isnan() | (expected_lse == torch.inf))


def test_short_and_empty_sequences():
    arguments = dict(retrieval_heads=[1], window=3, sinks=4, scale=0.3)
    for batch, rows, keys in [(1, 1, 1), (2, 3, 3), (2, 0, 0), (2, 0, 5), (0, 3, 3), (1, 1, 5)]:
        q, k = torch.randn(batch, 4, rows, 8), torch.randn(batch, 2, keys, 8)
        out, lse = ops.attention(q, k, k, **arguments)
        expected, expected_lse = reference.attention(q, k, k, **arguments)
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=1e-5)

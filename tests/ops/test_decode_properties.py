"""decode over random odd shapes, and what it must not look at."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests import reference
from tests.properties import Layer, assert_within_twice_the_error, layers, random_lists
from tests.reference.decode import listed
from tests.reference.masks import near, visible

one_row = layers(max_rows=1)
near_windows = st.integers(1, 40) | st.integers(1, 600)
block_sizes = st.sampled_from([1, 16, 32, 64])


def arguments_of(layer: Layer, near_window: int, block_size: int) -> dict:
    shape = layer.batch, len(layer.retrieval_heads), 1
    blocks = -(-layer.keys // block_size)
    indices, counts = random_lists(layer.generator(), *shape, blocks=blocks)
    return layer.mask() | dict(
        retrieval_heads=list(layer.retrieval_heads),
        near_window=near_window,
        indices=indices,
        counts=counts,
        block_size=block_size,
    )


def check(layer: Layer, q, k, v, arguments: dict) -> None:
    out, lse = ops.decode(q, k, v, **arguments)
    exact, exact_lse = reference.decode(q, k, v, **arguments)
    low, _ = reference.decode(q, k, v, **arguments, compute=layer.dtype)
    assert_within_twice_the_error(out, exact, low, layer.dtype)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)


@given(layer=one_row, near_window=near_windows, block_size=block_sizes)
def test_decode_equals_the_reference(layer, near_window, block_size):
    check(layer, *layer.qkv(), arguments_of(layer, near_window, block_size))


@given(layer=one_row, near_window=near_windows)
def test_decode_without_lists_sees_everything(layer, near_window):
    arguments = arguments_of(layer, near_window, 1) | dict(indices=None, counts=None)
    check(layer, *layer.qkv(), arguments)


@given(layer=one_row, near_window=near_windows, window=st.integers(1, 700))
def test_decode_over_rings(layer, near_window, window):
    q, k, v = layer.qkv()
    sinks = min(layer.sinks, 5)
    full = sorted({head // layer.group for head in layer.retrieval_heads})
    shape = layer.batch, layer.kv_heads - len(full), sinks + window, layer.dim
    rings = [torch.randn(shape, generator=layer.generator()).to(layer.dtype) for _ in range(2)]
    for b, first in enumerate(layer.start or [0] * layer.batch):
        for ring in rings:
            ring[b, :, layer.keys - first :] = torch.nan
    arguments = arguments_of(layer, near_window, 1) | dict(
        window=window, sinks=sinks, k_local=rings[0], v_local=rings[1], length=layer.keys
    )
    empty = [ring.nan_to_num(0.0) for ring in rings]
    got = ops.decode(q, k[:, full], v[:, full], **arguments)
    clean = arguments | dict(k_local=empty[0], v_local=empty[1])
    torch.testing.assert_close(got, ops.decode(q, k[:, full], v[:, full], **clean), atol=0, rtol=0)
    check(layer, q, k[:, full], v[:, full], clean)


@given(layer=one_row, near_window=near_windows, block_size=block_sizes)
def test_unselected_keys_and_padding_are_never_read(layer, near_window, block_size):
    q, k, v = layer.qkv()
    arguments = arguments_of(layer, near_window, block_size)
    expected = ops.decode(q, k, v, **arguments)
    positions = torch.full((layer.batch, 1), layer.keys - 1)
    sees = visible(positions, layer.keys, arguments["start"])[:, 0]
    windows = [
        near(positions, layer.keys, arguments["start"], window, layer.sinks)[:, 0]
        for window in (layer.window, near_window)
    ]
    used = torch.zeros(layer.batch, layer.kv_heads, layer.keys, dtype=torch.bool)
    for head in range(layer.heads):
        kv = head // layer.group
        if head not in layer.retrieval_heads:
            used[:, kv] |= windows[0]
            continue
        entry = layer.retrieval_heads.index(head)
        members = listed(
            arguments["indices"][:, entry, 0],
            arguments["counts"][:, entry, 0],
            layer.keys,
            block_size,
        )
        used[:, kv] |= windows[1] | (members & sees)
    k[~used] = v[~used] = torch.nan
    torch.testing.assert_close(ops.decode(q, k, v, **arguments), expected, atol=0, rtol=0)


@given(layer=one_row, where=st.sampled_from("qkv"), value=st.sampled_from([torch.nan, torch.inf]))
def test_nan_and_inf_come_out_where_they_went_in(layer, where, value):
    tensors = dict(zip("qkv", layer.qkv(), strict=True))
    tensors[where][:, :, -1, 3] = value
    arguments = arguments_of(layer, 5, 1)
    out, lse = ops.decode(**tensors, **arguments)
    expected, expected_lse = reference.decode(**tensors, **arguments)
    massless = expected_lse == -torch.inf
    assert torch.equal(out.isfinite(), expected.isfinite() | massless[..., None])
    assert torch.equal(lse.isnan(), expected_lse.isnan() | (expected_lse == torch.inf))

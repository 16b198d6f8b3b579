"""sparse_decode over random odd shapes: a legal selection, and attention to just that."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rtpurbo import ops
from rtpurbo.ops.sparse_decode import WORD_KEYS, unpacked
from tests import reference
from tests.lists import lists_where
from tests.properties import Layer, assert_within_twice_the_error, check_set, layers
from tests.reference.masks import last_positions, near, visible
from tests.reference.quantize_index import BLOCK, all_keys
from tests.reference.select import block_scores, index_logits
from tests.reference.softmax import log_sum_exp

one_row = layers(max_rows=1).filter(lambda layer: layer.retrieval_heads)
choices = st.fixed_dictionaries(
    dict(
        p=st.floats(0.05, 1.0) | st.just(1.0),
        min_tokens=st.integers(0, 70),
        block_size=st.sampled_from([1, 16, 32, 64]),
        near_window=st.integers(1, 40) | st.integers(1, 600),
        beyond_window=st.booleans(),
        index_bits=st.sampled_from([16, 16, 8, 4]),
        exact=st.booleans(),
    )
)
index_dims = st.sampled_from([4, 16, 16])


def arguments_of(layer: Layer, choice: dict, dim: int) -> dict:
    """Index queries and keys: half as they are cached, some keys shared by several heads.

    With fewer than 16 bits, the first blocks of keys as codes: none, some, or all that are whole.
    """
    choice = choice.copy()
    bits = choice.pop("index_bits")
    generator = layer.generator()
    heads = len(layer.retrieval_heads)
    shared = int(torch.randint(1, heads + 1, (), generator=generator))
    index_map = torch.randint(shared, (heads,), generator=generator).tolist()
    q_index = torch.randn(layer.batch, heads, 1, dim, generator=generator) * 2
    k_index = torch.randn(layer.batch, shared, layer.keys, dim, generator=generator).half()
    more: dict[str, Tensor] = {}
    if bits < 16:
        coded = BLOCK * int(torch.randint(layer.keys // BLOCK + 1, (), generator=generator))
        far, k_index = k_index.split([coded, layer.keys - coded], 2)
        more = dict(zip(("codes", "ranges"), ops.quantize_index(far, bits), strict=True))
    return (
        layer.mask()
        | choice
        | more
        | dict(
            retrieval_heads=list(layer.retrieval_heads),
            q_index=q_index.to(layer.dtype),
            k_index=k_index.contiguous(),
            index_map=index_map,
        )
    )


def lists_of(selected: Tensor, counts: Tensor, keys: int, block_size: int) -> Tensor:
    """Members int32 [B, R, 1, C] from the mask, -1 padded."""
    bits = unpacked(selected, selected.shape[-1] * WORD_KEYS)
    members = bits.unflatten(-1, (-1, block_size))
    assert torch.equal(members.any(-1), members.all(-1))
    members = members.any(-1)[..., : -(-keys // block_size)]
    indices, sizes = lists_where(members)
    assert torch.equal(sizes, counts)
    return indices


def keys_read(
    q: Tensor,
    k: Tensor,
    selected: Tensor,
    retrieval_heads: list[int],
    window: int,
    near_window: int,
    sinks: int,
    start: Tensor | None,
    k_local: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """bool, as k without its last dimension: keys that a query head of their KV head attends to."""
    batch, kv_heads, keys, _ = k.shape
    kv_heads += 0 if k_local is None else k_local.shape[1]
    positions = last_positions(1, keys, batch)
    sees = visible(positions, keys, start)[:, 0]
    local, close = (
        near(positions, keys, start, size, sinks)[:, 0] for size in (window, near_window)
    )
    bits = unpacked(selected[:, :, 0], keys)
    group = q.shape[1] // kv_heads
    read = torch.zeros(batch, kv_heads, keys, dtype=torch.bool)
    for head in range(q.shape[1]):
        wide = head in retrieval_heads
        attended = close | bits[:, retrieval_heads.index(head)] if wide else local
        read[:, head // group] |= attended & sees
    return read if k_local is None else read[:, sorted({head // group for head in retrieval_heads})]


def check_selection(layer: Layer, arguments: dict, forced: Tensor, indices: Tensor, out: tuple):
    _, _, _, counts, mass = out
    keys, size = layer.keys, arguments["block_size"]
    scored = all_keys(arguments["k_index"], arguments.get("codes"), arguments.get("ranges"))
    logits = index_logits(arguments["q_index"], scored, arguments["index_map"], None)
    positions = last_positions(1, keys, layer.batch)
    sees = visible(positions, keys, arguments["start"])
    close = near(positions, keys, arguments["start"], arguments["near_window"], layer.sinks)
    if not arguments["beyond_window"]:
        forced = log_sum_exp(logits, close[:, None].expand_as(logits))
    floor = -(-arguments["min_tokens"] // size)
    for b in range(layer.batch):
        for j in range(len(layer.retrieval_heads)):
            chosen = indices[b, j, 0, : counts[b, j, 0]].tolist()
            if not sees[b, 0].any():
                assert not chosen
                continue
            scores = block_scores(logits[b, j, 0], sees[b, 0] & ~close[b, 0], size)
            outside, share = float(forced[b, j, 0]), float(mass[b, j, 0])
            exact = arguments["exact"]
            check_set(scores, outside, arguments["p"], floor, chosen, share, exact=exact)


def check(layer: Layer, q: Tensor, k: Tensor, v: Tensor, arguments: dict, forced: Tensor) -> None:
    result = ops.sparse_decode(q, k, v, **arguments)
    out, lse, selected, counts, _ = result
    indices = lists_of(selected, counts, layer.keys, arguments["block_size"])
    check_selection(layer, arguments, forced, indices, result)
    index = ("q_index", "k_index", "index_map", "codes", "ranges")
    index += ("p", "min_tokens", "beyond_window", "exact")
    attended = {name: value for name, value in arguments.items() if name not in index}
    attended |= dict(indices=indices, counts=counts)
    exact, exact_lse = reference.decode(q, k, v, **attended)
    low, _ = reference.decode(q, k, v, **attended, compute=layer.dtype)
    assert_within_twice_the_error(out, exact, low, layer.dtype)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)


def near_mass(layer: Layer, q: Tensor, k: Tensor, arguments: dict) -> Tensor:
    owners = [head // layer.group for head in layer.retrieval_heads]
    return reference.near_lse(
        q, k, layer.retrieval_heads, owners, arguments["near_window"], layer.sinks,
        arguments["scale"], arguments["start"],
    )  # fmt: skip


@given(layer=one_row, choice=choices, dim=index_dims)
def test_sparse_decode_selects_and_attends(layer, choice, dim):
    q, k, v = layer.qkv()
    arguments = arguments_of(layer, choice, dim)
    check(layer, q, k, v, arguments, near_mass(layer, q, k, arguments))


@given(layer=one_row, choice=choices, window=st.integers(1, 700))
def test_sparse_decode_over_rings(layer, choice, window):
    q, k, v = layer.qkv()
    full = sorted({head // layer.group for head in layer.retrieval_heads})
    arguments = arguments_of(layer, choice, 16)
    forced = near_mass(layer, q, k, arguments)
    shape = layer.batch, layer.kv_heads - len(full), layer.sinks + window, layer.dim
    rings = [torch.randn(shape, generator=layer.generator()).to(layer.dtype) for _ in range(2)]
    arguments |= dict(window=window, k_local=rings[0], v_local=rings[1], length=layer.keys)
    check(layer, q, k[:, full], v[:, full], arguments, forced)


@given(layer=one_row, choice=choices)
def test_what_is_not_attended_is_never_read(layer, choice):
    q, k, v = layer.qkv()
    arguments = arguments_of(layer, choice, 16)
    expected = ops.sparse_decode(q, k, v, **arguments)
    used = keys_read(q, k, expected[2], **arguments)
    k[~used] = v[~used] = torch.nan
    coded = layer.keys - arguments["k_index"].shape[2]
    for b, first in enumerate(layer.start or ()):
        arguments["k_index"][b, :, : max(0, first - coded)] = torch.nan
        if coded:
            arguments["ranges"][b, :, : first // BLOCK] = torch.nan
    for got, want in zip(ops.sparse_decode(q, k, v, **arguments), expected, strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)


@given(layer=one_row, choice=choices)
def test_a_nan_score_selects_every_far_key(layer, choice):
    q, k, v = layer.qkv()
    arguments = arguments_of(layer, choice, 16)
    arguments["q_index"][:] = torch.nan
    _, _, _, counts, mass = ops.sparse_decode(q, k, v, **arguments)
    positions = last_positions(1, layer.keys, layer.batch)
    sees = visible(positions, layer.keys, arguments["start"])[:, 0]
    close = near(positions, layer.keys, arguments["start"], arguments["near_window"], layer.sinks)[
        :, 0
    ]
    size = arguments["block_size"]
    far = torch.nn.functional.pad(sees & ~close, (0, -layer.keys % size))
    blocks = far.unflatten(-1, (-1, size)).any(-1).sum(-1, dtype=torch.int32)
    assert torch.equal(counts, blocks[:, None, None].expand_as(counts))
    scored = sees if not arguments["beyond_window"] else sees & ~close
    assert torch.equal(mass[:, :, 0].isnan(), scored.any(-1)[:, None].expand_as(mass[:, :, 0]))

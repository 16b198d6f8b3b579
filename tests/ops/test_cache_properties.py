"""The headwise cache: whatever the chunks, decode and attention read the whole sequence from it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests import reference


@st.composite
def histories(draw: st.DrawFn) -> dict:
    """A sequence cut into chunks, and the storage that takes it."""
    chunks = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    heads = draw(st.integers(1, 4))
    length = sum(chunks)
    batch = draw(st.integers(1, 3))
    return dict(
        chunks=chunks,
        heads=heads,
        full=sorted(draw(st.sets(st.integers(0, heads - 1)))),
        batch=batch,
        sinks=draw(st.integers(0, 5)),
        window=draw(st.integers(1, 12)),
        start=draw(st.none() | st.lists(st.integers(0, length), min_size=batch, max_size=batch)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )


def stores(history: dict) -> list[torch.Tensor]:
    """k_ring, v_ring, k_pages, v_pages, full of NaN."""
    batch, full = history["batch"], len(history["full"])
    local, slots = history["heads"] - full, history["sinks"] + history["window"]
    shapes = 2 * [(batch, local, slots, 8)] + 2 * [(batch, full, sum(history["chunks"]) + 3, 8)]
    return [torch.full(shape, torch.nan, dtype=history["dtype"]) for shape in shapes]


def start_of(history: dict) -> torch.Tensor | None:
    return None if history["start"] is None else torch.tensor(history["start"])


@given(history=histories())
def test_append_and_unroll_equal_the_reference(history):
    start = start_of(history)
    kept, expected = stores(history), stores(history)
    local = [head for head in range(history["heads"]) if head not in history["full"]]
    position = 0
    for chunk in history["chunks"]:
        k, v = torch.randn(2, history["batch"], history["heads"], chunk, 8).to(history["dtype"])
        for ring, new in ((kept[0], k), (kept[1], v)):
            arguments = (ring, new, local, position, history["sinks"], start)
            keys, start_local = ops.cache_unroll(*arguments)
            want, want_start = reference.cache_unroll(*arguments)
            torch.testing.assert_close(keys, want, atol=0, rtol=0)
            assert torch.equal(start_local, want_start)
        ops.cache_append(k, v, *kept, history["full"], position, history["sinks"], start)
        reference.cache_append(k, v, *expected, history["full"], position, history["sinks"], start)
        position += chunk
        for got, want in zip(kept, expected, strict=True):
            torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)


@given(
    history=histories(),
    heads=st.tuples(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 4)),
    dims=st.sampled_from([(8, 4), (24, 16), (5, 3), (16, 1)]),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float64])] * 3),
    ahead=st.integers(0, 9),
)
def test_append_projected_is_project_and_append(history, heads, dims, dtypes, ahead):
    """Bit for bit; `ahead` is how far index slots are from positions."""
    start, batch, sinks = start_of(history), history["batch"], history["sinks"]
    full, (dim, index_dim), (of_features, of_weights, of_index) = history["full"], dims, dtypes
    q_heads, k_heads = heads[0], [i * 3 % history["heads"] for i in range(heads[1])]
    w_q, w_k = (torch.randn(len(h), index_dim, dim).to(of_weights) for h in (q_heads, k_heads))
    room = sum(history["chunks"]) + ahead + 2
    pages = torch.full((batch, len(k_heads), room, index_dim), torch.nan, dtype=of_index)
    kept, expected = [*stores(history), pages], [*stores(history), pages.clone()]
    position = 0
    for chunk in history["chunks"]:
        k, v = torch.randn(2, batch, history["heads"], chunk, 8).to(history["dtype"])
        q_pre, k_pre = (
            torch.randn(batch, count, chunk, dim).to(of_features) for count in (6, history["heads"])
        )
        slot = position + ahead if ahead else -1
        pre = (q_pre, k_pre, w_q, w_k, q_heads, k_heads)
        q_index = ops.cache_append_projected(
            k, v, *kept[:4], full, position, sinks, *pre, kept[4], start, slot
        )
        expected_q, k_index = ops.index_project(*pre, of_index)
        ops.cache_append(
            k, v, *expected[:4], full, position, sinks, start, k_index, expected[4], slot
        )
        for got, want in zip((q_index, *kept), (expected_q, *expected), strict=True):
            torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)
        position += chunk


@given(history=histories())
def test_chunks_and_decode_over_the_cache_equal_one_pass(history):
    """Chunked prefill through unrolled rings, then the last token through the rings themselves."""
    history["dtype"] = torch.float32
    start, sinks, window = start_of(history), history["sinks"], history["window"]
    length, batch, heads = sum(history["chunks"]), history["batch"], history["heads"]
    if length == 0:
        return
    full, kept = history["full"], stores(history)
    local = [head for head in range(heads) if head not in full]
    q, k, v = torch.randn(3, batch, heads, length, 8)
    expected, _ = ops.attention(q, k, v, full, window, sinks, 0.3, start)
    position = 0
    for chunk in history["chunks"]:
        here = slice(position, position + chunk)
        unrolled = [
            ops.cache_unroll(ring, new[:, :, here], local, position, sinks, start)
            for ring, new in ((kept[0], k), (kept[1], v))
        ]
        ops.cache_append(k[:, :, here], v[:, :, here], *kept, full, position, sinks, start)
        position += chunk
        out, _ = ops.attention(
            q[:, :, here],
            kept[2][:, :, :position],
            kept[3][:, :, :position],
            full,
            window,
            sinks,
            0.3,
            start,
            unrolled[0][0],
            unrolled[1][0],
            unrolled[0][1],
        )
        torch.testing.assert_close(out, expected[:, :, here], atol=1e-5, rtol=1e-4)
    out, _ = ops.decode(
        q[:, :, -1:],
        kept[2][:, :, :length],
        kept[3][:, :, :length],
        full,
        window,
        window,
        sinks,
        0.3,
        k_local=kept[0],
        v_local=kept[1],
        start=start,
        length=-1 if full else length,
    )
    torch.testing.assert_close(out, expected[:, :, -1:], atol=1e-5, rtol=1e-4)

"""The headwise cache on CUDA against the CPU operators, bit for bit."""

import random

import pytest
import torch

from rtpurbo import ops
from tests.gpu.stores import Store, same_bits
from tests.samples import cache_samples

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8]
DIMS = [1, 3, 8, 16, 64, 72, 128, 256, 520]


@pytest.mark.parametrize("seed", range(240))
def test_random_histories_equal_the_cpu(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, dtype = rng.randint(1, 3), rng.randint(1, 5), rng.choice(DTYPES)
    full = sorted(rng.sample(range(heads), rng.randint(0, heads)))
    local = [head for head in range(heads) if head not in full]
    sinks, window = rng.randint(0, 5), rng.choice([1, 2, 7, 30])
    most = rng.choice([1, 12, 200])
    chunks = [rng.randint(0, most) for _ in range(rng.randint(1, 5))]
    length = sum(chunks)
    start = None
    if rng.random() < 0.7:
        start = torch.tensor([rng.randint(0, length) for _ in range(batch)])
    dims = [rng.choice(DIMS) for _ in range(2)]  # of keys and of values
    sizes = [(len(local), sinks + window), (len(full), length + 3)]
    rings, pages = (
        [Store(rng, generator, dtype, batch, *size, dim) for dim in dims] for size in sizes
    )
    index_heads, index_dim, index_dtype = rng.randint(0, 4), rng.choice([1, 15, 16]), torch.float16
    index_pages = Store(rng, generator, index_dtype, batch, index_heads, length + 40, index_dim)
    ahead = rng.choice([0, 0, 7, 40])  # of the index's slots
    position = 0
    for chunk in chunks:
        new = [Store(rng, generator, dtype, batch, heads, chunk, dim) for dim in dims]
        new_index = Store(rng, generator, index_dtype, batch, index_heads, chunk, index_dim)
        index_slot = -1 if ahead == 0 else position + ahead
        starts = {"cpu": start, "cuda": None if start is None else start.cuda()}
        for ring, rows in zip(rings, new, strict=True):
            want, got = (
                ops.cache_unroll(ring.view(on), rows.view(on), local, position, sinks, starts[on])
                for on in ("cpu", "cuda")
            )
            assert same_bits(want[0], got[0])
            assert torch.equal(want[1], got[1].cpu())
        for on in ("cpu", "cuda"):
            stores = [store.view(on) for store in (*new, *rings, *pages)]
            index = (new_index.view(on), index_pages.view(on), index_slot)
            if rng.random() < 0.2:
                ops.cache_append(*stores, full, position, sinks, starts[on])
                ops.cache_append_index(*index[:2], max(position, index_slot))
            else:
                ops.cache_append(*stores, full, position, sinks, starts[on], *index)
        position += chunk
        for store in (*new, new_index, *rings, *pages, index_pages):
            store.assert_equal()


@pytest.mark.parametrize("seed", range(60))
def test_random_index_keys_equal_the_cpu(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, dtype = rng.randint(1, 3), rng.randint(0, 6), rng.choice(DTYPES)
    rows, dim = rng.choice([0, 1, 5, 300]), rng.choice([1, 4, 15, 16, 32])
    position = rng.randint(0, 40)
    pages = Store(rng, generator, dtype, batch, heads, position + rows + 4, dim)
    new = Store(rng, generator, dtype, batch, heads, rows, dim)
    for on in ("cpu", "cuda"):
        ops.cache_append_index(new.view(on), pages.view(on), position)
    pages.assert_equal()
    new.assert_equal()


@pytest.mark.parametrize("start", [None, [0, 50]])
def test_chunks_longer_than_the_ring(start):
    """Padding of the second sequence reaches into the last chunk."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    start = None if start is None else torch.tensor(start)
    rings = [Store(rng, generator, torch.bfloat16, 2, 1, 4 + 9, 64) for _ in range(2)]
    pages = [Store(rng, generator, torch.bfloat16, 2, 1, 3000, 64) for _ in range(2)]
    for position, rows in ((0, 40), (40, 2000), (2040, 1)):
        new = [Store(rng, generator, torch.bfloat16, 2, 2, rows, 64) for _ in range(2)]
        for on in ("cpu", "cuda"):
            stores = [store.view(on) for store in (*new, *rings, *pages)]
            first = None if start is None else start.to(on)
            ops.cache_append(*stores, [1], position, 4, first)
        for store in (*rings, *pages):
            store.assert_equal()


def test_twenty_runs_give_the_same_bits(cuda_device):
    ring = torch.randn(2, 3, 4 + 500, 128, device=cuda_device)
    new = torch.randn(2, 5, 700, 128, device=cuda_device)
    start = torch.tensor([0, 300], device=cuda_device)
    pages = torch.zeros(2, 2, 2000, 128, device=cuda_device)
    first = None
    for _ in range(20):
        k_ring, v_ring, k_pages, v_pages = (t.clone() for t in (ring, -ring, pages, pages))
        keys, start_local = ops.cache_unroll(ring, new, [0, 2, 3], 600, 4, start)
        ops.cache_append(new, -new, k_ring, v_ring, k_pages, v_pages, [1, 4], 600, 4, start)
        results = (keys, start_local, k_ring, v_ring, k_pages, v_pages)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_graph_capture_replays(cuda_device):
    new = torch.randn(2, 3, 1, 64, device=cuda_device)
    ring, pages = (torch.zeros(2, h, 20, 64, device=cuda_device) for h in (2, 1))
    index, index_pages = new[..., :16], torch.zeros(2, 3, 20, 16, device=cuda_device)
    start = torch.tensor([0, 3], device=cuda_device)

    def step(ring, other_ring, pages, other_pages, index_pages):
        unrolled = ops.cache_unroll(ring, new, [0, 2], 11, 2, start)
        stores = (ring, other_ring, pages, other_pages)
        ops.cache_append(new, -new, *stores, [1], 11, 2, start, index, index_pages)
        return unrolled

    kept = [ring, -ring, pages, -pages, index_pages]
    step(*(t.clone() for t in kept))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*kept)
    new.copy_(torch.randn_like(new))
    for tensor in kept:
        tensor.copy_(torch.randn_like(tensor))
    expected = [t.clone() for t in kept]
    unrolled = step(*expected)
    graph.replay()
    for a, b in zip((*captured, *kept), (*unrolled, *expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("memory_is_given_back")
def test_beyond_2_to_the_31_elements(cuda_device):
    capacity, dim = 1 << 24, 136
    pages = torch.zeros(1, 1, capacity, dim, device=cuda_device, dtype=torch.float16)
    new = torch.ones(1, 1, 3, dim, device=cuda_device, dtype=torch.float16)
    ops.cache_append_index(new, pages, capacity - 3)
    assert (pages[0, 0, -3:] == 1).all()
    assert not pages[0, 0, :-3].any()


@pytest.mark.usefixtures("memory_is_given_back")
@pytest.mark.parametrize("full_heads", [[0], []], ids=["pages", "ring"])
def test_append_beyond_2_to_the_31_elements(full_heads, cuda_device):
    slots, dim, sinks = 1 << 24, 136, 4
    k_store = torch.zeros(1, 1, slots, dim, device=cuda_device, dtype=torch.float16)
    v_store = torch.zeros(1, 1, slots, 1, device=cuda_device, dtype=torch.float16)
    new = torch.ones(1, 1, 3, dim, device=cuda_device, dtype=torch.float16)
    used, unused = (k_store, v_store), (k_store[:, :0], v_store[:, :0])
    stores = (*unused, *used) if full_heads else (*used, *unused)
    ops.cache_append(new, new[..., :1], *stores, full_heads, slots - 3, sinks)
    for store in used:
        assert (store[0, 0, -3:] == 1).all()
        assert not store[0, 0, :-3].any()


@pytest.mark.parametrize("sample", cache_samples(torch.float32), ids=str)
def test_opcheck(sample):
    torch.library.opcheck(
        getattr(torch.ops.rtpurbo, sample.op).default,
        (),
        sample.with_tensors(torch.Tensor.cuda),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_stores_on_another_device_are_refused(cuda_device):
    sample = cache_samples(torch.float32)[0]
    on_cuda = sample.with_tensors(torch.Tensor.cuda)
    for name in ("v", "k_ring", "v_pages", "start"):
        with pytest.raises(
            ValueError, match=f"rtpurbo::cache_append: {name} must be on the device"
        ):
            ops.cache_append(**on_cuda | {name: sample.arguments[name]})

"""cache_append_projected on CUDA against index_project and cache_append, bit for bit."""

import random

import pytest
import torch

from rtpurbo import ops
from tests.gpu.kernels import kernels_of
from tests.gpu.repeats import assert_repeats
from tests.gpu.stores import Store, same_bits
from tests.gpu.views import draw_features, to_cuda
from tests.properties import DTYPES
from tests.samples import Sample, cache_samples

ROWS = [0, 1, 1, 1, 2, 15, 16, 17, 130]
STORED = [*DTYPES, torch.float64, torch.uint8]
STORED_DIMS = [1, 3, 8, 16, 64, 72, 128, 256, 520]
DIMS = [1, 3, 8, 16, 64, 72, 128, 130, 256]
INDEX_DIMS = [1, 4, 15, 16, 17, 33]
SAMPLES = [s for s in cache_samples(torch.float32) if s.op == "cache_append_projected"]


def draw_weights(rng, generator, heads, index_dim, dim, dtype):
    """Some do not begin on a vector."""
    first = rng.randint(0, 1)
    flat = torch.randn(first + len(heads) * index_dim * dim, generator=generator).to(dtype)
    return to_cuda(flat[first:].view(len(heads), index_dim, dim))


@pytest.mark.parametrize("seed", range(240))
def test_random_histories_equal_the_two_operators(seed):
    """cache_append runs on the CPU, index_project on CUDA."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, q_count, dtype = (
        rng.randint(1, 3), rng.randint(1, 5), rng.randint(1, 9), rng.choice(STORED),
    )  # fmt: skip
    full = sorted(rng.sample(range(heads), rng.randint(0, heads)))
    sinks, window = rng.randint(0, 5), rng.choice([1, 2, 7, 30])
    chunks = [rng.choice(ROWS) for _ in range(rng.randint(1, 4))]
    length = sum(chunks)
    start = None
    if rng.random() < 0.7:
        start = torch.tensor([rng.randint(0, length) for _ in range(batch)])
    starts = {"cpu": start, "cuda": None if start is None else start.cuda()}
    stored_dims = [rng.choice(STORED_DIMS) for _ in range(2)]
    sizes = [(heads - len(full), sinks + window), (len(full), length + 3)]
    rings, pages = (
        [Store(rng, generator, dtype, batch, *size, dim) for dim in stored_dims] for size in sizes
    )
    dim, index_dim, index_dtype = rng.choice(DIMS), rng.choice(INDEX_DIMS), rng.choice(DTYPES)
    x_dtype, w_dtype = rng.choice(DTYPES), rng.choice(DTYPES)
    q_heads = [rng.randrange(q_count) for _ in range(rng.randint(0, 6))]
    k_heads = [rng.randrange(heads) for _ in range(rng.randint(0, 6))]
    w_q, w_k = (
        draw_weights(rng, generator, many, index_dim, dim, w_dtype) for many in (q_heads, k_heads)
    )
    room, ahead = length + 40, rng.choice([0, 0, 7, 40])
    index_pages = Store(rng, generator, index_dtype, batch, len(k_heads), room, index_dim)
    position = 0
    for chunk in chunks:
        new = [Store(rng, generator, dtype, batch, heads, chunk, d) for d in stored_dims]
        q_pre, k_pre = (
            to_cuda(draw_features(rng, generator, batch, count, chunk, dim, x_dtype))
            for count in (q_count, heads)
        )
        stores, index_slot = [*new, *rings, *pages], position + ahead if ahead else -1
        projected = (q_pre, k_pre, w_q, w_k, q_heads, k_heads)
        q_index = ops.cache_append_projected(
            *(store.view("cuda") for store in stores), full, position, sinks, *projected,
            index_pages.view("cuda"), starts["cuda"], index_slot,
        )  # fmt: skip
        expected, k_index = ops.index_project(*projected, index_dtype)
        ops.cache_append(
            *(store.view("cpu") for store in stores), full, position, sinks, start,
            k_index.cpu(), index_pages.view("cpu"), index_slot,
        )  # fmt: skip
        assert q_index.dtype == index_dtype and same_bits(q_index, expected)
        for store in (*stores, index_pages):
            store.assert_equal()
        position += chunk


class Layer:
    """A layer's tensors on CUDA: 32/4/128 heads, one full KV head, 5 retrieval heads."""

    heads, q_heads, k_heads = [2], [1, 9, 17, 18, 30], [0, 1, 2, 2, 3]

    def __init__(self, batch: int, rows: int, device: torch.device) -> None:
        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.new = [draw(batch, 4, rows, 128) for _ in range(2)]
        rings, pages = (draw(batch, h, n, 128) for h, n in ((3, 104), (1, 300)))
        self.kept = [rings, -rings, pages, -pages, draw(batch, 5, 300, 16, dtype=torch.float16)]
        self.pre = [draw(batch, heads, rows, 128) for heads in (32, 4)]
        self.weights = [draw(5, 16, 128, dtype=torch.float32) for _ in range(2)]
        self.start = torch.arange(batch, device=device) * 130

    def step(self, kept: list[torch.Tensor]) -> torch.Tensor:
        return ops.cache_append_projected(
            *self.new, *kept[:4], self.heads, 128, 4, *self.pre, *self.weights, self.q_heads,
            self.k_heads, kept[4], self.start,
        )  # fmt: skip

    def results(self) -> tuple[torch.Tensor, ...]:
        kept = [tensor.clone() for tensor in self.kept]
        return (self.step(kept), *kept)


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_runs_and_replays_give_the_same_bits(rows, cuda_device):
    assert_repeats(Layer(2, rows, cuda_device).results)


def test_a_replay_takes_new_tokens(cuda_device):
    layer = Layer(2, 1, cuda_device)
    layer.results()
    kept = [tensor.clone() for tensor in layer.kept]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q_index = layer.step(kept)
    for tensor in (*layer.new, *layer.pre):
        tensor.copy_(torch.randn_like(tensor))
    for before, now in zip(layer.kept, kept, strict=True):
        now.copy_(before)
    graph.replay()
    for got, want in zip((q_index, *kept), layer.results(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("rows", "launches"), [(1, 1), (16, 1), (17, 2)])
def test_few_rows_are_one_launch(rows, launches, cuda_device):
    layer = Layer(2, rows, cuda_device)
    kept = [tensor.clone() for tensor in layer.kept]
    torch.cuda.synchronize()
    assert len(kernels_of(lambda: layer.step(kept))) == launches


def test_more_sequences_than_a_grid_holds(cuda_device):
    """65535 is the most that blockIdx.z counts; every sequence has numbers of its own."""
    batch, one = 65_540, dict(device=cuda_device, dtype=torch.float16)
    k = torch.arange(batch, device=cuda_device).remainder(1000).half().view(batch, 1, 1, 1)
    k = k.expand(batch, 1, 1, 8).contiguous()
    ring, pages = torch.zeros(batch, 0, 5, 8, **one), torch.zeros(batch, 1, 2, 8, **one)
    v_pages, index_pages = torch.zeros_like(pages), torch.zeros(batch, 1, 2, 1, **one)
    w = torch.full((1, 1, 8), 0.125, **one)
    q_index = ops.cache_append_projected(
        k, -k, ring, ring, pages, v_pages, [0], 1, 4, 2 * k, k, w, w, [0], [0], index_pages
    )
    assert torch.equal(pages[:, :, 1:], k) and torch.equal(v_pages[:, :, 1:], -k)
    assert torch.equal(index_pages[:, :, 1:], k[..., :1]) and torch.equal(q_index, 2 * k[..., :1])
    assert not (pages[:, :, :1].any() or v_pages[:, :, :1].any() or index_pages[:, :, :1].any())


@pytest.mark.usefixtures("memory_is_given_back")
def test_index_pages_beyond_2_to_the_31_elements(cuda_device):
    capacity, index_dim = 1 << 24, 136
    pages = torch.zeros(1, 1, capacity, index_dim, device=cuda_device, dtype=torch.float16)
    k = torch.ones(1, 1, 3, 8, device=cuda_device, dtype=torch.float16)
    ring, none = torch.zeros(1, 1, 9, 8, device=cuda_device).half(), k[:, :0]
    w = torch.full((1, index_dim, 8), 0.125, device=cuda_device)
    ops.cache_append_projected(
        k, k, ring, ring.clone(), none, none, [], 0, 4, k, k, w, w, [0], [0], pages,
        index_slot=capacity - 3,
    )  # fmt: skip
    assert (pages[0, 0, -3:] == 1).all()
    assert not pages[0, 0, :-3].any()


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample):
    torch.library.opcheck(
        torch.ops.rtpurbo.cache_append_projected.default,
        (),
        sample.with_tensors(torch.Tensor.cuda),
        test_utils=("test_schema", "test_faketensor"),
    )


def assert_refused(sample: Sample, error: type[Exception], message: str, **changes: object) -> None:
    """And nothing is written."""
    arguments = sample.with_tensors(torch.Tensor.cuda) | changes
    with pytest.raises(error, match=message):
        sample.outputs(arguments)
    for name in set(sample.written) - set(changes):
        assert torch.equal(arguments[name].cpu(), sample.arguments[name])


@pytest.mark.parametrize("names", [("q_pre", "k_pre"), ("w_q", "w_k"), ("index_pages",)], ids=str)
def test_float64_is_refused(names):
    sample = SAMPLES[0]
    doubles = {name: sample.arguments[name].double().cuda() for name in names}
    message = rf"cache_append_projected: {names[0]} on CUDA must be float32"
    assert_refused(sample, TypeError, message, **doubles)


def test_more_heads_than_fit_are_refused():
    sample = SAMPLES[0]
    weights = torch.zeros(513, 4, 24, device="cuda")
    message = "q_heads on CUDA must be at most 512 heads, got 513"
    assert_refused(sample, ValueError, message, w_q=weights, q_heads=[0] * 513)

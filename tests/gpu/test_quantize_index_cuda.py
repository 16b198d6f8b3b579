"""quantize_index on CUDA against the CPU operator, bit for bit, and the cache that calls it."""

import random

import pytest
import torch

from rtpurbo import ops
from tests.gpu.repeats import assert_repeats
from tests.gpu.views import to_cuda
from tests.models.test_index_bits import layer
from tests.properties import DTYPES
from tests.samples import quantize_index_samples

DIMS = [1, 2, 3, 7, 8, 15, 16, 16, 16, 17, 33, 64, 65, 70]


def draw_keys(seed):
    """[B, Rk, N, r] cut out of something larger: normal numbers, or what rounding finds hard."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    keys, dim = 64 * rng.choice([0, 1, 2, 3, 5]), rng.choice(DIMS)
    shape = (rng.randint(1, 2), rng.randint(1, 3) + 1, keys + 3, dim + 3)
    spread = rng.choice([0.0, 1e-7, 1e-3, 1.0, 300.0, 3e4])
    wide = torch.randn(shape, generator=generator) * spread
    wide += rng.choice([0.0, -1e-6, 0.7, -40.0, 3000.0])
    match rng.choice(["plain", "plain", "zeros", "ties", "bad", "huge"]):
        case "zeros":
            wide = torch.where(wide > wide.median(), 0.0, -0.0)
        case "ties":
            wide = (wide * 4).round() / 4
        case "bad":
            some = torch.rand(shape, generator=generator)
            for at, value in enumerate((torch.nan, torch.inf, -torch.inf)):
                wide[(some > 0.002 * at) & (some < 0.002 * (at + 1))] = value
        case "huge":
            wide.view(-1)[::97] = 1e6
            wide.view(-1)[::101] = -7e4
    return wide.to(rng.choice(DTYPES))[:, 1:, 2 : keys + 2, 1 : dim + 1], rng.choice([4, 8])


def assert_same_bits(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.is_cuda and one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(*(t.cpu().view(torch.uint8) for t in (one, other)))


@pytest.mark.parametrize("seed", range(240))
def test_random_cases_equal_the_cpu(seed):
    keys, bits = draw_keys(seed)
    assert_same_bits(ops.quantize_index(to_cuda(keys), bits), ops.quantize_index(keys, bits))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("refine", [False, True])
def test_the_cache_equals_the_cpu_and_waits_for_nothing(bits, refine, cuda_device):
    layers = {on: layer(bits, 100, 16, refine) for on in ("cpu", "cuda")}
    for chunk in (70, 1, 500, *[1] * 130, 64):
        k_index = torch.randn(2, 3, chunk, 16).half()
        inputs = {"cpu": (torch.zeros(2, 1, chunk, 8), k_index)}
        inputs["cuda"] = tuple(t.cuda() for t in inputs["cpu"])
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for on, made in layers.items():
                kv, new = inputs[on]
                made.append(kv, kv, new, None)
                made.settle()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        assert_same_bits(layers["cuda"].index_keys(), layers["cpu"].index_keys())
        if refine:
            assert_same_bits(
                *([made.whole_index_keys()] for made in (layers["cuda"], layers["cpu"]))
            )
    assert layers["cuda"].layout.coded > 0


def test_without_keys_or_batch(cuda_device):
    for shape in ((0, 3, 64, 16), (2, 0, 64, 16), (2, 3, 0, 16), (2, 3, 64, 0)):
        keys = torch.zeros(shape)
        assert_same_bits(ops.quantize_index(keys.cuda(), 4), ops.quantize_index(keys, 4))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [1, 16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twenty_runs_and_a_graph_give_the_same_bits(dtype, dim, bits, cuda_device):
    keys = torch.randn(2, 3, 4096, dim, device=cuda_device).to(dtype)
    assert_repeats(lambda: ops.quantize_index(keys, bits))


def test_graph_capture_replays(cuda_device):
    keys = torch.randn(1, 2, 256, 16, device=cuda_device, dtype=torch.float16)
    ops.quantize_index(keys, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_index(keys, 4)
    keys.copy_(torch.randn_like(keys))
    graph.replay()
    for a, b in zip(captured, ops.quantize_index(keys, 4), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("memory_is_given_back")
def test_beyond_2_to_the_31_elements(cuda_device):
    rows, dim = 1 << 24, 136
    keys = torch.zeros(1, 1, rows, dim, device=cuda_device, dtype=torch.float16)
    keys[0, 0, -1] = 1
    codes, ranges = ops.quantize_index(keys, 4)
    assert (codes[0, 0, -1] == 255).all() and not codes[0, 0, :-1].any()
    assert not ranges[0, 0, :-1].any()


def test_opcheck(cuda_device):
    for sample in quantize_index_samples(torch.float32):
        torch.library.opcheck(
            torch.ops.rtpurbo.quantize_index.default,
            (),
            sample.with_tensors(torch.Tensor.cuda),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_float64_is_refused(cuda_device):
    keys = torch.zeros(1, 1, 64, 4, device=cuda_device, dtype=torch.float64)
    with pytest.raises(TypeError, match="k_index on CUDA must be float32"):
        ops.quantize_index(keys, 8)

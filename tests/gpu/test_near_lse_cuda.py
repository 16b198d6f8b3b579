"""near_lse on CUDA against its float64 reference, for one row, a few and many."""

import math

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.gpu.attention_check import CUDA_TYPES
from tests.gpu.views import on_cuda
from tests.ops.attention_cases import draw

TOLERANCE = 1e-5


def check(arguments: tuple) -> torch.Tensor:
    actual = ops.near_lse(*on_cuda(arguments))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual.cpu().double(), reference.near_lse(*arguments), atol=TOLERANCE, rtol=TOLERANCE
    )
    return actual


@pytest.mark.parametrize("rows", [1, 2, None])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
@pytest.mark.parametrize("seed", range(36))
def test_random_cases_match_the_reference(seed: int, dtype: torch.dtype, rows: int | None) -> None:
    case = draw(2000 + seed, dtype)
    case.dim = case.rng.choice([8, 24, 64, 64, 72, 128, 128, 136, 256])
    count = case.rng.randint(0, 40)
    check(
        (
            case.tensor(case.heads, min(rows or case.rows, case.keys)),
            case.tensor(case.kv_heads, case.keys),
            [case.rng.randrange(case.heads) for _ in range(count)],
            [case.rng.randrange(case.kv_heads) for _ in range(count)],
            case.window,
            case.sinks,
            case.scale,
            case.start,
        )
    )


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
@pytest.mark.parametrize("window", [252, 253, 512, 8192, 20_000])
def test_long_windows_are_split(window: int, dtype: torch.dtype, dim: int) -> None:
    q, k = torch.randn(2, 3, 1, dim).to(dtype), torch.randn(2, 1, 9001, dim).to(dtype)
    start = torch.tensor([0, 8900])
    check((q, k, [2, 0], [0, 0], window, 4, dim**-0.5, start))


@pytest.mark.parametrize("rows", [1, 16, 17, 200])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_poison_counts_only_where_it_is_seen(dtype: torch.dtype, rows: int) -> None:
    q, k = torch.randn(1, 2, rows, 64).to(dtype), torch.randn(1, 1, 400, 64).to(dtype)
    k[0, 0, 4:340] = torch.nan
    near = ops.near_lse(q.cuda(), k.cuda(), [0, 1], [0, 0], 50, 4, 0.125)
    positions = torch.arange(400 - rows, 400)
    poisoned = (positions >= 4) & (positions - 50 < 339)
    assert near.cpu().isnan().equal(poisoned.expand(1, 2, rows))


@pytest.mark.parametrize("rows", [1, 30])
def test_rows_that_see_nothing(rows: int) -> None:
    q, k = torch.randn(1, 2, rows, 64).half(), torch.randn(1, 1, 40, 64).half()
    assert (check((q, k, [1], [0], 5, 2, 0.125, torch.tensor([41]))) == -math.inf).all()


def test_more_heads_than_a_launch_takes() -> None:
    q, k = torch.randn(2, 200, 1, 64).bfloat16(), torch.randn(2, 40, 700, 64).bfloat16()
    check((q, k, list(range(200)), [h // 5 for h in range(200)], 600, 4, 0.125, None))


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_twenty_runs_give_the_same_bits(dtype: torch.dtype, rows: int) -> None:
    q, k = (torch.randn(2, h, n, 128, device="cuda").to(dtype) for h, n in ((4, rows), (2, 9000)))
    first = ops.near_lse(q, k, [0, 3], [0, 1], 8192, 4, 0.09)
    for _ in range(20):
        assert first.equal(ops.near_lse(q, k, [0, 3], [0, 1], 8192, 4, 0.09))


@pytest.mark.parametrize("rows", [1, 100])
def test_graph_capture_replays(rows: int) -> None:
    q, k = (torch.randn(1, h, n, 64, device="cuda").half() for h, n in ((4, rows), (2, 3000)))
    ops.near_lse(q, k, [0, 3], [0, 1], 1000, 4, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.near_lse(q, k, [0, 3], [0, 1], 1000, 4, 0.125)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert captured.equal(ops.near_lse(q, k, [0, 3], [0, 1], 1000, 4, 0.125))


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_misaligned_views_match_the_reference(dtype: torch.dtype, rows: int) -> None:
    q, k = (torch.randn(2, 2, n, 69).to(dtype)[..., 3:-2] for n in (rows, 500))
    check((q, k, [0, 1], [1, 0], 300, 4, 0.125))


@pytest.mark.usefixtures("memory_is_given_back")
@pytest.mark.parametrize("rows", [1, 40])
def test_keys_beyond_2_to_the_31_elements(rows: int) -> None:
    keys = (1 << 31) // 128 + 1000
    k = torch.zeros(1, 1, keys, 128, device="cuda", dtype=torch.bfloat16)
    q = torch.zeros(1, 1, rows, 128, device="cuda", dtype=torch.bfloat16)
    k[0, 0, -1, 0], q[..., 0] = 50, 1
    near = ops.near_lse(q, k, [0], [0], 100, 4, 1.0)[0, 0].cpu()
    others = torch.full((rows - 1,), math.log(104))  # only zeros
    want = torch.cat([others, torch.tensor([50.0])])
    torch.testing.assert_close(near, want, atol=TOLERANCE, rtol=TOLERANCE)


def test_empty() -> None:
    q, k = torch.randn(1, 2, 0, 64).cuda(), torch.randn(1, 1, 5, 64).cuda()
    assert ops.near_lse(q, k, [0], [0], 3, 1, 0.125).shape == (1, 1, 0)
    assert ops.near_lse(k, k, [], [], 3, 1, 0.125).shape == (1, 0, 5)


def test_what_cuda_does_not_take_is_refused() -> None:
    q = torch.zeros(1, 2, 1, 16, device="cuda")
    with pytest.raises(TypeError, match="q on CUDA must be float32, bfloat16 or float16"):
        ops.near_lse(q.double(), q.double(), [0], [0], 3, 1, 0.25)
    wide = torch.zeros(1, 2, 1, 264, device="cuda")
    with pytest.raises(ValueError, match="head dim D of at most 256, got 264; call it on the CPU"):
        ops.near_lse(wide, wide, [0], [0], 3, 1, 0.25)

"""attention on CUDA against the float64 reference, which is fed the rounded inputs."""

import math
import os
import random
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtpurbo import ops
from tests.gpu.attention_check import CUDA_TYPES, LSE_TOLERANCE, check
from tests.gpu.kernels import PORTABLE, kernels_of, skip_unless_sm90
from tests.gpu.long_outputs import assert_rows_see_themselves, needs_memory
from tests.gpu.repeats import assert_repeats
from tests.lists import lists_where
from tests.ops.attention_cases import Case, attention_arguments, draw


def draw_cuda(seed: int, dtype: torch.dtype) -> Case:
    """A case whose head dim is mostly one that models have."""
    case = draw(seed, dtype)
    case.dim = case.rng.choice([8, 24, 64, 64, 72, 128, 128, 136, 256])
    return case


@pytest.mark.parametrize("headwise", [False, True])
@pytest.mark.parametrize("dtype", CUDA_TYPES)
@pytest.mark.parametrize("seed", range(60))
def test_random_cases_match_the_reference(seed: int, dtype: torch.dtype, headwise: bool) -> None:
    check(*attention_arguments(draw_cuda(1000 + seed, dtype), headwise))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("seed", range(40))
def test_random_cases_of_a_models_layout(seed: int, dim: int, dtype: torch.dtype) -> None:
    """Aligned, in tiles of 128 rows and blocks of 64 keys: what the kernels for Hopper take."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, group = rng.randint(1, 2), rng.randint(1, 3), rng.choice([*range(1, 9), 16])
    rows = rng.choice([1, 17, 127, 128, 129, 200, 300])
    keys = rows + rng.choice([0, 0, 1, 64, 200, 500])
    heads = kv_heads * group
    retrieval = sorted(rng.sample(range(heads), rng.randint(0, heads)))

    def tensor(of: int, length: int) -> Tensor:
        return torch.randn(batch, length, of, dim, generator=generator).to(dtype).transpose(1, 2)

    more = {}
    if rng.random() < 0.4:
        more["start"] = torch.tensor([rng.randint(0, keys) for _ in range(batch)])
    if retrieval and rng.random() < 0.7:
        shape = batch, len(retrieval), -(-rows // 128), -(-keys // 64)
        picked = torch.rand(shape, generator=generator) < rng.choice([0.0, 0.2, 0.6, 1.0])
        indices, counts = lists_where(picked)
        counts[torch.rand(counts.shape, generator=generator) < 0.2] = -1
        more |= dict(block_indices=indices, block_counts=counts)
    window, sinks = rng.choice([1, 60, 64, 129, 300, 5000]), rng.choice([0, 1, 4, 70])
    q, k, v = tensor(heads, rows), tensor(kv_heads, keys), tensor(kv_heads, keys)
    check((q, k, v, retrieval, window, sinks, dim**-0.5), more)


@pytest.mark.parametrize("dtype", CUDA_TYPES)
@pytest.mark.parametrize("edge", [-1, 0, 1])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_lengths_and_windows_around_the_tiles(dim: int, edge: int, dtype: torch.dtype) -> None:
    for rows, prefix, window in product([64, 128], [0, 64], [64, 128]):
        q = torch.randn(1, 4, rows + edge, dim).to(dtype)
        k, v = (torch.randn(1, 2, rows + edge + prefix, dim).to(dtype) for _ in range(2))
        check((q, k, v, [1, 2], window + edge, 4, dim**-0.5), {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slope", [0.3, -0.05, -0.3, -1.0, -2.0])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_scores_that_grow_from_block_to_block(dim: int, slope: float, dtype: torch.dtype) -> None:
    """By up to 256, so that weights by the maximum of the blocks before are infinite: blocks come
    from the diagonal down. In some rows of a warp, in some warps of a tile, and in whole heads."""
    keys = 1500
    q, k, v = (torch.randn(2, heads, keys, dim) for heads in (4, 2, 2))
    along = torch.randn(dim).sign()
    row = torch.arange(keys)
    for head, sloped in enumerate((row >= 0, row < 0, row % 16 < 3, row % 64 < 16)):
        q[:, head] += sloped[:, None] * along
    k += along * (row * (slope * dim**-0.5))[:, None]
    q, k, v = (tensor[:, :, first:].to(dtype) for tensor, first in ((q, 700), (k, 0), (v, 0)))
    check((q, k, v, [0, 1, 3], 300, 4, dim**-0.5), {})
    picked = torch.rand(2, 3, 7, 24) < 0.6
    indices, counts = lists_where(picked)
    lists = {"block_indices": indices, "block_counts": counts}
    check((q, k, v, [0, 1, 3], 100, 4, dim**-0.5), {"start": torch.tensor([0, 90]), **lists})


@pytest.mark.parametrize("sinks", [0, 4, 70])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_windows_that_just_reach_the_sinks(dim: int, sinks: int) -> None:
    """Of one row tile or of all, the last row sees all keys but one, or all just or easily."""
    q = torch.randn(2, 4, 200, dim).bfloat16()
    k, v = (torch.randn(2, 2, 300, dim).bfloat16() for _ in range(2))
    first = torch.tensor([0, 40])
    for end, start, edge in product([228, 300], [0, 40], [-2, -1, 0, 1]):
        window = end - start - sinks + edge
        check((q, k, v, [1], window, sinks, dim**-0.5), {"start": first})


@pytest.mark.parametrize("dtype", CUDA_TYPES)
@pytest.mark.parametrize("tile", [1, 3, 64, 65, 100, 128, 1000])
@pytest.mark.parametrize("block_size", [1, 5, 64, 100, 5000])
def test_block_lists_of_any_size(block_size: int, tile: int, dtype: torch.dtype) -> None:
    rows, keys = 201, 330
    blocks = -(-keys // block_size)
    q = torch.randn(2, 4, rows, 64).to(dtype)
    k, v = (torch.randn(2, 2, keys, 64).to(dtype) for _ in range(2))
    tiles = -(-rows // tile)
    picked = torch.rand(2, 2, tiles, blocks) < 0.4
    indices, counts = lists_where(picked, padding=1 << 30)
    counts[:, :, ::5] = -1
    lists = {"block_indices": indices, "block_counts": counts}
    start = torch.tensor([0, 70])
    sizes = {"tile": tile, "block_size": block_size}
    check((q, k, v, [1, 2], 60, 4, 0.125), {"start": start, **lists, **sizes})


@pytest.mark.parametrize("group", [1, 3, 7, 16, 40])
def test_more_heads_than_a_launch_takes(group: int) -> None:
    heads = 5 * group
    q = torch.randn(2, heads, 70, 64).bfloat16()
    k, v = (torch.randn(2, 5, 90, 64).bfloat16() for _ in range(2))
    check((q, k, v, list(range(0, heads, 3)), 20, 2, 0.125), {})


@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 2, 130, 64).to(dtype), torch.randn(2, 1, 140, 64).to(dtype)
    start = torch.tensor([77, 500])
    out, lse = check((q, k, k, [1], 9, 3, 0.125), {"start": start})
    assert not out[1].any() and (lse[1] == -math.inf).all()
    assert not out[0, :, :67].any() and (lse[0, :, :67] == -math.inf).all()


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 3, 5), (1, 0, 5), (1, 0, 0)])
def test_empty(batch: int, rows: int, keys: int) -> None:
    q, k = torch.randn(batch, 2, rows, 16).cuda(), torch.randn(batch, 1, keys, 16).cuda()
    out, lse = ops.attention(q, k, k, [0], 3, 1, 0.25)
    assert out.shape == q.shape and lse.shape == q.shape[:3]


@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_misaligned_views_match_the_reference(dtype: torch.dtype) -> None:
    def odd(heads: int) -> Tensor:
        return torch.randn(2, heads, 150, 64 + 5).to(dtype)[..., 3:-2]

    check((odd(4), odd(2), odd(2), [1, 2], 40, 4, 0.125), {})


@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_keys_and_values_that_heads_or_sequences_share(dtype: torch.dtype) -> None:
    """Expanded views, whose strides are 0."""
    q = torch.randn(3, 6, 333, 64).to(dtype)
    one_head, one_sequence = torch.randn(3, 1, 444, 64), torch.randn(1, 3, 444, 64)
    for shared in (one_head.to(dtype), one_sequence.to(dtype)):
        k, v = shared.expand(3, 3, -1, -1), (-shared).expand(3, 3, -1, -1)
        start = torch.tensor([0, 111, 400])
        check((q, k, v, [1, 4], 100, 4, 0.125), {"start": start})


@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_twenty_runs_and_a_graph_give_the_same_bits(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, h, 1500, 128, device="cuda").to(dtype) for h in (8, 2, 2))
    assert_repeats(lambda: ops.attention(q, k, v, [1, 6], 300, 4, 0.09))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_lists_repeat_and_replay(dim: int) -> None:
    """Local heads, heads with lists, and tiles that read every key, in one launch; what else a
    multiprocessor did does not show."""
    q, k, v = (torch.randn(4, h, 1500, dim, device="cuda").bfloat16() for h in (8, 2, 2))
    indices, counts = lists_where(torch.rand(4, 3, 12, 24) < 0.3)
    counts[:, :, ::4] = -1
    lists = dict(block_indices=indices.cuda(), block_counts=counts.cuda())
    assert_repeats(lambda: ops.attention(q, k, v, [1, 2, 6], 300, 4, dim**-0.5, **lists))


@pytest.mark.parametrize("dtype", CUDA_TYPES)
@pytest.mark.parametrize("seed", range(10))
def test_any_split_equals_one_pass(seed: int, dtype: torch.dtype) -> None:
    """Rows in chunks, each with the keys so far; of whole tiles with lists, too. Bits may differ: a
    chunk's tiles may be split among multiprocessors."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dim, rows, heads = rng.choice([64, 128, 256]), rng.randint(300, 1200), 6
    q, k, v = (
        torch.randn(2, h, rows, dim, generator=generator).to(dtype).cuda() for h in (heads, 2, 2)
    )
    start = torch.tensor([0, rng.randint(0, rows)], device="cuda")
    call = [1, 2, 5], rng.choice([1, 64, 300, 5000]), rng.choice([0, 4]), dim**-0.5
    indices, counts = lists_where(
        torch.rand(2, 3, -(-rows // 128), -(-rows // 64), generator=generator) < 0.4
    )
    indices, counts = indices.cuda(), counts.cuda()
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    for lists, unit in ((False, 1), (False, 128), (True, 128)):
        whole = dict(block_indices=indices, block_counts=counts) if lists else {}
        out, lse = ops.attention(q, k, v, *call, start=start, **whole)
        cuts = sorted({0, rows, *(rng.randint(0, rows) // unit * unit for _ in range(3))})
        for a, b in pairwise(cuts):
            tiles = slice(a // 128, -(-b // 128))
            part = {name: tensor[:, :, tiles] for name, tensor in whole.items()}
            keys = (t[:, :, :b] for t in (k, v))
            got = ops.attention(q[:, :, a:b], *keys, *call, start=start, **part)
            torch.testing.assert_close(got[0], out[:, :, a:b], atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(got[1], lse[:, :, a:b], atol=1e-5, rtol=1e-5)


def test_graph_capture_replays() -> None:
    q, k, v = (torch.randn(1, h, 300, 64, device="cuda").half() for h in (4, 2, 2))
    start = torch.tensor([5], device="cuda")
    call = (q, k, v, [1], 40, 4, 0.125, start)
    ops.attention(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.attention(*call)
    q.copy_(torch.randn_like(q))
    start.fill_(50)
    graph.replay()
    assert all(map(torch.equal, captured, ops.attention(*call)))


def test_offsets_beyond_two_to_the_31() -> None:
    storage = torch.empty(2**31 + 64 * 40, dtype=torch.bfloat16, device="cuda")
    k = storage.as_strided((1, 2, 40, 64), (0, 2**31, 64, 1))
    k.copy_(torch.randn(1, 2, 40, 64))
    q = torch.randn(1, 2, 40, 64, device="cuda").bfloat16()
    far = ops.attention(q, k, k, [1], 9, 4, 0.125)
    packed = ops.attention(q, k.contiguous(), k.contiguous(), [1], 9, 4, 0.125)
    assert all(map(torch.equal, far, packed))


def draw_long_rows() -> list[Tensor]:
    """q, k and v of a call whose output has more than 2^31 elements."""
    needs_memory(13)
    rows, dim = 2**19 + 200, 128
    return [
        torch.randn(1, heads, rows, dim, device="cuda", dtype=torch.bfloat16)
        for heads in (32, 4, 4)
    ]


@pytest.mark.usefixtures("memory_is_given_back")
def test_outputs_beyond_two_to_the_31() -> None:
    q, k, v = draw_long_rows()
    scale = 128**-0.5
    results = ops.attention(q, k, v, [], 1, 0, scale)
    assert results[0].numel() > 2**31
    assert_rows_see_themselves(q, k, v, scale, results, LSE_TOLERANCE)


@pytest.mark.usefixtures("memory_is_given_back")
def test_outputs_beyond_two_to_the_31_with_lists() -> None:
    """Of each tile's own blocks, beside local heads; chunks of whole tiles have the same bits."""
    q, k, v = draw_long_rows()
    rows, chunk, call = q.shape[2], 2**17, ([0, 13, 31], 1, 0, 128**-0.5)
    tiles = -(-rows // 128)
    own = torch.arange(2 * tiles, device="cuda", dtype=torch.int32).view(1, 1, tiles, 2)
    own = own.expand(1, 3, tiles, 2)
    counts = torch.full_like(own[..., 0], 2)
    out, lse = ops.attention(q, k, v, *call, block_indices=own, block_counts=counts)
    for a in range(0, rows, chunk):
        b, part = min(a + chunk, rows), slice(a // 128, (a + chunk) // 128)
        got = ops.attention(
            q[:, :, a:b], k[:, :, :b], v[:, :, :b], *call, block_indices=own[:, :, part],
            block_counts=counts[:, :, part],
        )  # fmt: skip
        assert torch.equal(got[0], out[:, :, a:b]) and torch.equal(got[1], lse[:, :, a:b])


def test_heads_of_all_roles_over_long_rows() -> None:
    """Three tiles a multiprocessor, and lists with blocks on the diagonal, inside and at it."""
    for dim, dtype in product([64, 128, 256], [torch.bfloat16, torch.float16]):
        q = torch.randn(4, 12, 900, dim).to(dtype)
        k, v = (torch.randn(4, 2, 1100, dim).to(dtype) for _ in range(2))
        picked = torch.rand(4, 3, 8, 18) < 0.5
        indices, counts = lists_where(picked, padding=1 << 30)
        counts[:, 2] = -1
        lists = {"block_indices": indices, "block_counts": counts}
        start = torch.tensor([100, 0, 1099, 63])
        check((q, k, v, [0, 5, 10], 300, 4, dim**-0.5), {"start": start, **lists})


@pytest.mark.parametrize(("dim", "keys"), [(64, 30_000), (128, 16_000), (256, 8000)])
def test_heads_whose_keys_do_not_fit_in_l2_together(dim: int, keys: int) -> None:
    """On Hopper they run in sections, here of three and one head."""
    q, k, v = (torch.randn(1, 4, n, dim).bfloat16() for n in (300, keys, keys))
    check((q, k, v, [0, 1, 2, 3], 20, 4, dim**-0.5), {})


# On Hopper such heads run in two to six sections, the last one mostly smaller.
WIDE_WINDOWS = pytest.mark.parametrize(("dim", "keys"), [(64, 12_000), (128, 7000), (256, 4000)])


@WIDE_WINDOWS
def test_near_heads_whose_windows_do_not_fit_in_l2_together(dim: int, keys: int) -> None:
    q = torch.randn(1, 21, 200, dim).bfloat16()
    k, v = (torch.randn(1, 1, keys, dim).bfloat16() for _ in "kv")
    k_local, v_local = (torch.randn(1, 20, keys - 9, dim).bfloat16() for _ in "kv")
    local = {"k_local": k_local, "v_local": v_local}
    check((q, k, v, [7], keys - keys // 8, 4, dim**-0.5), local)


@WIDE_WINDOWS
def test_heads_of_several_sections_are_those_that_run_alone(dim: int, keys: int) -> None:
    q, k, v = (torch.randn(2, 23, keys, dim, device="cuda").bfloat16() for _ in range(3))
    masked = keys // 2, 4, dim**-0.5, torch.tensor([0, 999]).cuda()
    out, lse = ops.attention(q, k, v, [], *masked)
    for head in range(23):
        alone = [x[:, head : head + 1] for x in (q, k, v)]
        one, one_lse = ops.attention(*alone, [], *masked)
        torch.testing.assert_close(out[:, head : head + 1], one, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(lse[:, head : head + 1], one_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_that_runs(dtype: torch.dtype, dim: int) -> None:
    """That for Hopper, unless RTPURBO_PORTABLE asks for the one that every device runs."""
    skip_unless_sm90()
    q, k = (torch.randn(1, heads, 200, dim, device="cuda", dtype=dtype) for heads in (4, 2))
    names = kernels_of(lambda: ops.attention(q, k, k, [1], 64, 4, dim**-0.5))
    kernels = [name for name in names if "attention_kernel" in name]
    path = "mma::" if PORTABLE else "sm90::"
    assert kernels and all(f"{path}attention_kernel" in name for name in kernels)


@pytest.mark.skipif(PORTABLE, reason="this is that run")
def test_the_portable_path_where_it_is_not_the_usual_one() -> None:
    """In that run the tests that name kernels see that it is."""
    skip_unless_sm90()
    names = "attention", "attention_poison", "near_lse", "select_tiles"
    files = [str(Path(__file__).with_name(f"test_{name}_cuda.py")) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "RTPURBO_PORTABLE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


def test_what_cuda_does_not_take_is_refused() -> None:
    q = torch.zeros(1, 2, 3, 16, device="cuda")
    with pytest.raises(TypeError, match="q on CUDA must be float32, bfloat16 or float16"):
        ops.attention(q.double(), q.double(), q.double(), [0], 3, 1, 0.25)
    wide = torch.zeros(1, 2, 3, 264, device="cuda")
    with pytest.raises(ValueError, match="head dim D of at most 256, got 264; call it on the CPU"):
        ops.attention(wide, wide, wide, [0], 3, 1, 0.25)
    with pytest.raises(ValueError, match="k must be on the device of q"):
        ops.attention(q, q.cpu(), q, [0], 3, 1, 0.25)
    with pytest.raises(ValueError, match="window must be >= 1, got 0"):
        ops.attention(q, q, q, [0], 0, 1, 0.25)


def test_backward_says_that_it_is_missing() -> None:
    q = torch.randn(1, 2, 3, 16, device="cuda", requires_grad=True)
    out, _ = ops.attention(q, q, q, [0], 3, 1, 0.25)
    with pytest.raises(NotImplementedError, match="backward on CUDA is not available yet"):
        out.sum().backward()

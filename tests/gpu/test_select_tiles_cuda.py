"""select_tiles on CUDA against the CPU operator, which tests/ops holds against the reference."""

import math
import random
from itertools import pairwise

import pytest
import torch

from rtpurbo import ops
from tests.gpu.kernels import PORTABLE, kernels_of, skip_unless_sm90
from tests.gpu.repeats import assert_repeats
from tests.gpu.views import on_cuda
from tests.reference.quantize_index import all_keys
from tests.reference.select_tiles import settled, tile_of

ROUNDING = 5e-5  # of float32, in a share and relative to a weight
OF_LOGIT = 2.0**-11  # where block maxima are kept in fp16
MASS_OF_HALVES = 5e-3  # what that makes of a share


def draw(
    seed: int,
    keys: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    kind: str,
    batch: int = 2,
    heads: int = 3,
    key_heads: int = 2,
) -> dict:
    generator = torch.Generator().manual_seed(seed)
    # Heads between rows, as a cache may hold them: no contiguous heads.
    q_index = torch.randn(batch, rows, heads, dim, generator=generator) * 2
    k_index = torch.randn(batch, key_heads, keys, dim, generator=generator)
    if kind == "equal":
        k_index[:] = k_index[:, :, :1]
    if kind == "spike":
        k_index *= 1e-2
        k_index[:, :, keys // 3] = 3 * q_index[:, 0, :key_heads]
    if kind == "hidden":
        q_index[..., 0] = 1
        lost = torch.rand(batch, key_heads, keys, generator=generator) < 0.6
        k_index[..., 0].masked_fill_(lost, -math.inf)
    return {
        "q_index": q_index.to(dtype).transpose(1, 2),
        "k_index": k_index.to(dtype),
        "index_map": [0, 1, 1],
        "threshold": torch.rand(heads, generator=generator),
        "near_lse": torch.randn(batch, heads, rows, generator=generator) + 3,
        "offset": torch.randn(heads, generator=generator),
        "start": torch.randint(0, keys + 1, (batch,), generator=generator),
    }


KINDS = ["normal", "normal", "equal", "spike", "hidden"]
MODEL_SEEDS = range(560)


def draw_of_a_model(seed: int) -> dict:
    """What the kernel for Hopper takes from 128 rows on: fp16, 16 dimensions, blocks of 64 keys.

    The keys are a view of a cache with room for more, which holds NaN.
    """
    rng = random.Random(seed)
    rows = rng.choice([128, 129, 255, 256, 257, *(rng.randint(130, 700) for _ in range(5))])
    batch, key_heads = rng.randint(1, 2), rng.randint(1, 3)
    heads = rng.randint(key_heads, 5)
    prefix = rng.choice([0, 1, *(rng.randint(2, 1500) for _ in range(4))])
    if seed % 20 == 0:
        rows = rng.choice([1, 127, rng.randint(2, 126)])
    if seed % 40 == 1:
        rows, batch, prefix = rng.randint(128, 300), 1, rng.randint(10_000, 18_000)
    keys = rows + prefix
    sizes = batch, heads, key_heads
    case = draw(2000 + seed, keys, rows, 16, torch.float16, rng.choice(KINDS), *sizes)
    cache = torch.full((batch, key_heads, keys + rng.randint(0, 200), 16), math.nan).half()
    cache[:, :, :keys] = case["k_index"]
    window = rng.choice([1, rng.randint(2, 63), 64, rng.randint(65, 300), rng.randint(1, keys)])
    shares = [0.0, 2.0, *(rng.random() ** 0.3 for _ in range(12))]
    case |= {
        "k_index": cache[:, :, :keys],
        "index_map": [rng.randrange(key_heads) for _ in range(heads)],
        "threshold": torch.tensor([rng.choice(shares) for _ in range(heads)]),
        "near_lse": case["near_lse"] + rng.choice([-8, -3, 0, 4]),
        "start": case["start"] // rng.choice([1, 4]),
        "window": max(window, keys % 64),
        "sinks": rng.choice([0, 1, 4, rng.randint(5, 150)]),
        "min_blocks": rng.choice([0, 0, 1, rng.randint(2, 30)]),
        "capacity": rng.choice([0, 0, 0, rng.randint(1, 12)]),
        "rank": "max",
    }
    if rng.random() < 0.5:
        case["q_index"] = case["q_index"].contiguous()
    for name, share in {"offset": 0.5, "start": 0.5, "near_lse": 0.4}.items():
        if rng.random() < share:
            case[name] = None
    return case


def both(case: dict) -> tuple[tuple, tuple]:
    cuda = ops.select_tiles(**on_cuda(case))
    return ops.select_tiles(**case), tuple(t.cpu() for t in cuda)


def keeps_halves(case: dict) -> bool:
    """Whether block maxima may be kept in fp16."""
    q_index, k_index = case["q_index"], case["k_index"]
    tile, block_size = case.get("tile", 128), case.get("block_size", 64)
    return (
        case.get("rank") == "max"
        and (min(tile, q_index.shape[2]), block_size, q_index.shape[3]) == (128, 64, 16)
        and q_index.dtype == k_index.dtype == torch.float16
    )  # fmt: skip


def undecided(case: dict, b: int, j: int, t: int) -> tuple[set[int], int, int]:
    """Blocks of a tile that rounding may add or leave out, and the fewest and most that are in."""
    scored = {n: a for n, a in case.items() if n not in ("threshold", "min_blocks", "capacity")}
    tile = tile_of(b, j, t, **scored)
    assert tile is not None
    of_logit = OF_LOGIT if keeps_halves(case) else 0.0
    threshold = float(case["threshold"][j])
    sure, possible = settled(tile, threshold, case["min_blocks"], ROUNDING, of_logit)
    between = set((possible & ~sure).nonzero()[:, 0].tolist())
    return between, int(sure.sum()), int(possible.sum())


def check_equal(case: dict, cpu: tuple, cuda: tuple) -> None:
    """Equal lists, up to a few blocks that rounding may add or leave out.

    A list that differs covers as much as the other: its mass reaches the threshold as closely.
    """
    tolerance = MASS_OF_HALVES if keeps_halves(case) else ROUNDING
    same = (cpu[0] == cuda[0]).all(-1) & (cpu[1] == cuda[1])
    torch.testing.assert_close(cuda[2][same], cpu[2][same], atol=tolerance, rtol=0, equal_nan=True)
    threshold = case["threshold"][None, :, None].expand_as(same)
    for b, j, t in (~same).nonzero().tolist():
        a, c = int(cpu[1][b, j, t]), int(cuda[1][b, j, t])
        between, fewest, most = undecided(case, b, j, t)
        if -1 in (a, c):
            assert fewest <= cpu[0].shape[-1] < most, (b, j, t)
            continue
        left = set(cpu[0][b, j, t, :a].tolist()) ^ set(cuda[0][b, j, t, :c].tolist())
        assert left <= between, (b, j, t, left - between)
        assert len(left) <= 2 + max(a, c) // 20, (b, j, t, left)
        assert cuda[0][b, j, t, :c].diff().gt(0).all()
        assert (cuda[0][b, j, t, c:] == -1).all()
        floor = min(cpu[2][b, j, t], threshold[b, j, t])
        assert cuda[2][b, j, t] >= floor - tolerance


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("rank", ["sum", "max"])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(16, torch.float16), (16, torch.bfloat16), (24, torch.float32), (16, torch.float32)],
    ids=str,
)
def test_random_tiles_equal_the_cpu(seed, rank, dim, dtype):
    rng = random.Random(seed)
    rows = rng.choice([1, 16, 100, 127, 128, 129, 300, 513])
    keys = rows + rng.choice([0, 1, 64, 65, 200, 1000])
    kind = rng.choice(KINDS)
    case = draw(seed, keys, rows, dim, dtype, kind) | {
        "window": rng.choice([1, 5, 64, 128, 300, 5000]),
        "sinks": rng.choice([0, 1, 4, 70]),
        "min_blocks": rng.choice([0, 1, 3, 100]),
        "tile": rng.choice([1, 16, 33, 128, 128, 128, 256]),
        "block_size": rng.choice([1, 16, 33, 64, 64, 64, 64, 1 << 40]),
        "capacity": rng.choice([0, 0, 0, 1, 8]),
        "rank": rank,
    }
    for name in ("near_lse", "offset", "start"):
        if rng.random() < 0.4:
            case[name] = None
    check_equal(case, *both(case))


@pytest.mark.parametrize("seed", MODEL_SEEDS)
def test_random_tiles_of_a_model_equal_the_cpu(seed):
    case = draw_of_a_model(seed)
    check_equal(case, *both(case))


def test_random_tiles_of_a_model_take_the_kernel_for_hopper():
    skip_unless_sm90()
    cases = [on_cuda(draw_of_a_model(seed)) for seed in MODEL_SEEDS]
    names = kernels_of(lambda: [ops.select_tiles(**case) for case in cases])
    ran = sum("tile_maxima_kernel" in name for name in names)
    assert ran + sum("_scores_kernel" in name for name in names) == len(cases)
    suited = [case for case in cases if case["q_index"].shape[2] >= 128]
    assert len(suited) >= 500 and ran == (0 if PORTABLE else len(suited))
    full = sum(case["near_lse"] is None for case in suited)
    assert full >= 150 and sum("near_masses" in n for n in names) == (0 if PORTABLE else full)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "tile_maxima"),
        ({"window": 44}, "tile_maxima"),  # 300 keys are 44 more than whole blocks
        ({"window": 43}, "mma_scores"),
        ({"tile": 129}, "mma_scores"),
        ({"tile": 64}, "mma_scores"),
        ({"rank": "sum"}, "mma_scores"),
        ({"near_lse": None}, "tile_maxima"),
        ({"block_size": 32}, "plain_scores"),
    ],
    ids=str,
)
def test_the_kernel_for_hopper_runs_where_it_may(change, kernel):
    skip_unless_sm90()
    case = draw(0, 300, 200, 16, torch.float16, "normal")
    case |= {"window": 100, "sinks": 4, "min_blocks": 1, "rank": "max"} | change
    names = kernels_of(lambda: ops.select_tiles(**on_cuda(case)))
    if PORTABLE and kernel == "tile_maxima":
        kernel = "mma_scores"
    kernels = ("tile_maxima", "mma_scores", "plain_scores")
    assert [one for one in kernels for name in names if f"{one}_kernel" in name] == [kernel]


@pytest.mark.parametrize("rank", ["sum", "max"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_splits_between_tiles_equal_one_pass(rank, full, seed, cuda_device):
    rng = random.Random(seed)
    rows = rng.randint(300, 1500)
    case = draw(3000 + seed, rows, rows, 16, torch.float16, "normal")
    case |= {"window": rng.choice([64, 300]), "sinks": 4, "min_blocks": 1, "rank": rank}
    if full:
        case["near_lse"] = None
    case = on_cuda(case)
    whole = ops.select_tiles(**case, capacity=64)
    cuts = sorted({0, rows, *(rng.randint(0, rows) // 128 * 128 for _ in range(3))})
    for a, b in pairwise(cuts):
        rows_of = [name for name in ("q_index", "near_lse") if case[name] is not None]
        part = case | {name: case[name][:, :, a:b] for name in rows_of}
        got = ops.select_tiles(**part | {"k_index": case["k_index"][:, :, :b]}, capacity=64)
        for one, all_of in zip(got, whole, strict=True):
            assert torch.equal(one, all_of[:, :, a // 128 : -(-b // 128)])


@pytest.mark.parametrize("rank", ["sum", "max"])
@pytest.mark.parametrize("full", [True, False])
def test_long_rows_equal_the_cpu(rank, full):
    """Several chunks and stages of keys; the first rows see few of them, or none."""
    case = draw(1, 40_007, 300, 16, torch.float16, "normal")
    case |= {"window": 300, "sinks": 4, "min_blocks": 2, "rank": rank}
    case["start"] = torch.tensor([0, 39_900])
    if full:
        case["near_lse"] = None
    check_equal(case, *both(case))


def test_strided_keys_equal_packed_ones(cuda_device):
    case = on_cuda(draw(2, 500, 200, 16, torch.float16, "normal"))
    case |= {"window": 50, "sinks": 2, "min_blocks": 0, "start": None}
    packed = ops.select_tiles(**case)
    wide = torch.randn(2, 2, 500, 40, device=cuda_device, dtype=torch.float16)
    wide[..., 5:21] = case["k_index"]
    strided = ops.select_tiles(**case | {"k_index": wide[..., 5:21]})
    torch.testing.assert_close(strided[2], packed[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", ["sum", "max"])
@pytest.mark.parametrize(("full", "window"), [(False, 10), (True, 10), (True, 350)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_select_every_visible_block(rank, full, window, bad, cuda_device):
    """Of a far key, or in form `full` of one that is near for all rows but the last."""
    case = draw(3, 400, 200, 16, torch.float16, "normal")
    case |= {"window": window, "sinks": 2, "min_blocks": 0, "start": None, "rank": rank}
    if full:
        case["near_lse"] = None
    case["q_index"] = case["q_index"].abs()
    case["k_index"][0, 1, 100, 3] = bad
    cpu, cuda = both(case)
    assert torch.equal(cpu[2].isnan(), cuda[2].isnan()) and cuda[2][0, 1:].isnan().all()
    poisoned = cuda[2].isnan()
    assert torch.equal(cuda[0][poisoned], cpu[0][poisoned])
    assert torch.equal(cuda[1][poisoned], cpu[1][poisoned])


@pytest.mark.parametrize("rank", ["sum", "max"])
@pytest.mark.parametrize("full", [True, False])
def test_keys_that_no_row_sees_are_not_used(rank, full, cuda_device):
    case = draw(4, 700, 256, 16, torch.float16, "normal")
    case |= {"window": 64, "sinks": 4, "min_blocks": 0, "rank": rank}
    case["start"] = torch.tensor([130, 130])
    if full:
        case["near_lse"] = None
    clean = ops.select_tiles(**on_cuda(case))
    case["k_index"][:, :, :130] = math.nan
    if not full:
        case["k_index"][:, :, 640:] = math.nan  # in every window that reaches them
    for a, b in zip(clean, ops.select_tiles(**on_cuda(case)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rank", ["sum", "max"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dim", [16, 8])
def test_twenty_runs_and_a_graph_give_the_same_bits(rank, full, dim, cuda_device):
    torch.manual_seed(0)
    arguments = (
        torch.randn(1, 4, 5000, dim, device=cuda_device, dtype=torch.float16),
        torch.randn(1, 4, 9000, dim, device=cuda_device, dtype=torch.float16),
        [0, 1, 2, 3], torch.full((4,), 0.9, device=cuda_device), 1024, 4, 4,
    )  # fmt: skip
    near = None if full else torch.full((1, 4, 5000), 5.0, device=cuda_device)
    assert_repeats(lambda: ops.select_tiles(*arguments, near_lse=near, rank=rank))


@pytest.mark.parametrize("rank", ["sum", "max"])
@pytest.mark.parametrize("full", [True, False])
def test_several_launches_equal_one(rank, full, cuda_device):
    """More tiles than the workspace holds at a time: each head alone needs fewer launches."""
    torch.manual_seed(1)
    heads, keys = 3, 65_536
    q_index = torch.randn(1, heads, keys, 16, device=cuda_device, dtype=torch.float16) * 2
    k_index = torch.randn(1, heads, keys, 16, device=cuda_device, dtype=torch.float16)
    near = None if full else torch.full((1, heads, keys), 6.0, device=cuda_device)
    threshold = torch.tensor([0.5, 0.8, 0.95], device=cuda_device)
    whole = ops.select_tiles(
        q_index, k_index, [2, 0, 1], threshold, 1024, 4, 4, near_lse=near, rank=rank
    )
    for j, key_head in enumerate([2, 0, 1]):
        one = slice(j, j + 1)
        alone = ops.select_tiles(
            q_index[:, one], k_index, [key_head], threshold[one], 1024, 4, 4,
            near_lse=None if near is None else near[:, one], rank=rank,
        )  # fmt: skip
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a[:, 0], b[:, j])


@pytest.mark.parametrize("rank", ["sum", "max"])
def test_several_launches_of_a_head_equal_one(rank, cuda_device):
    """Its later half of rows, which alone needs one launch."""
    torch.manual_seed(2)
    keys, half = 262_144, 131_072
    q_index, k_index = (
        torch.randn(1, 1, keys, 16, device=cuda_device, dtype=torch.float16) for _ in "qk"
    )
    near = torch.full((1, 1, keys), 6.0, device=cuda_device)
    options = {"window": 1024, "sinks": 4, "min_blocks": 4, "capacity": 4096, "rank": rank}
    threshold = torch.tensor([0.7], device=cuda_device)
    whole = ops.select_tiles(q_index, k_index, [0], threshold, near_lse=near, **options)
    later = ops.select_tiles(
        q_index[:, :, half:], k_index, [0], threshold, near_lse=near[:, :, half:], **options
    )
    for a, b in zip(later, whole, strict=True):
        assert torch.equal(a, b[:, :, half // 128 :])


@pytest.mark.usefixtures("memory_is_given_back")
@pytest.mark.parametrize(
    ("rank", "block_size", "full"),
    [("max", 64, False), ("max", 64, True), ("sum", 64, False), ("sum", 32, False)],
)
def test_keys_beyond_2_to_the_31_elements(rank, block_size, full, cuda_device):
    """Zeros but for one key; on Hopper of maxima, of tensor cores, and of any block size."""
    keys, rows, window = (1 << 27) + 4096, 128, 64
    best = keys - 1000
    q_index = torch.ones(1, 1, rows, 16, device=cuda_device, dtype=torch.float16)
    k_index = torch.zeros(1, 1, keys, 16, device=cuda_device, dtype=torch.float16)
    k_index[0, 0, best] = 16
    near = None if full else torch.zeros(1, 1, rows, device=cuda_device)
    indices, counts, mass = ops.select_tiles(
        q_index, k_index, [0], torch.tensor([0.9], device=cuda_device), window, 0, 0,
        block_size=block_size, capacity=16, near_lse=near, rank=rank,
    )  # fmt: skip
    forced = range((keys - rows - window + 1) // block_size, keys // block_size)
    assert indices[0, 0, 0, : counts.item()].tolist() == [best // block_size, *forced]
    assert mass.item() > 0.99


@pytest.mark.usefixtures("memory_is_given_back")
def test_a_tile_of_more_than_2_to_the_31_masses(cuda_device):
    keys, rows = (1 << 21) + 8192, 1024
    best = keys - 2000
    q_index = torch.ones(1, 1, rows, 16, device=cuda_device, dtype=torch.float16)
    k_index = torch.zeros(1, 1, keys, 16, device=cuda_device, dtype=torch.float16)
    k_index[0, 0, best] = 16
    indices, counts, mass = ops.select_tiles(
        q_index, k_index, [0], torch.tensor([0.9], device=cuda_device), 1, 0, 0,
        tile=rows, block_size=1, near_lse=torch.zeros(1, 1, rows, device=cuda_device),
    )  # fmt: skip
    assert indices[0, 0, 0, : counts.item()].tolist() == [best, *range(keys - rows, keys)]
    assert mass.item() > 0.99


@pytest.mark.usefixtures("memory_is_given_back")
def test_lists_beyond_2_to_the_31_elements(cuda_device):
    q_index, k_index = (torch.randn(1, 1, n, 16, device=cuda_device).half() for n in (129, 300))
    arguments = q_index, k_index, [0], torch.tensor([0.7], device=cuda_device), 10, 2, 0, 1, 16
    short, *want = ops.select_tiles(*arguments)
    long, *got = ops.select_tiles(*arguments, capacity=(1 << 24) + 16)
    blocks = short.shape[-1]
    assert torch.equal(long[..., :blocks], short)
    assert not long[..., blocks:].add_(1).any()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_lists_drive_attention(cuda_device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 700, 64, device=cuda_device, dtype=torch.float16) for _ in "qkv")
    case = on_cuda(draw(5, 700, 700, 16, torch.float16, "normal"))
    lists = ops.select_tiles(
        case["q_index"][:1, :2], case["k_index"][:1], [0, 1],
        torch.full((2,), 2.0, device=cuda_device), 100, 4, 0,
    )  # fmt: skip
    assert (lists[2] > 0.999).all()
    every = ops.attention(q, k, v, [0, 1], 100, 4, 0.125)[0]
    listed = ops.attention(
        q, k, v, [0, 1], 100, 4, 0.125, block_indices=lists[0], block_counts=lists[1]
    )[0]
    torch.testing.assert_close(listed, every, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("rank", ["sum", "max"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_tile_whose_list_has_no_room_runs_dense(dtype, rank, cuda_device):
    check_fallbacks(on_cuda(draw(7, 1500, 1400, 16, dtype, "normal") | {"rank": rank}))


def check_fallbacks(case: dict) -> None:
    """Against lists with room for all; some tiles of each head are to fit and some are not."""
    case |= {"window": 64, "sinks": 4, "min_blocks": 1, "start": case["start"] // 4}
    _, full, full_mass = whole = ops.select_tiles(**case)
    capacity = int(full.float().median())
    indices, counts, mass = ops.select_tiles(**case, capacity=capacity)
    falls = full > capacity
    assert falls.any(-1).all() and not falls.all(-1).any()
    assert torch.equal(counts, full.masked_fill(falls, -1)) and torch.equal(mass, full_mass)
    assert torch.equal(indices, whole[0][..., :capacity].masked_fill(falls[..., None], -1))
    q, k, v = (torch.randn(2, 3, n, 64, device=counts.device).half() for n in (1400, 1500, 1500))
    call = q, k, v, [0, 1, 2], 64, 4, 0.125, case["start"]
    got, listed, dense = (
        ops.attention(*call, block_indices=lists[0], block_counts=lists[1])[0]
        for lists in ((indices, counts), (whole[0], full), (None, None))
    )
    rows = falls.repeat_interleave(128, 2)[:, :, :1400]
    assert torch.equal(got[~rows], listed[~rows])
    torch.testing.assert_close(got[rows], dense[rows], atol=2e-3, rtol=2e-3)
    assert (listed - dense)[rows].abs().max() > 0.05


def test_what_cuda_does_not_take(cuda_device):
    case = on_cuda(draw(6, 1500, 1500, 16, torch.float32, "normal"))
    case |= {"window": 10, "sinks": 2, "min_blocks": 0}
    with pytest.raises(ValueError, match="tile on CUDA must be <= 1024, got 2000"):
        ops.select_tiles(**case, tile=2000)
    with pytest.raises(TypeError, match="q_index on CUDA must be float32"):
        ops.select_tiles(**case | {"q_index": case["q_index"].double()})


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rank", ["sum", "max"])
def test_codes_are_spelt_out(bits, rank, cuda_device):
    torch.manual_seed(bits)
    q_index, k_index = torch.randn(2, 3, 300, 16).half() * 2, torch.randn(2, 2, 1000, 16).half()
    codes, ranges = ops.quantize_index(k_index[:, :, :640].contiguous(), bits)
    k_index = k_index[:, :, 640:].contiguous()
    case = dict(
        q_index=q_index, k_index=all_keys(k_index, codes, ranges).half(), index_map=[0, 1, 1],
        threshold=torch.full((3,), 0.8), window=70, sinks=4, min_blocks=1,
        near_lse=torch.randn(2, 3, 300), rank=rank, offset=None, start=None,
    )  # fmt: skip
    coded = on_cuda(case | dict(k_index=k_index, codes=codes, ranges=ranges))
    check_equal(case, ops.select_tiles(**case), tuple(t.cpu() for t in ops.select_tiles(**coded)))

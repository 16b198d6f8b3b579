"""select and decode on CUDA at sizes that the property tests do not reach."""

import itertools
import random

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.gpu.long_outputs import assert_rows_see_themselves, needs_memory
from tests.gpu.repeats import assert_repeats
from tests.gpu.views import on_cuda


def draw(seed: int, dim: int, dtype: torch.dtype) -> tuple[tuple, dict]:
    """A layer with thousands of keys, real head dims and lists of far tokens or blocks."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, kv_heads, group = (
        rng.randint(1, 3),
        rng.randint(1, 4),
        rng.choice([1, 2, 3, 4, 7, 8, 16]),
    )
    keys, window, sinks = (
        rng.randint(1, 6000),
        rng.choice([1, 63, 64, 500, 1024]),
        rng.choice([0, 4, 5]),
    )
    near_window = rng.choice([window, 64])
    heads = kv_heads * group
    retrieval = sorted(rng.sample(range(heads), rng.randint(0, min(heads, 5))))
    block_size = rng.choice([1, 16, 32, 64])
    blocks = -(-keys // block_size)
    capacity = rng.randint(1, blocks)
    indices = torch.full((batch, len(retrieval), 1, capacity), -1, dtype=torch.int32)
    counts = torch.zeros(batch, len(retrieval), 1, dtype=torch.int32)
    for b in range(batch):
        for j in range(len(retrieval)):
            count = rng.choice([-1, 0, capacity, rng.randint(0, capacity)])
            counts[b, j, 0] = count
            if count > 0:
                chosen = torch.randperm(blocks)[:count].sort().values
                indices[b, j, 0, :count] = chosen.int()
    q = torch.randn(batch, 1, heads, dim).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, keys, kv_heads, dim).to(dtype).transpose(1, 2) for _ in range(2))
    start = (
        torch.tensor([rng.randint(0, keys) for _ in range(batch)]) if rng.random() < 0.5 else None
    )
    return (q, k, v, retrieval, window, near_window, sinks, dim**-0.5), dict(
        indices=indices, counts=counts, block_size=block_size, start=start
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_matches_the_reference(seed, dim, dtype):
    positional, keywords = draw(seed * 7 + dim, dim, dtype)
    exact, exact_lse = reference.decode(*positional, **keywords)
    low, _ = reference.decode(*positional, **keywords, compute=dtype)
    out, lse = ops.decode(*on_cuda(positional), **on_cuda(keywords))
    allowed = 2 * (low.double() - exact).abs().max() + 1e-5
    assert (out.cpu().double() - exact).abs().max() <= allowed
    torch.testing.assert_close(lse.cpu().double(), exact_lse, atol=2e-4, rtol=1e-5)


def assert_decodes(arguments, start, heads=slice(None), poisoned=None):
    """`heads` of a step without lists are the reference's, on the keys and values of `poisoned`."""
    q, k, v, *rest = arguments
    exact, exact_lse = reference.decode(*arguments, start=start)
    low, _ = reference.decode(*arguments, start=start, compute=q.dtype)
    out, lse = ops.decode(*on_cuda((q, *(poisoned or (k, v)))), *rest, start=on_cuda(start))
    allowed = 2 * (low.double() - exact).abs().max() + 1e-5
    assert ((out.cpu().double() - exact)[:, heads].abs() <= allowed).all()
    got, wanted = lse.cpu().double()[:, heads], exact_lse[:, heads]
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_local_heads_beside_heads_that_read_every_key(seed, dim, dtype, poison):
    """They share loads, and nothing else: far keys may hold anything for a local head."""
    (q, k, v, retrieval, window, _, sinks, scale), keywords = draw(seed * 5 + dim, dim, dtype)
    start, keys = keywords["start"], k.shape[2]
    arguments = q, k, v, retrieval, window, window, sinks, scale
    if poison is None:
        return assert_decodes(arguments, start)
    begin = (torch.zeros(len(q), dtype=torch.long) if start is None else start) + sinks
    n = torch.arange(keys)
    far = (n >= begin[:, None]) & (n < keys - window)
    picked = (far & (torch.rand(far.shape) < 0.1))[:, None, :, None]
    poisoned = tuple(x.masked_fill(picked, poison) for x in (k, v))
    local = [h for h in range(q.shape[1]) if h not in retrieval]
    assert_decodes(arguments, start, local, poisoned)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_one_kv_head_of_three_reads_every_key(dim, padded, batch):
    """Its keys have most of the parts; of the short sets' parts most are empty."""
    torch.manual_seed(dim + batch)
    q = torch.randn(batch, 1, 9, dim, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(batch, 9001, 3, dim).bfloat16().transpose(1, 2) for _ in range(2))
    start = torch.arange(batch) * 700 if padded else None
    assert_decodes((q, k, v, [4], 100, 100, 4, dim**-0.5), start)


@pytest.mark.parametrize("retrieving", [1, 7, 8, 9, 12, 15, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sixteen_heads_of_a_kv_head_of_which_some_read_every_key(dtype, retrieving):
    """Local heads fill the last set of those that read all; the rest have sets of their own."""
    torch.manual_seed(retrieving)
    q = torch.randn(2, 16, 1, 64).to(dtype)
    k, v = (torch.randn(2, 1, 1000, 64).to(dtype) for _ in "kv")
    rest = list(range(16 - retrieving, 16)), 100, 100, 3, 0.125
    start = torch.tensor([0, 950])
    assert_decodes((q, k, v, *rest), start)


@pytest.mark.parametrize("batch, keys", [(1, 1), (1, 16), (1, 60), (300, 40), (150, 500)])
@pytest.mark.parametrize("retrieval", [[], [0, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_one_part_are_whole(dtype, retrieval, batch, keys):
    """Few keys or many sequences: nothing is split, and nothing is merged."""
    torch.manual_seed(batch + keys)
    q = torch.randn(batch, 4, 1, 128).to(dtype)
    k, v = (torch.randn(batch, 2, keys, 128).to(dtype) for _ in "kv")
    rest = retrieval, 30, 30, 2, 0.1
    start = torch.randint(0, keys + 1, (batch,))  # the last see nothing
    assert_decodes((q, k, v, *rest), start)


@pytest.mark.parametrize("keys", [700, 5000])
@pytest.mark.parametrize("retrieval", [[], [0, 3]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_sets_on_most_multiprocessors_stay_whole_or_are_split(padded, retrieval, keys, cuda_device):
    """Nine sets for ten multiprocessors, which long equal ones do not share."""
    count = torch.cuda.get_device_properties(cuda_device).multi_processor_count
    batch = count * 9 // 20
    torch.manual_seed(keys)
    q = torch.randn(batch, 4, 1, 64).bfloat16()
    k, v = (torch.randn(batch, 2, keys, 64).bfloat16() for _ in "kv")
    start = torch.randint(0, keys, (batch,)) if padded else None
    assert_decodes((q, k, v, retrieval, 300, 300, 2, 0.1), start)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_drawn_steps_repeat(seed, dim, dtype):
    positional, keywords = on_cuda(draw(seed * 11 + dim, dim, dtype))
    assert_repeats(lambda: ops.decode(*positional, **keywords))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_with_rings_repeat(dim, dtype, cuda_device):
    with cuda_device:
        q, k = torch.randn(3, 9, 1, dim).to(dtype), torch.randn(3, 2, 5000, dim).to(dtype)
        ring = torch.randn(3, 1, 1004, dim).to(dtype)
        indices = torch.arange(1, 5000, 3, dtype=torch.int32).expand(3, 4, 1, -1)
        counts = torch.tensor([[[900], [0], [-1], [1667]]], dtype=torch.int32).expand(3, -1, -1)
        start = torch.tensor([0, 3000, 4990])
    lists = dict(indices=indices, counts=counts, k_local=ring, v_local=ring, start=start)
    arguments = q, k, k, [3, 4, 5, 8], 1000, 1000, 4, dim**-0.5
    assert_repeats(lambda: ops.decode(*arguments, **lists))


def test_select_and_decode_repeat(cuda_device):
    torch.manual_seed(0)
    q = torch.randn(1, 32, 1, 128, device=cuda_device, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 4, 131_072, 128, device=cuda_device, dtype=torch.bfloat16) for _ in "kv")
    q_index = torch.randn(1, 5, 1, 16, device=cuda_device, dtype=torch.float16)
    k_index = torch.randn(1, 5, 131_072, 16, device=cuda_device, dtype=torch.float16)
    near = torch.zeros(1, 5, 1, device=cuda_device)

    def step():
        indices, counts, mass = ops.select(
            q_index, k_index, [0, 1, 2, 3, 4], 0.9, 8192, 4, 64, near_lse=near
        )
        return indices, counts, mass, *ops.decode(
            q, k, v, [1, 9, 10, 17, 30], 8192, 8192, 4, 128**-0.5, indices=indices, counts=counts
        )  # fmt: skip

    assert_repeats(step)


@pytest.mark.parametrize("kind", ["normal", "narrow", "equal", "spike", "few ahead", "high", "low"])
@pytest.mark.parametrize("block_size", [1, 64])
def test_long_rows_equal_the_exact_cpu(kind, block_size):
    torch.manual_seed(1)
    keys = 300_007
    floor = 64
    q_index, k_index = torch.randn(2, 3, 1, 16), torch.randn(2, 3, keys, 16)
    if kind == "narrow":
        k_index *= 1e-3
    if kind == "equal":
        k_index[:] = k_index[:, :, :1]
    if kind == "spike":
        k_index[:, :, 12_345] = 30 * q_index[:, :, 0]
    if kind in ("few ahead", "high", "low"):
        q_index[..., 0] = 4  # so that a key's score grows with its dimension 0
    if kind == "few ahead":  # four keys, by 17, and of all others the floor takes most
        k_index[:, :, 20_000:300_000:70_000, 0] += 17
        floor = 200_000 // block_size
    if kind in ("high", "low"):
        k_index[..., 0] += 1000 if kind == "high" else -1000
    arguments = (q_index, k_index.half(), [0, 1, 2], 0.9, 1024, 4, floor, block_size)
    cpu = ops.select(*arguments)
    cuda = [t.cpu() for t in ops.select(*on_cuda(arguments))]
    # Scores near the threshold differ in their last bits.
    slack = 3 + cpu[1].max() // 5_000
    for b in range(2):
        for j in range(3):
            a = set(cpu[0][b, j, 0, : cpu[1][b, j, 0]].tolist())
            c = cuda[0][b, j, 0, : cuda[1][b, j, 0]]
            assert c.diff().gt(0).all() and len(a ^ set(c.tolist())) <= slack
            assert (cuda[0][b, j, 0, len(c) :] == -1).all()
    assert (cuda[2] - cpu[2]).abs().max() < 1e-4
    assert (cuda[2] >= 0.9 - 1e-5).all()


@pytest.mark.parametrize(
    ("kind", "block_size"),
    [*itertools.product(("flat", "sharp", "equal"), (1, 64)), ("refined", 1)],
)
def test_select_without_exact_adds_the_rest_of_a_bin(kind, block_size, cuda_device):
    """Unless that is many, as where all score alike, or the choice is refined."""
    torch.manual_seed(block_size)
    q_index, k_index = (torch.randn(2, 3, n, 16, device=cuda_device).half() for n in (1, 50_003))
    q_index *= {"sharp": 4, "equal": 0}.get(kind, 1)
    more = {}
    if kind == "refined":
        more = dict(
            zip(("codes", "ranges"), ops.quantize_index(k_index[:, :, :49_984], 4), strict=True)
        )
        more["refine"] = True
    arguments = q_index, k_index, [0, 1, 2], 0.7, 100, 4, 64, block_size
    exact, fast = (ops.select(*arguments, exact=exact, **more) for exact in (True, False))
    if kind in ("equal", "refined"):
        assert all(map(torch.equal, exact, fast))
        return
    (indices, counts, mass), (more_indices, more_counts, more_mass) = exact, fast
    assert (more_counts <= counts + counts // 4 + 32).all()
    assert (more_counts > counts).any() or kind == "sharp"
    assert (more_mass >= mass - 1e-5).all()
    for b, head in itertools.product(range(2), range(3)):
        own = set(indices[b, head, 0, : counts[b, head, 0]].tolist())
        listed = more_indices[b, head, 0]
        assert own <= set(listed[: more_counts[b, head, 0]].tolist())
        assert (listed[more_counts[b, head, 0] :] == -1).all()


@pytest.mark.usefixtures("memory_is_given_back")
def test_keys_beyond_2_to_the_31_elements(cuda_device):
    keys = (1 << 31) // 128 + 1000
    k = torch.zeros(1, 1, keys, 128, device=cuda_device, dtype=torch.bfloat16)
    k[0, 0, -1, 0], k[0, 0, -300, 0] = 50, 100
    q = torch.zeros(1, 1, 1, 128, device=cuda_device, dtype=torch.bfloat16)
    q[..., 0] = 1
    indices = torch.tensor([keys - 300], device=cuda_device, dtype=torch.int32).view(1, 1, 1, 1)
    counts = torch.ones(1, 1, 1, device=cuda_device, dtype=torch.int32)
    out, lse = ops.decode(q, k, k, [0], 10, 10, 4, 1.0, indices=indices, counts=counts)
    assert out[0, 0, 0, 0] == 100 and lse[0, 0, 0] == 100


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_entries_outside_the_keys_add_none(block_size, cuda_device):
    q, k, v = (torch.randn(1, 2, n, 64, device=cuda_device).half() for n in (1, 999, 999))
    outside = [-1, -(2**31), 999 // block_size + 1, 2**31 - 1]
    if block_size > 1:
        outside += [2**32 // block_size // 2 + 3, 2**32 // block_size + 3]  # 3 in 31 bits and in 32
    entries = torch.tensor([2, *outside, 3], device=cuda_device).clamp(max=2**31 - 1).int()
    few = torch.tensor([2, 3], device=cuda_device, dtype=torch.int32)
    got, want = (
        ops.decode(
            q, k, v, [1], 100, 100, 1, 0.125, indices=one.view(1, 1, 1, -1),
            counts=torch.full((1, 1, 1), len(one), device=cuda_device, dtype=torch.int32),
            block_size=block_size,
        )
        for one in (entries, few)
    )  # fmt: skip
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("memory_is_given_back")
@pytest.mark.parametrize("elements", [2**30 - 8, 2**30])
def test_rows_as_far_apart_as_32_bits_hold_and_further(elements, cuda_device):
    needs_memory(5)
    keys, one = 3, dict(device=cuda_device, dtype=torch.bfloat16)
    held = torch.empty((keys - 1) * elements + 64, **one)
    k = held.as_strided((1, 1, keys, 64), (0, 0, elements, 1))
    k.copy_(torch.randn(1, 1, keys, 64, **one))
    q, v = torch.randn(1, 2, 1, 64, **one), torch.randn(1, 1, keys, 64, **one)
    for got, want in zip(
        ops.decode(q, k, v, [], 2, 2, 0, 0.125),
        ops.decode(q, k.contiguous(), v, [], 2, 2, 0, 0.125),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("memory_is_given_back")
@pytest.mark.parametrize("listed", [False, True])
def test_outputs_beyond_2_to_the_31_elements(listed, cuda_device):
    """Of more sequences than a grid holds, of one key each; a head with a list has two parts."""
    needs_memory(19 if listed else 10)
    batch, one = 2**16 + 8, dict(device=cuda_device, dtype=torch.bfloat16)
    q, k, v = (torch.randn(batch, heads, 1, 256, **one) for heads in (128, 8, 8))
    more = {}
    if listed:
        nothing = torch.zeros(batch, 1, 1, 1, device=cuda_device, dtype=torch.int32)
        more = dict(indices=nothing, counts=nothing[..., 0])
    results = ops.decode(q, k, v, [77] if listed else [], 1, 1, 0, 0.0625, **more)
    assert results[0].numel() > 2**31
    assert_rows_see_themselves(q, k, v, 0.0625, results, 2e-4)


@pytest.mark.usefixtures("memory_is_given_back")
@pytest.mark.parametrize(("bits", "refine"), [(16, False), (8, False), (4, False), (8, True)])
def test_select_reads_keys_beyond_2_to_the_31_elements(bits, refine, cuda_device):
    """Index keys, or codes of them, are zeros but for one key."""
    keys = (1 << 31) // min(bits * 2, 16) + (1 << 16)
    best = keys - 300
    coded = 0 if bits == 16 else keys - 64
    held = keys if refine or bits == 16 else 64
    k_index = torch.zeros(1, 1, held, 16, device=cuda_device, dtype=torch.float16)
    more = {}
    if held == keys:
        k_index[0, 0, best] = 16
    if coded:
        codes = torch.zeros(1, 1, coded, bits * 2, device=cuda_device, dtype=torch.uint8)
        codes[0, 0, best] = 255
        ranges = torch.zeros(1, 1, coded // 64, 32, device=cuda_device, dtype=torch.float16)
        ranges[..., 16:] = 16 / (2**bits - 1)
        more = dict(codes=codes, ranges=ranges, refine=refine)
    q_index = torch.ones(1, 1, 1, 16, device=cuda_device)
    indices, counts, mass = ops.select(q_index, k_index, [0], 0.9, 1, 0, 0, capacity=4, **more)
    assert counts.item() == 1 and indices.flatten().tolist() == [best, -1, -1, -1]
    assert mass.item() > 0.99


@pytest.mark.usefixtures("memory_is_given_back")
def test_select_writes_lists_beyond_2_to_the_31_elements(cuda_device):
    rows, keys = 129, 300
    q_index, k_index = (torch.randn(1, 1, n, 16, device=cuda_device).half() for n in (rows, keys))
    arguments = q_index, k_index, [0], 0.9, 10, 2, 3
    short, *want = ops.select(*arguments)
    long, *got = ops.select(*arguments, capacity=(1 << 24) + 16)
    assert torch.equal(long[..., :keys], short)
    assert not long[..., keys:].add_(1).any()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_every_head_of_many_can_have_a_list(cuda_device):
    heads, keys = 256, 40
    q, k = torch.randn(1, heads, 1, 64), torch.randn(1, heads, keys, 64)
    indices = torch.arange(heads * 3).view(1, heads, 1, 3).remainder(8).sort(-1).values.int()
    positional = (q, k, k, list(range(heads)), 20, 20, 2, 0.125)
    lists = {"indices": indices, "counts": torch.full((1, heads, 1), 3, dtype=torch.int32)}
    expected = ops.decode(*positional, **lists)
    got = ops.decode(*on_cuda(positional), **on_cuda(lists))
    torch.testing.assert_close(got[0].cpu(), expected[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="Hq <= 256"):
        ops.decode(
            *(torch.zeros(1, 257, n, 8, device=cuda_device) for n in (1, 9, 9)), [], 5, 5, 1, 1
        )


def test_a_block_of_all_keys(cuda_device):
    q, k = (
        torch.randn(1, 1, 1, 64, device=cuda_device),
        torch.randn(1, 1, 100, 64, device=cuda_device),
    )
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=cuda_device)
    arguments = (q, k, k, [0], 1, 1, 0, 0.125)
    all_keys = ops.decode(*arguments)
    for block_size in (100, 1 << 20, 1 << 32):
        got = ops.decode(*arguments, indices=zero, counts=zero[..., 0] + 1, block_size=block_size)
        torch.testing.assert_close(got, all_keys, atol=1e-5, rtol=1e-5)


def test_select_with_near_keys_that_outweigh_everything(cuda_device):
    q_index, k_index = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 100, 16)
    near = torch.full((1, 1, 1), 800.0)
    q_index, k_index, near = (t.to(cuda_device) for t in (q_index, k_index, near))
    _, counts, mass = ops.select(q_index, k_index, [0], 0.5, 1, 0, 3, near_lse=near)
    assert counts.item() == 3 and mass.item() == 1
    start = torch.tensor([200], device=cuda_device)
    nothing = ops.select(
        q_index, k_index, [0], 0.5, 1, 0, 3, near_lse=near * torch.nan, start=start
    )
    assert nothing[1].item() == 0 and nothing[2].item() == 1

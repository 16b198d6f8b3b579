"""sparse_decode on CUDA at sizes and head dims that the property tests do not reach."""

import math
import random

import pytest
import torch

from rtpurbo import ops
from rtpurbo.ops.quantize_index import INDEX_BLOCK
from rtpurbo.ops.sparse_decode import WORD_KEYS, unpacked
from tests import reference
from tests.gpu.kernels import kernels_of
from tests.gpu.long_outputs import assert_rows_see_themselves, needs_memory
from tests.gpu.repeats import assert_repeats
from tests.ops.test_sparse_decode_properties import keys_read, lists_of
from tests.properties import BIN
from tests.reference.masks import last_positions, near, visible
from tests.reference.quantize_index import dequantize
from tests.reference.select import index_logits
from tests.reference.softmax import log_sum_exp

# By the blocks of a team on an H100, which runs 264 of them: the sequences, the lists of each, and
# from how many keys on a team uses a sieve.
OF_TEAM = {1: (6, 44, 32_768), 2: (3, 44, 65_536)}


def sifting_team(seed: int) -> int:
    """0 where the sizes are to take no sieve."""
    return {1: 1, 5: 2}.get(seed % 8, 0)


def draw(seed: int, dtype: torch.dtype) -> dict:
    """A layer with thousands of keys as a cache holds them, every third with rings.

    Every fourth is of a size that takes a sieve.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rings, team = seed % 3 == 0, sifting_team(seed)
    batch, kv_heads, group = rng.randint(1, 3), rng.randint(1, 4), rng.choice([*range(1, 9), 16])
    dim, keys = rng.choice([64, 128, 256]), rng.randint(1, 9000)
    p, beyond = rng.choice([0.3, 0.9, 0.999, 1.0]), rng.random() < 0.6
    window, block_size = rng.choice([1, 63, 500, 1024]), rng.choice([1, 1, 16, 32, 64])
    if team:
        batch, lists, keys = OF_TEAM[team]
        kv_heads, group, dim = 3, 16, rng.choice([64, 128])
        keys += rng.randint(0, 500)
        p, beyond = rng.choice([0.3, 0.9, 0.999]), True
        window, block_size = rng.choice([64, 500, 1024]), 1
    whole = list(range(kv_heads))
    if rings:
        kv_heads += 1
        whole = rng.sample(range(kv_heads), 3 if team else rng.randint(1, kv_heads - 1))
    heads = [head for head in range(kv_heads * group) if head // group in whole]
    if not team:
        lists = rng.randint(1, min(len(heads), 5))
    retrieval = sorted(rng.sample(heads, lists))
    sinks = rng.choice([0, 4])
    q = torch.randn(batch, 1, kv_heads * group, dim).to(dtype).transpose(1, 2)
    full = sorted({head // group for head in retrieval}) if rings else range(kv_heads)
    k, v = (torch.randn(batch, keys, len(full), dim).to(dtype).transpose(1, 2) for _ in range(2))
    start = None
    if rng.random() < 0.4:
        start = torch.tensor([rng.randint(0, keys) for _ in range(batch)])
    local = {}
    if rings:
        shape = batch, kv_heads - len(full), sinks + window, dim
        local = {name: torch.randn(shape).to(dtype) for name in ("k_local", "v_local")}
        for ring in local.values():
            for b, first in enumerate([0] * batch if start is None else start.tolist()):
                ring[b, :, keys - first :] = torch.nan  # slots that hold nothing yet
    return dict(
        q=q,
        k=k,
        v=v,
        retrieval_heads=retrieval,
        p=p,
        window=window,
        near_window=window if beyond else rng.choice([window, 64]),
        sinks=sinks,
        min_tokens=rng.choice([0, 64, 3000]),
        scale=dim**-0.5,
        block_size=block_size,
        offset=torch.randn(lists) if beyond else None,
        beyond_window=beyond,
        start=start,
        **draw_index(rng, batch, lists, keys, rng.choice([2, 6, 11, 22]) if team else lists),
        **local,
        exact=rng.random() < 0.5,
    )


def draw_index(rng: random.Random, batch: int, heads: int, keys: int, shared: int) -> dict:
    """Half of the time with logits of -inf, but for keys in codes, which hold no infinity."""
    q_index = torch.randn(batch, heads, 1, 16).half() * rng.choice([0.3, 1, 3])
    k_index = torch.randn(batch, shared, keys, 16).half()
    more = {}
    bits, coded = rng.choice([16, 16, 8, 4]), rng.randint(0, keys // INDEX_BLOCK) * INDEX_BLOCK
    if bits < 16:
        far, k_index = (part.contiguous() for part in k_index.split([coded, keys - coded], 2))
        more = dict(zip(("codes", "ranges"), ops.quantize_index(far, bits), strict=True))
    if rng.random() < 0.5:
        q_index[..., 0] = 1
        lost = torch.rand(k_index.shape[:-1]) < rng.choice([0.1, 0.9, 1.0])
        lost[..., rng.choice([lost.shape[2] // 2, lost.shape[2]]) :] = False
        k_index[..., 0].masked_fill_(lost, -math.inf)
    index_map = [head % shared for head in range(heads)]
    return dict(q_index=q_index, k_index=k_index, index_map=index_map, **more)


def near_mass(arguments: dict) -> torch.Tensor:
    """Of the true logits [B, R, 1], a head at a time: the keys of all take much memory."""
    local = arguments["k_local"].shape[1] if "k_local" in arguments else 0
    group = arguments["q"].shape[1] // (arguments["k"].shape[1] + local)
    owners = [head // group for head in arguments["retrieval_heads"]]
    full = sorted(set(owners)) if local else list(range(arguments["k"].shape[1]))
    names = "near_window", "sinks", "scale", "start"
    near = [arguments[name] for name in names]
    return torch.cat(
        [
            reference.near_lse(arguments["q"], arguments["k"], [head], [full.index(owner)], *near)
            for head, owner in zip(arguments["retrieval_heads"], owners, strict=True)
        ],
        1,
    )


def scored_keys(arguments: dict) -> torch.Tensor:
    """float64 [B, Rk, N, r]: what the codes and the 16-bit keys mean."""
    if "codes" not in arguments:
        return arguments["k_index"].double()
    far = dequantize(arguments["codes"], arguments["ranges"])
    return torch.cat([far.double(), arguments["k_index"].double()], 2)


def any_in_blocks(keys: torch.Tensor, size: int) -> torch.Tensor:
    """bool [..., N] -> [..., ceil(N / size)]."""
    padded = torch.nn.functional.pad(keys, (0, -keys.shape[-1] % size))
    return padded.unflatten(-1, (-1, size)).any(-1)


def check(arguments: dict, result: tuple) -> None:
    """A legal selection, and attention to just that; on the device of the arguments."""
    out, lse, selected, counts, mass = result
    keys, size, p = arguments["k"].shape[2], arguments["block_size"], arguments["p"]
    indices = lists_of(selected, counts, keys, size)
    positions = last_positions(1, keys, out.shape[0])
    sees = visible(positions, keys, arguments["start"])[:, None]
    close = near(positions, keys, arguments["start"], arguments["near_window"], arguments["sinks"])[
        :, None
    ]
    bits = unpacked(selected[:, :, 0], keys)
    attended = close | (bits[:, :, None] & sees)
    index = arguments["q_index"], scored_keys(arguments), arguments["index_map"]
    logits = index_logits(*index, arguments["offset"])
    if arguments["beyond_window"]:
        forced = near_mass(arguments)
    else:
        forced = log_sum_exp(logits, close.expand_as(logits))
    far = (sees & ~close).expand_as(logits)
    chosen = torch.logaddexp(forced, log_sum_exp(logits, far & attended))
    total = torch.logaddexp(forced, log_sum_exp(logits, far))
    share = torch.where(total > -torch.inf, (chosen - total).exp(), 1.0)
    torch.testing.assert_close(mass.double(), share, atol=1e-4, rtol=0)
    assert (share >= p - 1e-4).all()
    candidates = any_in_blocks(far & (logits > -torch.inf), size)
    assert not (any_in_blocks(bits[:, :, None], size) & ~candidates).any()
    floor = keys if p == 1 else -(-arguments["min_tokens"] // size)
    assert (counts >= candidates.sum(-1).clamp(max=floor)).all()
    low = torch.where(far & attended, logits, torch.inf).amin(-1)
    high = torch.where(far & ~attended, logits, -torch.inf).amax(-1)
    if size == 1:
        assert (low >= high - 1e-4).all()
        # Without the last member, or a bin of them, it would be too little.
        if arguments["exact"]:
            fewer, spare = counts - 1, share - (low - total).exp()
        else:
            above = far & attended & (logits > (low + BIN + 1e-4)[..., None])
            mass_above = torch.logaddexp(forced, log_sum_exp(logits, above))
            fewer, spare = above.sum(-1), (mass_above - total).exp().nan_to_num()
        assert ((counts == 0) | (fewer < floor) | (spare < p + 1e-4)).all()

    names = ("window", "near_window", "sinks", "scale", "block_size", "start", "retrieval_heads")
    more = {name: arguments[name] for name in names} | dict(indices=indices, counts=counts)
    more |= {name: arguments.get(name) for name in ("k_local", "v_local")}
    tensors = [arguments[name] for name in "qkv"]
    exact, exact_lse = reference.decode(*tensors, **more)
    lower, _ = reference.decode(*tensors, **more, compute=out.dtype)
    allowed = 2 * (lower.double() - exact).abs().max() + 1e-5
    assert (out.double() - exact).abs().max() <= allowed
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_selects_enough_and_attends_to_it(seed, dtype, cuda_device):
    with cuda_device:
        arguments = draw(seed, dtype)
        check(arguments, ops.sparse_decode(**arguments))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_and_values_that_nothing_attends_to_are_never_read(seed, dtype, cuda_device):
    with cuda_device:
        arguments = draw(1000 + seed, dtype)
        expected = ops.sparse_decode(**arguments)
        unread = ~keys_read(selected=expected[2], **arguments)[..., None]
        poisoned = {name: arguments[name].masked_fill(unread, torch.nan) for name in "kv"}
        got = ops.sparse_decode(**arguments | poisoned)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def long_step(
    batch, keys, bits, device, scores="flat", *, heads=(1, 9, 10, 17, 30), heads_of_key=1, floor=64
):
    """A step whose batch shares its keys, and the same through the three operators.

    So many neighbours among the heads share an index key. Sharp scores select few keys. Misleading
    ones do in a sample of keys that holds the first far ones, but not in all. Some ahead are few
    keys that outweigh all others by more than a histogram holds; high ones are far from 0.
    """
    torch.manual_seed(0)
    q = torch.randn(batch, 32, 1, 128, device=device, dtype=torch.bfloat16)
    k, v = (
        torch.randn(1, 4, keys, 128, device=device, dtype=torch.bfloat16).expand(batch, -1, -1, -1)
        for _ in "kv"
    )
    index_map = [i // heads_of_key for i in range(len(heads))]
    q_index = torch.randn(batch, len(heads), 1, 16, device=device, dtype=torch.float16)
    k_index = torch.randn(1, index_map[-1] + 1, keys, 16, device=device, dtype=torch.float16)
    if scores == "sharp":
        q_index *= 4
    if scores == "equal":
        k_index[:] = k_index[:, :, :1].clone()
    if scores == "misleading":
        q_index[..., 0] = 4
        k_index[:, :, 100] = 0
        k_index[:, :, 100, 0] = math.log(8 * keys)  # about 3 times the mass of all others
    if scores == "some ahead":
        q_index[..., 0] = 4
        k_index[:, :, 30::40_000, 0] += 40
    if scores == "high":
        q_index[..., 0] = 4
        k_index[..., 0] += 1000
    more = {}
    if bits < 16:
        coded = (keys - 8192) // INDEX_BLOCK * INDEX_BLOCK
        codes, ranges = ops.quantize_index(k_index[:, :, :coded], bits)
        k_index = k_index[:, :, coded:]
        more = {
            "codes": codes.expand(batch, -1, -1, -1),
            "ranges": ranges.expand(batch, -1, -1, -1),
        }
    k_index = k_index.expand(batch, -1, -1, -1)
    owners, scale = [head // 8 for head in heads], 128**-0.5
    index = q_index, k_index, index_map, 0.9

    def step(exact=True):
        layer = q, k, v, heads
        return ops.sparse_decode(*layer, *index, 8192, 8192, 4, floor, scale, **more, exact=exact)

    def parts():
        near = ops.near_lse(q, k, heads, owners, 8192, 4, scale)
        indices, counts, mass = ops.select(*index, 8192, 4, floor, near_lse=near, **more)
        lists = {"indices": indices, "counts": counts}
        out, lse = ops.decode(q, k, v, heads, 8192, 8192, 4, scale, **lists)
        return out, lse, indices, counts, mass

    return step, parts


SCORES = ("sharp", "misleading", "flat")
# On 132 multiprocessors: teams of many blocks; of one; several problems for a team of one, and of
# several blocks.
LONG = [(1, 131_072), (1, 1_000_001), (40, 30_000), (64, 30_000), (16, 1_000_000)]
# Blocks with so many keys use a sieve; of 160 problems in two rounds of teams of three.
SIFTED = [(4, 1_000_003, scores) for scores in SCORES] + [(16, 1_000_000, "sharp")]
SIFTED += [(32, 209_000, scores) for scores in ("flat", "misleading")]
APART = [(*case, scores) for case in (LONG[0], LONG[2]) for scores in ("some ahead", "high")]
APART += [(4, 1_000_003, scores) for scores in ("some ahead", "high")]


@pytest.mark.parametrize(
    ("batch", "keys", "scores"), [*((*case, "flat") for case in LONG), *SIFTED, *APART]
)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_long_step_is_what_its_parts_give(batch, keys, scores, bits, cuda_device):
    assert_same_as_parts(*long_step(batch, keys, bits, cuda_device, scores))


# Of 30 heads or 32, whose teams use a sieve from so many keys on. 270,337 far keys are whole runs
# and one key more.
SHARED = [
    (2, "flat"),
    (2, "equal"),
    (3, "sharp"),
    (4, "misleading"),
    (8, "flat"),
    (8, "sharp"),
    (8, "misleading"),
    (16, "sharp"),
]


@pytest.mark.parametrize("keys", [270_337 + 4 + 8192, 300_001])
@pytest.mark.parametrize(("heads_of_key", "scores"), SHARED)
def test_heads_that_share_index_keys_select_as_each_alone(heads_of_key, scores, keys, cuda_device):
    heads = range(32 // heads_of_key * heads_of_key)
    more = dict(heads=list(heads), heads_of_key=heads_of_key)
    step, parts = long_step(1, keys, 16, cuda_device, scores, **more)
    assert_same_as_parts(step, parts)
    if scores == "equal":
        _, _, selected, counts, _ = step()
        bits = unpacked(selected[0, :, 0], selected.shape[-1] * WORD_KEYS)
        for own, count in zip(bits, counts[0, :, 0].tolist(), strict=True):
            assert own[4 : 4 + count].all()
    if torch.cuda.get_device_properties(cuda_device).multi_processor_count == 132:
        assert any("Sifting)2" in name for name in kernels_of(step))


@pytest.mark.parametrize("scores", SCORES)
def test_heads_that_share_index_keys_give_the_same_bits_again(scores, cuda_device):
    step, _ = long_step(2, 300_001, 16, cuda_device, scores, heads=list(range(16)), heads_of_key=4)
    assert_repeats(step)


def assert_same_as_parts(step, parts):
    out, lse, selected, counts, mass = step()
    want_out, want_lse, indices, want_counts, want_mass = parts()
    # near_lse and sparse_decode sum the near mass in another order: a member may change sides.
    assert (counts - want_counts).abs().max() <= 2 + want_counts.max() // 10_000
    torch.testing.assert_close(mass, want_mass, atol=1e-4, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=0)
    torch.testing.assert_close(out, want_out, atol=2e-2, rtol=2e-2)
    for b in range(0, len(selected), 7):
        bits_of = unpacked(selected[b, :, 0], selected.shape[-1] * WORD_KEYS)
        assert torch.equal(bits_of.sum(-1), counts[b, :, 0].long())
        for j in range(bits_of.shape[0]):
            listed = torch.zeros_like(bits_of[j])
            listed[indices[b, j, 0, : want_counts[b, j, 0]].long()] = 1
            assert (listed != bits_of[j]).sum() <= 4 + want_counts.max() // 5_000


@pytest.mark.parametrize(
    ("batch", "keys", "scores"),
    [*((*case, "flat") for case in LONG[:4]), *SIFTED, *APART, (3, 150_000, "equal")],
)
@pytest.mark.parametrize("floor", [64, 8192])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_long_step_without_exact_adds_the_rest_of_a_bin(
    batch, keys, scores, floor, bits, cuda_device
):
    step, _ = long_step(batch, keys, bits, cuda_device, scores, floor=floor)
    assert_adds_at_most_a_bin(step(), step(exact=False), some=scores == "flat")


@pytest.mark.parametrize(("heads_of_key", "scores"), SHARED)
def test_heads_that_share_index_keys_without_exact_add_the_rest_of_a_bin(
    heads_of_key, scores, cuda_device
):
    heads = list(range(32 // heads_of_key * heads_of_key))
    more = dict(heads=heads, heads_of_key=heads_of_key, floor=5000)
    step, _ = long_step(1, 300_001, 16, cuda_device, scores, **more)
    assert_adds_at_most_a_bin(step(), step(exact=False), some=scores == "flat")


def assert_adds_at_most_a_bin(exact, fast, some):
    """All of what is selected, and more unless that is much: by some heads, or maybe none."""
    (_, _, selected, counts, mass), (_, _, more_selected, more_counts, more_mass) = exact, fast
    assert not (selected & ~more_selected).any()
    bits = unpacked(more_selected, selected.shape[-1] * WORD_KEYS)
    assert torch.equal(bits.sum(-1), more_counts.long())
    assert (more_counts <= counts + counts // 4 + 32).all()
    assert (more_mass >= mass - 1e-5).all()
    assert (more_counts > counts).any() or not some


@pytest.mark.parametrize(
    ("batch", "keys", "scores"), [*((*case, "flat") for case in LONG[:3]), *SIFTED[:2], SIFTED[-1]]
)
@pytest.mark.parametrize("bits", [16, 4])
def test_twenty_runs_and_a_graph_give_the_same_bits(batch, keys, scores, bits, cuda_device):
    step, _ = long_step(batch, keys, bits, cuda_device, scores)
    assert_repeats(step)
    assert_repeats(lambda: step(exact=False))


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_drawn_steps_repeat(seed, dtype, cuda_device):
    """With rings, blocks of keys, codes of 4 and 8 bits, sieves and all head dims among them."""
    with cuda_device:
        arguments = draw(seed, dtype)
        assert_repeats(lambda: ops.sparse_decode(**arguments))


@pytest.mark.parametrize("heads_of_key", [1, 8])
def test_a_nan_among_sifted_keys_selects_all_of_its_heads(heads_of_key, cuda_device):
    keys, heads = 300_000, 32
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, n, 64, device=cuda_device).bfloat16() for n in (1, keys))
    q_index = 4 * torch.randn(1, heads, 1, 16, device=cuda_device)
    index_map = [head // heads_of_key for head in range(heads)]
    k_index = torch.randn(1, heads // heads_of_key, keys, 16, device=cuda_device).half()

    def step():
        return ops.sparse_decode(
            q, k, k, list(range(heads)), q_index, k_index, index_map, 0.9, 100, 100, 4, 64, 0.125
        )

    clean = step()
    k_index[0, index_map[7], 200_000, 3] = torch.nan
    out, lse, selected, counts, mass = step()
    spoilt = [head for head in range(heads) if index_map[head] == index_map[7]]
    assert (counts[0, spoilt] == keys - 104).all() and mass[0, spoilt].isnan().all()
    bits = unpacked(selected[0, 7, 0], selected.shape[-1] * WORD_KEYS)
    assert bits.sum() == keys - 104 and bits[4 : keys - 100].all()
    others = [head for head in range(heads) if head not in spoilt]
    for one, other in zip((out, lse, selected, counts, mass), clean, strict=True):
        assert torch.equal(one[:, others], other[:, others])


@pytest.mark.parametrize(("dim", "dtype"), [(64, "bfloat16"), (128, "float16"), (256, "bfloat16")])
def test_a_step_is_one_launch(dim, dtype, cuda_device):
    draw_on = dict(device=cuda_device, dtype=getattr(torch, dtype))
    q, k, v = (torch.randn(2, h, n, dim, **draw_on) for h, n in ((4, 1), (2, 900), (2, 900)))
    index = [torch.randn(2, 1, n, 16, device=cuda_device).half() for n in (1, 900)]

    def step():
        ops.sparse_decode(q, k, v, [3], *index, [0], 0.9, 100, 100, 4, 64, dim**-0.5)

    kernels = kernels_of(step)
    assert len(kernels) == 1 and "sparse_decode_kernel" in kernels[0]


@pytest.mark.parametrize("seed", range(10))
def test_drawn_sizes_take_a_sieve_where_they_should(seed, cuda_device):
    if not 132 <= torch.cuda.get_device_properties(cuda_device).multi_processor_count < 198:
        pytest.skip("teams have other sizes on so many multiprocessors")
    with cuda_device:
        arguments = draw(seed, torch.bfloat16)
        kernels = kernels_of(lambda: ops.sparse_decode(**arguments))
    sieves = ["Sifting)0" not in name for name in kernels if "sparse_decode_kernel" in name]
    assert sieves == [sifting_team(seed) > 0]


@pytest.mark.usefixtures("memory_is_given_back")
def test_keys_beyond_2_to_the_31_elements(cuda_device):
    keys = (1 << 31) // 128 + 1000
    best = keys - 300
    k = torch.zeros(1, 1, keys, 128, device=cuda_device, dtype=torch.bfloat16)
    k_index = torch.zeros(1, 1, keys, 16, device=cuda_device, dtype=torch.float16)
    k[0, 0, -1, 0], k[0, 0, best, 0], k_index[0, 0, best] = 50, 100, 16
    q = torch.zeros(1, 1, 1, 128, device=cuda_device, dtype=torch.bfloat16)
    q[..., 0] = 1
    q_index = torch.ones(1, 1, 1, 16, device=cuda_device)
    out, lse, selected, counts, _ = ops.sparse_decode(
        q, k, k, [0], q_index, k_index, [0], 0.9, 10, 10, 4, 0, 1.0
    )
    assert counts.item() == 1 and unpacked(selected, keys).nonzero()[:, -1].tolist() == [best]
    assert out[0, 0, 0, 0] == 100 and abs(lse.item() - 100) < 1e-4


@pytest.mark.usefixtures("memory_is_given_back")
def test_outputs_beyond_2_to_the_31_elements(cuda_device):
    """Of many sequences with one key each, which is near: nothing is left to select."""
    needs_memory(19)
    batch, one = 2**16 + 8, dict(device=cuda_device, dtype=torch.bfloat16)
    q, k, v = (torch.randn(batch, heads, 1, 256, **one) for heads in (128, 8, 8))
    index = torch.randn(batch, 1, 1, 16, device=cuda_device, dtype=torch.float16)
    *results, selected, counts, mass = ops.sparse_decode(
        q, k, v, [77], index, index, [0], 0.9, 1, 1, 0, 0, 0.0625
    )
    assert results[0].numel() > 2**31
    assert_rows_see_themselves(q, k, v, 0.0625, results, 2e-4)
    assert not selected.any() and not counts.any() and (mass == 1).all()


@pytest.mark.parametrize("keys", [40_000, 300_007])
def test_equal_scores_are_taken_by_position(keys, cuda_device):
    q, k = (torch.randn(1, 2, n, 64, device=cuda_device).bfloat16() for n in (1, keys))
    q_index = torch.zeros(1, 1, 1, 16, device=cuda_device)
    k_index = torch.randn(1, 1, keys, 16, device=cuda_device).half()
    _, _, selected, counts, mass = ops.sparse_decode(
        q, k, k, [1], q_index, k_index, [0], 0.5, 100, 100, 4, 7, 0.125, beyond_window=False
    )
    far = keys - 104
    need = -(-keys // 2) - 104
    assert abs(counts.item() - need) <= 1 and abs(mass.item() - 0.5) < 1e-4
    bits = unpacked(selected[0, 0, 0], selected.shape[-1] * WORD_KEYS)
    assert bits[4 : 4 + counts.item()].all() and bits.sum() == counts.item() < far

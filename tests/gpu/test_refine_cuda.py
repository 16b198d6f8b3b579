"""select with refine on CUDA against the CPU, at sizes that the property tests do not reach."""

import random

import pytest
import torch

from rtpurbo import ops
from tests.gpu.repeats import assert_repeats
from tests.gpu.views import on_cuda

BLOCK = 64


def draw(seed: int) -> dict:
    """Index keys as a cache holds them, or of a dim and dtype that are scored one by one."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, dim = rng.randint(1, 3), rng.randint(1, 5), rng.choice([16, 16, 16, 8, 5])
    dtype = rng.choice([torch.float16, torch.float16, torch.bfloat16, torch.float32])
    keys = rng.choice([rng.randint(1, 400), rng.randint(400, 30_000)])
    coded = rng.randint(0, keys // BLOCK) * BLOCK
    k_index = torch.randn(batch, heads, keys + 3, dim).to(dtype)[:, :, 3:]
    beside = torch.randn(k_index.shape) * rng.choice([0, 0, 0.3])
    codes, ranges = ops.quantize_index((k_index + beside).half()[:, :, :coded], rng.choice([4, 8]))
    beyond = rng.random() < 0.6
    return dict(
        q_index=torch.randn(batch, heads, 1, dim).half() * rng.choice([0.3, 1, 3]),
        k_index=k_index,
        index_map=list(range(heads)),
        p=rng.choice([0.3, 0.9, 0.999, 1.0]),
        window=rng.choice([1, 63, 500]),
        sinks=rng.choice([0, 4]),
        min_tokens=rng.choice([0, 64, 3000]),
        near_lse=torch.randn(batch, heads, 1) + 5 if beyond else None,
        offset=torch.randn(heads) if beyond else None,
        start=torch.randint(0, keys + 1, (batch,)) if rng.random() < 0.4 else None,
        codes=codes,
        ranges=ranges,
        refine=True,
    )


def assert_near_the_cpus(got, want, keys: int) -> None:
    """The two sum masses and scores in another order: a member near the cut may change sides."""
    (indices, counts, mass), (want_indices, want_counts, want_mass) = got, want
    torch.testing.assert_close(mass, want_mass, atol=2e-4, rtol=0, equal_nan=True)
    for b, j in torch.cartesian_prod(*map(torch.arange, counts.shape[:2])).tolist():
        count, wanted = int(counts[b, j, 0]), int(want_counts[b, j, 0])
        listed = torch.zeros(2, keys, dtype=torch.bool)
        listed[0, indices[b, j, 0, :count].long()] = True
        listed[1, want_indices[b, j, 0, :wanted].long()] = True
        assert (indices[b, j, 0, count:] == -1).all() and listed[0].sum() == count
        assert (listed[0] ^ listed[1]).sum() <= 2 + wanted // 1000


@pytest.mark.parametrize("seed", range(120))
def test_selections_are_the_cpus(seed):
    arguments = draw(seed)
    got = [t.cpu() for t in ops.select(**on_cuda(arguments))]
    assert_near_the_cpus(got, ops.select(**arguments), arguments["k_index"].shape[2])


def long_row(batch: int, keys: int, device, bits: int = 4, spread: float = 1.0) -> dict:
    """A batch that shares its keys."""
    torch.manual_seed(0)
    coded = max(0, keys - 8192) // BLOCK * BLOCK
    k_index = torch.randn(1, 5, keys, 16, device=device).half()
    codes, ranges = ops.quantize_index(k_index[:, :, :coded], bits)
    shared = dict(k_index=k_index, codes=codes, ranges=ranges)
    return {n: t.expand(batch, -1, -1, -1) for n, t in shared.items()} | dict(
        q_index=(torch.randn(batch, 5, 1, 16, device=device) * spread).half(),
        index_map=[0, 1, 2, 3, 4], p=0.9, window=8192, sinks=4, min_tokens=64,
        near_lse=torch.full((batch, 5, 1), 9.0, device=device), refine=True,
    )  # fmt: skip


# On 132 multiprocessors: teams of many blocks; of one; several problems for a team of one, and of
# several blocks.
LONG = [(1, 131_072), (1, 1_000_001), (40, 30_000), (64, 30_000), (16, 300_000)]


@pytest.mark.parametrize(("batch", "keys"), LONG)
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_long_rows_are_the_cpus(batch, keys, spread, cuda_device):
    arguments = long_row(batch, keys, cuda_device, spread=spread)
    got = [t.cpu() for t in ops.select(**arguments)]
    cpu = {n: a.cpu() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    assert_near_the_cpus(got, ops.select(**cpu), keys)


@pytest.mark.parametrize(("batch", "keys"), LONG)
def test_the_same_bits_every_time(batch, keys, cuda_device):
    arguments = long_row(batch, keys, cuda_device)
    assert_repeats(lambda: ops.select(**arguments))


def test_nothing_waits_for_the_host(cuda_device):
    arguments = long_row(2, 40_000, cuda_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.select(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("keys", [30_000, 300_007])
def test_equal_scores_are_taken_by_position(keys, cuda_device):
    """Two keys of three are needed, and as many more are scored again as there are."""
    arguments = long_row(1, keys, cuda_device) | dict(window=64, near_lse=None, p=0.6667)
    arguments["q_index"] = torch.zeros_like(arguments["q_index"])
    indices, counts, mass = ops.select(**arguments)
    need = int(0.6667 * keys) - 68
    for j in range(5):
        count = int(counts[0, j, 0])
        assert abs(count - need) <= 2 + keys // 10_000
        first = torch.arange(4, 4 + count, device=cuda_device)
        assert torch.equal(indices[0, j, 0, :count].long(), first)
    assert (mass - 0.6667).abs().max() < 1e-4


def test_all_that_are_scored_again_are_taken_where_they_do_not_reach_p(cuda_device):
    """Codes say that 200 keys stand out; in 16 bits they do not."""
    keys, coded = 20_000, 19_968
    by_codes = torch.full((1, 1, coded, 16), -1.0)
    by_codes[:, :, 1000:9000:40] = 3.0
    codes, ranges = ops.quantize_index(by_codes, 8)
    arguments = dict(
        q_index=torch.ones(1, 1, 1, 16), k_index=torch.full((1, 1, keys, 16), -1.0).half(),
        index_map=[0], p=0.9, window=1, sinks=0, min_tokens=0,
        near_lse=torch.full((1, 1, 1), -9.0), codes=codes, ranges=ranges, refine=True,
    )  # fmt: skip
    indices, counts, mass = (t.cpu() for t in ops.select(**on_cuda(arguments)))
    want_indices, want_counts, want_mass = ops.select(**arguments)
    assert counts.item() == want_counts.item() and counts.item() % 2 == 0 < counts.item()
    assert torch.equal(indices, want_indices) and mass.item() < 0.1
    torch.testing.assert_close(mass, want_mass, atol=1e-4, rtol=0)

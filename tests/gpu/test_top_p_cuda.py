"""top_p on CUDA against the CPU operator, which tests/ops holds against a stable sort."""

import math
import random

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.gpu.repeats import assert_repeats
from tests.properties import BIN


def wrong_rows(scores: torch.Tensor, exact: tuple, fast: tuple) -> list[int]:
    """Rows where `fast` has others than the best, lacks more than one of `exact`, or adds more than
    one that is not of the last bin: weights are rounded.
    """
    wrong = []
    for row, score in enumerate(scores.double()):
        own, got = (set(x[0][row, : x[1][row]].tolist()) for x in (exact, fast))
        inside = torch.zeros(len(score), dtype=torch.bool)
        inside[list(got)] = True
        best = inside.all() or not got or score[inside].amin() >= score[~inside].amax()
        more = score[sorted(got - own)]
        fits = len(more) <= len(own) // 4 + 32
        of_bin = own and fits and (more > score[sorted(own)].amin() - BIN - 1e-6).all()
        if not best or len(own - got) > (not len(more)) or not (len(more) <= 1 or of_bin):
            wrong.append(row)
    return wrong


@pytest.mark.parametrize(
    ("seed", "exact"), [*((i, False) for i in range(120)), *((i, True) for i in range(40))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_rows_equal_the_cpu(seed, exact, dtype):
    rng = random.Random(seed)
    rows, n = rng.choice([1, 3, 9, 300]), rng.choice([1, 2, 31, 63, 64, 65, 513, 5000, 40_001])
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, n + 13, generator=generator) * rng.choice([0.0, 0.3, 2, 30])
    wide[torch.rand(rows, n + 13, generator=generator) < rng.choice([0, 0.1, 1.0])] = -math.inf
    scores = wide.to(dtype)[:, 6 : 6 + n]
    p, floor = rng.choice([1e-6, 0.3, 0.9, 0.999, 1.0]), rng.choice([0, 1, 64])
    forced = torch.randn(rows, generator=generator) if rng.random() < 0.5 else None
    cpu = ops.top_p(scores, p, floor, forced)
    there = None if forced is None else forced.cuda()
    cuda = [t.cpu() for t in ops.top_p(scores.cuda(), p, floor, there, exact)]
    if exact:
        # Any cut of these draws is 1e-7 of the mass or more away from that of one member more or
        # less: the order of a sum in float64 does not move it.
        indices, counts, _ = reference.top_p(scores, p, floor, forced)
        assert torch.equal(cuda[0], indices) and torch.equal(cuda[1], counts)
    else:
        assert not wrong_rows(scores, cpu, cuda)
    for row in range(rows):
        count = int(cuda[1][row])
        assert (cuda[0][row, count:] == -1).all()
        assert cuda[0][row, :count].diff().gt(0).all()
    outside = torch.full((rows,), -math.inf) if forced is None else forced
    share = torch.cat([scores.double(), outside[:, None]], 1).softmax(1)
    chosen = torch.ones(rows, n + 1)  # of padding and `outside`, too
    chosen[:, :n] = chosen[:, :n].scatter(1, cuda[0].long().clamp(min=0), 2) - 1
    chosen[:, 0] = (cuda[0] == 0).any(1)  # padding stands there
    held = (share * chosen).sum(1)
    assert torch.allclose(held.where(held.isfinite(), 1.0), cuda[2].double(), atol=2e-5)
    assert (cuda[2] >= p - 1e-5).all()


@pytest.mark.parametrize("exact", [False, True])
def test_twenty_runs_and_a_graph_give_the_same_bits(exact, cuda_device):
    scores = torch.randn(5, 1_000_003, device=cuda_device) * 3
    assert_repeats(lambda: ops.top_p(scores, 0.9, 64, exact=exact))


@pytest.mark.parametrize("exact", [False, True])
def test_poison_and_empty_rows(exact, cuda_device):
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[-inf, -inf, -inf], [0, nan, -inf], [0, inf, -inf], [50, 0, 0]])
    indices, counts, mass = ops.top_p(rows.to(cuda_device), 0.9, exact=exact)
    assert counts.tolist() == [0, 2, 2, 1]
    assert mass[0] == 1 and mass[1].isnan() and mass[2].isnan() and mass[3] == 1
    assert indices[1].tolist() == [0, 1, -1]


def test_rows_without_members(cuda_device):
    nothing = torch.zeros(2, 0, device=cuda_device)
    forced = torch.tensor([math.nan, 1.0], device=cuda_device)
    for given, poisoned in ((forced, [True, False]), (None, [False, False])):
        indices, counts, mass = ops.top_p(nothing, 0.5, 3, given)
        assert indices.shape == (2, 0) and counts.tolist() == [0, 0]
        assert mass.isnan().tolist() == poisoned and mass[1] == 1
    assert [t.shape[0] for t in ops.top_p(nothing[:0], 0.5)] == [0, 0, 0]


@pytest.mark.parametrize(("rows", "exact"), [(1, False), (5, False), (40, False), (3, True)])
def test_long_rows_equal_a_sort(rows, exact, cuda_device):
    scores = torch.randn(rows, 1_000_003, device=cuda_device) * 3
    indices, counts, mass = ops.top_p(scores, 0.6, 100, exact=exact)
    share, order = scores.double().softmax(1).sort(dim=1, descending=True, stable=True)
    reached = share.cumsum(1)
    fewest = (reached < 0.6).sum(1) + 1
    most = fewest + 1 if exact else fewest + fewest // 4 + 32
    assert ((counts >= fewest - 1) & (counts <= most)).all()
    for row in range(rows):
        count = int(counts[row])
        assert torch.equal(indices[row, :count].long(), order[row, :count].sort().values)
        assert mass[row].item() == pytest.approx(reached[row, count - 1].item(), abs=1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("p", [0.3, 0.9])
def test_equal_weights_round_together(p, exact, cuda_device):
    scores = torch.full((1, 1_000_000), -2.9885, device=cuda_device)
    scores[0, 77] = 0
    indices, counts, mass = ops.top_p(scores, p, exact=exact)
    share = scores.double().softmax(1)[0, indices[0, : counts[0]].long()].sum().item()
    off = 2e-6 if exact else 2**-17  # one weight is 1e-6
    assert abs(share - p) < off
    assert mass.item() == pytest.approx(share, abs=off)


@pytest.mark.parametrize("n, more", [(8, 8), (32, 32), (33, 17), (1000, 500)])
def test_a_bin_of_few_members_is_added_without_exact(n, more, cuda_device):
    scores = torch.zeros(1, n, device=cuda_device)
    for exact, wanted in ((False, more), (True, -(-n // 2))):
        _, counts, mass = ops.top_p(scores, 0.5, exact=exact)
        assert counts.item() == wanted and mass.item() == pytest.approx(wanted / n)


@pytest.mark.usefixtures("memory_is_given_back")
def test_beyond_2_to_the_31_elements(cuda_device):
    rows, n = 2200, 1 << 20
    scores = torch.zeros(1, n, device=cuda_device, dtype=torch.float16).expand(rows, n)
    scores = scores.contiguous()
    scores[-1, 123_456] = 30
    indices, counts, _ = ops.top_p(scores, 0.5, exact=False)
    assert counts[-1] == 1 and indices[-1, 0] == 123_456
    assert counts[0] == n // 2 and indices[0, n // 2 - 1] == n // 2 - 1


@pytest.mark.parametrize("exact", [False, True])
def test_graph_capture_replays(exact, cuda_device):
    scores = torch.randn(4, 3000, device=cuda_device)
    ops.top_p(scores, 0.9, exact=exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.top_p(scores, 0.9, exact=exact)
    scores.copy_(torch.randn(4, 3000, device=cuda_device) * 5)
    graph.replay()
    for a, b in zip(captured, ops.top_p(scores, 0.9, exact=exact), strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused(cuda_device):
    with pytest.raises(TypeError, match="on CUDA must be float32"):
        ops.top_p(torch.zeros(1, 3, device=cuda_device, dtype=torch.float64), 0.5)


def test_forced_lse_on_another_device_is_refused(cuda_device):
    with pytest.raises(ValueError, match="forced_lse must be on the device of scores"):
        ops.top_p(torch.zeros(1, 3, device=cuda_device), 0.5, 0, torch.zeros(1))

"""attention and its gradients against the float64 reference."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from rtpurbo import ops
from tests import reference
from tests.ops.attention_cases import TOLERANCE, assert_near, attention_arguments, draw


@pytest.mark.parametrize("headwise", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(16))
def test_matches_reference(seed: int, dtype: torch.dtype, headwise: bool) -> None:
    positional, keywords = attention_arguments(draw(seed, dtype), headwise)
    out, lse = ops.attention(*positional, **keywords)
    assert_near((out, lse), reference.attention(*positional, **keywords))
    assert out.transpose(1, 2).is_contiguous()


def gradients(function, positional: tuple, keywords: dict, grad_out: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in positional[:3]]
    out, _ = function(*leaves, *positional[3:], **keywords)
    return torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(16))
def test_gradients_match_reference(seed: int, dtype: torch.dtype) -> None:
    case = draw(seed, dtype)
    positional, keywords = attention_arguments(case, headwise=False)
    grad_out = case.tensor(case.heads, case.rows)
    actual = gradients(ops.attention, positional, keywords, grad_out)
    exact = tuple(tensor.double() for tensor in positional[:3])
    expected = gradients(reference.attention, exact + positional[3:], keywords, grad_out)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype and ours.isfinite().all()
        error = (ours.double() - theirs).abs().max()
        assert error <= 1.5 * TOLERANCE[dtype] * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("listed", [False, True])
def test_gradcheck(listed: bool) -> None:
    lists: dict = {}
    if listed:
        indices = torch.tensor([[0, 2], [1, 3], [0, -1]], dtype=torch.int32).expand(2, 2, 3, 2)
        counts = torch.tensor([2, 2, -1], dtype=torch.int32).expand(2, 2, 3)
        lists = {"block_indices": indices, "block_counts": counts, "tile": 4, "block_size": 4}
    start = torch.tensor([0, 3])

    def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, [1, 4], 3, 2, 0.4, start, **lists)[0]

    shapes = ((2, 6, 11, 8), (2, 2, 14, 8), (2, 2, 14, 8))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.autograd.gradcheck(out, inputs)


def test_lse_is_not_differentiable_and_local_keys_are_forward_only() -> None:
    q, k = torch.randn(1, 2, 5, 16, requires_grad=True), torch.randn(1, 1, 5, 16)
    _, lse = ops.attention(q, k, k, [0], 3, 2, 0.25)
    assert not lse.requires_grad
    empty = k[:, :0]
    out, _ = ops.attention(q, k, k, [0], 3, 2, 0.25, k_local=empty, v_local=empty)
    with pytest.raises(NotImplementedError, match="k_local is forward only"):
        out.sum().backward()


def test_bits_do_not_depend_on_threads() -> None:
    q, k, v = torch.randn(1, 6, 700, 64), torch.randn(1, 2, 700, 64), torch.randn(1, 2, 700, 64)

    def results() -> tuple[Tensor, ...]:
        out, lse = ops.attention(q, k, v, [1, 4], 100, 4, 0.125)
        grads = gradients(ops.attention, (q, k, v, [1, 4], 100, 4, 0.125), {}, out)
        return (out, lse, *grads)

    first = results()
    torch.set_num_threads(2)
    for _ in range(20):
        assert all(map(torch.equal, results(), first))
    torch.set_num_threads(1)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_poison_reaches_only_the_rows_that_see_it(dtype: torch.dtype, poison: float) -> None:
    q, k, v = (torch.randn(1, heads, 400, 64).to(dtype) for heads in (4, 2, 2))
    k[0, 0, 150, 7] = v[0, 1, 151, 9] = poison
    arguments = (q, k, v, [1, 3], 60, 4, 0.125)
    out, lse = ops.attention(*arguments)
    expected_out, expected_lse = reference.attention(*arguments)
    assert out.isnan().equal(expected_out.isnan()) and out.isinf().equal(expected_out.isinf())
    assert lse.isnan().equal(expected_lse.isnan() | expected_lse.isposinf())


def test_unlisted_and_padded_keys_are_never_read() -> None:
    q, k, v = torch.randn(1, 2, 256, 64), torch.randn(1, 1, 512, 64), torch.randn(1, 1, 512, 64)
    k[:, :, 64:200] = v[:, :, :33] = torch.nan
    start = torch.tensor([33])
    indices = torch.tensor([0, 4, 5, 6, 7], dtype=torch.int32).expand(1, 2, 2, 5)
    counts = torch.full((1, 2, 2), 5, dtype=torch.int32)
    out, _ = ops.attention(
        q, k, v, [0, 1], 60, 4, 0.125, start, block_indices=indices, block_counts=counts
    )
    assert out.isfinite().all()


MEMORY_PROBE = """
import resource, torch
from rtpurbo import ops
q = torch.randn(1, 1, 30_000, 16, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, _ = ops.attention(q, q, q, [0], 32, 4, 0.25)
out.backward(out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear_in_length() -> None:
    """The logits of 30,000 rows would take 3.6 GB."""
    run = [sys.executable, "-c", MEMORY_PROBE]
    kilobytes = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert kilobytes < 200_000


def test_offsets_beyond_two_to_the_31() -> None:
    storage = torch.empty(2**31 + 64 * 40, dtype=torch.bfloat16)
    k = storage.as_strided((1, 2, 40, 64), (0, 2**31, 64, 1))
    k.copy_(torch.randn(1, 2, 40, 64))
    q = torch.randn(1, 2, 40, 64).bfloat16()
    for function in (
        ops.attention,
        lambda q, *rest: ops.decode(q[:, :, -1:], *rest[:4], 9, *rest[4:]),
    ):
        far = function(q, k, k, [1], 9, 4, 0.125)
        packed = function(q, k.contiguous(), k.contiguous(), [1], 9, 4, 0.125)
        assert far[0].equal(packed[0]) and far[1].equal(packed[1])


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 3, 5), (1, 0, 5), (1, 0, 0)])
def test_empty(batch: int, rows: int, keys: int) -> None:
    q = torch.randn(batch, 2, rows, 16, requires_grad=True)
    k = torch.randn(batch, 1, keys, 16, requires_grad=True)
    out, lse = ops.attention(q, k, k, [0], 3, 1, 0.25)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    out.sum().backward()
    assert k.grad is not None and not k.grad.any()


def test_errors_name_the_argument() -> None:
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    wrong = {
        "q must have a head dim D that is a multiple of 8, got 12": (q[..., :12], k[..., :12]),
        r"k must have shape \[B, heads, N, D\] = \[1, \*, \*, 16\]": (q, k[..., :8]),
        "positive multiple of the 3 KV heads, got Hq = 4": (q, torch.randn(1, 3, 8, 16)),
        "k must hold at least the keys of the M = 8 query rows, got N = 7": (q, k[:, :, :7]),
        "k must be contiguous in its last dimension": (q, torch.randn(1, 2, 16, 8).mT),
    }
    for message, (query, key) in wrong.items():
        with pytest.raises(ValueError, match=message):
            ops.attention(query, key, key, [0], 4, 1, 0.25)
    with pytest.raises(TypeError, match="v must have dtype Float, got Double"):
        ops.attention(q, k, k.double(), [0], 4, 1, 0.25)
    with pytest.raises(ValueError, match=r"ascending head numbers in \[0, 4\), got \[2, 1\]"):
        ops.attention(q, k, k, [2, 1], 4, 1, 0.25)
    with pytest.raises(ValueError, match="window must be >= 1, got 0"):
        ops.attention(q, k, k, [0], 0, 1, 0.25)
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        ops.attention(q, k, k, [0], 4, 1, 0.0)
    with pytest.raises(ValueError, match="k must hold the 1 KV heads that have a retrieval head"):
        ops.attention(q, k, k, [0], 4, 1, 0.25, k_local=k, v_local=k)

"""index_kl against the float64 reference and autograd through it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests import reference


def inputs(seed: int, keys: int, group: int, shared: bool, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    heads = [0, group - 1, group] if group > 1 else [0, 1]
    owners = [head // group for head in heads]
    full = sorted(set(owners))
    count = len(full) if shared else len(heads)
    return {
        "q": randn(2, 2 * group, 7, 16).to(dtype),
        "k": randn(2, 2, keys, 16).to(dtype),
        "q_index": randn(2, len(heads), 7, 8),
        "k_index": randn(2, count, keys, 8),
        "rows": torch.randint(0, keys, (2, 7), generator=generator),
        "retrieval_heads": heads,
        "index_map": [full.index(o) for o in owners] if shared else [*range(len(heads))],
        "offset": randn(len(heads)),
    }


@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(1, 600),
    group=st.sampled_from([1, 2, 3, 5]),
    window=st.integers(1, 80),
    sinks=st.integers(0, 5),
    beyond=st.booleans(),
    shared=st.booleans(),
    padded=st.booleans(),
)
def test_loss_and_gradients_equal_the_reference(
    seed, keys, group, window, sinks, beyond, shared, padded
):
    if group == 1:
        shared = False
    case = inputs(seed, keys, group, shared, torch.float32)
    start = torch.tensor([0, keys // 2]) if padded else None
    options = (window, sinks, 0.25, beyond, start)
    found = ops.index_kl(*case.values(), *options)
    wanted = reference.index_kl(*case.values(), *options)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("beyond", [True, False])
def test_gradcheck(beyond):
    case = inputs(3, 40, 3, True, torch.float64)
    leaves = [case[n].double().requires_grad_() for n in ("q_index", "k_index", "offset")]

    def loss(q_index: torch.Tensor, k_index: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        parts = case | {"q_index": q_index, "k_index": k_index, "offset": offset}
        return ops.index_kl(*parts.values(), 9, 2, 0.25, beyond)[0]

    assert torch.autograd.gradcheck(loss, leaves)


def test_an_index_that_equals_the_attention_has_no_loss():
    case = inputs(5, 50, 1, False, torch.float32)
    case["q_index"] = case["q"].clone() * 4
    case["k_index"] = case["k"].clone() * 0.25
    case["offset"] = torch.zeros(2)
    kl, rows, *gradients = ops.index_kl(*case.values(), 9, 2, 0.25, False)
    assert kl.abs().max() < 1e-5 and rows.abs().max() < 1e-5
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_low_precision_inputs():
    case = inputs(7, 300, 3, False, torch.bfloat16)
    found = ops.index_kl(*case.values(), 20, 4, 0.25, True)
    wanted = reference.index_kl(*case.values(), 20, 4, 0.25, True)
    assert torch.allclose(found[0].double(), wanted[0].double(), rtol=1e-2, atol=1e-3)


def test_opcheck():
    case = inputs(1, 30, 3, True, torch.float32)
    for name in ("q_index", "k_index", "offset"):
        case[name].requires_grad_()
    torch.library.opcheck(
        torch.ops.rtpurbo.index_kl.default, (*case.values(), 9, 2, 0.25, True, None)
    )

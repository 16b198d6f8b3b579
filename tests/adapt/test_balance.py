"""The basis of an index: scores stay, and few bits a key cost them less."""

import pytest
import torch
from torch import Tensor

from rtpurbo import ops
from rtpurbo.adapt import train_index
from rtpurbo.adapt.balance import Balance, balancing, key_moments
from rtpurbo.patching import observe, state
from tests.adapt import tiny
from tests.reference.quantize_index import dequantize


def moments(seed: int, dim: int, spread: float) -> Tensor:
    """A random positive matrix whose eigenvalues span e^spread."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    values = (torch.rand(dim, generator=generator, dtype=torch.float64) * spread).exp()
    return turn * values @ turn.T


def cost(of_queries: Tensor, of_keys: Tensor) -> Tensor:
    return of_queries.diagonal() @ of_keys.diagonal()


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 16, 20])
@pytest.mark.parametrize("seed", range(5))
def test_scores_stay_and_the_cost_is_near_the_least(dim: int, seed: int) -> None:
    queries, keys = moments(seed, dim, 6.0), moments(seed + 100, dim, 6.0)
    to_queries, to_keys = balancing(queries, keys)
    torch.testing.assert_close(to_queries.T @ to_keys, torch.eye(dim, dtype=torch.float64))
    after = to_queries @ queries @ to_queries.T, to_keys @ keys @ to_keys.T
    torch.testing.assert_close(*after)
    least = torch.linalg.eigvals(queries @ keys).real.sqrt().sum() ** 2 / dim
    assert least * (1 - 1e-9) <= cost(*after) <= 1.5 * least
    for other in range(20):
        any_basis = moments(other, dim, 3.0)
        away = torch.linalg.inv(any_basis)
        moved = away.T @ queries @ away, any_basis @ keys @ any_basis.T
        assert least <= cost(*moved) * (1 + 1e-9)


def show(model, observer) -> None:
    """The last of the sequences, the one that `train_index` holds out, layer by layer."""
    with observe(model, lambda context, q, k, start: observer(context, q, k)):
        model(torch.tensor([tiny.sequences()[-1]]))


@torch.no_grad()
def scores(model, number: int, bits: int) -> Tensor:
    """Of a layer, in float64."""
    found: list[Tensor] = []
    layer = state(model).index.layers[number]

    def look(context, q, k) -> None:
        if context.number == number:
            q_index, k_index = ops.index_project(
                context.q_pre, context.k_pre, layer.w_q, layer.w_k, layer.heads, layer.kv_heads
            )
            keys = k_index[:, :, : k_index.shape[2] // 64 * 64]
            if bits < 16:
                keys = dequantize(*ops.quantize_index(keys, bits))
            found.append(q_index.double() @ keys.double()[:, layer.index_map].mT)

    show(model, look)
    return found[0]


@pytest.mark.parametrize("options", [{}, {"share_index_keys": True}, {"index_dim": 12}])
def test_an_index_keeps_its_scores_and_errs_less(options) -> None:
    model = tiny.model(**options)
    index = state(model).index
    stretch = torch.logspace(-1, 1, state(model).config.index_dim)
    for layer in index.layers.values():
        layer.w_k *= stretch[:, None]
        layer.w_q /= stretch[:, None].flip(0)
    numbers = list(index.layers)
    before = {n: [scores(model, n, bits) for bits in (16, 4)] for n in numbers}
    balance = Balance(index)
    show(model, balance.observe)
    balance.store()
    for n in numbers:
        exact, coarse = (scores(model, n, bits) for bits in (16, 4))
        torch.testing.assert_close(exact, before[n][0], rtol=1e-3, atol=1e-3 * float(exact.std()))
        error = (coarse - exact).square().mean()
        assert error < 0.9 * (before[n][1] - before[n][0]).square().mean()


@pytest.mark.parametrize("options", [{"index_dim": 48}, {"index_dim": 1}])
def test_dimensions_without_keys_do_no_harm(options) -> None:
    model = tiny.model(**options)
    for layer in state(model).index.layers.values():
        layer.w_k[0] = 0.0
    before = scores(model, 1, 16)
    balance = Balance(state(model).index)
    show(model, balance.observe)
    balance.store()
    after = scores(model, 1, 16)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.std()))


def test_a_trained_index_is_balanced() -> None:
    model = tiny.model()
    train_index(model, tiny.sequences(), steps=2, rows=32, progress=False)
    balance = Balance(state(model).index)
    show(model, balance.observe)
    for of_queries, of_keys in balance._sums.values():
        near = 0.01 * of_keys.amax().item()
        torch.testing.assert_close(of_queries, of_keys, rtol=0.01, atol=near)


def stored_error(queries: Tensor, keys: Tensor, bits: int, exact: Tensor) -> float:
    """Of scores whose keys [N, r] are float16, and then of fewer bits."""
    held = keys.half()
    if bits < 16:
        held = dequantize(*ops.quantize_index(held[None, None], bits))[0, 0]
    return float((queries.double() @ held.double().T - exact).square().mean())


@pytest.mark.parametrize(
    "mean, spread, most", [(0.0, 1.0, 1.2), (50.0, 0.1, 1.2), (50.0, 0.01, 1.2), (200.0, 0.01, 2.0)]
)
def test_keys_with_a_large_mean_are_not_blown_up(mean: float, spread: float, most: float) -> None:
    """As where a projection has a bias: what float16 rounds would outweigh what bits round, and
    turned, it is rounded in every dimension."""
    queries, keys = torch.randn(256, 16), torch.randn(2048, 16)
    keys[:, 3] = mean + spread * keys[:, 3]
    exact = queries.double() @ keys.double().T
    of_queries = queries.double().T @ queries.double() / 256
    to_queries, to_keys = balancing(of_queries, key_moments(keys[None])[0])
    moved = (queries.double() @ to_queries.T).float(), (keys.double() @ to_keys.T).float()
    fine, coarse = (stored_error(queries, keys, bits, exact) for bits in (8, 4))
    assert stored_error(*moved, 16, exact) < fine
    assert stored_error(*moved, 8, exact) < most * fine
    assert stored_error(*moved, 4, exact) < most * coarse


def test_what_a_block_shares_hardly_counts() -> None:
    keys = torch.randn(2, 640, 8)
    shift = 3 * torch.randn(2, 10, 8).repeat_interleave(64, 1)
    alone, shifted = key_moments(keys), key_moments(keys + shift)
    torch.testing.assert_close(shifted, alone, rtol=0, atol=0.05)
    torch.testing.assert_close(key_moments(keys[:, :63]), torch.zeros(2, 8, 8).double())


def test_an_index_of_nan_stays() -> None:
    model = tiny.model()
    index = state(model).index
    layer = index.layers[1]
    layer.w_k[0] = torch.nan
    w_q = layer.w_q.clone()
    balance = Balance(index)
    show(model, balance.observe)
    balance.store()
    readers = [entry for entry, key in enumerate(layer.index_map) if key == 0]
    assert torch.equal(layer.w_q[readers], w_q[readers])
    assert layer.w_k[0].isnan().all() and layer.w_k[1:].isfinite().all()

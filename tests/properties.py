"""What the property tests of the operators share: random cases and the rules they are judged by."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.lists import lists_where
from tests.reference.masks import last_positions, near, visible
from tests.reference.softmax import log_sum_exp

ROUNDING = 2e-5  # of a share of the mass, or of a logit near 1
BIN = math.log(2) / 32  # logits that share a bin of weights
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Layer:
    """Sizes of one attention layer, and where its sequences begin."""

    batch: int
    kv_heads: int
    group: int
    dim: int
    rows: int
    keys: int
    window: int
    sinks: int
    start: tuple[int, ...] | None
    retrieval_heads: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = self.generator()

        def draw(heads: int, length: int) -> Tensor:
            shape = (self.batch, length, heads, self.dim)
            return torch.randn(shape, generator=generator).to(self.dtype).transpose(1, 2)

        return (
            draw(self.heads, self.rows),
            draw(self.kv_heads, self.keys),
            draw(self.kv_heads, self.keys),
        )

    def mask(self) -> dict[str, Any]:
        """Window, sinks, scale and start, as most operators take them."""
        return dict(
            window=self.window,
            sinks=self.sinks,
            scale=self.dim**-0.5,
            start=None if self.start is None else torch.tensor(self.start),
        )


@st.composite
def layers(
    draw: st.DrawFn, *, max_rows: int = 300, max_keys: int = 600, dtypes: list[torch.dtype] = DTYPES
) -> Layer:
    """Odd sizes on both sides of the kernels' tiles; a sequence may hold nothing but padding."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]))
    rows = draw(st.integers(1, max_rows) | st.just(1))
    keys = draw(st.integers(rows, max_keys) | st.just(rows))
    heads = range(kv_heads * group)
    return Layer(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        dim=draw(st.sampled_from([8, 16, 24, 64, 72, 128, 256])),
        rows=rows,
        keys=keys,
        window=draw(st.integers(1, 40) | st.integers(1, max_keys)),
        sinks=draw(st.integers(0, 5) | st.just(max_keys)),
        start=draw(st.none() | st.tuples(*[st.integers(0, keys)] * batch)),
        retrieval_heads=tuple(sorted(draw(st.sets(st.sampled_from(heads))))),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 10_000)),
    )


def assert_within_twice_the_error(
    got: Tensor, exact: Tensor, low: Tensor, dtype: torch.dtype, floor: float = 1e-6
) -> None:
    """FlashAttention's rule: at most twice the error of the same computation in low precision.

    A rounding of numbers near the inputs' size comes on top, since low may be exactly right, and
    `floor`, which is for gradients that cancel to 0.
    """
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got.isinf(), exact.isinf())
    finite = exact.isfinite()
    if not finite.any():
        return
    exact = exact[finite]
    error = (got.double()[finite] - exact).abs().max()
    low_error = (low.double()[finite] - exact).nan_to_num(0.0).abs().max()
    rounding = torch.finfo(dtype).eps * (2 * exact.abs().max() + 0.5) + floor
    assert error <= 2 * low_error + rounding, f"{error:.2e} > 2 * {low_error:.2e} + {rounding:.2e}"


def random_lists(generator: torch.Generator, *shape: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Ascending block lists [*shape, blocks] and counts; some are empty, some -1 (dense)."""
    share = torch.rand(*shape, 1, generator=generator) * 1.2 - 0.1
    picked = torch.rand(*shape, blocks, generator=generator) < share
    dense = torch.rand(*shape, generator=generator) < 0.1
    indices, counts = lists_where(picked)
    return indices, torch.where(dense, -1, counts)


def starts(keys: int) -> st.SearchStrategy[int]:
    """First real keys, also where no key is real and 32 bits do not hold them."""
    return st.integers(0, keys) | st.sampled_from([2**31, 2**32 + 1])


@st.composite
def selections(draw: st.DrawFn, max_rows: int = 6, max_keys: int = 300) -> dict:
    """Arguments of select or select_tiles, without p and floors."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    batch, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    index_map = sorted(draw(st.lists(st.integers(0, shared - 1), min_size=1, max_size=5)))
    rows = draw(st.integers(1, max_rows))
    keys = draw(st.integers(rows, max_keys))
    dim = draw(st.sampled_from([4, 8, 16, 32]))
    spread = draw(st.sampled_from([0.3, 1.0, 3.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    q_index = torch.randn(batch, len(index_map), rows, dim, generator=generator) * spread
    k_index = torch.randn(batch, shared, keys, dim, generator=generator)
    if dim in (4, 16) and draw(st.booleans()):  # r^-0.5 is exact, and so are ties
        q_index, k_index = q_index.round(), k_index.round()
    arguments = dict(
        q_index=q_index.to(dtype),
        k_index=k_index.to(dtype),
        index_map=index_map,
        window=draw(st.integers(1, 20) | st.integers(1, max_keys)),
        sinks=draw(st.integers(0, 5)),
        start=draw(st.none() | st.tuples(*[starts(keys)] * batch).map(torch.tensor)),
        offset=torch.randn(len(index_map), generator=generator) if draw(st.booleans()) else None,
    )
    if draw(st.booleans()):
        near_lse = torch.randn(batch, len(index_map), rows, generator=generator) * 3
        arguments["near_lse"] = near_lse + math.log(keys)
    return arguments


def seen_near_and_forced(arguments: dict, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a selection's rows: keys that they see, those that are near, [B, M, N], and the near mass.

    The mass is [B, R, M] in log; logits are those of the index, [B, R, M, N].
    """
    batch, _, rows, keys = logits.shape
    positions, start = last_positions(rows, keys, batch), arguments["start"]
    seen = visible(positions, keys, start)
    close = near(positions, keys, start, arguments["window"], arguments["sinks"])
    forced = arguments.get("near_lse")
    if forced is None:
        forced = log_sum_exp(logits, close[:, None].expand_as(logits))
    return seen, close, forced


def check_set(
    scores: Tensor,
    forced: float,
    p: float,
    floor: int,
    chosen: list[int],
    mass: float,
    left_out: float = -math.inf,
    exact: bool = True,
) -> None:
    """Judges one top-p set on its own, so that rounding may move a member that decides nothing.

    scores are float64 [N], -inf for what cannot be selected; left_out is the log-mass of others
    that cannot, but count. Without `exact` the rest of a bin of weights may be in, too.
    """
    candidates = [n for n, score in enumerate(scores.tolist()) if score > -math.inf]
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(candidates)
    if not candidates and forced == -math.inf:
        assert mass == 1
        return
    weights = torch.cat([scores, scores.new_tensor([forced, left_out])]).softmax(0)
    share = weights[chosen].sum().item() + weights[-2].item()
    assert abs(mass - share) < ROUNDING
    assert share >= p - ROUNDING or (left_out > -math.inf and chosen == candidates)
    assert len(chosen) >= min(floor, len(candidates))
    if p == 1:
        assert chosen == candidates
        return
    left = [n for n in candidates if n not in set(chosen)]
    if not chosen:
        return
    last = min(chosen, key=lambda n: (scores[n].item(), -n))
    slack = ROUNDING * max(1.0, scores[last].abs().item())
    above = [n for n in chosen if n != last and (exact or scores[n] > scores[last] + BIN + slack)]
    if len(above) >= floor:
        assert weights[above].sum().item() + weights[-2].item() < p + ROUNDING
    if left:
        assert max(scores[left]) <= scores[last] + slack
        ties = [n for n in left if scores[n] == scores[last]]
        assert not ties or min(ties) > last

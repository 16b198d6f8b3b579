"""select with refine over random odd shapes: are the sets those of the rule, and little read?"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests.properties import ROUNDING, check_set, seen_near_and_forced, selections
from tests.reference.quantize_index import BLOCK, all_keys
from tests.reference.select import index_logits, scored_again

LEAST = 1e-300  # a share that any mass reaches: the floor alone decides
SHARE = st.floats(0.01, 0.999)


@st.composite
def refined(draw: st.DrawFn, max_rows: int = 3, least_blocks: int = 0) -> dict:
    """Arguments of select with refine, without p and floor.

    Codes are those of the keys, or of keys that lie beside them: what is best may change then.
    """
    arguments = draw(selections(max_rows=max_rows))
    blocks, bits = draw(st.integers(least_blocks, 6)), draw(st.sampled_from([4, 8]))
    generator = torch.Generator().manual_seed(blocks)
    tail = arguments["k_index"]
    batch, heads, _, dim = tail.shape
    far = torch.randn(batch, heads, blocks * BLOCK, dim, generator=generator).to(tail.dtype)
    beside = torch.randn(far.shape, generator=generator) * draw(st.sampled_from([0, 0, 0.3, 2]))
    codes, ranges = ops.quantize_index((far + beside).to(tail.dtype), bits)
    if draw(st.integers(0, 9)) == 0:
        arguments["q_index"] = torch.zeros_like(arguments["q_index"])
    start = arguments["start"]
    if start is not None:
        start = (start * (1 + blocks * BLOCK / tail.shape[2])).long()
    keys = dict(k_index=torch.cat([far, tail], 2), codes=codes, ranges=ranges, refine=True)
    return arguments | keys | dict(start=start)


def by_codes(arguments: dict) -> dict:
    """The same selection without refine."""
    coded = arguments["codes"].shape[2]
    return arguments | dict(k_index=arguments["k_index"][:, :, coded:], refine=False)


def counts_that_reach(scores: torch.Tensor, forced: float, p: float, floor: int) -> tuple[int, int]:
    """Fewest and most members of the smallest set, as rounding has it."""
    order = scores[scores > -math.inf].sort(descending=True).values
    mass = torch.cat([scores.new_tensor([forced]), order])
    share = (mass.logcumsumexp(0) - mass.logsumexp(0)).exp()
    fewest, most = (int((share < p + slack).sum()) for slack in (-ROUNDING, ROUNDING))
    floor = min(floor, len(order))
    return max(fewest, floor), min(max(most, floor), len(order))


@given(arguments=refined(), p=SHARE, min_tokens=st.integers(0, 70), limit=st.booleans())
def test_sets_are_those_of_the_rule(arguments, p, min_tokens, limit):
    keys = arguments["k_index"].shape[2]
    capacity = max(1, keys // 3) if limit else 0
    more = dict(p=p, min_tokens=min_tokens)
    indices, counts, mass = ops.select(**arguments, **more)
    limited = ops.select(**arguments, **more, capacity=capacity)
    assert torch.equal(limited[1], counts.masked_fill(counts > (capacity or keys), -1))
    coded = by_codes(arguments)
    keys_by_codes = all_keys(coded["k_index"], coded["codes"], coded["ranges"])
    logits, exact = (
        index_logits(arguments["q_index"], k, arguments["index_map"], arguments["offset"])
        for k in (keys_by_codes, arguments["k_index"])
    )
    batch, heads, rows, _ = logits.shape
    seen, close, forced = seen_near_and_forced(arguments, logits)
    for b, j, row in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        count, share = int(counts[b, j, row]), float(mass[b, j, row])
        chosen = indices[b, j, row, :count].tolist()
        assert (indices[b, j, row, count:] == -1).all()
        far = seen[b, row] & ~close[b, row]
        scores = logits[b, j, row].masked_fill(~far, -torch.inf)
        outside = float(forced[b, j, row])
        if not far.any():
            assert count == 0 and abs(share - 1) < ROUNDING
            continue
        problems = []
        fewest, most = counts_that_reach(scores, outside, p, min_tokens)
        for wanted in range(fewest, most + 1):
            again, left_out = scored_again(scores, exact[b, j, row], wanted)
            try:
                check_set(again, outside, p, min_tokens, chosen, share, left_out)
                break
            except AssertionError as problem:
                problems.append(problem)
        else:
            raise problems[-1]


@given(arguments=refined(), p=SHARE, min_tokens=st.integers(0, 20))
def test_only_twice_the_members_are_read_in_16_bits(arguments, p, min_tokens):
    expected = ops.select(**arguments, p=p, min_tokens=min_tokens)
    coded = by_codes(arguments)
    first = ops.select(**coded, p=p, min_tokens=min_tokens)[1]
    read = torch.zeros(arguments["k_index"].shape[:3], dtype=torch.bool)
    for b, j, row in torch.cartesian_prod(*map(torch.arange, first.shape)).tolist():
        floor = 2 * int(first[b, j, row])
        best, counts, _ = ops.select(**coded, p=LEAST, min_tokens=floor)
        listed = best[b, j, row, : counts[b, j, row]].long() if floor else []
        read[b, arguments["index_map"][j], listed] = True
    read[:, :, arguments["codes"].shape[2] :] = True
    arguments["k_index"] = arguments["k_index"].masked_fill(~read[..., None], torch.nan)
    for got, want in zip(
        ops.select(**arguments, p=p, min_tokens=min_tokens), expected, strict=True
    ):
        assert torch.equal(got, want)


@given(arguments=refined(), min_tokens=st.integers(0, 20))
def test_nothing_is_refined_where_all_is_selected(arguments, min_tokens):
    more = dict(p=1.0, min_tokens=min_tokens)
    results = ops.select(**arguments, **more), ops.select(**by_codes(arguments), **more)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@given(
    arguments=refined(max_rows=1, least_blocks=1), p=SHARE,
    where=st.sampled_from(["q_index", "ranges", "near_lse", "k_index"]),
)  # fmt: skip
def test_a_nan_selects_every_far_key(arguments, p, where):
    arguments |= dict(window=1, sinks=1, start=None)
    keys, coded = arguments["k_index"].shape[2], arguments["codes"].shape[2]
    if where == "near_lse":
        arguments[where] = torch.full(arguments["q_index"].shape[:3], torch.nan)
    elif where == "k_index":
        if keys - coded < 3:
            return
        arguments[where][:, :, coded + 1, 0] = torch.nan
    else:
        arguments[where][:, :, 0, 0] = torch.nan
    _, counts, mass = ops.select(**arguments, p=p, min_tokens=0)
    assert (counts == keys - 2).all() and mass.isnan().all()


@given(arguments=refined(max_rows=1), p=SHARE)
def test_keys_without_codes_are_selected_as_ever(arguments, p):
    coded = arguments["codes"].shape[2]
    arguments = by_codes(arguments) | dict(start=None)
    plain = arguments | dict(codes=None, ranges=None)
    empty = {name: arguments[name][:, :, :0] for name in ("codes", "ranges")}
    refined = arguments | empty | dict(refine=True)
    assert refined["k_index"].shape[2] == plain["k_index"].shape[2] and coded % BLOCK == 0
    results = [ops.select(**case, p=p, min_tokens=5) for case in (refined, plain)]
    rows = [list(zip(*(x.flatten(0, 2) for x in result), strict=True)) for result in results]
    for one, other in zip(*rows, strict=True):
        (fewer, least), (more, most) = sorted(
            ((set(indices[:count].tolist()), float(mass)) for indices, count, mass in (one, other)),
            key=lambda member_mass: len(member_mass[0]),
        )
        assert fewer <= more
        if fewer == more:
            assert most == pytest.approx(least, abs=ROUNDING)
        else:  # a set whose mass is p
            assert least == pytest.approx(p, abs=ROUNDING)
            assert len(more) == len(fewer) + 1 or most == pytest.approx(least, abs=ROUNDING)


def realistic(bits: int, keys: int = 4096, coded: int = 3584) -> tuple[dict, dict]:
    """A row with refine, and the same with all keys in 16 bits."""
    q_index = torch.randn(2, 3, 1, 16) * 2
    k_index = torch.randn(2, 3, keys, 16).half()
    codes, ranges = ops.quantize_index(k_index[:, :, :coded].contiguous(), bits)
    plain = dict(
        q_index=q_index.half(), k_index=k_index, index_map=[0, 1, 2], p=0.9, window=100, sinks=4,
        min_tokens=32, near_lse=torch.full((2, 3, 1), 6.0),
    )  # fmt: skip
    return plain | dict(codes=codes, ranges=ranges, refine=True), plain


@pytest.mark.parametrize("bits", [4, 8])
def test_the_selection_is_nearly_that_of_16_bits(bits):
    arguments, plain = realistic(bits)
    lists = {
        name: ops.select(**case)
        for name, case in
        {"refined": arguments, "exact": plain, "codes": by_codes(arguments)}.items()
    }  # fmt: skip
    for b, j in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        sets = {n: set(i[b, j, 0, : c[b, j, 0]].tolist()) for n, (i, c, _) in lists.items()}
        assert len(sets["refined"] ^ sets["exact"]) <= 0.01 * len(sets["exact"])
        if bits == 4:
            assert len(sets["codes"] ^ sets["exact"]) > 3 * len(sets["refined"] ^ sets["exact"])


def test_all_that_are_scored_again_are_taken_where_they_do_not_reach_p():
    keys = torch.full((1, 1, 128, 1), -4.0)
    keys[0, 0, 10:14] = 4.0
    codes, ranges = ops.quantize_index(keys, 8)
    arguments = dict(
        q_index=torch.ones(1, 1, 1, 1), index_map=[0], p=0.9, window=1, sinks=0, min_tokens=0,
        near_lse=torch.full((1, 1, 1), -9.0), codes=codes, ranges=ranges, refine=True,
    )  # fmt: skip
    tail = torch.zeros(1, 1, 1, 1)
    indices, counts, mass = ops.select(k_index=torch.cat([keys, tail], 2), **arguments)
    assert indices[0, 0, 0, :4].tolist() == [10, 11, 12, 13] and counts.item() == 4
    assert mass.item() > 0.95
    keys[:] = -4.0
    indices, counts, mass = ops.select(k_index=torch.cat([keys, tail], 2), **arguments)
    assert indices[0, 0, 0, : counts.item()].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert mass.item() == pytest.approx(8 / (8 + 120), abs=1e-3)


@given(seed=st.integers(0, 10_000), coded=st.integers(1, 7), floor=st.integers(260, 500))
def test_equal_keys_tie_whether_they_had_codes_or_not(seed, coded, floor):
    """A model's first layer sees equal keys wherever a token repeats; all are scored again here."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(0, 6, (520,), generator=generator)
    k_index = torch.randn(6, 16, generator=generator).half()[token][None, None]
    codes, ranges = ops.quantize_index(k_index[:, :, : coded * BLOCK], 8)
    q_index = torch.randn(1, 1, 1, 16, generator=generator).half()
    indices, counts, _ = ops.select(
        q_index, k_index, [0], 1e-9, 1, 0, floor, near_lse=torch.zeros(1, 1, 1),
        codes=codes, ranges=ranges, refine=True,
    )  # fmt: skip
    assert counts.item() == floor
    chosen = torch.zeros(len(token), dtype=torch.bool)
    chosen[indices[0, 0, 0, :floor].long()] = True
    for one in range(6):
        own = chosen[:-1][token[:-1] == one]
        assert own[: own.sum()].all()

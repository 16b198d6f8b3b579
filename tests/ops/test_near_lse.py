"""near_lse against its float64 reference."""

import pytest
import torch

from rtpurbo import ops
from tests import reference
from tests.ops.attention_cases import TOLERANCE, draw


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(16))
def test_matches_reference(seed: int, dtype: torch.dtype) -> None:
    case = draw(seed, dtype)
    count = case.rng.randint(0, 40)
    arguments = (
        case.tensor(case.heads, case.rows),
        case.tensor(case.kv_heads, case.keys),
        [case.rng.randrange(case.heads) for _ in range(count)],
        sorted(case.rng.randrange(case.kv_heads) for _ in range(count)),
        case.window,
        case.sinks,
        case.scale,
        case.start,
    )
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(
        ops.near_lse(*arguments).double(),
        reference.near_lse(*arguments),
        atol=tolerance,
        rtol=tolerance,
    )


def test_equals_the_lse_of_attention() -> None:
    q, k = torch.randn(2, 6, 300, 64), torch.randn(2, 3, 300, 64)
    _, lse = ops.attention(q, k, k, [], 50, 4, 0.125)
    near = ops.near_lse(q, k, range(6), [0, 0, 1, 1, 2, 2], 50, 4, 0.125)
    torch.testing.assert_close(near, lse)


def test_errors_name_the_argument() -> None:
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=r"k_heads must be head numbers in \[0, 2\), got \[2\]"):
        ops.near_lse(q, k, [0], [2], 4, 1, 0.25)
    with pytest.raises(ValueError, match="key head of each of the 2 q_heads, got 1"):
        ops.near_lse(q, k, [0, 1], [0], 4, 1, 0.25)

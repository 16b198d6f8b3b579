"""Random arguments for the attention operators: odd shapes, strides, padding, caches, lists."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@dataclass
class Case:
    """Arguments that attention and decode share, as drawn from `seed`."""

    rng: random.Random
    dtype: torch.dtype
    batch: int
    group: int
    kv_heads: int
    dim: int
    keys: int
    rows: int
    window: int
    sinks: int
    retrieval_heads: list[int]
    start: Tensor | None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def full_heads(self) -> int:
        return len({head // self.group for head in self.retrieval_heads})

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def tensor(self, heads: int, length: int) -> Tensor:
        """[B, heads, length, D], in one of the layouts that models bring."""
        shape = (self.batch, length, heads, self.dim)
        layout = self.rng.randrange(3)
        if layout == 0:
            return torch.randn(shape).to(self.dtype).transpose(1, 2)
        if layout == 1:
            return torch.randn(*shape[:3], self.dim + 5).to(self.dtype)[..., 3:-2].transpose(1, 2)
        return torch.randn(self.batch, heads, length, self.dim).to(self.dtype)

    def integers(self, limit: int) -> Tensor:
        """int64 [B] in [0, limit)."""
        return torch.tensor([self.rng.randrange(limit) for _ in range(self.batch)])

    def lists(self, *shape: int, blocks: int) -> tuple[Tensor, Tensor]:
        """Ascending random members [*shape, blocks], -1 padded, and counts from -1 on."""
        counts = torch.tensor(
            [self.rng.randint(-1, blocks) for _ in range(torch.Size(shape).numel())],
            dtype=torch.int32,
        )
        indices = torch.full((counts.numel(), blocks), -1, dtype=torch.int32)
        for row, count in enumerate(counts.tolist()):
            chosen = sorted(self.rng.sample(range(blocks), max(count, 0)))
            indices[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        return indices.view(*shape, blocks), counts.view(shape)


def draw(seed: int, dtype: torch.dtype, rows: int | None = None) -> Case:
    rng = random.Random(seed)
    group, kv_heads = rng.choice([1, 2, 3, 5, 8, 16]), rng.choice([1, 2, 3])
    batch, keys = rng.choice([1, 2, 3]), rng.choice([1, 3, 17, 130, 257, 515, 1100])
    heads = range(group * kv_heads)
    retrieval_heads = sorted(rng.sample(heads, rng.randint(0, min(len(heads), 6))))
    case = Case(
        rng=rng,
        dtype=dtype,
        batch=batch,
        group=group,
        kv_heads=kv_heads,
        dim=rng.choice([8, 24, 64, 72, 128]),
        keys=keys,
        rows=rows or rng.choice([1, keys, max(1, keys // 2), max(1, keys - 3)]),
        window=rng.choice([1, 5, 64, 100, 1000]),
        sinks=rng.choice([0, 1, 4, 40]),
        retrieval_heads=retrieval_heads,
        start=None,
    )
    if rng.random() < 0.5:
        case.start = case.integers(keys + 2)
    return case


def block_lists(case: Case) -> dict:
    tile, block_size = case.rng.choice([16, 100, 128, 300]), case.rng.choice([1, 16, 64])
    shape = (case.batch, len(case.retrieval_heads), -(-case.rows // tile))
    indices, counts = case.lists(*shape, blocks=-(-case.keys // block_size))
    return {
        "block_indices": indices,
        "block_counts": counts,
        "tile": tile,
        "block_size": block_size,
    }


def attention_arguments(case: Case, headwise: bool) -> tuple[tuple, dict]:
    """Positional and keyword arguments of attention; headwise: with a split cache."""
    keywords: dict = {"start": case.start}
    stored = case.kv_heads
    if headwise:
        stored = case.full_heads
        length = case.rows + case.rng.choice([0, 2, 70])
        keywords["k_local"] = case.tensor(case.kv_heads - stored, length)
        keywords["v_local"] = case.tensor(case.kv_heads - stored, length)
        keywords["start_local"] = case.rng.choice([None, case.integers(length)])
    if case.rng.random() < 0.4:
        keywords |= block_lists(case)
    positional = (
        case.tensor(case.heads, case.rows),
        case.tensor(stored, case.keys),
        case.tensor(stored, case.keys),
        case.retrieval_heads,
        case.window,
        case.sinks,
        case.scale,
    )
    return positional, keywords


def assert_near(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """out and lse agree to rounding, infinities and NaN in the same places."""
    tolerance = TOLERANCE[actual[0].dtype]
    torch.testing.assert_close(
        actual[0].double(), expected[0], atol=tolerance, rtol=tolerance, equal_nan=True
    )
    lse_tolerance = 1e-12 if actual[1].dtype == torch.float64 else 4e-6
    torch.testing.assert_close(
        actual[1].double(), expected[1], atol=lse_tolerance, rtol=lse_tolerance, equal_nan=True
    )

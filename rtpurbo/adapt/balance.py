"""The basis of an index in which few bits a key cost its scores little.

A score (w_q q)·(w_k k) is, but for rounding, the same with A^-T w_q and A w_k, for any invertible
A. Quantised keys err by a share of what each of their r dimensions spans in a block of 64, so that
a score's mean square error goes as sum_d E[q_d^2] V[k_d] of the index queries and keys, V the
variance within a block. With S the eigenvalues of V^1/2 E V^1/2 of the matrices E and V, no A makes
that less than (tr S^1/2)^2 / r. An A that makes both matrices S^1/2, turned so that every dimension
has as much of it as any other, reaches it; turned by Hartley's matrix, which there is of any size,
it costs at most 1.5 times as much, and a few percent more where S has no few that outweigh the
others. As keys and ranges are float16, V has a share of the keys' second moment added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo import ops
from rtpurbo.context import LayerContext
from rtpurbo.index import Index, symmetric_roots
from rtpurbo.ops.quantize_index import INDEX_BLOCK

ROUNDING = 1e-3
"""Of a second moment: what float16 keys err by, 2^-21 of it, against 8 bits' 3e-4 of a variance."""


class Balance:
    """Collects, per layer, E [R, r, r] and V [Rk, r, r] of the sequences that it is shown."""

    def __init__(self, index: Index):
        self._index = index
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, context: LayerContext, q: Tensor, k: Tensor) -> None:
        """Adds the index queries and keys of a sequence of at least a block of keys."""
        layer = context.index
        q_pre, k_pre = context.q_pre, context.k_pre
        assert q_pre is not None and k_pre is not None
        q_index, k_index = ops.index_project(
            q_pre, k_pre, layer.w_q, layer.w_k, layer.heads, layer.kv_heads
        )
        queries = q_index[0].double()
        found = queries.mT @ queries / queries.shape[1], key_moments(k_index[0])
        before = self._sums.get(context.number, (0, 0))
        self._sums[context.number] = before[0] + found[0], before[1] + found[1]

    @torch.no_grad()
    def store(self) -> None:
        """Changes the basis of every index key and of the queries that read it."""
        for number, (of_queries, of_keys) in self._sums.items():
            layer = self._index.layers[number]
            for slot, keys in enumerate(of_keys):
                readers = [e for e, key in enumerate(layer.index_map) if key == slot]
                queries = of_queries[readers].mean(0)
                if not all(m.isfinite().all() and m.any() for m in (queries, keys)):
                    continue
                to_queries, to_keys = balancing(queries, keys)
                layer.w_k[slot] = (to_keys @ layer.w_k[slot].double()).float()
                layer.w_q[readers] = (to_queries @ layer.w_q[readers].double()).float()


def key_moments(k_index: Tensor) -> Tensor:
    """V, float64 [Rk, r, r], of the whole blocks of index keys [Rk, N, r]."""
    whole = k_index.shape[1] // INDEX_BLOCK * INDEX_BLOCK
    keys = k_index[:, :whole].double()
    blocks = keys.unflatten(1, (-1, INDEX_BLOCK))
    apart = (blocks - blocks.mean(2, keepdim=True)).flatten(1, 2)
    return (apart.mT @ apart + ROUNDING * keys.mT @ keys) / max(whole, 1)


def balancing(of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
    """A^-T and A, float64 [r, r], for E and V [r, r]."""
    root, inverse = symmetric_roots(of_keys)
    values, vectors = torch.linalg.eigh(root @ of_queries @ root)
    scale = values.clamp_min(values.amax() * 1e-9)[:, None] ** 0.25
    turn = _hartley(len(values)).to(of_keys)
    return turn @ (vectors.T @ root / scale), turn @ (vectors.T @ inverse * scale)


def _hartley(size: int) -> Tensor:
    """An orthogonal matrix [size, size] whose rows weigh all columns nearly alike."""
    i = torch.arange(size, dtype=torch.float64)
    angle = 2 * torch.pi / size * i[:, None] * i
    return (angle.cos() + angle.sin()) / size**0.5

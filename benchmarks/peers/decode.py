"""Peers of a decode step: dense, or by the tokens that `select` chose; none chooses any."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.peers import flash_sparse, flashinfer
from benchmarks.peers.peer import Peer
from benchmarks.peers.problems import Token, near_tokens

SMALL, SMALL_WINDOW, SMALL_SHARE = 1024, 200, 0.3


class Step(Protocol):
    """`lists`: far tokens of the retrieval heads, indices [B, R, 1, C] and counts [B, R, 1].

    Outside of them retrieval heads see the latest `near_window` keys, others the latest `window`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    retrieval: list[int]
    lists: tuple[Tensor, Tensor]
    window: int
    near_window: int


def token(step: Step, sinks: int) -> Token:
    indices, counts = (x[:, :, 0] for x in step.lists)
    if bool((counts < 0).any()):
        raise RuntimeError("benchmarks: a head attends to all keys, which no list says")
    keys = step.k.shape[2]
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    chosen = indices.new_zeros((*counts.shape, keys + 1), dtype=torch.bool)
    chosen.scatter_(-1, torch.where(used, indices, keys).long(), True)
    chosen = chosen[..., :-1] | near_tokens(keys, step.near_window, sinks, indices.device)
    return Token(step.q, step.k, step.v, step.retrieval, chosen, step.window, sinks)


def small_kv(step: Step) -> Tensor:
    batch, heads, _, dim = step.k.shape
    return torch.randn(2, batch, heads, SMALL, dim, dtype=step.k.dtype, device=step.k.device)


def decode_peers(steps: Sequence[Step], sinks: int) -> dict[str, Peer]:
    def small() -> Token:
        q, (k, v) = steps[0].q, small_kv(steps[0])
        heads, near = steps[0].retrieval, near_tokens(SMALL, SMALL_WINDOW, sinks, k.device)
        chosen = torch.rand(len(q), len(heads), SMALL, device=k.device) < SMALL_SHARE
        return Token(q, k, v, heads, chosen | near, SMALL_WINDOW, sinks)

    def problems() -> list[Token]:
        return [token(step, sinks) for step in steps]

    return {
        "flash-sparse-attn": Peer(flash_sparse.decode, small, problems),
        "flashinfer by tokens": Peer(flashinfer.decode, small, problems),
    }


def dense_token(q: Tensor, k: Tensor, v: Tensor) -> Token:
    return Token(q, k, v, [], q.new_empty(0, dtype=torch.bool), k.shape[2], 0)


def dense_peers(steps: Sequence[Step]) -> dict[str, Peer]:
    """All heads see all keys."""
    if steps[0].k.shape[2] % flashinfer.PAGE:
        return {}

    def small() -> Token:
        return dense_token(steps[0].q, *small_kv(steps[0]))

    def problems() -> list[Token]:
        return [dense_token(step.q, step.k, step.v) for step in steps]

    return {"flashinfer": Peer(flashinfer.dense_decode, small, problems)}

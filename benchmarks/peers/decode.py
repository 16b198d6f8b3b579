"""Peers of a decode step: they attend to the tokens that `select` chose, but choose none."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.peers import flash_sparse
from benchmarks.peers.peer import Peer
from benchmarks.peers.problems import Token, near_tokens

SMALL, SMALL_WINDOW, SMALL_SHARE = 1024, 200, 0.3


class Step(Protocol):
    """`lists`: far tokens of the retrieval heads, indices [B, R, 1, C] and counts [B, R, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    retrieval: list[int]
    lists: tuple[Tensor, Tensor]


def token(step: Step, window: int, sinks: int) -> Token:
    indices, counts = (x[:, :, 0] for x in step.lists)
    if bool((counts < 0).any()):
        raise RuntimeError("benchmarks: a head attends to all keys, which no list says")
    keys = step.k.shape[2]
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    chosen = indices.new_zeros((*counts.shape, keys + 1), dtype=torch.bool)
    chosen.scatter_(-1, torch.where(used, indices, keys).long(), True)
    near = near_tokens(keys, window, sinks, indices.device)
    return Token(step.q, step.k, step.v, step.retrieval, chosen[..., :-1] | near, window, sinks)


def decode_peers(steps: Sequence[Step], window: int, sinks: int) -> dict[str, Peer]:
    def small() -> Token:
        q, k = steps[0].q, steps[0].k
        k, v = torch.randn(2, *k.shape[:2], SMALL, k.shape[3], dtype=k.dtype, device=k.device)
        heads, near = steps[0].retrieval, near_tokens(SMALL, SMALL_WINDOW, sinks, k.device)
        chosen = torch.rand(len(q), len(heads), SMALL, device=k.device) < SMALL_SHARE
        return Token(q, k, v, heads, chosen | near, SMALL_WINDOW, sinks)

    def problems() -> list[Token]:
        return [token(step, window, sinks) for step in steps]

    return {"flash-sparse-attn": Peer(flash_sparse.decode, small, problems)}

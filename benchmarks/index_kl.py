"""Stage 1's loss with its gradients against the same in eager PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention import LAYERS
from benchmarks.registry import Case, Wanted, benchmark
from rtpurbo import ops

KEYS, ROWS, WINDOW, SINKS, INDEX_DIM = 8192, 512, 1024, 4, 16


def eager(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    rows: Tensor,
    retrieval_heads: list[int],
    index_map: list[int],
    offset: Tensor,
    window: int,
    sinks: int,
    scale: float,
    beyond_window: bool,
) -> tuple[Tensor, ...]:
    """kl and its gradients by q_index, k_index and offset; one head at a time saves memory."""
    group = q.shape[1] // k.shape[1]
    n, m = torch.arange(k.shape[2]), rows[:, :, None]
    hidden = n > m
    near = (n < sinks) | (m - n < window)
    leaves = [tensor.detach().requires_grad_() for tensor in (q_index, k_index, offset)]
    losses = []
    for j, head in enumerate(retrieval_heads):
        true = (q[:, head] @ k[:, head // group].mT).float() * scale
        index = leaves[0][:, j] @ leaves[1][:, index_map[j]].mT * q_index.shape[-1] ** -0.5
        index = index + leaves[2][j]
        if beyond_window:
            index = torch.where(near, true, index)
        log_a = true.masked_fill_(hidden, -1e30).log_softmax(-1)
        log_b = index.masked_fill(hidden, -1e30).log_softmax(-1)
        loss = (log_a.exp() * (log_a - log_b)).sum(-1).mean()
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), *(leaf.grad for leaf in leaves)


@benchmark
def index_kl(wanted: Wanted) -> Iterator[Case]:
    """The goal is twice the eager speed; the rows lie all over the sequence."""
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            heads = list(layer.retrieval_heads)
            for beyond_window in (True, False):
                parameters = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "heads": layer.shape,
                    "retrieval": len(heads),
                    "keys": KEYS,
                    "rows": ROWS,
                    "index": "beyond_window" if beyond_window else "full",
                }
                if not wanted(parameters):
                    continue
                q, k, _ = layer.qkv(ROWS, KEYS, dtype)
                arguments = (
                    q,
                    k,
                    torch.randn(1, len(heads), ROWS, INDEX_DIM),
                    torch.randn(1, len(heads), KEYS, INDEX_DIM),
                    torch.randint(0, KEYS, (1, ROWS)),
                    heads,
                    list(range(len(heads))),
                    torch.zeros(len(heads)),
                    WINDOW,
                    SINKS,
                    layer.dim**-0.5,
                    beyond_window,
                )
                yield Case(
                    parameters=parameters,
                    run=partial(ops.index_kl, *arguments),
                    baselines={"eager": partial(eager, *arguments)},
                    goals={"eager": 2.0},
                )

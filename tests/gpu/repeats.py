"""Whether a step gives the same bits again, eagerly and from a CUDA graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_repeats(step: Callable[[], Sequence[Tensor]]) -> None:
    """Twenty reruns, and two replays into results that were cleared, equal the first run."""
    first = step()
    for _ in range(20):
        for a, b in zip(first, step(), strict=True):
            assert torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        for a, b in zip(first, captured, strict=True):
            assert torch.equal(a, b)

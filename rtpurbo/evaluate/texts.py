"""Text: next-token loss and the KL to the dense model, in decode and in prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtpurbo import families
from rtpurbo.evaluate.modes import Footprint, cache_argument, new_cache, watch

_ROWS = 256


@torch.no_grad()
def decoded(model: Any, name: str, tokens: list[int], rows: int, footprint: Footprint) -> Tensor:
    """Hidden states [rows, width] of the last `rows` predictions, one decode step each.

    What stands before is prefilled; every step is given the true token.
    """
    decoder, argument = families.decoder(families.unwrap(model)), cache_argument(model)
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    cache, first = new_cache(model, name), len(tokens) - 1 - rows
    decoder(input_ids=ids[:, :first], use_cache=True, **{argument: cache})
    states = []
    with watch(model, name, cache, footprint):
        for row in range(first, len(tokens) - 1):
            step = decoder(input_ids=ids[:, row : row + 1], use_cache=True, **{argument: cache})
            states.append(step.last_hidden_state[0, 0])
    return torch.stack(states)


@torch.no_grad()
def prefilled(model: Any, tokens: list[int], rows: int) -> Tensor:
    """Hidden states [rows, width] of the last `rows` predictions, in one forward."""
    decoder = families.decoder(families.unwrap(model))
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    hidden = decoder(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return hidden[0, -rows:].clone()


@torch.no_grad()
def losses(model: Any, hidden: Tensor, tokens: list[int], teacher: Any, known: Tensor) -> Tensor:
    """Mean (KL to the teacher, negative log likelihood of the next token) of the last rows, [2].

    Args:
        hidden: [rows, width] of `model`. known: the same rows of `teacher`.
        tokens: the text; its last `rows` tokens are the targets.
    """
    head, teacher_head = model.get_output_embeddings(), teacher.get_output_embeddings()
    targets = torch.tensor(tokens[-len(hidden) :], device=hidden.device)
    total = torch.zeros(2, dtype=torch.float64)
    for part in range(0, len(hidden), _ROWS):
        here = slice(part, part + _ROWS)
        student = head(hidden[here]).float().log_softmax(-1)
        dense = teacher_head(known[here]).float().log_softmax(-1)
        total[0] += (dense.exp() * (dense - student)).sum().double().cpu()
        total[1] -= student.gather(1, targets[here, None]).sum().double().cpu()
    return total / len(hidden)

"""Needles: the prompt is prefilled once, the answer decoded greedily and compared."""

from __future__ import annotations

from typing import Any

import torch

from rtpurbo import families
from rtpurbo.data import NeedlePrompt
from rtpurbo.evaluate.modes import Footprint, cache_argument, new_cache, watch


@torch.no_grad()
def answers(model: Any, name: str, prompt: NeedlePrompt, footprint: Footprint) -> bool:
    """Whether `generate()` continues the prompt with exactly its answer.

    The prompt without its last token is prefilled; the last token and the answer are decode steps,
    so that every row that has to find the needle runs as decode does.
    """
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([prompt.tokens], device=device)
    cache, argument = new_cache(model, name), cache_argument(model)
    decoder = families.decoder(families.unwrap(model))
    decoder(input_ids=tokens[:, :-1], use_cache=True, **{argument: cache})
    with watch(model, name, cache, footprint):
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=len(prompt.answer),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            pad_token_id=0,
            **{argument: cache},
        )
    return out[0, tokens.shape[1] :].tolist() == prompt.answer

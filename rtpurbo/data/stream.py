"""The tokens of texts on end, and what is cut from them."""

import random
from collections.abc import Sequence
from typing import Any


def check_texts(texts: Any, what: str) -> list[str]:
    """The texts as a list; ValueError that begins with `what` if they are none."""
    found = texts if isinstance(texts, str) else list(texts)
    if isinstance(found, str) or not found or not all(isinstance(text, str) for text in found):
        got = "one string" if isinstance(found, str) else f"{found!r:.80}"
        raise ValueError(f"{what} must be a non-empty list of strings, got {got}")
    return found


class Stream:
    """The tokens of all texts on end, from which excerpts are cut."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        texts = check_texts(texts, "rtpurbo.data: texts")
        self._tokenizer = tokenizer
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        self._tokens = [token for document in encoded for token in document]
        if not self._tokens:
            raise ValueError("rtpurbo.data: texts must hold at least one token, got none")
        bos = tokenizer.bos_token_id
        self.prefix = [] if bos is None else [bos]

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def excerpt(self, rng: random.Random, length: int) -> list[int]:
        """`length` tokens from a random place; texts that are too short repeat."""
        start = rng.randrange(len(self._tokens))
        tokens = self._tokens[start : start + length]
        while len(tokens) < length:
            tokens += self._tokens[: length - len(tokens)]
        return tokens


def excerpts(
    tokenizer: Any, texts: Sequence[str], length: int, count: int, seed: int = 0
) -> list[list[int]]:
    """Token sequences cut from the texts at random places, each begun with the BOS token if any.

    What `rtpurbo.distill` trains on, and what perplexity is measured on.
    """
    stream = Stream(tokenizer, texts)
    room = length - len(stream.prefix)
    if room < 1:
        raise ValueError(f"rtpurbo.data.excerpts: length must be >= 2, got {length}")
    rng = random.Random(f"excerpt {seed}")
    return [stream.prefix + stream.excerpt(rng, room) for _ in range(count)]

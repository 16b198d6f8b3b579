"""Prompts that ask for a number hidden in a text."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rtpurbo.data import words
from rtpurbo.data.stream import Stream

_NEEDLE = "\nOne of the special magic numbers for {key} is: {value}.\n"
_QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)


@dataclass(frozen=True)
class NeedlePrompt:
    """A question about one of the statements hidden in a text.

    Attributes:
        tokens: the prompt; `answer` is what a model should continue with, exactly.
        key, value: the pair asked for.
        depth: where its statement stands, 0 the start and 1 the end of the text.
        needles: how many statements the text holds.
    """

    tokens: list[int]
    answer: list[int]
    key: str
    value: str
    depth: float
    needles: int


def needle_prompts(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    count: int = 1,
    *,
    needles: int = 1,
    depth: float | Sequence[float] = (0.05, 0.3, 0.5, 0.7, 0.95),
    seed: int = 0,
) -> list[NeedlePrompt]:
    """Prompts that ask for a number stated once in the text.

    needles=1 is NIAH; needles=8 is multi-key retrieval, where one of eight statements is asked.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the haystack; use text that was not trained on, e.g. `prose(split="held_out")`.
        length: tokens of a prompt and its answer together.
        count: how many prompts; they go through the depths in turn.
        needles: statements in a text. The asked one stands at its depth, the others anywhere.
        depth: in [0, 1], or several.
    """
    depths = [depth] if isinstance(depth, (int, float)) else list(depth)
    if not 1 <= needles <= words.KEYS or not depths or any(not 0 <= d <= 1 for d in depths):
        raise ValueError(
            f"rtpurbo.data.needle_prompts: needles must be in [1, {words.KEYS}] and depth in "
            f"[0, 1], got needles={needles}, depth={depth}"
        )
    stream = Stream(tokenizer, texts)
    return [
        _needle_prompt(
            stream,
            random.Random(f"needle {seed} {i}"),
            length,
            needles,
            depths[i % len(depths)],
        )
        for i in range(count)
    ]


def _needle_prompt(
    stream: Stream, rng: random.Random, length: int, needles: int, depth: float
) -> NeedlePrompt:
    keys = words.keys(rng, needles)
    values = [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
    statements = [
        stream.encode(_NEEDLE.format(key=key, value=value))
        for key, value in zip(keys, values, strict=True)
    ]
    question = stream.encode(_QUESTION.format(key=keys[0]))
    answer = stream.encode(f" {values[0]}")
    fixed = len(stream.prefix) + sum(map(len, statements)) + len(question) + len(answer)
    room = length - fixed
    if room < 1:
        raise ValueError(
            f"rtpurbo.data.needle_prompts: length must exceed {fixed} for {needles} needles, "
            f"got {length}"
        )
    body = stream.excerpt(rng, room)
    places = [int(depth * room)] + [rng.randrange(room + 1) for _ in keys[1:]]
    tokens, used = list(stream.prefix), 0
    for place, statement in sorted(zip(places, statements, strict=True), key=lambda pair: pair[0]):
        tokens += body[used:place] + statement
        used = place
    tokens += body[used:] + question
    return NeedlePrompt(tokens, answer, keys[0], values[0], depth, needles)

"""Training sequences that retrieve, and the rows at which they do."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rtpurbo.data import words
from rtpurbo.data.stream import Stream

_STATED = (
    ("\nThe access code of {key} is {value}.\n", "\nThe access code of {key} stated above is"),
    ("\nRemember: {key} -> {value}\n", "\nWhat was remembered: {key} ->"),
    ("\n{key} = {value}\n", "\nThe value set earlier: {key} ="),
    ('\n"{key}": "{value}",\n', '\nLooking up "{key}":'),
)


@dataclass(frozen=True)
class RetrievalSequence:
    """One training sequence and the rows at which it must look far back.

    Attributes:
        tokens: the sequence.
        rows: ascending positions whose next token was stated or copied earlier.
    """

    tokens: list[int]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.tokens)


def retrieval_sequences(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    count: int,
    seed: int = 0,
    *,
    statements: int | None = None,
    spans: int | None = None,
    span_length: int = 48,
) -> list[RetrievalSequence]:
    """Sequences of prose that retrieve: statements, later questions with answers, repeated spans.

    Stage 1 trains on the rows of such sequences, because uniform rows of prose leave an index that
    misjudges the rare rows that look far back.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the prose around the statements, e.g. `prose()`.
        length: tokens of each sequence, at least 256.
        count: how many sequences.
        statements: key-value statements a sequence, each asked once later (default: one per 128
            tokens, at most 48).
        spans: spans of `span_length` tokens that are repeated later (default: one per 1024
            tokens, at least 1 and at most 8).
    """
    if length < 256:
        raise ValueError(f"rtpurbo.data.retrieval_sequences: length must be >= 256, got {length}")
    statements = min(48, length // 128) if statements is None else statements
    spans = min(8, max(1, length // 1024)) if spans is None else spans
    if not 0 <= statements <= words.KEYS:
        raise ValueError(
            f"rtpurbo.data.retrieval_sequences: statements must be in [0, {words.KEYS}], the keys "
            f"that there are, got {statements}"
        )
    longest = length // 2 - 2
    if spans < 0 or (spans and not 1 <= span_length <= longest):
        raise ValueError(
            "rtpurbo.data.retrieval_sequences: spans must be >= 0 and span_length in "
            f"[1, {longest}], so that a span stands twice in {length} tokens, got {spans} and "
            f"{span_length}"
        )
    stream = Stream(tokenizer, texts)
    rng = random.Random(f"retrieval {seed}")
    return [
        _retrieval_sequence(stream, rng, length, statements, spans, span_length)
        for _ in range(count)
    ]


def _retrieval_sequence(
    stream: Stream,
    rng: random.Random,
    length: int,
    statements: int,
    spans: int,
    span_length: int,
) -> RetrievalSequence:
    inserts: list[tuple[float, list[int], list[int]]] = []
    for key in words.keys(rng, statements):
        value = words.value(rng)
        statement, question = rng.choice(_STATED)
        stated_at = rng.random()
        asked_at = stated_at + (1 - stated_at) * rng.random()
        inserts.append((stated_at, stream.encode(statement.format(key=key, value=value)), []))
        answer = stream.encode(f" {value}\n")
        inserts.append((asked_at, stream.encode(question.format(key=key)), answer))
    inserts.sort(key=lambda insert: insert[0])

    room = length - len(stream.prefix) - sum(len(text) + len(ans) for _, text, ans in inserts)
    if room < length // 4:
        raise ValueError(
            f"rtpurbo.data.retrieval_sequences: {statements} statements leave {room} of {length} "
            "tokens for prose; ask for fewer statements or a greater length"
        )
    body = stream.excerpt(rng, room)
    tokens, rows, used = list(stream.prefix), set[int](), 0
    for place, text, answer in inserts:
        until = int(place * room)
        tokens += body[used:until] + text
        used = until
        rows.update(range(len(tokens) - 1, len(tokens) + len(answer) - 1))
        tokens += answer
    tokens += body[used:]

    for _ in range(spans):
        first = rng.randrange(1, length // 2 - span_length)
        again = rng.randrange(length // 2, length - span_length)
        tokens[again : again + span_length] = tokens[first : first + span_length]
        rows.difference_update(range(again - 1, again + span_length))
        rows.update(range(again + 3, again + span_length - 1))
    return RetrievalSequence(tokens, sorted(row for row in rows if row >= 0))


def repeated_rows(tokens: Sequence[int], distance: int, ngram: int = 6) -> list[int]:
    """Rows whose last `ngram` tokens and the token after them stood at least `distance` earlier.

    The retrieval rows of a sequence that came without any: what follows there can be copied from
    far back.
    """
    first: dict[tuple[int, ...], int] = {}
    rows = []
    for row in range(ngram - 1, len(tokens) - 1):
        gram = tuple(tokens[row - ngram + 1 : row + 2])
        if row - first.setdefault(gram, row) >= distance:
            rows.append(row)
    return rows

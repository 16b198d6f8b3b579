"""Text to adapt and to judge with: prose any machine has, retrieval-rich sequences, needle prompts.

Nothing here downloads. `prose` reads documentation that is already installed; the generators hide
statements in it. Everything is a function of its arguments and a seed.
"""

import ast
import functools
import hashlib
import importlib.util
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SOURCES = {
    "cpython": "PSF-2.0 (CPython's pydoc topics and the docstrings of its standard library)",
    "torch": "BSD-3-Clause (docstrings of the installed PyTorch)",
    "transformers": "Apache-2.0 (docstrings of the installed transformers)",
}
"""Where `prose` can read, and the licence of what it finds there."""

_MIN_CHARACTERS = 400
_HELD_OUT_ONE_IN = 5
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def prose(
    source: str | Sequence[str] = "cpython",
    *,
    split: Literal["train", "held_out"] = "train",
) -> list[str]:
    """Documentation prose of this machine, as documents in a fixed order.

    Args:
        source: a key of `SOURCES`, or several. "cpython" needs nothing but the interpreter.
        split: one document in five is "held_out", chosen by a hash of its name, so that no
            document is ever in both.

    Returns:
        Documents of at least 400 characters. A docstring that stands in several places is kept
        once, in its first place.

    Raises:
        ValueError: an unknown source or split, or a source that is not installed.
    """
    names = [source] if isinstance(source, str) else list(source)
    if split not in ("train", "held_out"):
        raise ValueError(f"rtpurbo.data.prose: split must be 'train' or 'held_out', got {split!r}")
    unknown = [name for name in names if name not in SOURCES]
    if unknown or not names:
        raise ValueError(
            f"rtpurbo.data.prose: source must be among {sorted(SOURCES)}, got {unknown or names}"
        )
    held_out = split == "held_out"
    return [
        text
        for name in names
        for title, text in _documents(name)
        if _is_held_out(title) == held_out
    ]


def _is_held_out(title: str) -> bool:
    digest = hashlib.sha256(title.encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


@functools.cache
def _documents(source: str) -> tuple[tuple[str, str], ...]:
    """(title, text) of every document of a source, sorted by title within its kind."""
    documents = list(_topics()) if source == "cpython" else []
    seen: set[str] = set()
    root = _root(source)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            text = "\n\n".join(_docstrings(path, seen))
            documents.append((f"{source}:{relative.as_posix()}", text))
    return tuple((title, text) for title, text in documents if len(text) >= _MIN_CHARACTERS)


def _root(source: str) -> Path:
    if source == "cpython":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(source)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"rtpurbo.data.prose: source {source!r} needs the package, not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _topics() -> Iterator[tuple[str, str]]:
    """The language reference that `help()` prints; some distributions ship without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"topic:{name}", topics[name].strip()


def _docstrings(path: Path, seen: set[str]) -> Iterator[str]:
    """The docstrings of a module in source order, without those met before. Nothing is imported."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        pending.extend(reversed(list(ast.iter_child_nodes(node))))
        if not isinstance(node, documented):
            continue
        text = ast.get_docstring(node)
        if text and text not in seen:
            seen.add(text)
            yield text


def excerpts(
    tokenizer: Any, texts: Sequence[str], length: int, count: int, seed: int = 0
) -> list[list[int]]:
    """Token sequences cut from the texts at random places, each begun with the BOS token if any.

    What `rtpurbo.distill` trains on, and what perplexity is measured on.
    """
    stream = _Stream(tokenizer, texts)
    room = length - len(stream.prefix)
    if room < 1:
        raise ValueError(f"rtpurbo.data.excerpts: length must be >= 2, got {length}")
    rng = random.Random(f"excerpt {seed}")
    return [stream.prefix + stream.excerpt(rng, room) for _ in range(count)]


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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_QUALITIES = _words(
    "amber ancient bitter bronze careful cheerful clever cobalt copper coral distant dusty "
    "eager early faded fragrant frozen gentle gilded hidden humble ivory jagged lively lonely "
    "marble mellow modest narrow noble patient pale polished proud quiet restless rustic "
    "scarlet serene silver slender solemn sturdy tender timid velvet violet wandering weary "
    "winter"
)
_THINGS = _words(
    "abbey almond anvil atlas beacon bellows birch bridge canyon cedar chalice cipher compass "
    "cottage dagger delta easel ferry fiddle garnet glacier hammock harvest helmet inlet "
    "juniper kettle ladder lagoon ledger mantle meadow mosaic oasis otter pavilion pepper "
    "pigeon prairie raven reef saffron sparrow tavern thimble tunnel turret walnut willow"
)

_STATED = (
    ("\nThe access code of {key} is {value}.\n", "\nThe access code of {key} stated above is"),
    ("\nRemember: {key} -> {value}\n", "\nWhat was remembered: {key} ->"),
    ("\n{key} = {value}\n", "\nThe value set earlier: {key} ="),
    ('\n"{key}": "{value}",\n', '\nLooking up "{key}":'),
)

_NEEDLE = "\nOne of the special magic numbers for {key} is: {value}.\n"
_QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)


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
    stream = _Stream(tokenizer, texts)
    rng = random.Random(f"retrieval {seed}")
    return [
        _retrieval_sequence(stream, rng, length, statements, spans, span_length)
        for _ in range(count)
    ]


def _retrieval_sequence(
    stream: "_Stream",
    rng: random.Random,
    length: int,
    statements: int,
    spans: int,
    span_length: int,
) -> RetrievalSequence:
    inserts: list[tuple[float, list[int], list[int]]] = []
    for key in _keys(rng, statements):
        value = _value(rng)
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
    if needles < 1 or not depths or any(not 0 <= d <= 1 for d in depths):
        raise ValueError(
            "rtpurbo.data.needle_prompts: needles must be >= 1 and depth in [0, 1], "
            f"got needles={needles}, depth={depth}"
        )
    stream = _Stream(tokenizer, texts)
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
    stream: "_Stream", rng: random.Random, length: int, needles: int, depth: float
) -> NeedlePrompt:
    keys = _keys(rng, needles)
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


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = rng.sample(range(len(_QUALITIES) * len(_THINGS)), count)
    return [f"{_QUALITIES[p % len(_QUALITIES)]}-{_THINGS[p // len(_QUALITIES)]}" for p in pairs]


def _value(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return str(rng.randrange(1_000_000, 10_000_000))
    return f"{rng.getrandbits(32):08x}"


class _Stream:
    """The tokens of all texts on end, from which excerpts are cut."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        if isinstance(texts, str) or not texts:
            raise ValueError("rtpurbo.data: texts must be a non-empty list of strings")
        self._tokenizer = tokenizer
        encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        self._tokens = [token for document in encoded for token in document]
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

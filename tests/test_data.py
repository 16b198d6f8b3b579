"""rtpurbo.data: prose without a download, sequences that retrieve, needle prompts."""

import pytest

from rtpurbo import data
from rtpurbo.data import sources
from tests.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def texts():
    return data.prose()[:40]


def test_prose_is_documentation_split_by_document():
    texts = data.prose()
    held_out = data.prose(split="held_out")
    assert sum(map(len, texts)) > 1_000_000
    assert sum(map(len, held_out)) > 200_000
    assert not set(texts) & set(held_out)
    assert any("object.__getattr__" in text for text in texts + held_out)
    assert texts == data.prose("cpython", split="train")


def test_prose_repeats_no_docstring(tmp_path, monkeypatch):
    long = "A docstring that stands in two modules. " * 20
    (tmp_path / "a.py").write_text(f'"""{long}"""\ndef f():\n    "{long}"\n')
    (tmp_path / "b.py").write_text(f'"""{long}"""\nclass B:\n    """{"Another. " * 80}"""\n')
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(sources, "_root", lambda source: tmp_path)
    documents = dict(sources._documents.__wrapped__("torch"))
    assert list(documents) == ["torch:a.py", "torch:b.py"]
    assert documents["torch:a.py"].strip() == long.strip()
    assert documents["torch:b.py"].startswith("Another.")


@pytest.mark.parametrize("arguments", [("nowhere",), ([],), ("cpython", "all")])
def test_prose_refuses_what_it_does_not_know(arguments):
    source, *split = arguments
    with pytest.raises(ValueError, match=r"rtpurbo\.data\.prose: "):
        data.prose(source, **({"split": split[0]} if split else {}))


def test_every_source_names_its_licence():
    assert all(
        any(name in text for name in ("PSF", "BSD", "Apache")) for text in data.SOURCES.values()
    )


def test_retrieval_rows_predict_what_was_stated_or_copied(tokenizer, texts):
    sequences = data.retrieval_sequences(tokenizer, texts, 4096, 3, seed=1)
    for sequence in sequences:
        assert len(sequence) == len(sequence.tokens) == 4096
        assert sequence.tokens[0] == tokenizer.bos_token_id
        assert sequence.rows == sorted(set(sequence.rows))
        assert 100 < len(sequence.rows) < 1500
        anywhere = share_copied(sequence.tokens, range(1024, 4095))
        assert share_copied(sequence.tokens, sequence.rows) > max(0.7, 1.5 * anywhere)


def share_copied(tokens, rows):
    text = "".join(map(chr, tokens))
    return sum(text[row - 5 : row + 2] in text[: row - 16] for row in rows) / len(rows)


def test_generators_follow_their_seed(tokenizer, texts):
    def make(seed):
        return data.retrieval_sequences(tokenizer, texts, 1024, 2, seed=seed)

    assert make(3) == make(3)
    assert make(3) != make(4)
    prompts = data.needle_prompts(tokenizer, texts, 1024, 4, needles=2, seed=5)
    assert prompts == data.needle_prompts(tokenizer, texts, 1024, 4, needles=2, seed=5)


def test_excerpts_are_cut_from_the_texts(tokenizer, texts):
    cut = data.excerpts(tokenizer, texts, 500, 3, seed=1)
    assert [len(tokens) for tokens in cut] == [500] * 3
    assert len({tuple(tokens) for tokens in cut}) == 3
    whole = "".join(texts)
    assert all(
        tokenizer.decode(tokens[1:]).strip("\N{REPLACEMENT CHARACTER}") in whole for tokens in cut
    )
    assert data.excerpts(tokenizer, ["short"], 20, 1)[0][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("needles", [1, 8])
def test_needles_stand_where_they_should(tokenizer, texts, needles):
    prompts = data.needle_prompts(tokenizer, texts, 3000, 5, needles=needles, seed=2)
    assert [prompt.depth for prompt in prompts] == [0.05, 0.3, 0.5, 0.7, 0.95]
    for prompt in prompts:
        assert len(prompt.tokens) + len(prompt.answer) == 3000
        text = tokenizer.decode(prompt.tokens, skip_special_tokens=True)
        assert text.count("special magic numbers") == needles
        place = text.index(f"magic numbers for {prompt.key} is: {prompt.value}.") / len(text)
        assert abs(place - prompt.depth) < 0.35
        assert text.endswith(f"number for {prompt.key} mentioned in the provided text is")
        assert tokenizer.decode(prompt.answer) == f" {prompt.value}"


def test_generators_refuse_lengths_without_room(tokenizer, texts):
    with pytest.raises(ValueError, match="length must exceed"):
        data.needle_prompts(tokenizer, texts, 100, needles=8)
    with pytest.raises(ValueError, match="fewer statements"):
        data.retrieval_sequences(tokenizer, texts, 1024, 1, statements=20)
    with pytest.raises(ValueError, match="non-empty list"):
        data.retrieval_sequences(tokenizer, "a text", 1024, 1)
    with pytest.raises(ValueError, match="one string"):
        data.excerpts(tokenizer, "a text", 100, 1)
    with pytest.raises(ValueError, match="at least one token, got none"):
        data.excerpts(tokenizer, [""], 100, 1)
    with pytest.raises(ValueError, match=r"span_length in \[1, 126\]"):
        data.retrieval_sequences(tokenizer, texts, 256, 1, statements=0, span_length=127)
    with pytest.raises(ValueError, match=r"statements must be in \[0, 2450\]"):
        data.retrieval_sequences(tokenizer, texts, 4096, 1, statements=4000)
    with pytest.raises(ValueError, match=r"needles must be in \[1, 2450\]"):
        data.needle_prompts(tokenizer, texts, 4096, needles=4000)
    with pytest.raises(ValueError, match="depth"):
        data.needle_prompts(tokenizer, texts, 1000, depth=1.5)


def test_a_span_may_be_as_long_as_half_of_the_sequence(tokenizer, texts):
    (sequence,) = data.retrieval_sequences(
        tokenizer, texts, 256, 1, statements=0, spans=1, span_length=126
    )
    assert len(sequence) == 256


def test_repeated_rows_are_those_that_can_copy():
    tokens = list(range(100)) + list(range(20, 40)) + [7, 8]
    rows = data.repeated_rows(tokens, distance=50, ngram=4)
    assert rows == list(range(103, 119))
    assert data.repeated_rows(tokens, distance=90, ngram=4) == []

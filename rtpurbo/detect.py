"""Which heads retrieve: R_h of the paper, from needle rows only, and how stable the answer is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rtpurbo import families, ops
from rtpurbo.data.stream import check_texts
from rtpurbo.heads import HeadMap, check_choice
from rtpurbo.patching import is_sparse

_IMPLEMENTATION = "rtpurbo_detect"
_DENSE = "sdpa"
_KEY = "_rtpurbo_detect"

Progress = Callable[[int, int], None]


def detect_heads(
    model: Any,
    tokenizer: Any,
    *,
    documents: Sequence[str] | None = None,
    length: int = 8192,
    num_documents: int = 8,
    needle_length: int = 32,
    share: float | None = None,
    threshold: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadMap:
    """Ranks all query heads by the attention that a repeated needle pays to its first occurrence.

    A random token span stands at the start and at the end of each document:
    R_h = (1 / |post|) sum over t in post, j in pre of A_h(t, j). Only the rows of `post` are
    computed, O(N) memory. The scores are means over the documents; half of the documents are read
    again at half the length, to see whether the ranking depends on it.

    Args:
        model: a dense model of a supported family; it is left as it was.
        tokenizer: the model's.
        documents: texts to take the haystacks from; default: `rtpurbo.data.prose()`.
        length: tokens of a sequence, both needles included.
        num_documents: sequences, each with its own text and needle.
        needle_length: tokens of the needle.
        share: share of all query heads that become retrieval heads; default 0.15.
        threshold: instead of a share: heads with at least this score become retrieval heads.
        seed: chooses texts and needles.
        progress: called with (sequences done, sequences in all).

    Returns:
        A HeadMap with this model's identity. `stability` holds `documents` and `lengths`, each with
        the mean `rank_correlation` (Spearman, all heads) and `overlap` (of the sets of retrieval
        heads) between pairs, and the lengths and the number of documents they come from.

    Raises:
        ValueError: sizes that do not fit, too little text, an unsupported or a sparse model.
    """
    model = families.unwrap(model)
    families.family(model)
    if is_sparse(model):
        raise ValueError("rtpurbo.detect_heads: the model is sparse; call rtpurbo.restore first")
    if needle_length < 1 or num_documents < 1 or length // 2 < 2 * needle_length + 2:
        raise ValueError(
            "rtpurbo.detect_heads: needle_length and num_documents must be >= 1 and length at "
            f"least {4 * needle_length + 4}, got {needle_length}, {num_documents} and {length}"
        )
    check_choice("rtpurbo.detect_heads", share, threshold)
    if documents is not None:
        documents = check_texts(documents, "rtpurbo.detect_heads: documents")
    families.warn_beyond_context(model, length, "rtpurbo.detect_heads: length")
    source = _Haystacks(tokenizer, documents, random.Random(seed), needle_length)
    haystacks = source.take(num_documents, length)
    half, halves = length // 2, (num_documents + 1) // 2
    total, done = num_documents + halves, 0

    scores: dict[int, list[Tensor]] = {length: [], half: []}
    with _scoring(model, needle_length) as score:
        for size, count in ((length, num_documents), (half, halves)):
            for needle, text in haystacks[:count]:
                body = text[: size - 2 * needle_length - 1]
                scores[size].append(score(source.first, needle, body))
                done += 1
                if progress is not None:
                    progress(done, total)
    means = {size: torch.stack(found).mean(0) for size, found in scores.items()}
    heads = HeadMap.from_scores(
        means[length],
        share,
        threshold=threshold,
        model_id=families.identity(model),
        kv_heads=families.geometry(model).kv_heads,
    )
    kept = int(heads.roles.sum())
    stability = {
        "documents": _agreement(scores[length], kept),
        "lengths": _agreement(list(means.values()), kept),
        "num_documents": num_documents,
        "length": length,
        "half_length": half,
    }
    return replace(heads, stability=stability)


class _Haystacks:
    """Token spans from documents, and needles of random tokens that no text would hold."""

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[str] | None,
        rng: random.Random,
        needle_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.documents = documents
        self.rng = rng
        self.needle_length = needle_length
        special = set(tokenizer.all_special_ids)
        self.vocabulary = [token for token in range(len(tokenizer)) if token not in special]
        first = tokenizer.bos_token_id
        self.first = [] if first is None else [first]

    def take(self, count: int, length: int) -> list[tuple[list[int], list[int]]]:
        """`count` pairs of a needle and a text of `length` tokens, from distinct places."""
        tokens = self._tokens(count * length)
        places = self.rng.sample(range(len(tokens) // length), count)
        needles = [self.rng.sample(self.vocabulary, self.needle_length) for _ in range(count)]
        texts = [tokens[place * length : (place + 1) * length] for place in places]
        return list(zip(needles, texts, strict=True))

    def _tokens(self, wanted: int) -> list[int]:
        if self.documents is None:
            from rtpurbo.data import prose

            documents: Sequence[str] = prose()
        else:
            documents = self.documents
        order = list(documents)
        self.rng.shuffle(order)
        tokens: list[int] = []
        for text in order:
            tokens += self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(tokens) >= wanted:
                return tokens
        raise ValueError(
            f"rtpurbo.detect_heads: documents must hold {wanted} tokens for these sizes, got "
            f"{len(tokens)}; give more text or a smaller length or num_documents"
        )


@contextmanager
def _scoring(model: Any, needle_length: int) -> Iterator[Callable[..., Tensor]]:
    """Runs the model on an attention function that scores each layer and then attends densely."""
    AttentionInterface.register(_IMPLEMENTATION, _score_and_attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, lambda *args, **kwargs: None)
    modules = families.attention_layers(model)
    device = model.get_input_embeddings().weight.device
    implementation, training = model.config._attn_implementation, model.training

    def score(first: list[int], needle: list[int], body: list[int]) -> Tensor:
        tokens = torch.tensor([[*first, *needle, *body, *needle]], device=device)
        span = (len(first), len(first) + needle_length)
        for module in modules:
            module.__dict__[_KEY] = span
        families.decoder(model)(input_ids=tokens, use_cache=False)
        return torch.stack([module.__dict__[_KEY] for module in modules])

    try:
        model.eval()
        model.set_attn_implementation(_IMPLEMENTATION)
        with torch.no_grad():
            yield score
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
        for module in modules:
            module.__dict__.pop(_KEY, None)


def _score_and_attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    begin, end = module.__dict__[_KEY]
    rows = query[:, :, begin - end :]
    scores = ops.retrieval_scores(rows, key, begin, end, kwargs["scaling"])
    module.__dict__[_KEY] = scores[0].float().cpu()
    return ALL_ATTENTION_FUNCTIONS[_DENSE](module, query, key, value, attention_mask, **kwargs)


def _agreement(maps: list[Tensor], kept: int) -> dict[str, float]:
    """Mean rank correlation and overlap of the top `kept` heads, over all pairs of score maps."""
    flat = [scores.flatten() for scores in maps]
    pairs = [(a, b) for i, a in enumerate(flat) for b in flat[i + 1 :]]
    if not pairs:
        return {"rank_correlation": 1.0, "overlap": 1.0, "pairs": 0}
    correlations = [_spearman(a, b) for a, b in pairs]
    overlaps = [len(_top(a, kept) & _top(b, kept)) / max(kept, 1) for a, b in pairs]
    return {
        "rank_correlation": sum(correlations) / len(pairs),
        "overlap": sum(overlaps) / len(pairs) if kept else 1.0,
        "pairs": len(pairs),
    }


def _top(scores: Tensor, kept: int) -> set[int]:
    return set(scores.argsort(descending=True, stable=True)[:kept].tolist())


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return torch.corrcoef(ranks)[0, 1].nan_to_num(1.0).item()


def _ranks(scores: Tensor) -> Tensor:
    """Ranks from 0; equal scores share the mean of theirs."""
    _, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    return (last - (counts - 1) / 2)[inverse]

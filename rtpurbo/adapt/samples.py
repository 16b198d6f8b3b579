"""The forms in which users hold token sequences, read as one; names for data and models."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtpurbo.data import RetrievalSequence

_NOT_IN_THE_FORWARD = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One sequence: tokens int64 [N]; retrieval rows and label positions where they were given.

    A label position p is a token to predict from the ones before it: its logits stand at p - 1.
    """

    tokens: Tensor
    rows: list[int] | None = None
    labels: list[int] | None = None


class Samples:
    """A sized, indexable source of sequences, converted one at a time.

    Items may be sequences or tensors of token ids, `RetrievalSequence`s, or mappings with
    `input_ids` and optionally `rows` (retrieval rows) or `labels` (-100 where there is none), as
    a Hugging Face dataset gives them. Left padding that an `attention_mask` marks is cut off, from
    labels and rows too.
    """

    def __init__(self, source: Any, what: str):
        if isinstance(source, str | Mapping) or not (
            hasattr(source, "__len__") and hasattr(source, "__getitem__")
        ):
            raise TypeError(
                f"rtpurbo: {what} must be a list of token sequences or a Hugging Face dataset, got "
                f"{type(source).__name__}"
            )
        if len(source) == 0:
            raise ValueError(f"rtpurbo: {what} is empty")
        self._source = source
        self._what = what

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Sample:
        item = self._source[i]
        if isinstance(item, RetrievalSequence):
            return Sample(self._tokens(item.tokens, i), rows=item.rows)
        if not isinstance(item, Mapping):
            return Sample(self._tokens(item, i))
        if "input_ids" not in item:
            raise ValueError(
                f"rtpurbo: {self._what}[{i}] must have a field input_ids, got {sorted(item)}"
            )
        tokens = self._tokens(item["input_ids"], i)
        padding = self._padding(item.get("attention_mask"), len(tokens), i)
        rows = item.get("rows")
        labels = item.get("labels")
        if labels is not None:
            given = torch.as_tensor(labels)
            if given.shape != tokens.shape:
                raise ValueError(
                    f"rtpurbo: {self._what}[{i}]: labels must have the length of input_ids, "
                    f"{len(tokens)}, got {list(given.shape)}"
                )
            labels = (given[padding:] >= 0).nonzero().flatten().tolist()
        if rows is not None:
            rows = [int(row) - padding for row in rows]
        return Sample(tokens[padding:], rows, labels)

    def _padding(self, mask: Any, length: int, i: int) -> int:
        """How many zeros an attention mask begins with; ValueError if others come later."""
        if mask is None:
            return 0
        given = torch.as_tensor(mask)
        if given.shape != (length,):
            raise ValueError(
                f"rtpurbo: {self._what}[{i}]: attention_mask must have the length of input_ids, "
                f"{length}, got {list(given.shape)}"
            )
        real = given != 0
        padding = int((~real).sum())
        if padding == length or not real[padding:].all():
            raise ValueError(
                f"rtpurbo: {self._what}[{i}]: attention_mask must be zeros, then ones, and mark a "
                "token; pad on the left or not at all"
            )
        return padding

    def _tokens(self, ids: Any, i: int) -> Tensor:
        try:
            tokens = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"rtpurbo: {self._what}[{i}] is no token sequence: {error}") from error
        if tokens.dim() != 1 or tokens.is_floating_point() or len(tokens) == 0:
            raise ValueError(
                f"rtpurbo: {self._what}[{i}] must be a non-empty 1-D sequence of token ids, got "
                f"shape {list(tokens.shape)}, dtype {tokens.dtype}; tokenize texts first"
            )
        return tokens.to(torch.int64).cpu()

    def lengths(self, vocabulary: int) -> list[int]:
        """The length of every sequence; ValueError where an id lies outside [0, vocabulary)."""
        found = []
        for i in range(len(self)):
            tokens = self[i].tokens
            found.append(len(tokens))
            if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
                raise ValueError(
                    f"rtpurbo: {self._what}[{i}] holds token ids outside [0, {vocabulary}); it was "
                    "made with another tokenizer"
                )
        return found

    def fingerprint(self) -> str:
        """A name for the data: a dataset's own, or a hash of everything."""
        own = getattr(self._source, "_fingerprint", None)
        if isinstance(own, str):
            return f"dataset:{own}:{len(self)}"
        digest = hashlib.sha256()
        for i in range(len(self)):
            sample = self[i]
            digest.update(sample.tokens.numpy().tobytes())
            digest.update(repr((sample.rows, sample.labels)).encode())
        return f"sha256:{digest.hexdigest()}"


def fingerprint(model: Any) -> str:
    """A hash of the configuration (RoPE, norms, ...) and of names, shapes and 256 evenly spaced
    values of every weight."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_IN_THE_FORWARD}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(256, flat.numel()), dtype=torch.float64)
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(flat[places.long().to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()

"""One model in several modes, and what its decode steps attend to."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import DynamicCache

from rtpurbo import families, patching
from rtpurbo.cache import RTPurboCache
from rtpurbo.stats import stats


@dataclass
class Footprint:
    """What decode steps read and what the cache weighed after the last of them.

    Attributes:
        attended, fraction: keys a query head reads, and their share of the visible ones, by step.
        kv_bytes, index_bytes, dense_bytes: of the largest cache seen.
    """

    attended: list[float] = field(default_factory=list)
    fraction: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    index_bytes: int = 0
    dense_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """The fields of an `EvalRow` that this fills."""
        if not self.attended:
            return {}
        return {
            "attended_tokens": sum(self.attended) / len(self.attended),
            "attended_fraction": sum(self.fraction) / len(self.fraction),
            "kv_bytes": self.kv_bytes,
            "index_bytes": self.index_bytes,
            "dense_bytes": self.dense_bytes,
        }


@contextmanager
def mode(model: Any, name: str, window: int | None) -> Iterator[Any]:
    """The model "dense", or "sparse" with this window (None: its own), in eval mode."""
    training = model.training
    model.eval()
    try:
        with _dense(model) if name == "dense" else _windowed(model, window):
            yield model
    finally:
        model.train(training)


def _dense(model: Any) -> Any:
    return patching.dense(model) if patching.is_sparse(model) else nullcontext(model)


@contextmanager
def _windowed(model: Any, window: int | None) -> Iterator[Any]:
    found = patching.state(model)
    before = found.config
    if window is not None:
        found.config = replace(before, window=window)
    try:
        yield model
    finally:
        found.config = before


def new_cache(model: Any, name: str) -> Any:
    """An empty cache for the mode."""
    return DynamicCache(config=model.config) if name == "dense" else RTPurboCache(model)


def cache_argument(model: Any) -> str:
    """What this transformers calls the cache: "cache", or "past_key_values" in older ones."""
    parameters = inspect.signature(families.decoder(families.unwrap(model)).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@contextmanager
def watch(model: Any, name: str, cache: Any, footprint: Footprint) -> Iterator[None]:
    """Adds the forwards inside this context, decode steps of one sequence, to `footprint`."""
    inner = families.unwrap(model)
    sizes = families.geometry(inner)
    item = inner.get_input_embeddings().weight.element_size()
    key_bytes = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * item

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if name == "dense":
            keys = cache.get_seq_length()
            seen = {"attended_tokens": keys, "attended_fraction": 1.0, "index_bytes": 0}
            seen["kv_bytes"] = seen["dense_bytes"] = keys * key_bytes
        else:
            seen = stats(model)
        footprint.attended.append(seen["attended_tokens"])
        footprint.fraction.append(seen["attended_fraction"])
        for what in ("kv_bytes", "index_bytes", "dense_bytes"):
            setattr(footprint, what, max(getattr(footprint, what), int(seen[what])))

    handle = families.decoder(inner).register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

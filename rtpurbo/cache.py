"""The headwise KV cache: rings for local KV heads, growing pages and index keys for the others."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from rtpurbo import ops
from rtpurbo._C import HeadwiseLayout
from rtpurbo.index import LayerIndex
from rtpurbo.ops.quantize_index import INDEX_BLOCK

INDEX_DTYPE = torch.float16


class IndexKeys(NamedTuple):
    """Stored index keys: [0, Q) as codes and ranges, or None; [Q, N) as keys [B, Rk, N - Q, r]."""

    keys: Tensor
    codes: Tensor | None = None
    ranges: Tensor | None = None


class HeadwiseLayer(CacheLayerMixin):
    """The cache of one layer. The attention function stores into it, not `update`.

    Attributes:
        layout: counts, capacities and bytes (C++).
        start: int64 [B], first real key of each sequence, or None without padding.
        k_pages, v_pages: [B, F, page capacity, D], the KV heads that hold a retrieval head.
        k_ring, v_ring: [B, L, ring capacity, D], the others; slots as `ops.cache_append` has them.
        index_bits: bits of a stored index-key dimension.
        refine: whether keys of fewer than 16 bits are kept in 16 bits, too.
        index_pages: [B, Rk, page capacity, r] float16, with 16 bits or refine.
        index_codes, index_ranges, index_tail: with fewer bits, what `ops.quantize_index` made of
            the first `layout.coded` tokens, and without refine the others [B, Rk, tail capacity, r]
            float16.
        fallbacks: int64 [], tiles of sparse prefill that ran dense for want of room since the first
            token; None before a pass has selected.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        layout: HeadwiseLayout,
        sinks: int,
        token: str,
        index_bits: int = 16,
        refine: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.index_bits = index_bits
        self.refine = refine
        self.sinks = sinks
        self.token = token
        self.start: Tensor | None = None
        self.tensors: dict[str, Tensor] = {}
        self.fallbacks: Tensor | None = None
        self._expected = False

    def __getattr__(self, name: str) -> Tensor:
        tensors = self.__dict__.get("tensors", {})
        if name in tensors:
            return tensors[name]
        raise AttributeError(name)

    @property
    def length(self) -> int:
        """Tokens stored, padding included."""
        return self.layout.length

    @property
    def batch_size(self) -> int:
        """Sequences, 0 before the first token."""
        return self.tensors["k_pages"].shape[0] if self.tensors else 0

    def expect(self) -> None:
        """Announces the attention function that will store the tokens of the coming `update`."""
        self._expected = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands the new keys and values on: sparse attention reads the cache before it appends."""
        if not self._expected:
            raise RuntimeError(
                "rtpurbo.RTPurboCache: only the sparse model that it was made for can fill this "
                "cache; make a new cache after rtpurbo.restore"
            )
        self._expected = False
        return key_states, value_states

    def append(self, k: Tensor, v: Tensor, k_index: Tensor | None, start: Tensor | None) -> None:
        """Stores M new tokens: k, v [B, Hk, M, D] after RoPE, k_index [B, Rk, M, r].

        `settle` must follow once they are attended.
        """
        index_pages, index_slot = self._room(k, k_index, start)
        ops.cache_append(
            k, v, self.k_ring, self.v_ring, self.k_pages, self.v_pages,
            self.layout.full_heads, self.length, self.sinks, self.start,
            k_index, index_pages, index_slot,
        )  # fmt: skip
        self.layout.advance(k.shape[2])

    def append_projected(
        self, k: Tensor, v: Tensor, q_pre: Tensor, k_pre: Tensor, index: LayerIndex,
        start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`append` with the index keys of k_pre [B, Hk, M, D]; returns the index queries.

        These are [B, R, M, r], of q_pre [B, Hq, M, D]. `index` is on k's device.
        """
        heads, dim, _ = index.w_k.shape
        like = k.new_empty(k.shape[0], heads, 0, dim, dtype=INDEX_DTYPE)
        index_pages, index_slot = self._room(k, like, start)
        assert index_pages is not None
        q_index = ops.cache_append_projected(
            k, v, self.k_ring, self.v_ring, self.k_pages, self.v_pages,
            self.layout.full_heads, self.length, self.sinks, q_pre, k_pre,
            index.w_q, index.w_k, index.heads, index.kv_heads, index_pages, self.start, index_slot,
        )  # fmt: skip
        self.layout.advance(k.shape[2])
        return q_index

    @property
    def _keeps_pages(self) -> bool:
        """Whether index keys of all tokens are kept in 16 bits."""
        return self.index_bits == 16 or self.refine

    def _room(
        self, k: Tensor, like: Tensor | None, start: Tensor | None
    ) -> tuple[Tensor | None, int]:
        """Makes room for the tokens of k; where their index keys go, and their slot there.

        `like` has the dtype of the index keys and, but for the tokens, their shape.
        """
        if like is not None and self.index_bits < 16 and "index_codes" not in self.tensors:
            # No codes yet, but their shapes and types.
            nothing = ops.quantize_index(like[:, :, :0], self.index_bits)
            self.tensors["index_codes"], self.tensors["index_ranges"] = nothing
        if self.length == 0:
            self.start = start
        if self.layout.reserve(k.shape[2]):
            self._grow(k, like)
        if like is None:
            return None, -1
        if self._keeps_pages:
            return self.index_pages, self.length
        slot = self.length - self.layout.coded
        room = max(self.layout.tail_capacity, slot + k.shape[2])
        self._resize("index_tail", like, like.shape[1], room)
        return self.index_tail, slot

    def settle(self) -> None:
        """Quantises the index keys that no later row sees as near, in whole blocks."""
        if "index_codes" not in self.tensors:
            return
        layout, position = self.layout, self.layout.coded
        tail = self.index_pages[:, :, position:] if self.refine else self.index_tail
        joined = layout.settle()
        if joined:
            codes, ranges = ops.quantize_index(tail[:, :, :joined], self.index_bits)
            for name, new, size in (
                ("index_codes", codes, 1), ("index_ranges", ranges, INDEX_BLOCK),
            ):  # fmt: skip
                self._resize(name, new, new.shape[1], layout.code_capacity // size)
                ops.cache_append_index(new, self.tensors[name], position // size)
        if not self.refine and (joined or tail.shape[2] != layout.tail_capacity):
            rest = tail[:, :, joined : self.length - position]
            self.tensors["index_tail"] = _with_room(rest, layout.tail_capacity)

    def count_fallbacks(self, counts: Tensor) -> None:
        """Adds the tiles of counts [B, R, T] that are -1, on their device."""
        found = (counts < 0).sum()
        if self.fallbacks is None:
            # A tensor made in inference mode could not be added to outside it.
            with torch.inference_mode(False):
                self.fallbacks = torch.zeros_like(found)
        self.fallbacks += found

    def unroll(self, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Local keys, values and their start for M new tokens: cached ones in order, then these."""
        local = self.layout.local_heads
        if not local:
            return None, None, None
        position, sinks = self.length, self.sinks
        keys, start = ops.cache_unroll(self.k_ring, k, local, position, sinks, self.start)
        values, _ = ops.cache_unroll(self.v_ring, v, local, position, sinks, self.start)
        return keys, values, start

    def pages(self) -> tuple[Tensor, Tensor]:
        """The stored keys and values of the full KV heads, [B, F, N, D]."""
        return self.k_pages[:, :, : self.length], self.v_pages[:, :, : self.length]

    def index_keys(self) -> IndexKeys:
        """The stored index keys."""
        if self.index_bits == 16:
            return IndexKeys(self.whole_index_keys())
        coded = self.layout.coded
        if self.refine:
            keys = self.whole_index_keys()[:, :, coded:]
        else:
            keys = self.index_tail[:, :, : self.length - coded]
        return IndexKeys(
            keys,
            self.index_codes[:, :, :coded],
            self.index_ranges[:, :, : coded // INDEX_BLOCK],
        )

    def whole_index_keys(self) -> Tensor:
        """The index keys of all tokens in 16 bits, [B, Rk, N, r]; with 16 bits or refine."""
        return self.index_pages[:, :, : self.length]

    def _grow(self, k: Tensor, like: Tensor | None) -> None:
        layout = self.layout
        shapes = {
            "k_pages": (len(layout.full_heads), layout.page_capacity),
            "k_ring": (len(layout.local_heads), layout.ring_capacity),
        }
        shapes["v_pages"], shapes["v_ring"] = shapes["k_pages"], shapes["k_ring"]
        for name, (heads, capacity) in shapes.items():
            self._resize(name, k, heads, capacity)
        if like is not None and self._keeps_pages:
            self._resize("index_pages", like, like.shape[1], layout.page_capacity)
        self.is_initialized = True
        self.device = k.device

    def _resize(self, name: str, like: Tensor, heads: int, capacity: int) -> None:
        old = self.tensors.get(name)
        if old is None:
            self.tensors[name] = like.new_empty(like.shape[0], heads, capacity, like.shape[3])
        elif old.shape[2] != capacity:
            self.tensors[name] = _with_room(old, capacity)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError(
            "rtpurbo.RTPurboCache: tensors appear with the first tokens, not before"
        )

    def reset(self) -> None:
        """Forgets every token and gives the memory back."""
        self.layout.reset()
        self.tensors.clear()
        self.start = self.fallbacks = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in that order."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor[indices.to(tensor.device)]
        if self.start is not None:
            self.start = self.start[indices.to(self.start.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.repeat_interleave(repeats, dim=0)
        if self.start is not None:
            self.start = self.start.repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a ring has overwritten what going back would need."""
        if tokens_to_remove != 0:
            raise NotImplementedError(
                "rtpurbo.RTPurboCache: tokens cannot be taken back, local KV heads have forgotten "
                "what stood before them; assisted and speculative generation need "
                "rtpurbo.restore(model)"
            )

    def offload(self) -> None:
        raise NotImplementedError("rtpurbo.RTPurboCache: offloading is not available")

    prefetch = offload

    def weigh(self) -> tuple[int, int, int]:
        """Bytes of keys and values, of index keys, and of a dense cache of as many tokens."""
        if not self.tensors:
            return 0, 0, 0
        batch, size, layout = self.batch_size, self.k_pages.itemsize, self.layout
        return (
            layout.kv_bytes(batch, size),
            layout.index_bytes(batch),
            layout.dense_bytes(batch, size),
        )


def _with_room(stored: Tensor, capacity: int) -> Tensor:
    """A copy of stored [B, heads, n, D] with room for `capacity` tokens, n at most."""
    batch, heads, count, dim = stored.shape
    new = stored.new_empty(batch, heads, capacity, dim)
    new[:, :, :count] = stored
    return new


class RTPurboCache(Cache):
    """The KV cache of a sparse model; `generate()` makes one by itself.

    Args:
        model: a sparse model. The cache works with this model only, for as long as it is sparse.
    """

    def __init__(self, model: Any) -> None:
        from rtpurbo.context import state

        super().__init__(layers=[*make_layers(state(model))])

    @classmethod
    def adopt(cls, cache: DynamicCache, layers: list[HeadwiseLayer]) -> RTPurboCache:
        """Turns an empty DynamicCache into an RTPurboCache, in place.

        Whoever made the cache holds a reference to it and expects it to fill.
        """
        adopted = cast(RTPurboCache, cache)
        adopted.__class__ = cls
        Cache.__init__(adopted, layers=[*layers])
        return adopted

    @property
    def headwise_layers(self) -> list[HeadwiseLayer]:
        """The layers, by their own type."""
        return cast(list[HeadwiseLayer], self.layers)

    def nbytes(self) -> int:
        """Bytes held: keys and values of all heads, and the index keys."""
        return sum(sum(layer.weigh()[:2]) for layer in self.headwise_layers)

    def nbytes_dense(self) -> int:
        """Bytes that a dense cache of as many tokens would hold."""
        return sum(layer.weigh()[2] for layer in self.headwise_layers)


def make_layers(state: Any) -> list[HeadwiseLayer]:
    """Empty cache layers for a sparse model's `SparseState`."""
    config, sizes = state.config, state.sizes
    layers = []
    for context in state.layers:
        layout = HeadwiseLayout(
            kv_heads=sizes.kv_heads,
            full_heads=context.full_kv_heads,
            window=config.window,
            sinks=config.sinks,
            head_dim=sizes.head_dim,
            index_heads=len(context.index.kv_heads) if context.heads else 0,
            index_dim=config.index_dim,
            index_bits=config.index_bits,
            index_window=config.near_window,
            index_refine=config.refine,
        )
        layers.append(
            HeadwiseLayer(layout, config.sinks, state.token, config.index_bits, config.refine)
        )
    return layers


def resolve(state: Any, cache: Any) -> RTPurboCache:
    """The cache that a forward of a sparse model uses, given what the caller passed.

    Raises:
        ValueError: the cache belongs to another model, or is of a kind that cannot be taken over.
    """
    if isinstance(cache, RTPurboCache):
        if any(layer.token != state.token for layer in cache.headwise_layers):
            raise ValueError(
                "rtpurbo: this RTPurboCache was made for another model or before the last "
                "sparsify; make a new one with rtpurbo.RTPurboCache(model)"
            )
        return cache
    fresh = type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0
    if not fresh:
        raise ValueError(
            f"rtpurbo: a sparse model needs an RTPurboCache, got {type(cache).__name__}"
            + (" with tokens in it" if type(cache) is DynamicCache else "")
            + "; leave cache and cache_implementation out, or pass rtpurbo.RTPurboCache(model)"
        )
    return RTPurboCache.adopt(cache, make_layers(state))

"""What a sparse model carries with it: one `SparseState`, and one `LayerContext` per layer.

Neither is a submodule or a buffer, so that the model's state_dict stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from rtpurbo.cache import HeadwiseLayer
from rtpurbo.config import RTPurboConfig
from rtpurbo.families import Family, Geometry, heads_first, unwrap
from rtpurbo.index import Index, LayerIndex

KEY = "_rtpurbo"

Observer: TypeAlias = Callable[["LayerContext", Tensor, Tensor, Tensor | None], None]
"""Called with (context, q, k, start) in every layer: see `rtpurbo.patching.observe`."""


@dataclass
class LastForward:
    """References to what the last forward of a layer selected; `rtpurbo.stats` reads it.

    Attributes:
        rows, keys: M and N.
        start: first real keys, int64 [B] or None.
        batch: B.
        scale: of the logits.
        indices, counts, mass: of `select_tiles`; None if heads ran dense.
        selected, counts, mass: of `sparse_decode`; None if decode read every key, or the layer has
            no retrieval head.
        tokens: the indices of `select`, in place of `selected`, where that ran instead.
        q, lse: of a decode step, for the true mass.
        cache: the layer's cache, if it is still alive.
        kv_bytes, index_bytes, dense_bytes: what that cache held.
        fallbacks: what that cache counts; the cache goes on adding to it.
    """

    rows: int
    keys: int
    batch: int
    start: Tensor | None
    scale: float
    indices: Tensor | None = None
    selected: Tensor | None = None
    tokens: Tensor | None = None
    counts: Tensor | None = None
    mass: Tensor | None = None
    q: Tensor | None = None
    lse: Tensor | None = None
    cache: ReferenceType[HeadwiseLayer] | None = None
    kv_bytes: int = 0
    index_bytes: int = 0
    dense_bytes: int = 0
    fallbacks: Tensor | None = None

    def keep(self, cache: HeadwiseLayer) -> None:
        """Notes what the cache weighs and counts; the cache itself may die."""
        self.cache = ref(cache)
        self.kv_bytes, self.index_bytes, self.dense_bytes = cache.weigh()
        if self.indices is not None and self.counts is not None:
            cache.count_fallbacks(self.counts)
        self.fallbacks = cache.fallbacks


@dataclass(eq=False)
class LayerContext:
    """One attention layer of a sparse model.

    Attributes:
        number: the layer's index.
        heads: its retrieval heads, ascending.
        owners: KV head of each retrieval head.
        full_kv_heads: KV heads that are cached whole, ascending.
        q_pre, k_pre: q [B, Hq, M, D] and k [B, Hk, M, D] before RoPE, during a forward only.
        cache: the layer's cache, during a forward only.
        last: what the last forward selected.
    """

    state: SparseState
    number: int
    module: Any
    heads: list[int]
    owners: list[int]
    full_kv_heads: list[int]
    q_pre: Tensor | None = None
    k_pre: Tensor | None = None
    cache: HeadwiseLayer | None = None
    last: LastForward | None = None
    sources: tuple[Any, ...] = ()
    handles: list[Any] = field(default_factory=list)

    @property
    def index(self) -> LayerIndex:
        """The layer's index; only layers with retrieval heads have one."""
        return self.state.index.layers[self.number]

    @property
    def page_heads(self) -> list[int]:
        """Where each retrieval head's KV head stands among the cached pages."""
        return [self.full_kv_heads.index(owner) for owner in self.owners]

    def attach(self) -> None:
        """Hooks the submodules that give q and k before RoPE; again if they were exchanged."""
        family = self.state.family
        sources = (getattr(self.module, family.q_source), getattr(self.module, family.k_source))
        if sources != self.sources:
            self.detach()
            self.sources = sources
            for source, hook in zip(sources, (self._keep_q, self._keep_k), strict=True):
                self.handles.append(source.register_forward_hook(hook))

    def detach(self) -> None:
        """Removes the hooks of `attach`."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.sources = ()

    def release(self) -> None:
        """Drops what only a running forward needs."""
        self.q_pre = self.k_pre = self.cache = None

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention module: finds the layer's cache."""
        if not self.state.active:
            return
        if self.heads:
            self.attach()
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        self.cache = None if cache is None else cache.layers[self.number]
        if self.cache is not None:
            self.cache.expect()

    def _keep_q(self, module: Any, args: Any, output: Tensor) -> None:
        self.q_pre = heads_first(output.detach(), self.state.sizes.query_heads)

    def _keep_k(self, module: Any, args: Any, output: Tensor) -> None:
        self.k_pre = heads_first(output.detach(), self.state.sizes.kv_heads)


@dataclass(eq=False)
class SparseState:
    """What `sparsify` adds to a model.

    Attributes:
        config, index: how it runs sparse.
        family, sizes, identity: what model it is.
        implementation: the attention implementation to go back to.
        token: tells the caches of this model from those of others.
        layers: the contexts, in order.
        handles: hooks to remove.
        observer: see `rtpurbo.patching.observe`.
        active: False inside `rtpurbo.patching.dense`.
    """

    config: RTPurboConfig
    index: Index
    family: Family
    sizes: Geometry
    identity: str
    implementation: str
    token: str
    layers: list[LayerContext] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    observer: Observer | None = None
    active: bool = True
    _first_keys: tuple[Tensor, list[int]] | None = field(default=None, init=False, repr=False)

    def first_keys(self, start: Tensor | None, batch: int) -> list[int]:
        """start, int64 [B], on the host; read once for all layers of a forward, which share it.

        A graph capture cannot wait for it, and takes every key as real.
        """
        capturing = start is not None and start.is_cuda and torch.cuda.is_current_stream_capturing()
        if start is None or capturing:
            return [0] * batch
        if self._first_keys is None or self._first_keys[0] is not start:
            self._first_keys = start, start.tolist()
        return self._first_keys[1]


def state(model: Any) -> SparseState:
    """The state of a sparse model.

    Raises:
        ValueError: the model is not sparse.
    """
    found = unwrap(model).__dict__.get(KEY)
    if found is None:
        raise ValueError("rtpurbo: this model is not sparse; call rtpurbo.sparsify(model, config)")
    return found


class NoBackward(torch.autograd.Function):
    """Passes `out` on and refuses to differentiate it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "rtpurbo: gradients do not pass through a filled cache; run the whole sequence in one "
            "forward, without a cache, to train"
        )

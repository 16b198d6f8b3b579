"""sparsify and restore: what is attached to a transformers model, and taken off again."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from rtpurbo import attention, families
from rtpurbo.cache import RTPurboCache, resolve
from rtpurbo.config import RTPurboConfig
from rtpurbo.context import KEY, LayerContext, Observer, SparseState, state
from rtpurbo.index import Index

__all__ = ["dense", "is_sparse", "observe", "restore", "sparse", "sparsify", "state"]

_HEAD_DIM_MULTIPLE = 8
_MAX_GROUP = 16


def sparsify(model: Any, config: RTPurboConfig) -> Any:
    """Makes a model run sparse, in place, and returns it. `restore` undoes it.

    No weight is touched and no forward is copied: the model's attention implementation is set to
    `rtpurbo`, and hooks keep q and k before RoPE and supply the headwise cache. The index starts
    from the weights alone; `rtpurbo.train_index` makes it good.

    Args:
        model: a transformers model of a supported family, or a PEFT model around one.
        config: whose head map must be this model's.

    Raises:
        ValueError: the family is not supported, the head map is another model's, or the model is
            sparse already. The model is then as it was.
        NotImplementedError: an option or a size that is not available yet.
    """
    wrapped, model = model, families.unwrap(model)
    family = families.family(model)
    if is_sparse(model):
        raise ValueError("rtpurbo.sparsify: this model is sparse already; restore it first")
    sizes = families.geometry(model)
    identity = families.identity(model)
    _check(config, sizes, identity)
    index = Index.from_weights(model, config)
    attach(model, SparseState(
        config, index, family, sizes, identity, model.config._attn_implementation, uuid.uuid4().hex
    ))  # fmt: skip
    return wrapped


def restore(model: Any) -> Any:
    """Makes a sparse model what it was before `sparsify`, and returns it; the index is dropped.

    Raises:
        ValueError: the model is not sparse.
    """
    state(model)
    _detach(families.unwrap(model))
    return model


@contextmanager
def sparse(model: Any, config: RTPurboConfig) -> Iterator[Any]:
    """The model is sparse inside this context, and as it was before afterwards."""
    sparsify(model, config)
    try:
        yield model
    finally:
        restore(model)


def is_sparse(model: Any) -> bool:
    """Whether `sparsify` was applied and not undone."""
    return KEY in families.unwrap(model).__dict__


@contextmanager
def dense(model: Any) -> Iterator[Any]:
    """A sparse model runs as the dense one inside this context; its index stays.

    Caches do not cross over: what was filled inside is of no use outside, and the other way round.
    """
    inner, found = families.unwrap(model), state(model)
    active, implementation = found.active, inner.config._attn_implementation
    found.active = False
    inner.set_attn_implementation(found.implementation)
    try:
        yield model
    finally:
        if is_sparse(model):
            inner.set_attn_implementation(implementation)
        found.active = active


@contextmanager
def observe(model: Any, observer: Observer) -> Iterator[Any]:
    """Dense forwards of a sparse model that show q and k to `observer`, layer by layer.

    Args:
        observer: called with (context, q, k, start): the layer's `LayerContext` with `q_pre` and
            `k_pre` filled where it has retrieval heads, q [B, Hq, M, D] and k [B, Hk, M, D] after
            RoPE without gradient, and the first real keys int64 [B] or None. Forwards inside run
            without a cache.
    """
    found = state(model)
    before, found.observer = found.observer, observer
    try:
        yield model
    finally:
        found.observer = before


def attach(model: Any, found: SparseState) -> None:
    """Puts a state on a model: interfaces (registered at first use), contexts and hooks."""
    AttentionInterface.register(attention.IMPLEMENTATION, attention.attention_forward)
    AttentionMaskInterface.register(attention.IMPLEMENTATION, attention.mask_forward)
    model.__dict__[KEY] = found
    try:
        for number, module in enumerate(families.attention_layers(model)):
            heads = found.config.heads.retrieval_heads(number)
            owners = [head // found.sizes.group for head in heads]
            context = LayerContext(found, number, module, heads, owners, sorted(set(owners)))
            found.layers.append(context)
            module.__dict__[KEY] = context
            found.handles.append(
                module.register_forward_pre_hook(context.before_forward, with_kwargs=True)
            )
        decoder = families.decoder(model)
        hook = _DecoderHook(model, list(inspect.signature(decoder.forward).parameters))
        found.handles.append(decoder.register_forward_pre_hook(hook, with_kwargs=True))
        model.set_attn_implementation(attention.IMPLEMENTATION)
    except BaseException:
        _detach(model)
        raise


def _detach(model: Any) -> None:
    found = model.__dict__.pop(KEY)
    model.set_attn_implementation(found.implementation)
    for handle in found.handles:
        handle.remove()
    for context in found.layers:
        context.detach()
        del context.module.__dict__[KEY]


class _DecoderHook:
    """Forward pre-hook of the decoder: refuses what does not work, and supplies the cache.

    The cache is made or taken over under either of its names.
    """

    def __init__(self, model: Any, parameters: list[str]) -> None:
        self.model = model
        self.name = "cache" if "cache" in parameters else "past_key_values"
        self.position = parameters.index(self.name)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = state(self.model)
        name = next((n for n in ("past_key_values", "cache") if n in kwargs), self.name)
        cache = kwargs.get(name)
        if len(args) > self.position:
            raise TypeError(f"rtpurbo: {self.name} must be passed by keyword")
        if found.active:
            _refuse(args, kwargs)
        if not found.active or found.observer is not None:
            if cache is not None and (found.active or isinstance(cache, RTPurboCache)):
                raise ValueError(
                    "rtpurbo: inside dense() and observe() a sparse model takes no RTPurboCache; "
                    "pass use_cache=False"
                )
            if found.active:
                kwargs["use_cache"] = False
        elif cache is not None:
            kwargs[name] = resolve(found, cache)
        elif _use_cache(module, kwargs):
            kwargs[name] = RTPurboCache(self.model)
        return args, kwargs


def _refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "rtpurbo: output_attentions must be False, a sparse model has no attention matrices; "
            "use rtpurbo.patching.dense(model) or rtpurbo.restore(model)"
        )
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is not None and inputs.shape[1] == 0:
        raise ValueError("rtpurbo: a forward needs at least one token, got none")


def _use_cache(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether transformers would make a cache here."""
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = module.config.use_cache
    return bool(wanted) and not (
        getattr(module, "gradient_checkpointing", False) and module.training
    )


def _check(config: RTPurboConfig, sizes: families.Geometry, identity: str) -> None:
    heads = config.heads
    shape = (sizes.layers, sizes.query_heads)
    if tuple(heads.roles.shape) != shape:
        raise ValueError(
            "rtpurbo.sparsify: config.heads must have shape [layers, query heads] = "
            f"{list(shape)}, got {list(heads.roles.shape)}; it is another model's head map"
        )
    if heads.model_id is not None and not families.same_model(heads.model_id, identity):
        raise ValueError(
            f"rtpurbo.sparsify: config.heads was found on model {heads.model_id}, this one is "
            f"{identity}; detect the heads of this model"
        )
    if sizes.head_dim % _HEAD_DIM_MULTIPLE or sizes.group > _MAX_GROUP:
        raise NotImplementedError(
            f"rtpurbo.sparsify: head_dim must be a multiple of {_HEAD_DIM_MULTIPLE} and a KV head "
            f"have at most {_MAX_GROUP} query heads, got {sizes.head_dim} and {sizes.group}"
        )

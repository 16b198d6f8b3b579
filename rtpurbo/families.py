"""The model families: where a model keeps its attention layers and its pre-RoPE q and k.

A new family is one entry of `FAMILIES` if

- its layers are `base_model.layers`, each with `self_attn`, which calls the attention interface of
  transformers after RoPE;
- q and k before RoPE are the output of one submodule each, [B, M, H·D] from a projection or
  [B, M, H, D] from a norm over D that stands behind it. A fused q, k, v projection has no such
  output and is refused;
- what the projections read is an RMS norm of the hidden states times its `weight`; the index is
  initialised from the three.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """Names of the submodules from which q and k before RoPE come.

    Attributes:
        q_projection, k_projection: of an attention layer, linear.
        q_norm, k_norm: of an attention layer, where the family normalises q and k per head.
        input_norm: of a decoder layer, what the projections read.
    """

    model_type: str
    q_projection: str = "q_proj"
    k_projection: str = "k_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    input_norm: str = "input_layernorm"

    @property
    def q_source(self) -> str:
        """The submodule whose output is q before RoPE."""
        return self.q_norm or self.q_projection

    @property
    def k_source(self) -> str:
        """The submodule whose output is k before RoPE."""
        return self.k_norm or self.k_projection


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3", q_norm="q_norm", k_norm="k_norm"),
        Family("qwen3_moe", q_norm="q_norm", k_norm="k_norm"),
    )
}


@dataclass(frozen=True)
class Geometry:
    """Sizes that a head map, an index and a cache must agree on."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family(model: Any) -> Family:
    """The adapter of a model.

    Raises:
        ValueError: the family is not supported, the model's own sliding window is active, or its
            layers lack a submodule that the family names.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"rtpurbo: model must be one of the families {sorted(FAMILIES)}, got "
            f"{model_type or type(model).__name__}; another one is an entry in rtpurbo/families.py"
        )
    if _slides(config):
        raise ValueError(
            f"rtpurbo: this {model_type} model has an active sliding window of "
            f"{config.sliding_window} tokens, which would fight with rtpurbo's own; load it with "
            "config.sliding_window = None if it was trained for full attention"
        )
    found = FAMILIES[model_type]
    for layer in decoder(model).layers:
        _check_names(found, layer)
    return found


def _check_names(names: Family, layer: Any) -> None:
    attention = (names.q_projection, names.k_projection, names.q_norm, names.k_norm)
    for module, wanted in ((layer, (names.input_norm,)), (layer.self_attn, attention)):
        missing = [name for name in wanted if name is not None and not hasattr(module, name)]
        if missing:
            raise ValueError(
                f"rtpurbo: {type(module).__name__} of family {names.model_type} must have the "
                f"submodules {missing}, got {[name for name, _ in module.named_children()]}; name "
                "them in rtpurbo/families.py. A fused q, k, v projection is not supported"
            )


def _slides(config: Any) -> bool:
    if getattr(config, "sliding_window", None) is None:
        return False
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or "sliding_attention" in layer_types


def geometry(model: Any) -> Geometry:
    """The sizes of a supported model."""
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Geometry(config.num_hidden_layers, heads, config.num_key_value_heads, head_dim)


def decoder(model: Any) -> Any:
    """The module that holds the layers and receives the cache: `LlamaModel` of a causal model."""
    return model.base_model


def attention_layers(model: Any) -> list[Any]:
    """The self-attention modules in order."""
    return [layer.self_attn for layer in decoder(model).layers]


def warn_beyond_context(model: Any, length: int, what: str) -> None:
    """Warns that `length` tokens, called `what`, are more than the model was made for."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        warnings.warn(
            f"{what} is {length} tokens, beyond this model's context of {context} "
            "(config.max_position_embeddings); what it does there is not what it was trained for",
            stacklevel=3,
        )


_SIGNATURE_BITS = 128
_SAME_MODEL_BITS = 32


@torch.no_grad()
def identity(model: Any) -> str:
    """A name for the weights: family, sizes and the signs of 128 token-embedding weights.

    Steps of fine-tuning leave nearly all signs as they were, another training changes half of them;
    `same_model` tells them apart.
    """
    sizes = geometry(model)
    embedding = model.get_input_embeddings().weight
    flat = embedding.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, _SIGNATURE_BITS, dtype=torch.float64).long()
    bits = (flat[places.to(flat.device)] > 0).tolist()
    signature = sum(1 << i for i, bit in enumerate(bits) if bit)
    shape = f"{sizes.layers}x{sizes.query_heads}x{sizes.kv_heads}x{sizes.head_dim}"
    return f"{model.config.model_type}/{shape}/{embedding.shape[0]}/{signature:032x}"


def same_model(first: str, second: str) -> bool:
    """Whether two identities name one model, give or take a few steps of fine-tuning."""
    (sizes_a, _, bits_a), (sizes_b, _, bits_b) = first.rpartition("/"), second.rpartition("/")
    if sizes_a != sizes_b:
        return False
    try:
        differing = (int(bits_a, 16) ^ int(bits_b, 16)).bit_count()
    except ValueError:
        return first == second
    return differing <= _SAME_MODEL_BITS


def heads_first(states: Tensor, heads: int) -> Tensor:
    """[B, M, H·D] or [B, M, H, D], as the submodules give it, as [B, H, M, D]."""
    batch, length = states.shape[:2]
    dim = states.shape[2:].numel() // heads
    return states.view(batch, length, heads, dim).transpose(1, 2)

"""Random models of every family that are small, attend sharply and run in float32."""

import inspect

import torch
import transformers

from rtpurbo import HeadMap, RTPurboConfig

VOCABULARY = 64
LAYERS, HEADS, KV_HEADS, DIM = 2, 6, 3, 16
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
# KV head 0 is local in both layers, 1 is mixed, 2 retrieves with both of its query heads.
MIXED = torch.tensor([[False, False, True, False, True, True]] * LAYERS)
EVERY = {"sinks": 2, "index_dim": 8, "min_tokens": 4, "recent": 4}


def tiny(family="Llama", seed=1, **settings):
    """A causal model with 6 query heads, 3 KV heads and D = 16 in 2 layers."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "Mistral":
        options["sliding_window"] = None
    if family == "Qwen3Moe":
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        options |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    config = getattr(transformers, f"{family}Config")(**{**options, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    sharp = 12 if not hasattr(model.model.layers[0].self_attn, "q_norm") else 1
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= sharp
            layer.self_attn.k_proj.weight *= sharp
            layer.self_attn.o_proj.weight *= 10
            if sharp == 1:
                layer.self_attn.q_norm.weight.fill_(2.5)
            if getattr(layer.self_attn.q_proj, "bias", None) is not None:
                layer.self_attn.q_proj.bias.normal_()
                layer.self_attn.k_proj.bias.normal_()
        model.lm_head.weight *= 10
    return model


def config(roles=MIXED, **settings):
    """A configuration with small numbers; p = 1 and every key near unless said otherwise."""
    options = {**EVERY, "window": 4096, "top_p": 1.0}
    return RTPurboConfig(heads=HeadMap.from_roles(roles), **{**options, **settings})


def tokens(length=40, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def padded(lengths=(40, 23, 37), seed=0):
    """Left-padded tokens and their mask."""
    ids = tokens(max(lengths), len(lengths), seed)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def cache_name(model):
    """What this transformers calls the cache of a forward."""
    parameters = inspect.signature(model.model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def cache_of(output):
    return output["cache"] if "cache" in output else output["past_key_values"]


@torch.no_grad()
def in_pieces(model, ids, pieces, mask=None, cache=None):
    """Logits of a forward that is cut into chunks of these lengths, cached."""
    logits, done = [], 0
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    for piece in pieces:
        upto = done + piece
        options = {"use_cache": True, cache_name(model): cache}
        if mask is not None:
            options |= {"attention_mask": mask[:, :upto], "position_ids": positions[:, done:upto]}
        output = model(ids[:, done:upto], **options)
        cache = cache_of(output)
        logits.append(output.logits)
        done = upto
    return torch.cat(logits, 1)


@torch.no_grad()
def whole(model, ids, mask=None):
    """Logits of one forward without a cache."""
    if mask is None:
        return model(ids, use_cache=False).logits
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits

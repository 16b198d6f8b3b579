"""A tiny sparse byte-level model that the tests of evaluation, pictures and commands share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rtpurbo import HeadMap, RTPurboConfig, sparsify
from tests.tokenizers import byte_tokenizer

ROLES = torch.tensor([[True, False, False, False], [False, False, False, True]])
DOCUMENTS = [" ".join(f"line {i} tells of thing {i * 7 % 31}." for i in range(900))]


def network(sparse=False, **settings):
    """Two layers, 4 query heads, 2 KV heads, D = 8, 258 tokens; window 16 when sparse."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
            layer.self_attn.o_proj.weight *= 10
    if sparse:
        options = {"window": 16, "index_dim": 4, "min_tokens": 8}
        heads = HeadMap.from_roles(ROLES, kv_heads=2)
        sparsify(model, RTPurboConfig(heads=heads, **{**options, **settings}))
    return model


def saved(folder, sparse=False, dtype=torch.float32, **settings):
    """A folder with the model and its tokenizer."""
    from rtpurbo import save_pretrained

    model = network(sparse, **settings).to(dtype)
    if sparse:
        save_pretrained(model, folder, byte_tokenizer())
    else:
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder

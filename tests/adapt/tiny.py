"""A random model that is small and attends sharply, and text with something to find in it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rtpurbo import HeadMap, RTPurboConfig, sparsify

VOCABULARY = 64
ROLES = torch.tensor([[True, False, False, False], [False, True, False, True]])


def model(sparse=True, theta=10000.0, **options):
    """Two layers, 4 query heads, 2 KV heads, D = 16; window 32, RoPE of base theta."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
        made.lm_head.weight *= 10
    if sparse:
        settings = {"window": 32, "index_dim": 8, "min_tokens": 8, **options}
        sparsify(made, RTPurboConfig(heads=HeadMap.from_roles(ROLES), **settings))
    return made


def sequences(count=6, length=320):
    """Random tokens whose first third returns at the end."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        tokens[-length // 3 :] = tokens[: length // 3 + (length % 3 > 0)][
            : length - 2 * length // 3
        ]
        made.append(tokens.tolist())
    return made


def weights(made):
    return {name: value.clone() for name, value in made.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)

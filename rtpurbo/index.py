"""The index of a model: low-rank projections of pre-RoPE q and k for every retrieval head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rtpurbo import families
from rtpurbo.config import RTPurboConfig


@dataclass
class LayerIndex:
    """The index of one layer with R retrieval heads; all tensors float32.

    Attributes:
        heads: the retrieval heads, ascending.
        kv_heads: KV head of each index key: one a retrieval head, or one a full KV head if shared.
        index_map: which index key each retrieval head reads.
        w_q: [R, r, D]. w_k: [len(kv_heads), r, D].
        offset: [R], added to the index logits of far keys in form `beyond_window`.
        threshold: [R], pooled share at which a tile's selection stops in sparse prefill.
    """

    heads: list[int]
    kv_heads: list[int]
    index_map: list[int]
    w_q: Tensor
    w_k: Tensor
    offset: Tensor
    threshold: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as they are saved."""
        names = ("w_q", "w_k", "offset", "threshold")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> LayerIndex:
        """Moves the tensors in place if they are elsewhere."""
        if self.w_q.device != device:
            for name, tensor in self.tensors().items():
                setattr(self, name, tensor.to(device))
        return self


@dataclass
class Index:
    """The layer indices by layer number; layers without a retrieval head have none."""

    layers: dict[int, LayerIndex]
    trained: bool = False
    history: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def from_weights(cls, model: Any, config: RTPurboConfig) -> Index:
        """An index from the weights alone: covariances as if hidden states were white noise.

        A start for training; `min_tokens` and the window carry an untrained index meanwhile.
        """
        sizes, names = families.geometry(model), families.family(model)
        layers = {}
        for number, module in enumerate(families.attention_layers(model)):
            heads = config.heads.retrieval_heads(number)
            if heads:
                norm = getattr(families.decoder(model).layers[number], names.input_norm).weight
                cov_q = _covariance(
                    module, names.q_projection, names.q_norm, norm, sizes.query_heads
                )
                cov_k = _covariance(module, names.k_projection, names.k_norm, norm, sizes.kv_heads)
                layers[number] = from_covariance(heads, cov_q, cov_k, config)
        return cls(layers)


def from_covariance(
    heads: list[int], cov_q: Tensor, cov_k: Tensor, config: RTPurboConfig
) -> LayerIndex:
    """The best rank-r index for given second moments of pre-RoPE q [Hq, D, D] and k [Hk, D, D]."""
    group = cov_q.shape[0] // cov_k.shape[0]
    owners = [head // group for head in heads]
    kv_heads = sorted(set(owners)) if config.share_index_keys else owners
    index_map = (
        [kv_heads.index(o) for o in owners] if config.share_index_keys else [*range(len(heads))]
    )
    device = cov_q.device
    w_q = torch.empty(len(heads), config.index_dim, cov_q.shape[-1], device=device)
    w_k = torch.empty(len(kv_heads), config.index_dim, cov_q.shape[-1], device=device)
    for slot, kv_head in enumerate(kv_heads):
        readers = [entry for entry, key in enumerate(index_map) if key == slot]
        mean_q = cov_q[[heads[entry] for entry in readers]].mean(0)
        left, right = svd_projections(mean_q, cov_k[kv_head], config.index_dim)
        w_q[readers] = left
        w_k[slot] = right
    offset = torch.zeros(len(heads), device=device)
    threshold = torch.full((len(heads),), float(config.top_p), device=device)
    return LayerIndex(heads, kv_heads, index_map, w_q, w_k, offset, threshold)


def svd_projections(cov_q: Tensor, cov_k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """w_q, w_k [r, D] with (w_q q)·(w_k k) r^-1/2 ≈ q·k D^-1/2, best in the mean square.

    The leading singular directions of Cq^1/2 Ck^1/2, for independent q and k of these second
    moments [D, D]. Directions beyond D are zero.
    """
    dim = cov_q.shape[-1]
    root_q, inverse_q = symmetric_roots(cov_q.double())
    root_k, inverse_k = symmetric_roots(cov_k.double())
    u, s, vt = torch.linalg.svd(root_q @ root_k)
    kept = min(rank, dim)
    scale = s[:kept, None].sqrt() * (rank / dim) ** 0.25
    w_q, w_k = cov_q.new_zeros(2, rank, dim, dtype=torch.float32)
    w_q[:kept] = (scale * (u[:, :kept].T @ inverse_q)).float()
    w_k[:kept] = (scale * (vt[:kept] @ inverse_k)).float()
    return w_q, w_k


def symmetric_roots(cov: Tensor) -> tuple[Tensor, Tensor]:
    """cov^1/2 and cov^-1/2 of a covariance [D, D]; what it lacks counts as next to nothing."""
    values, vectors = torch.linalg.eigh(cov)
    floor = values.amax().clamp_min(torch.finfo(torch.float64).tiny) * 1e-9
    root = values.clamp_min(floor).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _covariance(
    module: Any, projection_name: str, norm_name: str | None, norm: Tensor, heads: int
) -> Tensor:
    """Second moments [heads, D, D] of q or k before RoPE for white hidden states."""
    projection = getattr(module, projection_name)
    weight = projection.weight.float().view(heads, -1, norm.numel()) * norm.float()
    cov = weight @ weight.transpose(-1, -2)
    if projection.bias is not None:
        bias = projection.bias.float().view(heads, -1)
        cov = cov + bias[:, :, None] * bias[:, None]
    if norm_name is not None:
        head_norm = getattr(module, norm_name)
        dim = cov.shape[-1]
        trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        gain = head_norm.weight.float()
        cov = cov * (dim / trace) * gain[:, None] * gain
    return cov

"""The operators of rtpurbo, one module each; their schemas live in csrc/ops."""

from rtpurbo.ops.attention import attention
from rtpurbo.ops.cache import cache_append, cache_append_index, cache_unroll
from rtpurbo.ops.cache_append_projected import cache_append_projected
from rtpurbo.ops.decode import decode
from rtpurbo.ops.index_kl import index_kl
from rtpurbo.ops.index_project import index_project
from rtpurbo.ops.near_lse import near_lse
from rtpurbo.ops.quantize_index import quantize_index
from rtpurbo.ops.retrieval_scores import retrieval_scores
from rtpurbo.ops.select import select
from rtpurbo.ops.select_tiles import select_tiles
from rtpurbo.ops.sparse_decode import sparse_decode
from rtpurbo.ops.top_p import top_p

__all__ = [
    "attention",
    "cache_append",
    "cache_append_index",
    "cache_append_projected",
    "cache_unroll",
    "decode",
    "index_kl",
    "index_project",
    "near_lse",
    "quantize_index",
    "retrieval_scores",
    "select",
    "select_tiles",
    "sparse_decode",
    "top_p",
]

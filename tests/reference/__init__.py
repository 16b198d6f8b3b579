"""What every operator computes, in float64 and in plain PyTorch that may build N x N matrices.

Each function takes the arguments of the operator of the same name and returns what it returns, with
float64 in place of every floating dtype. Gradients come from autograd. The attention operators also
compute in a low precision when `compute` names one, to show what error that precision makes.
"""

from tests.reference.attention import attention
from tests.reference.cache import (
    cache_append,
    cache_append_index,
    cache_append_projected,
    cache_unroll,
)
from tests.reference.decode import decode
from tests.reference.index_kl import index_kl
from tests.reference.index_project import index_project
from tests.reference.near_lse import near_lse
from tests.reference.quantize_index import quantize_index
from tests.reference.retrieval_scores import retrieval_scores
from tests.reference.select import select
from tests.reference.select_tiles import select_tiles
from tests.reference.sparse_decode import sparse_decode
from tests.reference.top_p import top_p

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

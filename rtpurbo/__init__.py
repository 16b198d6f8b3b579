"""rtpurbo: turn a full-attention Hugging Face model into a sparse one, and run it fast."""

from rtpurbo import data, ops
from rtpurbo._C import build_info
from rtpurbo.adapt import TrainResult, distill, train_index
from rtpurbo.cache import RTPurboCache
from rtpurbo.config import RTPurboConfig
from rtpurbo.heads import HeadMap
from rtpurbo.patching import is_sparse, restore, sparse, sparsify

__all__ = [
    "HeadMap",
    "RTPurboCache",
    "RTPurboConfig",
    "TrainResult",
    "build_info",
    "data",
    "distill",
    "is_sparse",
    "ops",
    "restore",
    "sparse",
    "sparsify",
    "train_index",
]

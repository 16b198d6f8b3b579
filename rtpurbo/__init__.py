"""rtpurbo: turn a full-attention Hugging Face model into a sparse one, and run it fast."""

from rtpurbo import data, ops
from rtpurbo._C import build_info
from rtpurbo.adapt import TrainResult, calibrate, distill, train_index
from rtpurbo.cache import RTPurboCache
from rtpurbo.checkpoint import from_pretrained, save_pretrained
from rtpurbo.config import RTPurboConfig
from rtpurbo.detect import detect_heads
from rtpurbo.evaluate import EvalReport, evaluate
from rtpurbo.heads import HeadMap
from rtpurbo.patching import is_sparse, restore, sparse, sparsify
from rtpurbo.stats import stats

__all__ = [
    "EvalReport",
    "HeadMap",
    "RTPurboCache",
    "RTPurboConfig",
    "TrainResult",
    "build_info",
    "calibrate",
    "data",
    "detect_heads",
    "distill",
    "evaluate",
    "from_pretrained",
    "is_sparse",
    "ops",
    "restore",
    "save_pretrained",
    "sparse",
    "sparsify",
    "stats",
    "train_index",
]

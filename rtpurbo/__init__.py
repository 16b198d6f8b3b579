"""rtpurbo: turn a full-attention Hugging Face model into a sparse one, and run it fast."""

from rtpurbo import ops
from rtpurbo._C import build_info

__all__ = ["build_info", "ops"]

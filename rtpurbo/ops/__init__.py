"""The operators of rtpurbo, one module each; their schemas live in csrc/ops."""

from rtpurbo.ops.top_p import top_p

__all__ = ["top_p"]

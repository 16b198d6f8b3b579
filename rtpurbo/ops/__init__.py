"""The operators of rtpurbo, one module each; their schemas live in csrc/ops."""

from rtpurbo.ops.attention import attention
from rtpurbo.ops.decode import decode
from rtpurbo.ops.near_lse import near_lse
from rtpurbo.ops.top_p import top_p

__all__ = ["attention", "decode", "near_lse", "top_p"]

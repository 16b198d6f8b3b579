"""What both rules know of the kernels."""

FAST_INDEX_DIM = 16
"""The one that selection has kernels for on tensor cores, and in one launch with decode."""

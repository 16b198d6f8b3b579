"""Kernels of other projects as baselines, where they are installed; nothing depends on them."""

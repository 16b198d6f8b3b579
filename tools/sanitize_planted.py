"""A planted fault for each of compute-sanitizer's tools, which that tool must report.

Usage: python tools/sanitize_planted.py TOOL
"""

import os
import sys

os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")  # torch asks where headers are; none is read

import torch

from rtpurbo import ops

RACE = """
extern "C" __global__ void race(int* out) {
  __shared__ int cells[64];
  cells[threadIdx.x] = out[threadIdx.x];
  out[threadIdx.x] = cells[63 - threadIdx.x];  // of the other warp, without a barrier
}"""
DIVERGENCE = """
extern "C" __global__ void divergence(int* out) {
  if (threadIdx.x < 48) __syncthreads();  // half of the second warp is missing
  out[threadIdx.x] = 1;
}"""


def launch(source: str, name: str) -> None:
    out = torch.zeros(64, dtype=torch.int32, device="cuda")
    kernel = torch.cuda._compile_kernel(source, name)
    kernel(grid=(1, 1, 1), block=(64, 1, 1), args=[out])


def overrun() -> None:
    """An operator reads 32 MiB of which 512 bytes are left."""
    keys = torch.zeros(1, 1, 1 << 19, 16, device="cuda")
    keys.untyped_storage().resize_(512)
    ops.quantize_index(keys, 8)


def unwritten() -> None:
    ops.quantize_index(torch.empty(1, 1, 64, 16, device="cuda"), 8)


FAULTS = {
    "memcheck": overrun,
    "racecheck": lambda: launch(RACE, "race"),
    "initcheck": unwritten,
    "synccheck": lambda: launch(DIVERGENCE, "divergence"),
}
FAULTS[sys.argv[1]]()
torch.cuda.synchronize()

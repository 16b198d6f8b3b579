#pragma once
// Stage 3: the mean over a tile's rows of the share that a block's far keys have in the row.

#include "csrc/cuda/select_tiles/problem.cuh"

namespace rtpurbo::cuda::tiles {

constexpr int kPoolThreads = 256;
constexpr int kPoolBlocks = 128;  // blocks of keys that a thread block pools

/// Share of a row's mass; 0 where no row is.
__device__ __forceinline__ float share(float mass, float total) {
  return total == INFINITY ? 0.0f : fast_exp2(mass - total);
}

/// The lanes' sum, in every lane.
__device__ __forceinline__ float warp_sum(float sum) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

/// A warp takes a block of keys at a time, a lane every 32nd row.
__global__ __launch_bounds__(kPoolThreads) void pool_kernel(
    const __grid_constant__ SelectTilesParams p, const __grid_constant__ Workspace w) {
  __shared__ float totals[kMaxTile];
  constexpr int kWarps = kPoolThreads / 32;
  const int64_t pieces = (w.blocks + kPoolBlocks - 1) / kPoolBlocks;
  const int64_t slot = blockIdx.x / pieces;
  const int first = static_cast<int>(blockIdx.x % pieces) * kPoolBlocks;
  const Tile tile = tile_of(p, w, slot);
  if (tile.empty()) return;
  const Range far = tile.far_blocks();
  const int begin = max(far.begin, first);
  const int end = min(far.end, first + kPoolBlocks);
  if (end <= begin) return;

  const int height = static_cast<int>(w.height);
  for (int i = threadIdx.x; i < height; i += kPoolThreads) totals[i] = w.totals[w.row(slot, i)];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const float scale = 1.0f / static_cast<float>(tile.rows());
#pragma unroll 2
  for (int block = begin + threadIdx.x / 32; block < end; block += kWarps) {
    const float* masses = w.masses + w.mass(slot, block, 0);
    float sum = 0.0f;
#pragma unroll 4
    for (int i = lane; i < height; i += 32) sum += share(masses[i], totals[i]);
    sum = warp_sum(sum);
    if (lane == 0) w.weights[slot * w.blocks + block] = sum * scale;
  }
}

}  // namespace rtpurbo::cuda::tiles

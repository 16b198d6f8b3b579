#pragma once
// Stage 3: the mean over a tile's rows of the share that a block's far keys have in the row.

#include <cuda_fp16.h>

#include "csrc/cuda/select_tiles/problem.cuh"
#include "csrc/cuda/select_tiles/quad.cuh"

namespace rtpurbo::cuda::tiles {

constexpr int kPoolThreads = 256;
constexpr int kPoolBlocks = 128;  // blocks of keys that a thread block pools

/// Share of a row's mass.
__device__ __forceinline__ float share(float mass, float total) { return fast_exp2(mass - total); }

/// The log-masses of four blocks, at a multiple of four. Blocks without far keys have none: another
/// is read in their place.
struct Floats {
  const float* masses;
  int at[4];
  __device__ Floats(const Workspace& w, int64_t slot, int block, const Range& far)
      : masses(&w.mass(slot, block, 0)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at[i] = (min(max(block + i, far.begin), far.end - 1) - block) * static_cast<int>(w.height);
    }
  }
  __device__ float4 load(int i) const {
    return make_float4(masses[at[0] + i], masses[at[1] + i], masses[at[2] + i], masses[at[3] + i]);
  }
};

struct Halves {
  const uint2* masses;
  __device__ Halves(const Workspace& w, int64_t slot, int block, const Range& /*far*/)
      : masses(&w.quad(slot, block / kQuad, 0)) {}
  __device__ float4 load(int i) const {
    const uint2 quad = masses[i];
    const float2 a = __half22float2(reinterpret_cast<const __half2&>(quad.x));
    const float2 b = __half22float2(reinterpret_cast<const __half2&>(quad.y));
    return make_float4(a.x * kLog2OfDot, a.y * kLog2OfDot, b.x * kLog2OfDot, b.y * kLog2OfDot);
  }
};

/// A warp takes four blocks of keys at a time, a lane every 32nd row. kRowsOfLane 0: any number.
template <typename Masses, int kRowsOfLane>
__global__ __launch_bounds__(kPoolThreads) void pool_kernel(
    const __grid_constant__ SelectTilesParams p, const __grid_constant__ Workspace w) {
  __shared__ float totals[kMaxTile];
  constexpr int kWarps = kPoolThreads / 32;
  const int pieces = static_cast<int>((w.blocks + kPoolBlocks - 1) / kPoolBlocks);
  const int64_t slot = blockIdx.x / pieces;
  const int first = static_cast<int>(blockIdx.x % pieces) * kPoolBlocks;
  const Tile tile = tile_of(p, w, slot);
  if (tile.empty()) return;
  const Range far = tile.far_blocks();
  const int begin = max(far.begin, first) / kQuad * kQuad;
  const int end = min(far.end, first + kPoolBlocks);
  if (end <= begin) return;

  const int height = static_cast<int>(w.height);
  for (int i = threadIdx.x; i < height; i += kPoolThreads) totals[i] = w.totals[w.row(slot, i)];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int rows = kRowsOfLane ? kRowsOfLane : height / 32;
  const float scale = 1.0f / static_cast<float>(tile.rows());
  const auto add = [](float a, float b) { return a + b; };
#pragma unroll 2
  for (int block = begin + threadIdx.x / 32 * kQuad; block < end; block += kWarps * kQuad) {
    const Masses masses(w, slot, block, far);
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float total = totals[lane + 32 * i];
      if (total == INFINITY) continue;  // no such row: its masses may not be written
      const float4 mass = masses.load(lane + 32 * i);
      sums[0] += share(mass.x, total);
      sums[1] += share(mass.y, total);
      sums[2] += share(mass.z, total);
      sums[3] += share(mass.w, total);
    }
    float pooled = share_out(sums, lane % 4, add);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) pooled += __shfl_xor_sync(kAll, pooled, step);
    if (lane < 4 && block + lane < w.blocks)
      w.weights[slot * w.blocks + block + lane] = pooled * scale;
  }
}

}  // namespace rtpurbo::cuda::tiles

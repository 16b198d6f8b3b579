#pragma once
// Where the scoring kernels leave what a row's keys of one chunk sum up to.

#include "csrc/cuda/select_tiles/problem.cuh"

namespace rtpurbo::cuda::tiles {

__device__ __forceinline__ void store(float2* to, const Log2Sum& sum) {
  *to = make_float2(sum.top, sum.sum);
}

__device__ __forceinline__ Log2Sum load_sum(const float2* from) {
  const float2 pair = *from;
  return {pair.x, pair.y};
}

/// Blocks of a chunk that are scored.
__device__ __forceinline__ Range chunk_blocks(const Range& scored, int64_t chunk) {
  const int first = static_cast<int>(chunk) * kChunk;
  return {max(scored.begin, first), min(scored.end, first + kChunk)};
}

/// Chunks that hold scored blocks.
__device__ __forceinline__ Range scored_chunks(const Range& scored) {
  if (scored.end <= scored.begin) return {0, 0};
  return {scored.begin / kChunk, (scored.end - 1) / kChunk + 1};
}

}  // namespace rtpurbo::cuda::tiles

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
__device__ __forceinline__ Range chunk_blocks(const Workspace& w, const Range& scored,
                                              int64_t chunk) {
  const int size = static_cast<int>(w.chunk_blocks);
  const int first = static_cast<int>(chunk) * size;
  return {max(scored.begin, first), min(scored.end, first + size)};
}

/// Chunks that hold scored blocks.
__device__ __forceinline__ Range scored_chunks(const Workspace& w, const Range& scored) {
  if (scored.end <= scored.begin) return {0, 0};
  const int size = static_cast<int>(w.chunk_blocks);
  return {scored.begin / size, (scored.end - 1) / size + 1};
}

}  // namespace rtpurbo::cuda::tiles

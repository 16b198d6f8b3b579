#pragma once
// Stage 4: how many members of each chunk are in for certain, and which ones the cut bin holds.

#include "csrc/cuda/select/cut.cuh"

namespace rtpurbo::cuda {

constexpr int kCollectThreads = 512;

__global__ __launch_bounds__(kCollectThreads) void collect_kernel(SelectParams p, Workspace w) {
  __shared__ int sure;
  Problem& problem = w.problems[blockIdx.y];
  const bool everything = problem.poisoned || p.p >= 1.0;
  const int cut_bin = problem.cut_bin;
  const float top = score_of(problem.top_key);
  const float* scores = w.scores + blockIdx.y * w.members;
  if (threadIdx.x == 0) sure = 0;
  __syncthreads();
  int own = 0;
  constexpr int kLoads = kChunk / (4 * kCollectThreads);
  float4 four[kLoads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk + 4 * threadIdx.x;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    four[j] = four_scores(scores, first + j * 4 * kCollectThreads, w.members);
  }
#pragma unroll
  for (int j = 0; j < 4 * kLoads; ++j) {
    const int64_t i = first + j / 4 * 4 * kCollectThreads + j % 4;
    const float score = element(four[j / 4], j % 4);
    const bool candidate = score != -INFINITY;
    const int bin = everything || !candidate ? 0 : bin_of(octaves_below(top, score));
    own += candidate && (everything || bin < cut_bin || (bin == cut_bin && !p.exact));
    const bool unsure = candidate && !everything && bin == cut_bin && p.exact;
    const uint32_t lanes = __ballot_sync(0xffffffffu, unsure);
    if (lanes == 0) continue;
    uint32_t place = 0;
    if (threadIdx.x % 32 == 0) place = atomicAdd(&problem.collected, __popc(lanes));
    place = __shfl_sync(0xffffffffu, place, 0) + __popc(lanes & ((1u << threadIdx.x % 32) - 1));
    if (unsure) w.list[blockIdx.y * w.members + place] = static_cast<int32_t>(i);
  }
  own = __reduce_add_sync(0xffffffffu, own);
  if (threadIdx.x % 32 == 0) atomicAdd(&sure, own);
  __syncthreads();
  if (threadIdx.x == 0) w.chunk_counts[blockIdx.y * w.chunks + blockIdx.x] = sure;
}

}  // namespace rtpurbo::cuda

#pragma once
// Stage 2: masses and counts of the members by bin of their log-weight.

#include "csrc/cuda/select/scan.cuh"

namespace rtpurbo::cuda {

constexpr int kBinsThreads = 512;

/// Whether the row takes every candidate, or has none; then no bin is needed.
__device__ __forceinline__ bool trivial(const SelectParams& p, const Problem& problem) {
  return problem.poisoned || p.p >= 1.0 || problem.top_key == 0;
}

__global__ __launch_bounds__(kBinsThreads) void histogram_kernel(SelectParams p, Workspace w,
                                                                 int64_t members_of_block) {
  __shared__ uint32_t mass[kBins], count[kBins];
  const Problem& problem = w.problems[blockIdx.y];
  if (trivial(p, problem)) return;
  for (int bin = threadIdx.x; bin < kBins; bin += kBinsThreads) mass[bin] = count[bin] = 0;
  __syncthreads();
  const float top = score_of(problem.top_key);
  const float* scores = w.scores + blockIdx.y * w.members;
  const int64_t begin = blockIdx.x * members_of_block;
  const int64_t end = min(begin + members_of_block, w.members);
  const auto add = [&](float score) {
    if (score == -INFINITY) return;
    const float octaves = octaves_below(top, score);
    const int bin = bin_of(octaves);
    atomicAdd(&mass[bin],
              static_cast<uint32_t>(
                  weight_in_bin(octaves, bin) * static_cast<float>(1 << kBinFraction) + 0.5f));
    atomicAdd(&count[bin], 1u);
  };
  constexpr int kLoads = 2;
  for (int64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * kBinsThreads * kLoads) {
    float4 four[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) four[j] = four_scores(scores, i + 4 * kBinsThreads * j, end);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) add(element(four[j], e));
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kBinsThreads) {
    if (count[bin] == 0) continue;
    atomicAdd(&w.bin_mass[blockIdx.y * kBins + bin], static_cast<unsigned long long>(mass[bin]));
    atomicAdd(&w.bin_count[blockIdx.y * kBins + bin], count[bin]);
  }
}

}  // namespace rtpurbo::cuda

#pragma once
// Stage 6: the members that are in, by ascending position, then -1.

#include "csrc/cuda/select/finish.cuh"

namespace rtpurbo::cuda {

__global__ __launch_bounds__(kCollectThreads) void emit_kernel(SelectParams p, Workspace w) {
  constexpr int kPerThread = kChunk / kCollectThreads;
  using Scan = cub::BlockScan<int, kCollectThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  const Problem problem = w.problems[blockIdx.y];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  int32_t* indices = p.indices_ptr + (w.first + blockIdx.y) * p.capacity;
  const bool fits = problem.count <= p.capacity;
  if (fits && begin < w.members) {
    const bool everything = problem.poisoned || p.p >= 1.0;
    const float top = score_of(problem.top_key);
    const int64_t first = begin + threadIdx.x * kPerThread;
    const float* scores = w.scores + blockIdx.y * w.members;
    float4 four[kPerThread / 4];
#pragma unroll
    for (int j = 0; j < kPerThread / 4; ++j) {
      four[j] = four_scores(scores, first + 4 * j, w.members);
    }
    bool in[kPerThread];
    int own = 0;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const float score = element(four[j / 4], j % 4);
      in[j] = score != -INFINITY;
      if (in[j] && !everything) {
        const int bin = bin_of(octaves_below(top, score));
        const uint32_t key = ordered_key(score);
        in[j] =
            bin < problem.cut_bin ||
            (bin == problem.cut_bin &&
             (key > problem.cut_key || (key == problem.cut_key && first + j <= problem.cut_index)));
      }
      own += in[j];
    }
    int slot;
    Scan(scan_storage).ExclusiveSum(own, slot);
    slot += w.chunk_counts[blockIdx.y * w.chunks + blockIdx.x];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      if (in[j]) indices[slot++] = static_cast<int32_t>(first + j);
    }
  }
  const int64_t kept = fits ? problem.count : 0;
  const int64_t end = min(begin + kChunk, p.capacity);
  for (int64_t i = max(begin, kept) + threadIdx.x; i < end; i += kCollectThreads) indices[i] = -1;
}

}  // namespace rtpurbo::cuda

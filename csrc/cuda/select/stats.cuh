#pragma once
// The statistics of warps and of blocks, merged in a fixed order.

#include "csrc/cuda/select/team.cuh"

namespace rtpurbo::cuda {

/// log of a sum of exponentials, kept as a shift and a sum relative to it.
struct LogSum {
  float shift = -INFINITY;
  float sum = 0.0f;

  /// A NaN or an infinite score makes the sum NaN.
  __device__ __noinline__ void add(float other_shift, float other_sum) {
    const float top = fmaxf(shift, other_shift);
    if (top == -INFINITY && other_sum == 0.0f) return;
    const float base = softmax_shift(top);
    sum = sum * expf(shift - base) + other_sum * expf(other_shift - base);
    shift = top;
  }

  __device__ float log() const { return sum == 0.0f ? -INFINITY : shift + logf(sum); }
};

/// The lanes' sums together, in lane 0.
__device__ __forceinline__ LogSum warp_log_sum(LogSum sum) {
#pragma unroll 1
  for (int step = 16; step > 0; step /= 2) {
    sum.add(__shfl_down_sync(0xffffffffu, sum.shift, step),
            __shfl_down_sync(0xffffffffu, sum.sum, step));
  }
  return sum;
}

/// Of one warp's lanes, in lane 0.
__device__ __forceinline__ BlockStats warp_stats(uint32_t top_key, uint32_t poisoned,
                                                 int32_t candidates, LogSum rest, bool has_rest) {
  if (has_rest) rest = warp_log_sum(rest);
  return {__reduce_max_sync(0xffffffffu, top_key), __reduce_or_sync(0xffffffffu, poisoned),
          __reduce_add_sync(0xffffffffu, candidates), rest.shift, rest.sum};
}

/// Of `count` parts, which other blocks may have written; by one warp, in lane 0.
__device__ __forceinline__ BlockStats merge_stats(const BlockStats* parts, int count,
                                                  bool has_rest) {
  uint32_t top_key = 0, poisoned = 0;
  int32_t candidates = 0;
  LogSum rest;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const volatile BlockStats& part = parts[i];
    top_key = max(top_key, part.top_key);
    poisoned |= part.poisoned;
    candidates += part.candidates;
    if (has_rest) rest.add(part.rest_shift, part.rest_sum);
  }
  return warp_stats(top_key, poisoned, candidates, rest, has_rest);
}

}  // namespace rtpurbo::cuda

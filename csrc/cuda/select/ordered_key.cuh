#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace rtpurbo::cuda {

/// Larger scores get larger keys; 0 is below every score.
__device__ __forceinline__ uint32_t ordered_key(float score) {
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace rtpurbo::cuda

#pragma once
// Values as two halves each, so that half products see 22 bits of them: the value as a half, and
// what that left, made as large as the value.

#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/cuda/ptx/mma.cuh"

namespace rtpurbo::cuda {

constexpr float kRestScale = 1 << 11;

__device__ __forceinline__ float rest_of(float value) {
  return (value - __half2float(__float2half_rn(value))) * kRestScale;
}

/// The upper, or lower, halves of two values.
__device__ __forceinline__ uint32_t half_parts(float a, float b, bool lower) {
  return lower ? ptx::pack_pair<__half>(rest_of(a), rest_of(b)) : ptx::pack_pair<__half>(a, b);
}

/// The sum of products with the upper halves and of those with the lower ones.
__device__ __forceinline__ float joined(float upper, float lower) {
  return fmaf(lower, 1.0f / kRestScale, upper);
}

/// Divided by 2 to this power the largest value is in [2, 4): far from the ends of the halves.
template <int kDim>
__device__ __forceinline__ int exponent_of(const float* values) {
  float top = 0.0f;
#pragma unroll
  for (int d = 0; d < kDim; ++d) top = fmaxf(top, fabsf(values[d]));
  return top > 0.0f ? min(max(ilogbf(top), -90), 90) - 1 : 0;
}

}  // namespace rtpurbo::cuda

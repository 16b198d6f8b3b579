#pragma once
// Reductions over a quad: four neighbouring lanes, which share the rows of a tensor-core result.

#include <cuda_runtime.h>

#include <cstdint>

namespace rtpurbo::cuda::tiles {

constexpr unsigned kAll = 0xffffffffu;

/// The larger, or NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

/// The same of two pairs of fp16.
__device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

/// Of four values a lane, combines each over the lanes of a quad: lane t gets that of value t.
template <typename T, typename Op>
__device__ __forceinline__ T share_out(const T (&v)[4], int t, Op op) {
  const bool high = t & 2, odd = t & 1;
  const T a = op(high ? v[2] : v[0], __shfl_xor_sync(kAll, high ? v[0] : v[2], 2));
  const T b = op(high ? v[3] : v[1], __shfl_xor_sync(kAll, high ? v[1] : v[3], 2));
  return op(odd ? b : a, __shfl_xor_sync(kAll, odd ? a : b, 1));
}

}  // namespace rtpurbo::cuda::tiles

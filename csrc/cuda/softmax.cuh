#pragma once
// Pieces of an online softmax. A maximum drops NaN; the sum of the terms keeps it.

#include <cuda_runtime.h>

namespace rtpurbo::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

/// 2^x to 2 ulp; 0 below the normal numbers.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// log2(x) to 2^-22 of a sum of weights, or of its logarithm where that is more; -inf of none.
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Log of sum 2^maximum, in nats.
__device__ __forceinline__ float lse_of_octaves(float maximum, float sum) {
  return (maximum + log2f(sum)) * kLn2;
}

/// What is subtracted from scores before the exponential: their maximum, 0 when there is none.
__device__ __forceinline__ float softmax_shift(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

/// The largest score so far, and the sum of exp(scale (score - maximum)).
struct SoftmaxSum {
  float maximum = -INFINITY;
  float sum = 0.0f;

  /// factor is scale log2(e).
  __device__ void merge(const SoftmaxSum& other, float factor) {
    const float top = fmaxf(maximum, other.maximum);
    const float shift = softmax_shift(top);
    sum = sum * exp2f((maximum - shift) * factor) +
          other.sum * exp2f((other.maximum - shift) * factor);
    maximum = top;
  }

  __device__ float lse(float scale) const { return maximum * scale + logf(sum); }
};

}  // namespace rtpurbo::cuda

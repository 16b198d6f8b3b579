#pragma once
// By tensor cores, the log-masses that two blocks of 64 keys have in 16 rows. The order of the
// dimensions is free as long as both operands agree, so a lane loads its part of a key at once.

#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/select_tiles/problem.cuh"
#include "csrc/cuda/select_tiles/quad.cuh"

namespace rtpurbo::cuda::tiles {

namespace mma {

constexpr int kStep = 2 * kBlock;

/// Scores of 16 rows and 64 keys: with g = lane / 4 and t = lane % 4, of row g + 8 half and key
/// 8 j + 2 t + e in at[j][2 half + e].
struct Scores {
  float at[8][4];
};

/// Four dimensions of a row, 4 t and on.
__device__ __forceinline__ uint2 load_quarter(const __half* row, int t) {
  return __ldg(reinterpret_cast<const uint2*>(row) + t);
}

/// The keys of a block as the second operand.
struct Keys {
  uint2 at[8];
};

/// Keys at or behind `end` are not read, and zero.
template <bool kGuarded>
__device__ __forceinline__ Keys load_keys(const __half* keys, int first, int end, int g, int t) {
  Keys block = {};
  const __half* own = keys + static_cast<int64_t>(first + g) * kDim;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (!kGuarded || first + 8 * j + g < end) block.at[j] = load_quarter(own + 8 * j * kDim, t);
  }
  return block;
}

__device__ __forceinline__ Scores score(const uint32_t (&query)[4], const Keys& keys) {
  Scores scores = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    ptx::mma_m16n8k16<__half>(scores.at[j], query, keys.at[j].x, keys.at[j].y);
  }
  return scores;
}

/// What a lane makes of a pair of blocks; value 2 half + block.
template <bool kMax>
struct PairMass {
  float top[4];
  float sum[4];

  /// Takes in the scores for which keep(half, key of the block) holds.
  template <typename Keep>
  __device__ void take(int block, const Scores& scores, float factor, int t, const Keep& keep) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float s = scores.at[i / 2][2 * half + i % 2];
        if (!keep(half, i / 2 * 8 + 2 * t + i % 2)) continue;
        largest = kMax ? max_or_nan(largest, s) : fmaxf(largest, s);
      }
      const int v = 2 * half + block;
      top[v] = largest;
      if constexpr (kMax) continue;
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 2));
      top[v] = softmax_shift(largest) * factor;
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float s = scores.at[i / 2][2 * half + i % 2];
        const float weight = fast_exp2(fmaf(s, factor, -top[v]));
        if (keep(half, i / 2 * 8 + 2 * t + i % 2)) total += weight;
      }
      sum[v] = total;
    }
  }

  /// Lane t gets the log-mass of value t.
  __device__ float finish(float factor, int t) const {
    if constexpr (kMax) {
      return factor * share_out(top, t, [](float a, float b) { return max_or_nan(a, b); });
    }
    const float total = share_out(sum, t, [](float a, float b) { return a + b; });
    const float base = t & 2 ? (t & 1 ? top[3] : top[2]) : (t & 1 ? top[1] : top[0]);
    return base + __log2f(total);
  }
};

}  // namespace mma

}  // namespace rtpurbo::cuda::tiles

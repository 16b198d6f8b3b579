#pragma once
// Values that are infinite or NaN in a masked block: 0 * inf is NaN, so that the tensor cores would
// carry them to rows that do not see their keys.

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/ptx/named_barrier.cuh"
#include "csrc/cuda/sm90/attention_shared.cuh"

namespace rtpurbo::cuda::sm90 {

/// Whether one of kWidth keys has a poisoned value; called by a whole warpgroup.
template <typename T, int kWidth, int kDim>
__device__ __forceinline__ bool is_poisoned(const unsigned char* values, int panel_bytes,
                                            const ptx::NamedBarrier& barrier) {
  constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  uint32_t top = 0;  // the largest magnitudes: they order as integers do
#pragma unroll
  for (int panel = 0; panel < kDim / kBoxColumns; ++panel) {
    const uint4* chunks = reinterpret_cast<const uint4*>(values + panel * panel_bytes);
#pragma unroll 4
    for (int i = threadIdx.x % kWarpgroup; i < kWidth * kBoxColumns * 2 / 16; i += kWarpgroup) {
      const uint4 chunk = chunks[i];
      top = __vimax3_u16x2(top, chunk.x & 0x7fff7fff, chunk.y & 0x7fff7fff);
      top = __vimax3_u16x2(top, chunk.z & 0x7fff7fff, chunk.w & 0x7fff7fff);
    }
  }
  return barrier.any((top & 0xffff) >= kInfinity || top >> 16 >= kInfinity);
}

/// out += weights V of the keys that a row sees; `m` is the position of the first row.
template <typename T, int kWidth, int kDim>
__device__ __forceinline__ void add_seen_values(float (&out)[kDim / 2],
                                                const float (&weights)[kWidth / 2],
                                                const unsigned char* values, int panel_bytes,
                                                const KeyBlock<kWidth / kBoxRows>& block, int m) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int key = 0; key < kWidth; ++key) {
    float mine[2] = {};
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {  // no run-time index into registers
      if (i / 4 * 2 + i % 2 == key / 8 * 2 + key % 2) mine[i / 2 % 2] = weights[i];
    }
    const int begin = key < kBoxRows ? block.begin[0] : block.begin[kWidth / kBoxRows - 1];
    const int n = begin + key % kBoxRows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float weight = __shfl_sync(~0u, mine[h], (lane & ~3) | (key % 8 / 2));
      const bool seen = n >= block.first_seen(m + 8 * h) && n <= block.last_seen(m + 8 * h);
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const int chunk = j % 8 ^ key % 8;  // by the swizzle
        const T* pair = reinterpret_cast<const T*>(values + j / 8 * panel_bytes + key * 128 +
                                                   chunk * 16 + lane % 4 * 4);
        out[4 * j + 2 * h] += seen ? weight * to_float(pair[0]) : 0.0f;
        out[4 * j + 2 * h + 1] += seen ? weight * to_float(pair[1]) : 0.0f;
      }
    }
  }
}

}  // namespace rtpurbo::cuda::sm90

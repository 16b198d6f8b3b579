// A thread block takes one block of keys: threadIdx.x runs along the bytes of a key's codes,
// threadIdx.y over stripes of consecutive keys, which stay in registers between the two passes.

#include <algorithm>

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/quantize_index.h"
#include "csrc/ops/common/index_block.h"

namespace rtpurbo::cuda {
namespace {

constexpr int kMaxColumns = 32;
constexpr int kStripes = 8;
constexpr int kStripeKeys = kIndexBlock / kStripes;

/// Of equal values the earlier stays, as in a single pass (signed zeros show it), and a NaN stays.
struct Range {
  float low, high;

  __device__ void add(const Range& later) {
    low = later.low >= low || low != low ? low : later.low;
    high = later.high <= high || high != high ? high : later.high;
  }
};

/// Minimum and step of a dimension.
struct Scale {
  __half low, step;

  __device__ Scale(const Range& range, float levels)
      : low(__float2half_rd(range.low)),
        step(__float2half_ru((range.high - __half2float(low)) / levels)) {
    if (isfinite(__half2float(low)) && isfinite(__half2float(step))) return;
    low = __ushort_as_half(0x7e00);
    step = __ushort_as_half(0);
  }

  __device__ uint8_t code(float key, float levels) const {
    const float divisor = __half2float(step);
    const float code = rintf((key - __half2float(low)) / (divisor == 0.0f ? 1.0f : divisor));
    return code > 0.0f ? static_cast<uint8_t>(fminf(code, levels)) : 0;  // 0 for NaN
  }
};

template <typename T, int kBits>
__global__ __launch_bounds__(kMaxColumns* kStripes) void quantize_kernel(
    const __grid_constant__ QuantizeIndexParams p) {
  constexpr int kHalves = 8 / kBits;  // dimensions of a byte
  constexpr float kLevels = (1 << kBits) - 1;
  __shared__ Range ranges[kHalves][kStripes][kMaxColumns];
  const int64_t blocks = p.keys / kIndexBlock;
  const int64_t unit = blockIdx.x;
  const int64_t head = unit / blocks;
  const int x = threadIdx.x, stripe = threadIdx.y;
  const int64_t key_begin = unit % blocks * kIndexBlock + stripe * kStripeKeys;
  const T* keys = head_rows<const T>(p.k_index, head / p.heads, head % p.heads) +
                  key_begin * p.k_index.row_stride;
  const int64_t bytes = (p.dim + kHalves - 1) / kHalves;  // code_bytes
  uint8_t* codes = p.codes_ptr + (unit * kIndexBlock + stripe * kStripeKeys) * bytes;
  __half* block_ranges = static_cast<__half*>(p.ranges_ptr) + unit * 2 * p.dim;

  for (int64_t first = 0; first < bytes; first += blockDim.x) {
    const int64_t column = first + x;
    float key[kHalves][kStripeKeys];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int64_t d = column + half * bytes;
#pragma unroll
      for (int i = 0; i < kStripeKeys; ++i) {
        key[half][i] = d < p.dim ? to_float(keys[i * p.k_index.row_stride + d]) : 0.0f;
      }
      Range range{key[half][0], key[half][0]};
#pragma unroll
      for (int i = 1; i < kStripeKeys; ++i) range.add({key[half][i], key[half][i]});
      ranges[half][stripe][x] = range;
    }
    __syncthreads();
    uint8_t packed[kStripeKeys] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int64_t d = column + half * bytes;
      Range range = ranges[half][0][x];
      for (int i = 1; i < kStripes; ++i) range.add(ranges[half][i][x]);
      const Scale scale(range, kLevels);
      if (stripe == 0 && d < p.dim) {
        block_ranges[d] = scale.low;
        block_ranges[p.dim + d] = scale.step;
      }
#pragma unroll
      for (int i = 0; i < kStripeKeys; ++i) {
        packed[i] |= scale.code(key[half][i], kLevels) << (half * kBits);
      }
    }
    if (column < bytes) {
#pragma unroll
      for (int i = 0; i < kStripeKeys; ++i) codes[i * bytes + column] = packed[i];
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_quantize_index(const QuantizeIndexParams& p, cudaStream_t stream) {
  const int64_t units = p.batch * p.heads * (p.keys / kIndexBlock);
  if (units == 0 || p.dim == 0) return cudaSuccess;
  const int64_t bytes = code_bytes(p.dim, p.bits);
  const dim3 block(static_cast<unsigned>(std::min<int64_t>(bytes, kMaxColumns)), kStripes);
  const dim3 grid(static_cast<unsigned>(units));
  return dispatch_element(p.type, [&](auto element) {
    using T = decltype(element);
    if (p.bits == 4) {
      quantize_kernel<T, 4><<<grid, block, 0, stream>>>(p);
    } else {
      quantize_kernel<T, 8><<<grid, block, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace rtpurbo::cuda

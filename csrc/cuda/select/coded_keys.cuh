#pragma once
// Scores of 4- and 8-bit index keys. With 16 dimensions a warp scores a block of 64 keys on the
// tensor cores: per key only codes are touched, since
//   q . (minimum + step * code) = q . minimum + (q * step) . code.
// Codes are exact as halves, queries are split into a half and the half of what it left, and sums
// are float32: scores are within a few 1e-6 of the sizes of their terms.

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/select/half_parts.cuh"
#include "csrc/ops/common/heads_view.h"
#include "csrc/ops/common/index_block.h"

namespace rtpurbo::cuda {

/// Index dim of CodedBlock and CodedQuery.
constexpr int kCodedDim = 16;

/// Whether CodedBlock can load every block of these codes and ranges (strides in elements).
inline bool coded_blocks_are_packed(const HeadsView& codes, const HeadsView& ranges, int64_t bits) {
  const int64_t key = code_bytes(kCodedDim, bits);
  const int64_t places =
      reinterpret_cast<int64_t>(codes.ptr) | codes.batch_stride | codes.head_stride;
  const int64_t range_places =
      reinterpret_cast<int64_t>(ranges.ptr) | ranges.batch_stride * 2 | ranges.head_stride * 2;
  return codes.row_stride == key && ranges.row_stride == 2 * kCodedDim && places % key == 0 &&
         range_places % 8 == 0;
}

/// What a lane holds of a block of 64 keys.
template <int kBits>
struct CodedBlock {
  static_assert(kBits == 4 || kBits == 8);
  static constexpr int kKeyBytes = code_bytes(kCodedDim, kBits);
  static constexpr int kBytes = kIndexBlock * kKeyBytes;  // from block to block of codes
  static constexpr int kRanges = 2 * kCodedDim;           // from block to block of ranges
  static constexpr int kWords = kKeyBytes / 4;

  uint32_t keys[2][kWords];  // keys `lane` and `lane + 32`
  uint2 minima;              // of dimensions 4t to 4t + 3, t = lane % 4
  __half step;               // of dimension lane - 16; 0 in lanes below

  /// `codes` and `ranges` point to the block, in global memory.
  __device__ __forceinline__ static CodedBlock load(const uint8_t* codes, const __half* ranges,
                                                    int lane) {
    using Key = std::conditional_t<kBits == 4, uint2, uint4>;
    CodedBlock block;
    const Key* keys = reinterpret_cast<const Key*>(codes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Key key = __ldcs(&keys[lane + 32 * i]);  // read once
      block.keys[i][0] = key.x;
      block.keys[i][1] = key.y;
      if constexpr (kBits == 8) {
        block.keys[i][2] = key.z;
        block.keys[i][3] = key.w;
      }
    }
    block.minima = __ldg(reinterpret_cast<const uint2*>(ranges) + lane % 4);
    block.step = __ushort_as_half(0);
    if (lane >= kCodedDim) block.step = __ldg(&ranges[lane]);
    return block;
  }
};

/// A query ready to score blocks of keys; all lanes of the warp together. A query with a NaN or an
/// infinity has NaN scores only.
///
/// Four products m16n8k16 score 64 keys. In each, row g of A holds 4 codes of the first keys of
/// lanes 4g to 4g + 3, row g + 8 of their second keys; columns 2t and 2t + 1 of B hold the query,
/// upper and lower halves, for the keys of lanes t modulo 4, and zeros against the other lanes'
/// codes. So a lane unpacks its own keys, and the results arrive where the keys are.
template <int kBits>
class CodedQuery {
 public:
  /// `query`: 16 values with the scale of the scores, in shared or global memory.
  __device__ __forceinline__ CodedQuery(const float* query, int lane) {
    const int exponent = exponent_of<kCodedDim>(query);
    const float scale = ldexpf(1.0f, -exponent);
    unscale_ = ldexpf(1.0f, exponent);
    const int d = lane % kCodedDim;
    weight_ = lane < kCodedDim ? 0.0f : query[d] * scale;
    if (kBits == 4 && d >= kCodedDim / 2) weight_ /= 16;  // their codes stand 4 bits higher

    const int column = lane / 4, t = lane % 4;
    const bool lower = column % 2;
    minima_[0] = half_parts(query[4 * t] * scale, query[4 * t + 1] * scale, lower);
    minima_[1] = half_parts(query[4 * t + 2] * scale, query[4 * t + 3] * scale, lower);
    source_ = column / 2 == t ? kCodedDim + 2 * lower : 0;
    selector_ = lane & 2 ? 0x3276 : 0x5410;
  }

  /// Scores of keys `lane` and `lane + 32` of the block. A NaN minimum makes all 64 NaN.
  __device__ __forceinline__ float2 scores(const CodedBlock<kBits>& block) const {
    const uint32_t pairs = query_pairs(block.step);
    float low[4] = {}, sum[4] = {};
    ptx::mma_m16n8k16<__half>(low, {block.minima.x, block.minima.x, block.minima.y, block.minima.y},
                              minima_[0], minima_[1]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Pair first = pair(block.keys[0], j), second = pair(block.keys[1], j);
      const int d = kBits == 4 ? j / 2 * 4 + j % 2 : 4 * j;
      ptx::mma_m16n8k16<__half>(sum, {first.a, second.a, first.b, second.b}, shuffle(pairs, d),
                                shuffle(pairs, kBits == 4 ? d + kCodedDim / 2 : d + 1));
    }
    const float base = joined(low[0], low[1]) * unscale_;
    const float code_scale = unscale_ * kOnePerHalfUnit;
    return {fmaf(joined(sum[0], sum[1]), code_scale, base),
            fmaf(joined(sum[2], sum[3]), code_scale, base)};
  }

 private:
  /// Codes stand in halves as multiples of 2^-24, their smallest unit: nothing to convert.
  static constexpr float kOnePerHalfUnit = 1 << 24;

  /// Two words with two codes each.
  struct Pair {
    uint32_t a, b;
  };

  /// The j-th four codes of a key. 4 bits: dimensions d, d + 2 and d + 8, d + 10 with d = 0, 1, 4,
  /// 5; 8 bits: 4j, 4j + 2 and 4j + 1, 4j + 3.
  __device__ __forceinline__ static Pair pair(const uint32_t (&key)[CodedBlock<kBits>::kWords],
                                              int j) {
    if constexpr (kBits == 4) {
      const uint32_t word = key[j / 2] >> j % 2 * 8;
      return {word & 0x000f000fu, word & 0x00f000f0u};
    } else {
      return {__byte_perm(key[j], 0, 0x4240), __byte_perm(key[j], 0, 0x4341)};
    }
  }

  /// Query times step. For d with d & 2 == 0, lane 16 + d holds the upper halves of dimensions d
  /// and d + 2, lane 16 + d + 2 the lower ones. The other 16 lanes hold zeros.
  __device__ __forceinline__ uint32_t query_pairs(__half step) const {
    const float value = weight_ * __half2float(step);
    const uint32_t own = ptx::pack_pair<__half>(value, rest_of(value));
    return __byte_perm(own, __shfl_xor_sync(0xffffffffu, own, 2), selector_);
  }

  __device__ __forceinline__ uint32_t shuffle(uint32_t pairs, int d) const {
    return __shfl_sync(0xffffffffu, pairs, source_ + d);
  }

  float weight_;        // of dimension lane - 16
  float unscale_;       // of the scores
  uint32_t minima_[2];  // what multiplies the minima
  int source_;          // where this lane's part of B is
  uint32_t selector_;
};

/// q . k of one key of any index dim, by one thread. `ranges` are those of its block.
__device__ __forceinline__ float coded_dot(const float* query, const uint8_t* key,
                                           const __half* ranges, int dim, int bits) {
  const int bytes = bits == 8 ? dim : (dim + 1) / 2;  // code_bytes
  float sum = 0.0f;
  for (int d = 0; d < dim; ++d) {
    const int code = bits == 8 ? key[d] : d < bytes ? key[d] & 15 : key[d - bytes] >> 4;
    const float value =
        fmaf(__half2float(ranges[dim + d]), static_cast<float>(code), __half2float(ranges[d]));
    sum = fmaf(query[d], value, sum);
  }
  return sum;
}

}  // namespace rtpurbo::cuda

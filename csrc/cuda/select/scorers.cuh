#pragma once
// Scores of 64 keys at a time by a warp, from index keys as the caller has them.

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/select/coded_keys.cuh"
#include "csrc/cuda/select/problem.cuh"

namespace rtpurbo::cuda {

/// The scores that a lane has of a group: of key `lane` and of key `32 + lane`.
struct GroupScores {
  float of_half[2];
};

/// Row 0 of the key head that a row's query reads.
template <typename T>
__device__ __forceinline__ const T* key_rows(const SelectParams& p, const HeadsView& view,
                                             const Row& row) {
  return head_rows<const T>(view, row.batch, p.index_map.heads[row.head]);
}

/// Keys of 16 dimensions whose rows are aligned to 16 bytes: those of kAtOnce groups are on their
/// way before the first is needed.
template <typename TK, int kAtOnce>
class WideScorer {
 public:
  static constexpr int kGroups = kAtOnce;
  static constexpr bool kScoresCodes = false;

  __device__ WideScorer(const SelectParams& p, const Row& row, const float* query)
      : keys_(key_rows<TK>(p, p.k_index, row) - p.coded * p.k_index.row_stride),
        stride_(p.k_index.row_stride) {
#pragma unroll
    for (int d = 0; d < 16; ++d) query_[d] = query[d];
  }

  /// Scores the 64 keys from each `first` on; those outside [begin, end) have any score.
  __device__ void score(const int (&first)[kGroups], int begin, int end,
                        GroupScores (&scores)[kGroups]) const {
    Key loaded[kGroups][2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = first[g] + half * 32 + static_cast<int>(threadIdx.x) % 32;
        loaded[g][half] = key(min(max(n, begin), end - 1));
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) scores[g].of_half[half] = dot(loaded[g][half]);
    }
  }

  /// The score of key n as k_index has it; with `refine` of any key.
  __device__ float of_key(int n) const { return dot(key(n)); }

 private:
  struct alignas(16) Key {
    TK values[16];
  };

  __device__ const Key& key(int n) const {
    return *reinterpret_cast<const Key*>(keys_ + n * stride_);
  }

  __device__ float dot(const Key& key) const {
    float sum = 0.0f;
#pragma unroll
    for (int d = 0; d < 16; ++d) sum = fmaf(query_[d], to_float(key.values[d]), sum);
    return sum;
  }

  const TK* const keys_;
  const int64_t stride_;
  float query_[16];
};

/// Keys, and codes, of any dimension and stride.
template <typename TK>
class AnyScorer {
 public:
  static constexpr int kGroups = 1;
  static constexpr bool kScoresCodes = true;

  __device__ AnyScorer(const SelectParams& p, const Row& row, const float* query)
      : p_(p), row_(row), query_(query), dim_(static_cast<int>(p.dim)) {}

  __device__ void score(const int (&first)[1], int begin, int end, GroupScores (&scores)[1]) const {
    for (int half = 0; half < 2; ++half) {
      const int n = first[0] + half * 32 + static_cast<int>(threadIdx.x) % 32;
      scores[0].of_half[half] = n >= begin && n < end ? dot(n) : 0.0f;
    }
  }

  /// The score of key n as k_index has it; with `refine` of any key.
  __device__ float of_key(int n) const {
    const TK* key = key_rows<TK>(p_, p_.k_index, row_) + (n - p_.coded) * p_.k_index.row_stride;
    float sum = 0.0f;
    for (int d = 0; d < dim_; ++d) sum = fmaf(query_[d], to_float(key[d]), sum);
    return sum;
  }

 private:
  __device__ float dot(int n) const {
    if (n >= p_.coded) return of_key(n);
    return coded_dot(query_, key_rows<uint8_t>(p_, p_.codes, row_) + n * p_.codes.row_stride,
                     key_rows<__half>(p_, p_.ranges, row_) + n / kIndexBlock * p_.ranges.row_stride,
                     dim_, p_.code_bits);
  }

  const SelectParams& p_;
  const Row& row_;
  const float* const query_;
  const int dim_;
};

}  // namespace rtpurbo::cuda

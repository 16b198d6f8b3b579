#pragma once
// Scores of 64 keys at a time by a warp, from index keys as the caller has them.

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/ptx/mad_wide.cuh"
#include "csrc/cuda/select/coded_keys.cuh"
#include "csrc/cuda/select/problem.cuh"

namespace rtpurbo::cuda {

/// The scores that a lane has of a group: of key `lane` and of key `32 + lane`.
struct GroupScores {
  float of_half[2];

  /// By all lanes: whether all of theirs are.
  __device__ bool are_finite() const {
    return __all_sync(0xffffffffu, fabsf(of_half[0]) < INFINITY && fabsf(of_half[1]) < INFINITY);
  }
};

/// The key of [begin, end) that may be read in the place of key n.
__device__ __forceinline__ int nearest_within(int n, int begin, int end) {
  return min(max(n, begin), end - 1);
}

/// Row 0 of the key head that a row's query reads.
template <typename T>
__device__ __forceinline__ const T* key_rows(const SelectParams& p, const HeadsView& view,
                                             const Row& row) {
  return head_rows<const T>(view, row.batch, p.index_map.heads[row.head]);
}

/// Keys of 16 dimensions whose rows are aligned to 16 bytes.
template <typename TK>
class WideScorer {
  struct alignas(16) Key {
    TK values[16];
  };

 public:
  static constexpr int kGroups = sizeof(TK) == 2 ? 2 : 1;
  static constexpr bool kScoresCodes = false;
  static constexpr bool kSpoilsNeighbours = false;

  __device__ WideScorer(const SelectParams& p, const Row& row, const float* query)
      : keys_(key_rows<TK>(p, p.k_index, row) - p.coded * p.k_index.row_stride),
        stride_(p.k_index.row_stride) {
#pragma unroll
    for (int d = 0; d < 16; ++d) query_[d] = query[d];
  }

  struct Loaded {
    Key keys[kGroups][2];
  };

  /// The 64 keys from each first(g) on.
  template <typename First>
  __device__ Loaded load(const First& first) const {
    return load_within(first, 0, INT32_MAX);
  }

  /// The same, with others in the place of those outside [begin, end).
  template <typename First>
  __device__ Loaded load_within(const First& first, int begin, int end) const {
    Loaded loaded;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = first(g) + half * 32 + static_cast<int>(threadIdx.x) % 32;
        loaded.keys[g][half] = key(nearest_within(n, begin, end));
      }
    }
    return loaded;
  }

  /// Their scores.
  template <typename First>
  __device__ void score(const Loaded& loaded, const First& /*first*/,
                        GroupScores (&scores)[kGroups]) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) scores[g].of_half[half] = dot(loaded.keys[g][half]);
    }
  }

  /// The score of key n as k_index has it; with `refine` of any key.
  __device__ float of_key(int n) const { return dot(key(n)); }

 private:
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

/// Blocks of codes of 16 dimensions, packed; a scan keeps up with the memory when each warp scores
/// four 4-bit blocks, or two 8-bit ones, while as many are on their way.
template <int kBits, int kGroupsOfStep = kBits == 4 ? 4 : 2>
class CodedScorer {
  using Block = CodedBlock<kBits>;

 public:
  static constexpr int kGroups = kGroupsOfStep;
  static constexpr bool kSpoilsNeighbours = false;

  __device__ CodedScorer(const SelectParams& p, const Row& row, const float* query)
      : query_(query, threadIdx.x % 32),
        codes_(key_rows<uint8_t>(p, p.codes, row)),
        ranges_(key_rows<__half>(p, p.ranges, row)) {}

  struct Loaded {
    Block blocks[kGroups];
  };

  template <typename First>
  __device__ Loaded load(const First& first) const {
    Loaded loaded;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int block = first(g) / kGroupKeys;
      loaded.blocks[g] = Block::load(
          ptx::offset_by(codes_, block, Block::kBytes),
          ptx::offset_by(ranges_, block, Block::kRanges * static_cast<int>(sizeof(__half))),
          threadIdx.x % 32);
    }
    return loaded;
  }

  /// Groups that follow each other, from this key on.
  __device__ Loaded load_run(int first) const {
    Loaded loaded;
    const int block = first / kGroupKeys;
    const uint8_t* codes = ptx::offset_by(codes_, block, Block::kBytes);
    const __half* ranges =
        ptx::offset_by(ranges_, block, Block::kRanges * static_cast<int>(sizeof(__half)));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      loaded.blocks[g] = Block::load(codes + g * Block::kBytes, ranges + g * Block::kRanges,
                                     static_cast<int>(threadIdx.x) % 32);
    }
    return loaded;
  }

  template <typename First>
  __device__ Loaded load_within(const First& first, int /*begin*/, int /*end*/) const {
    return load(first);
  }

  template <typename First>
  __device__ void score(const Loaded& loaded, const First& /*first*/,
                        GroupScores (&scores)[kGroups]) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float2 pair = query_.scores(loaded.blocks[g]);
      scores[g] = {{pair.x, pair.y}};
    }
  }

 private:
  const CodedQuery<kBits> query_;
  const uint8_t* const codes_;
  const __half* const ranges_;
};

/// Keys, and codes, of any dimension and stride.
template <typename TK>
class AnyScorer {
 public:
  static constexpr int kGroups = 1;
  static constexpr bool kScoresCodes = true;
  static constexpr bool kSpoilsNeighbours = false;

  __device__ AnyScorer(const SelectParams& p, const Row& row, const float* query)
      : p_(p), row_(row), query_(query), dim_(static_cast<int>(p.dim)) {}

  struct Loaded {
    int begin, end;
  };

  template <typename First>
  __device__ Loaded load(const First& /*first*/) const {
    return {0, INT32_MAX};
  }

  template <typename First>
  __device__ Loaded load_within(const First& /*first*/, int begin, int end) const {
    return {begin, end};
  }

  template <typename First>
  __device__ void score(const Loaded& within, const First& first, GroupScores (&scores)[1]) const {
    for (int half = 0; half < 2; ++half) {
      const int n = first(0) + half * 32 + static_cast<int>(threadIdx.x) % 32;
      scores[0].of_half[half] = dot(nearest_within(n, within.begin, within.end));
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

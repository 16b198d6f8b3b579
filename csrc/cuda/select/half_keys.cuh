#pragma once
// Scores of fp16 index keys of 16 dimensions on the tensor cores, where they cost a sixth of what
// they cost otherwise. Queries are split into two halves each, sums are float32.

#include "csrc/cuda/ptx/mad_wide.cuh"
#include "csrc/cuda/select/half_parts.cuh"
#include "csrc/cuda/select/scorers.cuh"

namespace rtpurbo::cuda {

/// q . k of one key of 16 halves.
__device__ __forceinline__ float half_dot(const uint4* key, const float* query) {
  const uint4 loaded[2] = {__ldg(&key[0]), __ldg(&key[1])};
  const __half* values = reinterpret_cast<const __half*>(loaded);
  float sum = 0.0f;
#pragma unroll
  for (int d = 0; d < 16; ++d) sum = fmaf(query[d], __half2float(values[d]), sum);
  return sum;
}

/// Keys whose rows are aligned to 16 bytes.
///
/// Two products m16n8k16 score 32 keys, of which a warp loads 16 at a time, whole lines of memory:
/// lane l half l % 2 of key l / 2. With g = l / 4 and t = l % 4 the first 16 stand in row g of A,
/// the others in row g + 8. Columns 2s and 2s + 1 of B hold the query, upper and lower halves,
/// against the key of lanes 2s and 2s + 1 modulo 4, and zeros against the other one; columns 4 to 7
/// are the same again. So the scores of keys 2g and 2g + 1 arrive in lanes t = 0 and 1, those of
/// keys 16 + 2g and 17 + 2g in the other lanes, from where they go to the lanes of the keys'
/// numbers.
/// A warp scores kGroups of them at a time while as many are on their way.
template <int kGroupsOfStep>
class HalfScorerOf {
  static constexpr int kDim = 16;

 public:
  static constexpr int kGroups = kGroupsOfStep;
  static constexpr bool kScoresCodes = false;
  static constexpr bool kSpoilsNeighbours = true;  // where a key is not finite

  __device__ HalfScorerOf(const SelectParams& p, const Row& row, const float* query)
      : query_(query),
        keys_(reinterpret_cast<const char*>(key_rows<__half>(p, p.k_index, row) -
                                            p.coded * p.k_index.row_stride)),
        stride_(static_cast<int>(p.k_index.row_stride * sizeof(__half))) {
    const int exponent = exponent_of<kDim>(query);
    const float scale = ldexpf(1.0f, -exponent);
    unscale_ = ldexpf(1.0f, exponent);
    const int column = lane() / 4, t = lane() % 4;
    const float* own = query + t % 2 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool meets = column / 2 % 2 == t / 2;
      parts_[i] = meets ? half_parts(own[2 * i] * scale, own[2 * i + 1] * scale, column % 2) : 0u;
    }
  }

  /// Halves of keys of kGroups groups, on their way.
  struct Loaded {
    uint4 halves[kGroups][4];
  };

  /// The 64 keys from each first(g) on.
  template <typename First>
  __device__ Loaded load(const First& first) const {
    Loaded loaded;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const char* own = ptx::offset_by(own_half(), first(g) + lane() / 2, stride_);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        loaded.halves[g][i] = half_at(own + i * 16 * static_cast<int64_t>(stride_));
    }
    return loaded;
  }

  /// Groups that follow each other, from this key on.
  __device__ Loaded load_run(int first) const {
    return load([first](int g) { return first + g * kGroupKeys; });
  }

  /// The same, with others in the place of those outside [begin, end).
  template <typename First>
  __device__ Loaded load_within(const First& first, int begin, int end) const {
    Loaded loaded;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = first(g) + lane() / 2 + i * 16;
        loaded.halves[g][i] =
            half_at(ptx::offset_by(own_half(), nearest_within(n, begin, end), stride_));
      }
    }
    return loaded;
  }

  /// Their scores.
  template <typename First>
  __device__ void score(const Loaded& loaded, const First& /*first*/,
                        GroupScores (&scores)[kGroups]) const {
    const bool low = lane() % 4 < 2;
    const int source = lane() % 16 / 2 * 4 + lane() / 16 * 2 + lane() % 2;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 &a = loaded.halves[g][2 * half], &b = loaded.halves[g][2 * half + 1];
        float sum[4] = {};
        ptx::mma_m16n8k16<__half>(sum, {a.x, b.x, a.y, b.y}, parts_[0], parts_[1]);
        ptx::mma_m16n8k16<__half>(sum, {a.z, b.z, a.w, b.w}, parts_[2], parts_[3]);
        const float own = unscale_ * (low ? joined(sum[0], sum[1]) : joined(sum[2], sum[3]));
        scores[g].of_half[half] = __shfl_sync(0xffffffffu, own, source);
      }
    }
  }

  /// The scores of a group, of each key by itself where one is not finite. These, and those of
  /// of_key, may differ by rounding from the others.
  __device__ GroupScores mended(const GroupScores& scores, int first, int begin, int end) const {
    if (scores.are_finite()) return scores;
    return one_by_one(keys_, stride_, query_, first, begin, end);
  }

  /// The score of key n as k_index has it; with `refine` of any key.
  __device__ float of_key(int n) const { return dot(keys_, stride_, n, query_); }

 private:
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ const char* own_half() const { return keys_ + threadIdx.x % 2 * sizeof(uint4); }

  /// Read once, it leaves the L2 cache first, so that code stays there.
  static __device__ uint4 half_at(const char* address) {
    return __ldcs(reinterpret_cast<const uint4*>(address));
  }

  static __device__ float dot(const char* keys, int stride, int n, const float* query) {
    return half_dot(reinterpret_cast<const uint4*>(ptx::offset_by(keys, n, stride)), query);
  }

  static __device__ __noinline__ GroupScores one_by_one(const char* keys, int stride,
                                                        const float* query, int first, int begin,
                                                        int end) {
    GroupScores scores;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int n = first + half * 32 + lane();
      scores.of_half[half] = dot(keys, stride, nearest_within(n, begin, end), query);
    }
    return scores;
  }

  const float* const query_;
  const char* const keys_;
  const int stride_;  // bytes
  float unscale_;
  uint32_t parts_[4];
};

using HalfScorer = HalfScorerOf<2>;

}  // namespace rtpurbo::cuda

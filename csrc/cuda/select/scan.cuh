#pragma once
// Stage 1: the score r^-1/2 q . k of every far key, or the log-mass of every block of them; the
// largest score; and in form `full` the mass of the near keys.

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/select/coded_keys.cuh"
#include "csrc/cuda/select/members.cuh"
#include "csrc/cuda/select/stats.cuh"

namespace rtpurbo::cuda {

/// Log-mass of the keys of `lanes` adjacent lanes, of two keys a lane.
static __device__ __noinline__ float block_log_mass(float score, float other, int lanes) {
  float top = fmaxf(score, other);
  for (int step = lanes / 2; step > 0; step /= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  }
  const float base = softmax_shift(top);
  float sum = expf(score - base) + expf(other - base);
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return base + logf(sum);
}

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

  /// Scores the 64 keys from each `first` on, without those outside [begin, end).
  __device__ void score(const int64_t (&first)[kGroups], int64_t begin, int64_t end,
                        GroupScores (&scores)[kGroups]) const {
    Key loaded[kGroups][2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = first[g] + half * 32 + threadIdx.x % 32;
        loaded[g][half] = {};
        if (n >= begin && n < end) {
          loaded[g][half] = *reinterpret_cast<const Key*>(keys_ + n * stride_);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) scores[g].of_half[half] = dot(loaded[g][half]);
    }
  }

  /// The score of key n as k_index has it; with `refine` of any key.
  __device__ float of_key(int64_t n) const {
    return dot(*reinterpret_cast<const Key*>(keys_ + n * stride_));
  }

 private:
  struct alignas(16) Key {
    TK values[16];
  };

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

  __device__ void score(const int64_t (&first)[1], int64_t begin, int64_t end,
                        GroupScores (&scores)[1]) const {
    for (int half = 0; half < 2; ++half) {
      const int64_t n = first[0] + half * 32 + threadIdx.x % 32;
      scores[0].of_half[half] = n >= begin && n < end ? dot(n) : 0.0f;
    }
  }

  /// The score of key n as k_index has it; with `refine` of any key.
  __device__ float of_key(int64_t n) const {
    const TK* key = key_rows<TK>(p_, p_.k_index, row_) + (n - p_.coded) * p_.k_index.row_stride;
    float sum = 0.0f;
    for (int d = 0; d < dim_; ++d) sum = fmaf(query_[d], to_float(key[d]), sum);
    return sum;
  }

 private:
  __device__ float dot(int64_t n) const {
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

/// What a thread saw of the members' scores.
struct ScoreStats {
  float top = -INFINITY;
  bool poisoned = false;
  int candidates = 0;

  __device__ void add(float score) {
    candidates += score != -INFINITY;
    poisoned |= !(score < INFINITY);
    top = fmaxf(top, score);  // passes over a NaN
  }

  __device__ uint32_t top_key() const { return top == -INFINITY ? 0 : ordered_key(top); }
};

template <typename Scorer>
class Scan {
 public:
  struct Shared {
    float query[kMaxIndexDim];
    BlockStats of_warp[kSelectWarps];
  };

  /// Scores this block's members of the row; its statistics go to `stats`.
  static __device__ void run(const SelectParams& p, const Row& row, Members& members,
                             Shared& shared, BlockStats& stats) {
    constexpr int kGroups = Scorer::kGroups;
    const int lane = threadIdx.x % 32;
    load_query(p, row, shared);
    // Keys that are scored; the others are not read.
    const int64_t begin = p.near_is_scored ? row.start : row.far_begin;
    const int64_t end = p.near_is_scored ? row.position + 1 : row.far_end;
    members.take(begin, end);

    ScoreStats own;
    LogSum near;
    const auto keep = [&](int i, float score) {
      members.score(i) = score;
      own.add(score);
    };
    const auto store = [&](int group, int64_t first, const GroupScores& scores) {
      if (p.block_size == 1 && first >= row.far_begin && first + kGroupKeys <= row.far_end) {
        keep(group * kGroupKeys + lane, scores.of_half[0]);
        keep(group * kGroupKeys + 32 + lane, scores.of_half[1]);
        return;
      }
      float value[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = first + half * 32 + lane;
        value[half] = scores.of_half[half];
        const bool far = n >= row.far_begin && n < row.far_end;
        if (p.near_is_scored && !far && n >= begin && n < end && value[half] != -INFINITY) {
          near.add(value[half], 1.0f);
        }
        if (!far) value[half] = -INFINITY;
      }
      const int place = group * members.of_group();
      if (p.block_size == 1) {
        keep(place + lane, value[0]);
        keep(place + 32 + lane, value[1]);
      } else if (p.block_size == 64) {
        const float mass = block_log_mass(value[0], value[1], 32);
        if (lane == 0) keep(place, mass);
      } else {
        const int size = static_cast<int>(p.block_size);
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          const float mass = block_log_mass(value[half], -INFINITY, size);
          if (lane % size == 0) keep(place + half * (32 / size) + lane / size, mass);
        }
      }
    };

    int coded = 0;  // groups of this warp that are scored from codes
    if (!Scorer::kScoresCodes && p.coded > 0) {
      coded = members.groups_before(p.coded / kGroupKeys);
      if (p.code_bits == 4) {
        score_codes<4>(p, row, members, coded, shared.query, store);
      } else {
        score_codes<8>(p, row, members, coded, shared.query, store);
      }
    }
    const Scorer scorer(p, row, shared.query);
#pragma unroll 1
    for (int i = coded; i < members.groups(); i += kGroups) {
      int64_t first[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        first[g] = i + g < members.groups()
                       ? static_cast<int64_t>(members.group(i + g)) * kGroupKeys
                       : end;
      }
      GroupScores scores[kGroups];
      scorer.score(first, begin, end, scores);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (i + g < members.groups()) store(i + g, first[g], scores[g]);
      }
    }
    put_stats(own, near, p.near_is_scored, shared, stats);
  }

  /// The row's query, with the scale of the scores.
  static __device__ __forceinline__ void load_query(const SelectParams& p, const Row& row,
                                                    Shared& shared) {
    const int64_t q_offset = row.batch * p.q_index.batch_stride + row.head * p.q_index.head_stride +
                             row.row * p.q_index.row_stride;
    const float scale = rsqrtf(static_cast<float>(p.dim));
    for (int d = threadIdx.x; d < p.dim; d += kSelectThreads) {
      shared.query[d] = scale * load_as_float(p.q_type, p.q_index.ptr, q_offset + d);
    }
    __syncthreads();
  }

  /// What the block's threads saw, to `stats`.
  static __device__ __forceinline__ void put_stats(const ScoreStats& own, const LogSum& near,
                                                   bool near_is_scored, Shared& shared,
                                                   BlockStats& stats) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const BlockStats of_warp =
        warp_stats(own.top_key(), own.poisoned, own.candidates, near, near_is_scored);
    if (lane == 0) shared.of_warp[warp] = of_warp;
    __syncthreads();
    if (warp != 0) return;
    const BlockStats of_block = merge_stats(shared.of_warp, kSelectWarps, near_is_scored);
    if (lane == 0) stats = of_block;
  }

 private:
  /// The first `count` groups of this warp, with the next ones on their way.
  template <int kBits, typename Store>
  static __device__ void score_codes(const SelectParams& p, const Row& row, const Members& members,
                                     int count, const float* query, const Store& store) {
    using Block = CodedBlock<kBits>;
    constexpr int kAtOnce = kBits == 4 ? 4 : 2;
    const int lane = threadIdx.x % 32;
    const CodedQuery<kBits> coded_query(query, lane);
    const uint8_t* codes = key_rows<uint8_t>(p, p.codes, row);
    const __half* ranges = key_rows<__half>(p, p.ranges, row);
    Block now[kAtOnce], next[kAtOnce] = {};
    // One step ahead: the first pass only loads.
#pragma unroll 1
    for (int i = -kAtOnce; i < count; i += kAtOnce) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        now[j] = next[j];
        if (i + kAtOnce + j < count) {
          const int64_t block = members.group(i + kAtOnce + j);
          next[j] =
              Block::load(codes + block * Block::kBytes, ranges + block * Block::kRanges, lane);
        }
      }
      if (i < 0) continue;
      float2 scores[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) scores[j] = coded_query.scores(now[j]);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (i + j >= count) break;
        store(i + j, static_cast<int64_t>(members.group(i + j)) * kGroupKeys,
              GroupScores{{scores[j].x, scores[j].y}});
      }
    }
  }
};

}  // namespace rtpurbo::cuda

#pragma once
// Stage 1: the score r^-1/2 q . k of every far key, or the log-mass of every block of them; the
// largest score; and in form `full` the mass of the near keys.

#include "csrc/cuda/select/coded_keys.cuh"
#include "csrc/cuda/select/half_keys.cuh"
#include "csrc/cuda/select/members.cuh"
#include "csrc/cuda/select/scorers.cuh"
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

/// What a thread saw of the members' scores.
struct ScoreStats {
  float top = -INFINITY;
  uint32_t poisoned = 0;
  int candidates = 0;

  __device__ void add(float score) {
    candidates += score != -INFINITY;
    poisoned |= !(score < INFINITY);
    top = fmaxf(top, score);  // passes over a NaN
  }

  __device__ void add(float score, float other) {
    if (fabsf(score) < INFINITY && fabsf(other) < INFINITY) {
      candidates += 2;
      top = fmaxf(fmaxf(top, score), other);
    } else {
      add(score);
      add(other);
    }
  }

  __device__ void add(const ScoreStats& other) {
    candidates += other.candidates;
    poisoned |= other.poisoned;
    top = fmaxf(top, other.top);
  }

  __device__ uint32_t top_key() const { return top == -INFINITY ? 0 : ordered_key(top); }
};

/// What the keys of a row are to its scan.
struct Sight {
  int begin, end;          // keys that are scored; the others are not read
  int far_begin, far_end;  // those of them that are members
  int block_size;

  __device__ Sight(const SelectParams& p, const Row& row)
      : begin(static_cast<int>(p.near_is_scored ? row.start : row.far_begin)),
        end(static_cast<int>(p.near_is_scored ? row.position + 1 : row.far_end)),
        far_begin(static_cast<int>(row.far_begin)),
        far_end(static_cast<int>(row.far_end)),
        block_size(static_cast<int>(p.block_size)) {}

  __device__ bool is_far(int n) const { return n >= far_begin && n < far_end; }
  /// Whether all of a group's keys are far.
  __device__ bool sees_far(int first) const {
    return first >= far_begin && first + kGroupKeys <= far_end;
  }
};

/// Keeps the scores of a group that is not all far keys, or whose members are blocks, at `scores`;
/// `score` and `next` are of the lane's keys. Near keys that are scored go to `near`.
static __device__ __noinline__ ScoreStats keep_some(Sight sight, int first, float score, float next,
                                                    float* scores, LogSum& near) {
  const int lane = threadIdx.x % 32;
  const int size = sight.block_size;
  float value[2] = {score, next};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = first + half * 32 + lane;
    if (sight.is_far(n)) continue;
    if (n >= sight.begin && n < sight.end && value[half] != -INFINITY) near.add(value[half], 1.0f);
    value[half] = -INFINITY;
  }
  if (size == kGroupKeys) {
    value[0] = block_log_mass(value[0], value[1], 32);
  } else if (size > 1) {
    value[0] = block_log_mass(value[0], -INFINITY, size);
    value[1] = block_log_mass(value[1], -INFINITY, size);
  }
  ScoreStats own;
  for (int half = 0; half < 2; ++half) {
    const int key = half * 32 + lane;
    if (key % size != 0) continue;
    scores[key / size] = value[half];
    own.add(value[half]);
  }
  return own;
}

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
    const Sight sight(p, row);
    members.take(sight.begin, sight.end);

    ScoreStats own;
    LogSum near;
    const auto store = [&](int group, int first, const GroupScores& scores) {
      float& place = members.score(group * members.of_group());
      const auto [score, next] = scores.of_half;
      if (sight.block_size == 1 && sight.sees_far(first)) {
        (&place)[lane] = score;
        (&place)[lane + 32] = next;
        own.add(score, next);
      } else {
        own.add(keep_some(sight, first, score, next, &place, near));
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
    if (coded < members.groups()) {
      const Scorer scorer(p, row, shared.query);
#pragma unroll 1
      for (int i = coded; i < members.groups(); i += kGroups) {
        int first[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          first[g] = members.group(min(i + g, members.groups() - 1)) * kGroupKeys;
        }
        GroupScores scores[kGroups];
        scorer.score(first, sight.begin, sight.end, scores);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          if (i + g < members.groups()) store(i + g, first[g], scores[g]);
        }
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
        store(i + j, members.group(i + j) * kGroupKeys, GroupScores{{scores[j].x, scores[j].y}});
      }
    }
  }
};

}  // namespace rtpurbo::cuda

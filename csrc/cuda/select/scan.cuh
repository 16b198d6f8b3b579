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

  __device__ void add(const ScoreStats& other) {
    candidates += other.candidates;
    poisoned |= other.poisoned;
    top = fmaxf(top, other.top);
  }

  __device__ uint32_t top_key() const { return top == -INFINITY ? 0 : ordered_key(top); }
};

/// What the keys of a row are to its scan.
struct Sight {
  int begin, end;          // keys that are scored; scores of others that are read are not used
  int far_begin, far_end;  // those of them that are members
  int keys;
  int block_size;
  bool scores_near;  // not only members

  __device__ Sight(const SelectParams& p, const Row& row)
      : begin(static_cast<int>(p.near_is_scored ? row.start : row.far_begin)),
        end(static_cast<int>(p.near_is_scored ? row.position + 1 : row.far_end)),
        far_begin(static_cast<int>(row.far_begin)),
        far_end(static_cast<int>(row.far_end)),
        keys(static_cast<int>(p.keys)),
        block_size(static_cast<int>(p.block_size)),
        scores_near(p.near_is_scored) {}

  __device__ bool is_far(int n) const { return n >= far_begin && n < far_end; }
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
    load_query(p, row, shared);
    const Sight sight(p, row);
    members.take(sight.begin, sight.end);

    Found found;
    int coded = 0;  // groups of this warp that are scored from codes
    if (!Scorer::kScoresCodes && p.coded > 0) {
      coded = members.groups_before(p.coded / kGroupKeys);
      if (p.code_bits == 4) {
        score_groups(CodedScorer<4>(p, row, shared.query), sight, members, 0, coded, found);
      } else {
        score_groups(CodedScorer<8>(p, row, shared.query), sight, members, 0, coded, found);
      }
    }
    if (coded < members.groups()) {
      const Scorer scorer(p, row, shared.query);
      score_groups(scorer, sight, members, coded, members.groups(), found);
    }
    put_stats(found.scores, found.near, p.near_is_scored, shared, stats);
  }

  static __device__ __forceinline__ void load_query(const SelectParams& p, const Row& row,
                                                    Shared& shared) {
    for (int d = threadIdx.x; d < p.dim; d += kSelectThreads) {
      shared.query[d] = scaled_query(p, row, d);
    }
    __syncthreads();
  }

  /// What the block's threads saw, to `stats`.
  static __device__ __forceinline__ void put_stats(const ScoreStats& own, const LogSum& rest,
                                                   bool has_rest, Shared& shared,
                                                   BlockStats& stats) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const BlockStats of_warp =
        warp_stats(own.top_key(), own.poisoned, own.candidates, rest, has_rest);
    if (lane == 0) shared.of_warp[warp] = of_warp;
    __syncthreads();
    if (warp != 0) return;
    const BlockStats of_block = merge_stats(shared.of_warp, kSelectWarps, has_rest);
    if (lane == 0) stats = of_block;
  }

 private:
  struct Found {
    ScoreStats scores;
    LogSum near;
  };

  /// Groups [begin, end) of this warp.
  template <typename S>
  static __device__ void score_groups(const S& scorer, const Sight& sight, const Members& members,
                                      int begin, int end, Found& found) {
    constexpr int kGroups = S::kGroups;
    const int lane = threadIdx.x % 32;
    const auto first_of = [&](int i, int last) { return members.group(min(i, last)) * kGroupKeys; };
    // Groups that may be loaded whole, and whose members are keys. No function is called while
    // others are on their way: their registers would have to be saved.
    const auto among = [&](int key) {
      return min(max(members.groups_before(key / kGroupKeys), begin), end);
    };
    int plain_begin = begin, plain_end = begin;
    if (sight.block_size == 1 && !sight.scores_near) {
      plain_end = among(sight.keys);
    } else if (sight.block_size == 1) {
      plain_begin = among(sight.far_begin + kGroupKeys - 1);
      plain_end = max(plain_begin, among(sight.far_end));
    }
    float top = -INFINITY;
    int candidates = 0;
    bool strange = false;  // a score is not finite
    typename S::Loaded next{};
    // One step ahead: the first pass only loads.
#pragma unroll 1
    for (int i = plain_begin < plain_end ? plain_begin - kGroups : plain_end; i < plain_end;
         i += kGroups) {
      const typename S::Loaded now = next;
      next = scorer.load([&](int g) { return first_of(i + kGroups + g, plain_end - 1); });
      if (i < plain_begin) continue;
      GroupScores scores[kGroups];
      scorer.score(
          now, [&](int g) { return first_of(i + g, plain_end - 1); }, scores);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (i + g >= plain_end) continue;
        auto [score, other] = scores[g].of_half;
        strange |= !(fabsf(score) < INFINITY) || !(fabsf(other) < INFINITY);
        candidates += 2;
        const int key = first_of(i + g, plain_end - 1);
        if (key < sight.far_begin || key > sight.far_end - kGroupKeys) {
          candidates -= 2 - (sight.is_far(key + lane) + sight.is_far(key + lane + 32));
          if (!sight.is_far(key + lane)) score = -INFINITY;
          if (!sight.is_far(key + lane + 32)) other = -INFINITY;
        }
        float* place = &members.score((i + g) * kGroupKeys) + lane;
        place[0] = score;
        place[32] = other;
        top = fmaxf(fmaxf(top, score), other);
      }
    }
    const bool again = __any_sync(0xffffffffu, strange);
    if (again) {
      plain_begin = plain_end = begin;
    } else {
      found.scores.add({top, 0, candidates});
    }
    // The others, or all of them with care.
#pragma unroll 1
    for (int i = begin, upto; i < end; i = upto) {
      upto = plain_end;
      if (i == plain_begin && plain_begin < plain_end) continue;
      upto = min(i + kGroups, i < plain_begin ? plain_begin : end);
      const auto first = [&](int g) { return first_of(i + g, upto - 1); };
      GroupScores scores[kGroups];
      scorer.score(scorer.load_within(first, sight.begin, sight.end), first, scores);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (i + g >= upto) continue;
        GroupScores right = scores[g];
        if constexpr (S::kSpoilsNeighbours) {
          right = scorer.mended(right, first(g), sight.begin, sight.end);
        }
        float* place = &members.score((i + g) * members.of_group());
        found.scores.add(
            keep_some(sight, first(g), right.of_half[0], right.of_half[1], place, found.near));
      }
    }
  }
};

}  // namespace rtpurbo::cuda

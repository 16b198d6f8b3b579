#pragma once
// Stage 1 where there is much to score. A sample of the members is kept whole; below its cut, with
// a margin, others are dropped as soon as they are scored, so that later stages read few. Whether
// the cut lies among those that are kept is known when it is found.

#include <cfloat>

#include "csrc/cuda/select/cut.cuh"
#include "csrc/cuda/select/scan.cuh"

namespace rtpurbo::cuda {

/// Which groups of a warp are scored: of each 32 runs of 4 groups a sample takes one.
struct Part {
  int begin, end;  // of each kOf groups

  static __device__ Part sample() { return {0, kRun}; }
  static __device__ Part rest() { return {kRun, kOf}; }
  static __device__ Part all() { return {0, kOf}; }

  /// From where a block counts groups, so that a sample of its team is spread over the row.
  static __device__ int origin(const Team& team) { return team.rank * kOneOf / team.size * kRun; }

  /// Group i, or the next one that belongs to the part.
  __device__ int next(int i) const {
    const int place = i & (kOf - 1);
    return i + (place < begin ? begin - place : place < end ? 0 : kOf - place + begin);
  }

  /// The same where group i - 1 belongs to it.
  __device__ int after(int i) const {
    return (i & (kOf - 1)) == (end & (kOf - 1)) ? i + (begin - end + kOf) : i;
  }

  static constexpr int kRun = 1 << kLongRun, kOneOf = 32, kOf = kOneOf * kRun;
};

/// Which scores are kept.
class Sieve {
 public:
  /// What is asked of a sample with this share of all members.
  static __device__ Wanted of_sample(const Wanted& wanted, double share) {
    return {kOdds * wanted.share / (1.0 + (kOdds - 1.0) * wanted.share),
            static_cast<long long>(static_cast<double>(wanted.floor) * kFloor * share) + kMore};
  }

  /// Keeps what the cut of a sample of `count` members says. Where that is much, all is kept.
  __device__ void set(const Cut& cut, float top, int count) {
    if (cut.bin >= kBins - 1 || cut.count > count / kMost) return;
    edge_ = cut.bin == kNoBin ? top : BinRange(top, cut.bin).low;
    shift_ = top;
  }

  __device__ bool keeps(float score) const { return !(score < edge_); }  // a NaN, too
  __device__ bool keeps_all() const { return edge_ == kAll; }

  /// Whether all members are kept that the cut may take.
  __device__ bool holds(const Cut& cut, float top) const {
    return cut.bin == kNoBin || (cut.bin < kBins && BinRange(top, cut.bin).low >= edge_);
  }

  /// To which masses that are dropped are relative.
  __device__ float shift() const { return shift_; }

  /// Edge and shift, for whom scans for several heads; infinite where the team scans for itself.
  __device__ float2 published() const {
    return make_float2(keeps_all() ? INFINITY : edge_, shift_);
  }

 private:
  static constexpr double kOdds = 2.0, kFloor = 1.5;  // times those of the mass, times the floor
  static constexpr int kMore = 32;                    // members
  static constexpr int kMost = 4;                     // one of so many members
  static constexpr float kAll = -FLT_MAX;             // but for -inf, which is no member

  float edge_ = kAll, shift_ = 0.0f;
};

/// What a thread saw of the members that a sieve took or dropped.
struct Sifted {
  float top = -INFINITY;
  uint32_t poisoned = 0;
  float dropped = 0.0f;  // mass
};

/// Keeps what the sieve keeps of groups whose first keys are key(g). Masses first, so that their
/// latencies overlap.
template <int kGroups, typename Key>
__device__ __forceinline__ void sift_groups(const Sieve& sieve,
                                            const GroupScores (&scores)[kGroups], const Key& key,
                                            Members& members, Sifted& sifted) {
  const float shift = sieve.shift() * kLog2E;
  float mass[kGroups][2];
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    const float score = scores[i / 2].of_half[i % 2];
    sifted.top = fmaxf(sifted.top, score);
    mass[i / 2][i % 2] = fast_exp2(fmaf(score, kLog2E, -shift));
  }
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    const float score = scores[i / 2].of_half[i % 2];
    if (sieve.keeps(score)) {
      members.keep(score, key(i / 2) + i % 2 * 32 + static_cast<int>(threadIdx.x) % 32);
    } else {
      sifted.dropped += mass[i / 2][i % 2];
    }
  }
}

/// Scores groups [begin, end) of this warp that are in the part, counted from `origin`, and sifts
/// them.
template <typename Scorer>
__device__ __forceinline__ Sifted sift_part(const Scorer& scorer, const Part& part,
                                            const Sieve& sieve, const Sight& sight, int origin,
                                            int begin, int end, Members& members) {
  constexpr int kGroups = Scorer::kGroups, kRun = Part::kRun;
  static_assert(kRun % kGroups == 0);
  // Whole runs of far keys: their groups follow each other.
  const auto among = [&](int groups) { return min(max(groups, begin), end); };
  const int far_begin = members.groups_before((sight.far_begin + kGroupKeys - 1) / kGroupKeys);
  const int plain_begin = (among(far_begin) + kRun - 1) / kRun * kRun - origin;
  int plain_end = among(members.groups_before(sight.far_end / kGroupKeys)) / kRun * kRun - origin;
  begin -= origin;
  end -= origin;
  const int stride = (members.group(kRun) - members.group(0)) * kGroupKeys;
  const int first_of_all = members.group(0) * kGroupKeys + origin / kRun * stride;
  const auto first_key = [&](int i) {
    return first_of_all + (i >> kLongRun) * stride + (i & (kRun - 1)) * kGroupKeys;
  };
  const int kept = members.kept();
  Sifted sifted;
  bool strange = false;  // a score is not finite
  typename Scorer::Loaded next{};
  int i = part.next(plain_begin), next_first = first_key(i);
  if (i < plain_end) next = scorer.load_run(next_first);
#pragma unroll 1
  while (i < plain_end) {
    const typename Scorer::Loaded now = next;
    const int first = next_first;
    i = part.after(i + kGroups);
    next_first = first_key(i);
    if (i < plain_end) next = scorer.load_run(next_first);
    const auto key = [&](int g) { return first + g * kGroupKeys; };
    GroupScores scores[kGroups];
    scorer.score(now, key, scores);
#pragma unroll
    for (const GroupScores& group : scores) {
      strange |= !(fabsf(group.of_half[0]) < INFINITY) || !(fabsf(group.of_half[1]) < INFINITY);
    }
    sift_groups(sieve, scores, key, members, sifted);
  }
  if (__any_sync(0xffffffffu, strange)) {
    plain_end = plain_begin;
    members.keep_only(kept);
    sifted = {};
  }
  // The others, or all of them with care. Nothing that is not inlined is called, as what lives
  // through a call would be in local memory in the loop above, too.
#pragma unroll 1
  for (i = part.next(begin); i < end; i = part.next(i + 1)) {
    if (i >= plain_begin && i < plain_end) {
      i = plain_end - 1;
      continue;
    }
    const auto key = [&](int g) { return first_key(min(i + g, end - 1)); };
    GroupScores scores[kGroups];
    scorer.score(scorer.load_within(key, sight.begin, sight.end), key, scores);
    GroupScores one[1] = {scores[0]};
    const bool spoilt = Scorer::kSpoilsNeighbours && !one[0].are_finite();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = key(0) + half * 32 + static_cast<int>(threadIdx.x) % 32;
      if constexpr (Scorer::kSpoilsNeighbours) {
        if (spoilt) one[0].of_half[half] = scorer.of_key(nearest_within(n, sight.begin, sight.end));
      }
      if (!sight.is_far(n)) one[0].of_half[half] = -INFINITY;
      sifted.poisoned |= !(one[0].of_half[half] < INFINITY);
    }
    sift_groups(sieve, one, key, members, sifted);
  }
  return sifted;
}

/// Sifts a part of this block's members. In the statistics the candidates are all that are kept by
/// now, and the rest is what was dropped.
template <typename Scorer>
__device__ __forceinline__ void sift(const SelectParams& p, const Row& row, const Part& part,
                                     const Sieve& sieve, int origin, Members& members,
                                     typename Scan<Scorer>::Shared& shared, BlockStats& stats) {
  Scan<Scorer>::load_query(p, row, shared);
  const Sight sight(p, row);
  Sifted all;
  const auto sift_with = [&](const auto& scorer, int begin, int end) {
    const Sifted found = sift_part(scorer, part, sieve, sight, origin, begin, end, members);
    all.top = fmaxf(all.top, found.top);
    all.poisoned |= found.poisoned;
    all.dropped += found.dropped;
  };
  const int coded = members.groups_before(static_cast<int>(p.coded / kGroupKeys));
  if (coded > 0 && p.code_bits == 4) {
    sift_with(CodedScorer<4, Part::kRun / 2>(p, row, shared.query), 0, coded);
  } else if (coded > 0) {
    sift_with(CodedScorer<8, Part::kRun / 4>(p, row, shared.query), 0, coded);
  }
  if (coded < members.groups()) {
    sift_with(Scorer(p, row, shared.query), coded, members.groups());
  }
  const int kept = members.kept();
  members.keep_end();
  Scan<Scorer>::put_stats({all.top, all.poisoned, kept}, {sieve.shift(), all.dropped}, true, shared,
                          stats);
}

}  // namespace rtpurbo::cuda

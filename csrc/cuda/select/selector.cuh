#pragma once
// The stages of a selection, one after the other, by one block of a team.

#include "csrc/cuda/select/chosen.cuh"
#include "csrc/cuda/select/finish.cuh"
#include "csrc/cuda/select/score_again.cuh"

namespace rtpurbo::cuda {

/// The near keys' log-mass, of which the scores' offset is taken; `near_log_mass()` is of a real
/// row.
template <typename NearLogMass>
__device__ __forceinline__ float near_of_scores(const SelectParams& p, const Row& row,
                                                const NearLogMass& near_log_mass) {
  if (row.position < row.start) return -INFINITY;
  const float near = near_log_mass();
  return p.offset_ptr ? near - p.offset_ptr[row.head] : near;
}

/// Shared memory of the stages, which follow each other, of which More are a selector's own.
template <typename Scorer, typename More>
struct SelectorShared {
  union {
    typename Scan<Scorer>::Shared scan;
    Weigh::Shared weigh;
    FindBin::Shared find_bin;
    Publish::Shared publish;
    Finish::Shared finish;
    More more;
  };
  BlockStats stats;
  float near;  // log-mass of the near keys
};

/// With kRefine the choice is made again, among twice its members, with their scores by k_index.
template <typename Scorer, bool kRefine = false>
class Selector {
  static constexpr int kHistograms = kRefine ? 2 : 1;

 public:
  using Shared = SelectorShared<Scorer, typename ScoreAgain<Scorer>::Shared>;

  /// The first half: this block's scores and statistics. A barrier of the team must follow.
  static __device__ void scan(const SelectParams& p, const SelectWorkspace& w, const Team& team,
                              const Row& row, Members& members, Shared& shared) {
    clear_histograms<kHistograms>(w, team);
    Scan<Scorer>::run(p, row, members, shared.scan, w.stats[blockIdx.x]);
  }

  /// The second half. `near_log_mass()`, of a real row, is called by one warp, unless near keys are
  /// scored.
  template <typename NearLogMass>
  static __device__ Selection choose(const SelectParams& p, const SelectWorkspace& w, Team& team,
                                     const Row& row, Members& members, Shared& shared,
                                     const NearLogMass& near_log_mass) {
    unsigned long long* bin_mass = w.bin_mass + team.number * kBins;
    uint32_t* bin_count = w.bin_count + team.number * kBins;
    Selection found{};
    Wanted wanted{p.p, p.min_members, !kRefine && p.whole_bins};
    double left_out = 0.0;
    // One loop, so that its code is fetched once.
#pragma unroll 1
    for (int pass = kChoose; pass <= kLastPass; ++pass) {
      if (pass != kWiden) {
        const bool first = pass == kChoose;
        if (threadIdx.x < 32) {
          const bool near_is_scored = p.near_is_scored && first;
          const BlockStats stats =
              merge_stats(w.stats + team.number * team.size, team.size, near_is_scored);
          if (threadIdx.x == 0) {
            shared.stats = stats;
            if (near_is_scored) shared.near = LogSum{stats.rest_shift, stats.rest_sum}.log();
          }
        } else if (threadIdx.x < 64 && !p.near_is_scored && first) {
          const float near = near_of_scores(p, row, near_log_mass);
          if (threadIdx.x == 32) shared.near = near;
        }
        __syncthreads();
        if (kRefine && !first && shared.stats.top_key == 0 && !shared.stats.poisoned) {
          const double near = relative_mass(shared.near, found.top);
          found.cut = {.bin = kNoBin,
                       .score = INFINITY,
                       .index = -1,
                       .count = 0,
                       .mass = near,
                       .total = near + left_out};
          return found;
        }
        const float top = score_of(shared.stats.top_key);
        if (!first) left_out *= relative_mass(found.top, top);
        found.top = top;
        found.poisoned = shared.stats.poisoned || !(shared.near < INFINITY);
        found.everything = found.poisoned || p.p >= 1.0 || shared.stats.top_key == 0;
        if (found.everything) {
          found.cut.score = -INFINITY;
          found.cut.count = shared.stats.candidates;
          return found;
        }
        Weigh::run(members, found.top, shared.weigh, bin_mass, bin_count);
      }
      team.sync();  // with kWiden, others may still read what will be published anew
      const double near = relative_mass(shared.near, found.top);
      const double outside = kRefine ? near + left_out : near;
      found.cut = FindBin::run(wanted, near, outside, bin_mass, bin_count, shared.find_bin);
      cut_bin(w, team, members, found.top, found.cut, shared);
      if constexpr (kRefine) {
        if (found.cut.count == 0) return found;
        if (pass == kChoose) wanted = {0.0, 2 * found.cut.count};
        if (pass == kWiden) {
          wanted = {p.p, p.min_members};
          left_out = fmax(found.cut.total - found.cut.mass, 0.0);
          bin_mass += w.teams * kBins;
          bin_count += w.teams * kBins;
          __syncthreads();
          ScoreAgain<Scorer>::run(p, row, members, found, shared.more, w.stats[blockIdx.x]);
          team.sync();
        }
      }
    }
    return found;
  }

 private:
  static constexpr int kChoose = 0;                        // as without kRefine
  static constexpr int kWiden = 1;                         // twice as many members
  static constexpr int kLastPass = kRefine ? 2 : kChoose;  // the choice among them
};

}  // namespace rtpurbo::cuda

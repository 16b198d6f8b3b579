#pragma once
// The stages of a selection with a sieve, one after the other, by one block of a team. After the
// sample and the rest, all members are scanned once more in the rare case that the sieve held back
// some that may be in. Where heads share index keys, blocks of all teams scan the rest for them.

#include <type_traits>

#include "csrc/cuda/select/selector.cuh"
#include "csrc/cuda/select/shared_lists.cuh"
#include "csrc/cuda/select/shared_scan.cuh"
#include "csrc/cuda/select/sieve.cuh"

namespace rtpurbo::cuda {

/// kShares: with heads that share index keys.
template <typename Scorer, bool kShares>
class SievedSelector {
  struct Nothing {};
  union Together {
    SharedScan::Shared scan;
    SharedLists::Shared lists;
  };

 public:
  using Shared = SelectorShared<Scorer, std::conditional_t<kShares, Together, Nothing>>;

  /// What a block of no team has to do, after the first barrier.
  template <typename Meet>
  static __device__ void help(const SelectParams& p, const SelectWorkspace& w, const KeyHeads& keys,
                              Shared& shared, const Meet& meet) {
    if constexpr (kShares) scan_together(p, w, keys, shared, meet);
  }

  /// `meet(whole_grid)` is a barrier. `near_log_mass()`, of a real row, is called by one warp.
  /// `dynamic` is shared memory for what is kept.
  template <typename Meet, typename NearLogMass>
  static __device__ Selection run(const SelectParams& p, const SelectWorkspace& w,
                                  const KeyHeads& keys, Team& team, const Row& row,
                                  Members& members, Shared& shared, const Meet& meet,
                                  const NearLogMass& near_log_mass, char* dynamic) {
    clear_histograms<kSiftedHistograms>(w, team);
    members.take(row.far_begin, row.far_end);
    members.keep_only(0);
    Selection found{};
    Sieve sieve;
    Part part = Part::sample();
    // Of the parts so far.
    uint32_t top_key = 0, poisoned = 0;
    // One loop, so that its code is fetched once.
#pragma unroll 1
    for (int scan = 0;; ++scan) {
      const bool sampling = scan == 0;
      bool given = false;
      if constexpr (kShares) {
        if (scan == 1) {
          if (team.rank == 0 && threadIdx.x == 0) w.edges[team.number] = sieve.published();
          scan_together(p, w, keys, shared, meet);
          given = !sieve.keeps_all();
        }
        if (given) {
          SharedLists::take(w, team, row, members, dynamic, shared.more.lists);
          __syncthreads();
        }
      }
      if (!given) {
        sift<Scorer>(p, row, part, sieve, Part::origin(team), members, shared.scan,
                     w.stats[blockIdx.x]);
        meet(sampling);
        if (!sampling) members.bring(dynamic, w.shared_bytes);
      }
      if (threadIdx.x < 32) {
        const int blocks = given ? w.shared_blocks : team.size;
        const BlockStats* parts = given ? w.shared_stats : w.stats;
        const BlockStats stats = merge_stats(parts + team.number * blocks, blocks, true);
        if (threadIdx.x == 0) shared.stats = stats;
      } else if (threadIdx.x < 64 && sampling) {
        const float near = near_of_scores(p, row, near_log_mass);
        if (threadIdx.x == 32) shared.near = near;
      }
      __syncthreads();
      const BlockStats stats = shared.stats;
      top_key = max(top_key, stats.top_key);
      poisoned |= stats.poisoned;
      found.top = score_of(top_key);
      found.poisoned = poisoned || !(shared.near < INFINITY);
      found.everything = found.poisoned || top_key == 0;
      const int64_t histogram = static_cast<int64_t>(scan * w.teams + team.number) * kBins;
      if (!found.everything) {
        Weigh::run(members, found.top, shared.weigh, w.bin_mass + histogram,
                   w.bin_count + histogram);
      }
      team.sync();
      if (!found.everything) {
        const double near = relative_mass(shared.near, found.top);
        const double dropped =
            relative_mass(LogSum{stats.rest_shift, stats.rest_sum}.log(), found.top);
        Wanted wanted{p.p, p.min_members, p.whole_bins};
        double share = 1.0;
        if (sampling) {
          share = static_cast<double>(stats.candidates) /
                  static_cast<double>(row.far_end - row.far_begin);
          wanted = Sieve::of_sample(wanted, share);
        }
        found.cut = FindBin::run(wanted, near * share, (near + dropped) * share,
                                 w.bin_mass + histogram, w.bin_count + histogram, shared.find_bin);
      }
      if (sampling) {
        if (!found.everything) sieve.set(found.cut, found.top, stats.candidates);
        part = Part::rest();
      } else {
        if (sieve.keeps_all() || (!found.everything && sieve.holds(found.cut, found.top))) break;
        sieve = Sieve();
        part = Part::all();
        members.keep_only(0);
      }
      __syncthreads();
    }
    if (found.everything) {
      found.cut = {};
      found.cut.score = -INFINITY;
      found.cut.count = shared.stats.candidates;
      return found;
    }
    cut_bin(w, team, members, found.top, found.cut, shared);
    return found;
  }

 private:
  template <typename Meet>
  static __device__ void scan_together(const SelectParams& p, const SelectWorkspace& w,
                                       const KeyHeads& keys, Shared& shared, const Meet& meet) {
    meet(true);
    SharedScan::run(p, w, keys, shared.more.scan);
    meet(true);
  }
};

}  // namespace rtpurbo::cuda

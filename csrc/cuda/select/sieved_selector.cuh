#pragma once
// The stages of a selection with a sieve, one after the other, by one block of a team. After the
// sample and the rest, all members are scanned once more in the rare case that the sieve held back
// some that may be in.

#include "csrc/cuda/select/chosen.cuh"
#include "csrc/cuda/select/finish.cuh"
#include "csrc/cuda/select/sieve.cuh"

namespace rtpurbo::cuda {

template <typename Scorer>
class SievedSelector {
 public:
  struct Shared {
    union {
      typename Scan<Scorer>::Shared scan;
      Weigh::Shared weigh;
      FindBin::Shared find_bin;
      Publish::Shared publish;
      Finish::Shared finish;
    };
    BlockStats stats;
    float near;  // log-mass of the near keys
  };

  /// `meet(scan)` is the team's barrier after each scan. `near_log_mass()`, of a real row, is
  /// called by one warp.
  template <typename Meet, typename NearLogMass>
  static __device__ Selection run(const SelectParams& p, const SelectWorkspace& w, Team& team,
                                  const Row& row, Members& members, Shared& shared,
                                  const Meet& meet, const NearLogMass& near_log_mass) {
    clear_histograms(w, team);
    members.take(row.far_begin, row.far_end);
    members.keep_only(0);
    Selection found{};
    Sieve sieve;
    Part part = Part::sample();
    uint32_t top_key = 0, poisoned = 0;  // of the parts so far
                                         // One loop, so that its code is fetched once.
#pragma unroll 1
    for (int scan = 0;; ++scan) {
      sift<Scorer>(p, row, part, sieve, Part::origin(team), members, shared.scan,
                   w.stats[blockIdx.x]);
      meet(scan);
      const bool sampling = scan == 0;
      if (threadIdx.x < 32) {
        const BlockStats stats = merge_stats(w.stats + team.number * team.size, team.size, true);
        if (threadIdx.x == 0) shared.stats = stats;
      } else if (threadIdx.x < 64 && sampling) {
        float near = -INFINITY;
        if (row.position >= row.start) {
          near = near_log_mass();
          if (p.offset_ptr) near -= p.offset_ptr[row.head];
        }
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
        const double near = relative(shared.near, found.top);
        const double dropped = relative(LogSum{stats.rest_shift, stats.rest_sum}.log(), found.top);
        Wanted wanted{p.p, p.min_members};
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
  /// Each scan has one of its own.
  static __device__ void clear_histograms(const SelectWorkspace& w, const Team& team) {
    for (int bin = team.rank * kSelectThreads + threadIdx.x; bin < kBins;
         bin += team.size * kSelectThreads) {
#pragma unroll
      for (int scan = 0; scan < kSiftedHistograms; ++scan) {
        const int64_t histogram = static_cast<int64_t>(scan * w.teams + team.number) * kBins;
        w.bin_mass[histogram + bin] = 0;
        w.bin_count[histogram + bin] = 0;
      }
    }
  }

  static __device__ double relative(float log_mass, float top) {
    return exp(fmin(static_cast<double>(log_mass) - top, kMostNats));
  }
};

}  // namespace rtpurbo::cuda

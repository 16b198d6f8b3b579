#pragma once
// The stages of a selection, one after the other, by one block of a team.

#include "csrc/cuda/select/finish.cuh"
#include "csrc/cuda/select/scan.cuh"

namespace rtpurbo::cuda {

/// What a team found out about its problem.
struct Selection {
  bool everything;  // every candidate is in: p is 1, a score is NaN or infinite, or there is none
  bool poisoned;
  float top;  // the largest score
  Cut cut;

  /// Mass of what is in and of the near keys, as a share of all.
  __device__ float mass() const {
    if (poisoned) return NAN;
    return everything ? 1.0f : static_cast<float>(fmin(1.0, cut.mass / cut.total));
  }
};

template <typename Scorer>
class Selector {
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

  /// The first half: this block's scores and statistics. A barrier of the team must follow.
  static __device__ void scan(const SelectParams& p, const SelectWorkspace& w, const Team& team,
                              const Row& row, Members& members, Shared& shared) {
    for (int bin = team.rank * kSelectThreads + threadIdx.x; bin < kBins;
         bin += team.size * kSelectThreads) {
      w.bin_mass[team.number * kBins + bin] = 0;
      w.bin_count[team.number * kBins + bin] = 0;
    }
    Scan<Scorer>::run(p, row, members, shared.scan, w.stats[blockIdx.x]);
  }

  /// The second half. `near_log_mass()`, of a real row, is called by one warp, unless near keys are
  /// scored.
  template <typename NearLogMass>
  static __device__ Selection choose(const SelectParams& p, const SelectWorkspace& w, Team& team,
                                     const Row& row, const Members& members, Shared& shared,
                                     const NearLogMass& near_log_mass) {
    unsigned long long* bin_mass = w.bin_mass + team.number * kBins;
    uint32_t* bin_count = w.bin_count + team.number * kBins;
    if (threadIdx.x < 32) {
      const BlockStats stats =
          merge_stats(w.stats + team.number * team.size, team.size, p.near_is_scored);
      if (threadIdx.x == 0) {
        shared.stats = stats;
        if (p.near_is_scored) shared.near = LogSum{stats.near_shift, stats.near_sum}.log();
      }
    } else if (threadIdx.x < 64 && !p.near_is_scored) {
      float near = -INFINITY;
      if (row.position >= row.start) {
        near = near_log_mass();
        if (p.offset_ptr) near -= p.offset_ptr[row.head];
      }
      if (threadIdx.x == 32) shared.near = near;
    }
    __syncthreads();
    Selection found{};
    found.top = score_of(shared.stats.top_key);
    found.poisoned = shared.stats.poisoned || !(shared.near < INFINITY);
    found.everything = found.poisoned || p.p >= 1.0 || shared.stats.top_key == 0;
    if (found.everything) {
      found.cut.score = -INFINITY;
      found.cut.count = shared.stats.candidates;
      return found;
    }
    Weigh::run(members, found.top, shared.weigh, bin_mass, bin_count);
    team.sync();
    const double near = exp(fmin(static_cast<double>(shared.near) - found.top, kMostNats));
    found.cut = FindBin::run(p, near, bin_mass, bin_count, shared.find_bin);
    if (found.cut.bin < 0 || found.cut.bin >= kBins) return found;

    __syncthreads();
    Publish::run(members, found.top, found.cut.bin,
                 w.cut_members + static_cast<int64_t>(blockIdx.x) * w.block_members,
                 w.cut_counts + blockIdx.x, shared.publish);
    team.sync();
    const int64_t first_block = static_cast<int64_t>(team.number) * team.size;
    const Published published(w.cut_members + first_block * w.block_members,
                              w.cut_counts + first_block, w.block_members, team.size);
    Finish::run(published, found.top, found.cut, shared.finish);
    return found;
  }
};

/// Calls fn(i, in) with bit e of `in` set when member i + e of this warp is in, i a multiple of 4;
/// by all lanes, for all members. fn may overwrite scores of members before i's step of 128.
template <typename Fn>
__device__ __forceinline__ void for_each_chosen(const Selection& selection, const Members& members,
                                                const Fn& fn) {
  for_each_four(members, 0, members.count(), [&](int i, const float(&scores)[4]) {
    uint32_t in = 0, ties = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool own =
          selection.everything ? scores[e] != -INFINITY : scores[e] > selection.cut.score;
      in |= static_cast<uint32_t>(own) << e;
      ties |= static_cast<uint32_t>(scores[e] == selection.cut.score) << e;
    }
    if (ties && !selection.everything) {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        if (ties >> e & 1) in |= (members.position(i + e) <= selection.cut.index) << e;
      }
    }
    fn(i, in);
  });
}

/// Sets the bits of the keys of members i to i + 3; every lane is there.
__device__ __forceinline__ void mark_chosen(const Members& members, int i, uint32_t in,
                                            int block_size, uint64_t* selected) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(selected);
  if (block_size == 1) {
    const uint32_t next = __shfl_down_sync(0xffffffffu, in, 1);
    if (threadIdx.x % 2 == 0 && i < members.count()) {
      bytes[members.position(i) / 8] = static_cast<uint8_t>(in | next << 4);
    }
    return;
  }
#pragma unroll 1
  for (int e = 0; e < 4 && i + e < members.count(); ++e) {
    const int64_t first = static_cast<int64_t>(members.position(i + e)) * (block_size / 8);
    const uint8_t value = in >> e & 1 ? 0xff : 0;
#pragma unroll 1
    for (int b = 0; b < block_size / 8; ++b) bytes[first + b] = value;
  }
}

}  // namespace rtpurbo::cuda

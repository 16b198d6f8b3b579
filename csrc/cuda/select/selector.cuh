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

/// Calls fn(i, in) with bit e of `in` set when member i + e of this warp is in, i a multiple of 4;
/// by all lanes, for members [0, end). fn may overwrite scores of members up to i's step of 128.
template <typename Fn>
__device__ __forceinline__ void for_each_chosen(const Selection& selection, const Members& members,
                                                int end, const Fn& fn) {
  for_each_four(members, 0, end, [&](int i, const float(&scores)[4]) {
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

/// With kRefine the choice is made again, among twice its members, with their scores by k_index.
template <typename Scorer, bool kRefine = false>
class Selector {
  static constexpr int kHistograms = kRefine ? 2 : 1;
  static constexpr int kListed = 256;
  struct Again {
    typename Scan<Scorer>::Shared scan;
    int list[kSelectWarps][kListed];
  };

 public:
  struct Shared {
    union {
      typename Scan<Scorer>::Shared scan;
      Weigh::Shared weigh;
      FindBin::Shared find_bin;
      Publish::Shared publish;
      Finish::Shared finish;
      Again again;
    };
    BlockStats stats;
    float near;  // log-mass of the near keys
  };

  /// The first half: this block's scores and statistics. A barrier of the team must follow.
  static __device__ void scan(const SelectParams& p, const SelectWorkspace& w, const Team& team,
                              const Row& row, Members& members, Shared& shared) {
    for (int bin = team.rank * kSelectThreads + threadIdx.x; bin < kBins;
         bin += team.size * kSelectThreads) {
#pragma unroll
      for (int i = 0; i < kHistograms; ++i) {
        w.bin_mass[(i * w.teams + team.number) * kBins + bin] = 0;
        w.bin_count[(i * w.teams + team.number) * kBins + bin] = 0;
      }
    }
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
    Wanted wanted{p.p, p.min_members};
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
            if (near_is_scored) shared.near = LogSum{stats.near_shift, stats.near_sum}.log();
          }
        } else if (threadIdx.x < 64 && !p.near_is_scored && first) {
          float near = -INFINITY;
          if (row.position >= row.start) {
            near = near_log_mass();
            if (p.offset_ptr) near -= p.offset_ptr[row.head];
          }
          if (threadIdx.x == 32) shared.near = near;
        }
        __syncthreads();
        const float top = score_of(shared.stats.top_key);
        if (!first) left_out *= exp(fmin(static_cast<double>(found.top) - top, kMostNats));
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
      const double near = exp(fmin(static_cast<double>(shared.near) - found.top, kMostNats));
      const double outside = kRefine ? near + left_out : near;
      found.cut = FindBin::run(wanted, near, outside, bin_mass, bin_count, shared.find_bin);
      if (found.cut.bin >= 0 && found.cut.bin < kBins) {
        __syncthreads();
        Publish::run(members, found.top, found.cut.bin,
                     w.cut_members + static_cast<int64_t>(blockIdx.x) * w.block_members,
                     w.cut_counts + blockIdx.x, shared.publish);
        team.sync();
        const int64_t first_block = static_cast<int64_t>(team.number) * team.size;
        const Published published(w.cut_members + first_block * w.block_members,
                                  w.cut_counts + first_block, w.block_members, team.size);
        Finish::run(published, found.top, found.cut, shared.finish);
      }
      if constexpr (kRefine) {
        if (found.cut.count == 0) return found;
        if (pass == kChoose) wanted = {0.0, 2 * found.cut.count};
        if (pass == kWiden) {
          wanted = {p.p, p.min_members};
          left_out = fmax(found.cut.total - found.cut.mass, 0.0);
          bin_mass += w.teams * kBins;
          bin_count += w.teams * kBins;
          __syncthreads();
          score_again(p, row, members, found, shared, w.stats[blockIdx.x]);
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

  /// Scores this block's members of the cut by k_index where codes gave the score; the others have
  /// none any more. A warp lists its members first, so that lanes wait for their keys together.
  static __device__ void score_again(const SelectParams& p, const Row& row, Members& members,
                                     const Selection& found, Shared& shared, BlockStats& stats) {
    Again& again = shared.again;
    Scan<Scorer>::load_query(p, row, again.scan);
    const Scorer scorer(p, row, again.scan.query);
    const int lane = threadIdx.x % 32;
    int* list = again.list[threadIdx.x / 32];
    int listed = 0;
    ScoreStats own;
    // One step more than there are members, for what is still listed.
    for_each_chosen(found, members, members.count() + 128, [&](int i, uint32_t in) {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const bool chosen = in >> e & 1;
        const uint32_t lanes = __ballot_sync(0xffffffffu, chosen);
        if (chosen) {
          list[listed + __popc(lanes & ((1u << lane) - 1))] = i + e;
        } else if (i < members.count()) {
          members.score(i + e) = -INFINITY;
        }
        listed += __popc(lanes);
      }
      const bool more = (i & ~127) < members.count();
      if (more && listed <= kListed - 128) return;
      __syncwarp();
#pragma unroll 1
      for (int j = lane; j < listed; j += 32) {
        float& score = members.score(list[j]);
        const int32_t n = members.position(list[j]);
        if (n < p.coded) score = scorer.of_key(n);
        own.add(score);
      }
      __syncwarp();
      listed = 0;
    });
    Scan<Scorer>::put_stats(own, LogSum{}, false, again.scan, stats);
  }
};

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

#pragma once
// What refine adds: the members of a cut, chosen by codes, are scored again by 16-bit keys.

#include "csrc/cuda/select/chosen.cuh"
#include "csrc/cuda/select/scan.cuh"

namespace rtpurbo::cuda {

template <typename Scorer>
class ScoreAgain {
  static constexpr int kListed = 256;

 public:
  struct Shared {
    typename Scan<Scorer>::Shared scan;
    int list[kSelectWarps][kListed];
  };

  /// Scores this block's members of the cut by k_index, those without codes too, so that equal keys
  /// tie; the others have none any more. A warp lists its members first, so that lanes wait for
  /// their keys together.
  static __device__ void run(const SelectParams& p, const Row& row, Members& members,
                             const Selection& found, Shared& shared, BlockStats& stats) {
    Scan<Scorer>::load_query(p, row, shared.scan);
    const Scorer scorer(p, row, shared.scan.query);
    const int lane = threadIdx.x % 32;
    int* list = shared.list[threadIdx.x / 32];
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
        score = scorer.of_key(members.position(list[j]));
        own.add(score);
      }
      __syncwarp();
      listed = 0;
    });
    Scan<Scorer>::put_stats(own, LogSum{}, false, shared.scan, stats);
  }
};

}  // namespace rtpurbo::cuda

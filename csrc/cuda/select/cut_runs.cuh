#pragma once
// Where the warps of a team leave their members of the bin that is cut.

#include "csrc/cuda/select/team.cuh"

namespace rtpurbo::cuda {

struct CutRuns {
  Member* members;  // [count, room]
  int32_t* counts;
  int count, room;
  int own;  // run of this warp

  __device__ CutRuns(const SelectWorkspace& w, const Team& team)
      : count(team.size * kSelectWarps),
        room(w.block_members / kSelectWarps),
        own(team.rank * kSelectWarps + static_cast<int>(threadIdx.x) / 32) {
    const int64_t first = static_cast<int64_t>(team.number) * count;
    members = w.cut_members + first * room;
    counts = w.cut_counts + first;
  }

  __device__ Member* of_warp() const { return members + static_cast<int64_t>(own) * room; }
  __device__ int32_t& count_of_warp() const { return counts[own]; }

  __device__ Member load(int run, int i) const {
    const auto* from = reinterpret_cast<const uint2*>(members + static_cast<int64_t>(run) * room);
    const uint2 loaded = __ldcg(from + i);
    return {loaded.x, static_cast<int32_t>(loaded.y)};
  }
};

}  // namespace rtpurbo::cuda

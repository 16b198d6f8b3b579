#pragma once
// Who scans which far keys where a key head is scanned once for all its heads.

#include "csrc/cuda/select/problem.cuh"

namespace rtpurbo::cuda {

/// Runs of far keys, dealt out in turn to the warps that scan a key head. Warp i keeps what it
/// finds for a head in list i of that head, with room for all keys of its runs.
struct SharedRuns {
  static constexpr int kKeys = kGroupKeys << kLongRun;

  int begin, end;  // far keys
  int warps;
  int of_each, rest;  // runs of a warp; so many warps have one more

  __device__ SharedRuns(const Row& row, int blocks)
      : begin(static_cast<int>(row.far_begin)),
        end(static_cast<int>(row.far_end)),
        warps(blocks * kSelectWarps) {
    const int runs = (end - begin + kKeys - 1) / kKeys;
    of_each = runs / warps;
    rest = runs % warps;
  }

  __device__ int runs_of(int warp) const { return of_each + (warp < rest); }
  __device__ int first_key(int warp, int run) const { return begin + (run * warps + warp) * kKeys; }

  /// Where the list of a warp begins.
  __device__ int list(int warp) const { return (warp * of_each + min(warp, rest)) * kKeys; }
};

/// Where the lists of a problem are: in the place of its team for members of the cut bin, which are
/// as large, and published only when the team has taken its lists over.
__device__ __forceinline__ float2* lists_of(const SelectWorkspace& w, int problem) {
  return reinterpret_cast<float2*>(w.cut_members +
                                   static_cast<int64_t>(problem) * w.team_size * w.block_members);
}

}  // namespace rtpurbo::cuda

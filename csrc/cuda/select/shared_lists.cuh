#pragma once
// What a shared scan kept for a head goes to the warps of the head's team.

#include <cub/block/block_scan.cuh>

#include "csrc/cuda/select/key_heads.h"
#include "csrc/cuda/select/members.cuh"
#include "csrc/cuda/select/shared_runs.cuh"

namespace rtpurbo::cuda {

class SharedLists {
  using Scan = cub::BlockScan<int, kSelectThreads>;

 public:
  struct Shared {
    int before[kMostLists];  // members in lists before each
    typename Scan::TempStorage scan;
  };

  /// The lists one after the other are dealt out in rows of 32, so that neighbours are spread over
  /// the team.
  static __device__ __forceinline__ void take(const SelectWorkspace& w, const Team& team,
                                              const Row& row, Members& members, char* dynamic,
                                              Shared& shared) {
    const SharedRuns runs(row, w.shared_blocks);
    const int lists = runs.warps;
    const int all = count(w.list_counts + static_cast<int64_t>(team.number) * lists, lists, shared);
    const float2* kept = lists_of(w, team.number);
    const int first_row = static_cast<int>(threadIdx.x) / 32 * team.size + team.rank;
    const int stride = team.size * kSelectWarps, all_rows = (all + 31) / 32;
    const int rows = all_rows > first_row ? (all_rows - first_row - 1) / stride + 1 : 0;
    members.make_room(rows, dynamic, w.shared_bytes);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    constexpr int kAtOnce = 4;  // on their way
#pragma unroll 1
    for (int base = 0; base < rows; base += kAtOnce) {
      float2 own[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = (first_row + (base + j) * stride) * 32 + lane;
        own[j] = make_float2(-INFINITY, 0.0f);
        if (base + j < rows && i < all) {
          const int list = list_of(i, lists, shared);
          own[j] = __ldcg(&kept[runs.list(list) + i - shared.before[list]]);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (base + j < rows) {
          members.put((base + j) * 32 + lane, own[j].x, __float_as_int(own[j].y));
        }
      }
    }
    __syncwarp();
  }

 private:
  /// Counts the members in the lists before each, and returns those of all.
  static __device__ int count(const int32_t* counts, int lists, Shared& shared) {
    int all = 0;
#pragma unroll 1
    for (int first = 0; first < lists; first += kSelectThreads) {
      const int list = first + static_cast<int>(threadIdx.x);
      int before, more;
      Scan(shared.scan).ExclusiveSum(list < lists ? __ldcg(&counts[list]) : 0, before, more);
      if (list < lists) shared.before[list] = all + before;
      all += more;
      __syncthreads();
    }
    return all;
  }

  /// Which list holds member i of all.
  static __device__ int list_of(int i, int lists, const Shared& shared) {
    int list = 0;
#pragma unroll 1
    for (int step = 1 << (31 - __clz(lists)); step > 0; step /= 2) {
      if (list + step < lists && shared.before[list + step] <= i) list += step;
    }
    return list;
  }
};

}  // namespace rtpurbo::cuda

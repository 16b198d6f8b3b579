#pragma once
// Stage 6 of the operator select: the members that are in, by ascending position, then -1. The
// blocks of a team mark theirs, and after a barrier each writes a run of them.

#include "csrc/cuda/select/selector.cuh"

namespace rtpurbo::cuda {

constexpr int kChunkGroups = 64;  // that a warp writes at a time

class Emit {
 public:
  using Scan = cub::BlockScan<uint32_t, kSelectThreads>;
  struct Shared {
    typename Scan::TempStorage scan;
    uint32_t before[kSelectThreads];
  };

  /// Counts the chosen of members i to i + 3 by chunk.
  static __device__ void count(const Members& members, int i, uint32_t in, int block_size,
                               uint32_t* chunk_counts) {
    if (in == 0) return;
    if (block_size == 1) {
      atomicAdd(&chunk_counts[members.position(i) / (kChunkGroups * kGroupKeys)], __popc(in));
      return;
    }
    for (int e = 0; e < 4; ++e) {
      if (in >> e & 1) {
        const int64_t key = static_cast<int64_t>(members.position(i + e)) * block_size;
        atomicAdd(&chunk_counts[key / (kChunkGroups * kGroupKeys)], 1u);
      }
    }
  }

  static __device__ void write(const Team& team, const SelectWorkspace& w, int block_size,
                               const uint64_t* selected, const uint32_t* chunk_counts,
                               int32_t* indices, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Bits of the keys that stand for their block.
    uint64_t leaders = 0;
    for (int i = 0; i < kGroupKeys; i += block_size) leaders |= uint64_t{1} << i;
    uint32_t before_run = 0;
    for (int64_t base = 0; base < w.chunks; base += kSelectThreads) {
      const int64_t own_chunk = base + threadIdx.x;
      uint32_t all;
      Scan(shared.scan)
          .ExclusiveSum(own_chunk < w.chunks ? __ldcg(&chunk_counts[own_chunk]) : 0u,
                        shared.before[threadIdx.x], all);
      __syncthreads();
      const int64_t end = min(base + kSelectThreads, w.chunks);
      for (int64_t chunk = base + team.rank * kSelectWarps + warp; chunk < end;
           chunk += team.size * kSelectWarps) {
        uint32_t place = before_run + shared.before[chunk - base];
        for (int64_t first = chunk * kChunkGroups;
             first < min((chunk + 1) * kChunkGroups, w.groups); first += 32) {
          const int64_t group = first + lane;
          uint64_t bits = group < w.groups ? __ldcg(&selected[group]) & leaders : 0;
          uint32_t own = __popcll(bits), upto = own;
          for (int step = 1; step < 32; step *= 2) {
            const uint32_t received = __shfl_up_sync(0xffffffffu, upto, step);
            if (lane >= step) upto += received;
          }
          uint32_t slot = place + upto - own;
          for (; bits; bits &= bits - 1) {
            const int64_t key = group * kGroupKeys + __ffsll(bits) - 1;
            indices[slot++] = static_cast<int32_t>(key / block_size);
          }
          place += __shfl_sync(0xffffffffu, upto, 31);
        }
      }
      before_run += all;
      __syncthreads();
    }
  }
};

}  // namespace rtpurbo::cuda

#pragma once
// Stage 3: the bin in which mass and floor are reached, one block a problem.

#include <cub/block/block_scan.cuh>

#include "csrc/cuda/select/histogram.cuh"

namespace rtpurbo::cuda {

constexpr int kCutThreads = 512;
constexpr double kMostNats =
    700.0;  // above, near mass would be infinite; far keys add nothing then
constexpr int kBinsPerThread = kBins / kCutThreads;

struct MassCount {
  double mass;
  long long count;
  __device__ MassCount operator+(const MassCount& other) const {
    return {mass + other.mass, count + other.count};
  }
};

/// Log-mass of the near keys on the scale of the scores; for a whole warp.
__device__ __forceinline__ float near_log_mass(const SelectParams& p, const Workspace& w,
                                               int64_t local) {
  const int64_t problem = w.first + local;
  const Row row = row_of(p, problem);
  if (row.position < row.start) return -INFINITY;
  if (p.near_lse_ptr) {
    const float near = p.near_lse_ptr[problem];
    return p.offset_ptr ? near - p.offset_ptr[problem / p.rows % p.heads] : near;
  }
  LogSum near;
  for (int64_t i = threadIdx.x % 32; i < w.scan_chunks; i += 32) {
    const float2 part = w.near[local * w.scan_chunks + i];
    near.add(part.x, part.y);
  }
  near = warp_log_sum(near);
  return near.sum == 0.0f ? -INFINITY : near.shift + logf(near.sum);
}

/// Weight of a bin's upper edge relative to the largest score.
__device__ __forceinline__ double bin_edge(int bin) {
  return exp2(-static_cast<double>(bin) / kBinsPerOctave);
}

__global__ __launch_bounds__(kCutThreads) void cut_kernel(SelectParams p, Workspace w) {
  using Scan = cub::BlockScan<MassCount, kCutThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ double shared_near;
  const int thread = threadIdx.x;
  const int64_t local = blockIdx.x;
  Problem& problem = w.problems[local];
  if (thread < 32) {
    const float near = near_log_mass(p, w, local);
    const uint32_t top_key = problem.top_key;
    if (thread == 0) {
      if (!(near < INFINITY)) problem.poisoned = 1;
      shared_near = near == -INFINITY || top_key == 0
                        ? 0.0
                        : exp(fmin(static_cast<double>(near) - score_of(top_key), kMostNats));
      problem.cut_bin = kNoBin;
    }
  }
  __syncthreads();
  if (trivial(p, problem)) return;

  MassCount own[kBinsPerThread];
  MassCount sum{0.0, 0};
  for (int j = 0; j < kBinsPerThread; ++j) {
    const int bin = thread * kBinsPerThread + j;
    const double units = static_cast<double>(w.bin_mass[local * kBins + bin]);
    own[j] = {units * bin_edge(bin) / (1 << kBinFraction), w.bin_count[local * kBins + bin]};
    sum = sum + own[j];
  }
  MassCount before, all;
  Scan(scan_storage)
      .ExclusiveScan(
          sum, before, MassCount{0.0, 0},
          [](const MassCount& a, const MassCount& b) { return a + b; }, all);
  const double near = shared_near;
  const double total = near + all.mass;
  const double target = p.p * total;
  const long long floor_count = min(static_cast<long long>(p.min_members), all.count);
  if (thread == 0) {
    problem.total = total;
    problem.target = target;
    problem.mass_above = near;
    problem.floor_left = 0;
    if (near < target || floor_count > 0) {
      problem.cut_bin = kAllBins;  // unless a thread finds a bin
      problem.mass_above = total;
    }
  }
  __syncthreads();
  if (near >= target && floor_count == 0) return;
  MassCount reached{near + before.mass, before.count};
  for (int j = 0; j < kBinsPerThread; ++j) {
    const bool was = reached.mass >= target && reached.count >= floor_count;
    const MassCount next = reached + own[j];
    if (!was && own[j].count > 0 && next.mass >= target && next.count >= floor_count) {
      problem.cut_bin = thread * kBinsPerThread + j;
      problem.mass_above = reached.mass;
      problem.floor_left = static_cast<int32_t>(max(floor_count - reached.count, 0ll));
    }
    reached = next;
  }
}

}  // namespace rtpurbo::cuda

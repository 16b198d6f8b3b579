#pragma once
// Stage 2: masses and counts of the members by bin of their log-weight; the last block of a
// problem finds the bin in which mass and floor are reached.

#include <cub/block/block_scan.cuh>

#include "csrc/cuda/select/scan.cuh"

namespace rtpurbo::cuda {

constexpr int kBinsThreads = 512;
constexpr int kBinsPerThread = kBins / kBinsThreads;

struct MassCount {
  double mass;
  long long count;
  __device__ MassCount operator+(const MassCount& other) const {
    return {mass + other.mass, count + other.count};
  }
};

/// True in every thread of the last of `blocks` blocks to come here; what the others wrote before
/// is then visible.
__device__ __forceinline__ bool last_block(uint32_t* ticket, uint32_t blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

/// Log-mass of the near keys on the scale of the scores.
__device__ __forceinline__ float near_log_mass(const SelectParams& p, const Workspace& w,
                                               int64_t local) {
  const int64_t problem = w.first + local;
  if (p.near_lse_ptr) {
    const float near = p.near_lse_ptr[problem];
    return p.offset_ptr ? near - p.offset_ptr[problem / p.rows % p.heads] : near;
  }
  LogSum near;
  for (int64_t i = 0; i < w.scan_chunks; ++i) {
    const float2 part = __ldcg(&w.near[local * w.scan_chunks + i]);
    near.add(part.x, part.y);
  }
  return near.sum == 0.0f ? -INFINITY : near.shift + logf(near.sum);
}

/// Weight of a bin's upper edge relative to the largest score.
__device__ __forceinline__ double bin_edge(int bin) {
  return exp2(-static_cast<double>(bin) / kBinsPerOctave);
}

/// Whether the row takes every candidate, or has none; then no bin is needed.
__device__ __forceinline__ bool trivial(const SelectParams& p, const Problem& problem) {
  return problem.poisoned || p.p >= 1.0 || problem.top_key == 0;
}

__device__ inline void find_cut_bin(const SelectParams& p, const Workspace& w, Problem& problem) {
  using Scan = cub::BlockScan<MassCount, kBinsThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ double shared_near;
  const int thread = threadIdx.x;
  const int64_t local = blockIdx.y;
  if (thread == 0) {
    const float near = near_log_mass(p, w, local);
    const uint32_t top_key = __ldcg(&problem.top_key);
    if (!(near < INFINITY)) problem.poisoned = 1;
    shared_near = near == -INFINITY || top_key == 0
                      ? 0.0
                      : exp(static_cast<double>(near) - score_of(top_key));
    problem.cut_bin = kNoBin;
  }
  __syncthreads();
  if (trivial(p, problem)) return;

  MassCount own[kBinsPerThread];
  MassCount sum{0.0, 0};
  for (int j = 0; j < kBinsPerThread; ++j) {
    const int bin = thread * kBinsPerThread + j;
    const double units = static_cast<double>(__ldcg(&w.bin_mass[local * kBins + bin]));
    own[j] = {units * bin_edge(bin) / (1 << kBinFraction),
              __ldcg(&w.bin_count[local * kBins + bin])};
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

__global__ __launch_bounds__(kBinsThreads) void histogram_kernel(SelectParams p, Workspace w,
                                                                 int64_t members_of_block) {
  __shared__ uint32_t mass[kBins], count[kBins];
  Problem& problem = w.problems[blockIdx.y];
  if (!trivial(p, problem)) {
    for (int bin = threadIdx.x; bin < kBins; bin += kBinsThreads) mass[bin] = count[bin] = 0;
    __syncthreads();
    const float top = score_of(problem.top_key);
    const float* scores = w.scores + blockIdx.y * w.members;
    const int64_t begin = blockIdx.x * members_of_block;
    const int64_t end = min(begin + members_of_block, w.members);
    for (int64_t i = begin + threadIdx.x; i < end; i += kBinsThreads) {
      const float score = scores[i];
      if (score == -INFINITY) continue;
      const float octaves = octaves_below(top, score);
      const int bin = bin_of(octaves);
      atomicAdd(&mass[bin],
                static_cast<uint32_t>(
                    weight_in_bin(octaves, bin) * static_cast<float>(1 << kBinFraction) + 0.5f));
      atomicAdd(&count[bin], 1u);
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kBinsThreads) {
      if (count[bin] == 0) continue;
      atomicAdd(&w.bin_mass[blockIdx.y * kBins + bin], static_cast<unsigned long long>(mass[bin]));
      atomicAdd(&w.bin_count[blockIdx.y * kBins + bin], count[bin]);
    }
  }
  if (last_block(&problem.bins_ticket, gridDim.x)) find_cut_bin(p, w, problem);
}

}  // namespace rtpurbo::cuda

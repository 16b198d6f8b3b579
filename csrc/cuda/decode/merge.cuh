#pragma once
// The parts of a head's keys, merged by their log-sum-exp in a fixed order.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/ptx/grid_dependency.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

constexpr int kMergeThreads = 256;
constexpr int kMergeWarps = kMergeThreads / 32;
constexpr int kMergeColumns = 32;  // of the output, that a block makes at a time

/// Evenly spaced parts: part i's statistics are at stats[i * stride], its sums at sums[i * stride].
struct PartRun {
  const float* sums = nullptr;  // [parts * stride, dim]
  const float2* stats = nullptr;
  int64_t stride = 1;
  int count = 0;
};

/// Two runs as one.
struct Parts {
  PartRun first, second;
  int64_t dim;

  __device__ int count() const { return first.count + second.count; }

  __device__ float2 stats(int i) const {
    const PartRun& run = i < first.count ? first : second;
    return __ldcg(run.stats + place(i) * run.stride);
  }

  __device__ float sum(int i, int64_t column) const {
    const PartRun& run = i < first.count ? first : second;
    return __ldcg(run.sums + place(i) * run.stride * dim + column);
  }

 private:
  __device__ int64_t place(int i) const { return i < first.count ? i : i - first.count; }
};

constexpr int64_t kMostParts = 1024;

struct MergeShared {
  float2 stats[kMergeWarps];
  float sums[kMergeWarps][kMergeColumns];
};

/// Columns [first_column, first_column + 32) of a head's output; its log-sum-exp with the first.
/// Each warp merges every eighth part, a lane a column.
template <typename T>
__device__ void merge_columns(const Parts& parts, int64_t first_column, T* out, float* lse,
                              MergeShared& shared) {
  constexpr int kAtOnce = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = first_column + lane;
  const int count = parts.count();
  float top = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma unroll 1
  for (int first = warp; first < count; first += kAtOnce * kMergeWarps) {
    float2 stats[kAtOnce];
    float sums[kAtOnce];
    float new_top = top;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * kMergeWarps;
      stats[j] = i < count ? parts.stats(i) : make_float2(-INFINITY, 0.0f);
      sums[j] = i < count && column < parts.dim ? parts.sum(i, column) : 0.0f;
    }
#pragma unroll
    for (const float2& part : stats) new_top = fmaxf(new_top, part.x);
    const float base = softmax_shift(new_top);
    const float shrink = fast_exp2(top - base);
    top = new_top;
    total *= shrink;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float share = fast_exp2(stats[j].x - base);
      total = fmaf(share, stats[j].y, total);
      sum = fmaf(share, sums[j], sum);
    }
  }
  __syncthreads();  // the last merge may still read
  if (lane == 0) shared.stats[warp] = make_float2(top, total);
  shared.sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  float largest = -INFINITY;
#pragma unroll
  for (const float2& part : shared.stats) largest = fmaxf(largest, part.x);
  const float base = softmax_shift(largest);
  total = sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) {
    const float share = fast_exp2(shared.stats[w].x - base);
    total = fmaf(share, shared.stats[w].y, total);
    sum = fmaf(share, shared.sums[w][lane], sum);
  }
  if (column < parts.dim) out[column] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
  if (first_column == 0 && lane == 0) *lse = lse_of_octaves(largest, total);
}

/// The parts of one of a head's slots.
__device__ __forceinline__ PartRun run_of_slot(const DecodeParams& p, const Partials& partials,
                                               int64_t batch, int slot) {
  const int64_t first = batch * p.splits * p.slots_count + slot;
  return {partials.sums + first * p.dim, partials.stats + first, p.slots_count, p.splits};
}

template <typename T>
__global__ __launch_bounds__(kMergeThreads) void merge_kernel(
    const __grid_constant__ DecodeParams p, Partials partials) {
  __shared__ MergeShared shared;
  ptx::await_previous_kernel();
  const int64_t head = blockIdx.x, batch = blockIdx.y;
  Parts parts{.dim = p.dim};
  parts.first = run_of_slot(p, partials, batch, p.head_slots[head][0]);
  if (p.head_slots[head][1] >= 0) {
    parts.second = run_of_slot(p, partials, batch, p.head_slots[head][1]);
  }
  merge_columns(parts, static_cast<int64_t>(blockIdx.z) * kMergeColumns,
                head_rows<T>(p.out, batch, head), p.lse_ptr + batch * p.heads + head, shared);
}

}  // namespace rtpurbo::cuda

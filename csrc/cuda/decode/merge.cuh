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

/// More would take longer to merge than they spare.
constexpr int64_t kMostSplits = 512;

struct MergeShared {
  float2 stats[kMergeWarps];
  float sums[kMergeWarps][kMergeColumns];
};

/// A column of a head's output, of some of its parts.
struct MergedColumn {
  float top = -INFINITY, total = 0.0f, sum = 0.0f;
};

/// Of every stride-th part from `first` on.
__device__ __forceinline__ MergedColumn merge_column(const Parts& parts, int first, int stride,
                                                     int64_t column) {
  constexpr int kAtOnce = 4;
  const int count = parts.count();
  MergedColumn merged;
#pragma unroll 1
  for (; first < count; first += kAtOnce * stride) {
    float2 stats[kAtOnce];
    float sums[kAtOnce];
    float new_top = merged.top;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * stride;
      stats[j] = i < count ? parts.stats(i) : make_float2(-INFINITY, 0.0f);
      sums[j] = i < count && column < parts.dim ? parts.sum(i, column) : 0.0f;
    }
#pragma unroll
    for (const float2& part : stats) new_top = fmaxf(new_top, part.x);
    const float base = softmax_shift(new_top);
    const float shrink = fast_exp2(merged.top - base);
    merged.top = new_top;
    merged.total *= shrink;
    merged.sum *= shrink;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float share = fast_exp2(stats[j].x - base);
      merged.total = fmaf(share, stats[j].y, merged.total);
      merged.sum = fmaf(share, sums[j], merged.sum);
    }
  }
  return merged;
}

/// Columns [first_column, first_column + 32) of a head's output, a lane each; its log-sum-exp with
/// the first. By a block, or with `alone` by each warp for itself.
template <typename T>
__device__ void merge_columns(const Parts& parts, bool alone, int64_t first_column, T* out,
                              float* lse, MergeShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = first_column + lane;
  MergedColumn merged = merge_column(parts, alone ? 0 : warp, alone ? 1 : kMergeWarps, column);
  if (!alone) {
    __syncthreads();  // the last merge may still read
    if (lane == 0) shared.stats[warp] = make_float2(merged.top, merged.total);
    shared.sums[warp][lane] = merged.sum;
    __syncthreads();
    if (warp != 0) return;
    merged = {};
#pragma unroll
    for (const float2& part : shared.stats) merged.top = fmaxf(merged.top, part.x);
    const float base = softmax_shift(merged.top);
#pragma unroll
    for (int w = 0; w < kMergeWarps; ++w) {
      const float share = fast_exp2(shared.stats[w].x - base);
      merged.total = fmaf(share, shared.stats[w].y, merged.total);
      merged.sum = fmaf(share, shared.sums[w][lane], merged.sum);
    }
  }
  if (column < parts.dim) {
    out[column] = from_float<T>(merged.total == 0.0f ? 0.0f : merged.sum / merged.total);
  }
  if (first_column == 0 && lane == 0) *lse = lse_of_octaves(merged.top, merged.total);
}

/// The parts of one of a head's slots.
__device__ __forceinline__ PartRun run_of_slot(const DecodeParams& p, const Partials& partials,
                                               int64_t batch, int slot) {
  const int64_t first = batch * p.splits * p.slots_count + slot;
  return {partials.sums + first * p.dim, partials.stats + first, p.slots_count, p.splits};
}

/// Whether warps merge alone: of few parts each, or where there are many heads' columns.
__device__ __host__ inline bool merges_alone(int64_t items, int blocks, int64_t parts) {
  constexpr int kFewParts = 8, kMostParts = 32;
  return parts <= (items > 2 * blocks ? kMostParts : kFewParts);
}

/// Of the warps that merge alone, or of the blocks.
__device__ __forceinline__ uint32_t merger_number(bool alone) {
  return alone ? blockIdx.x * kMergeWarps + threadIdx.x / 32 : blockIdx.x;
}

/// Columns of a head's output that one of them merges: item i of [B, Hq, runs]. 32-bit divisions,
/// which the items of one launch fit.
struct MergeItem {
  uint32_t batch, head, first_column;

  __device__ __forceinline__ MergeItem(uint32_t i, uint32_t heads, uint32_t runs) {
    const uint32_t head_number = i / runs;
    batch = head_number / heads;
    head = head_number - batch * heads;
    first_column = (i - head_number * runs) * kMergeColumns;
  }
};

template <typename T>
__global__ __launch_bounds__(kMergeThreads) void merge_kernel(
    const __grid_constant__ DecodeParams p, Partials partials, bool alone) {
  __shared__ MergeShared shared;
  ptx::await_previous_kernel();
  const auto runs = static_cast<uint32_t>((p.dim + kMergeColumns - 1) / kMergeColumns);
  const MergeItem item(merger_number(alone), static_cast<uint32_t>(p.heads), runs);
  const int64_t batch = item.batch, head = item.head;
  if (batch >= p.batch) return;
  Parts parts{.dim = p.dim};
  parts.first = run_of_slot(p, partials, batch, p.head_slots[head][0]);
  if (p.head_slots[head][1] >= 0) {
    parts.second = run_of_slot(p, partials, batch, p.head_slots[head][1]);
  }
  merge_columns(parts, alone, item.first_column, head_rows<T>(p.out, batch, head),
                p.lse_ptr + batch * p.heads + head, shared);
}

}  // namespace rtpurbo::cuda

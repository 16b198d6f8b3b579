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
  float shares[kMostParts];
  float maxima[kMergeWarps];
  float totals[kMergeWarps];
  float sums[kMergeWarps][kMergeColumns];
};

/// Columns [first_column, first_column + 32) of a head's output; its log-sum-exp with the first.
template <typename T>
__device__ void merge_columns(const Parts& parts, int64_t first_column, T* out, float* lse,
                              MergeShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // On their way before it is known what they weigh.
  constexpr int kAhead = 8;
  const int64_t column = first_column + lane;
  float ahead[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int i = warp + j * kMergeWarps;
    ahead[j] = column < parts.dim && i < parts.count() ? parts.sum(i, column) : 0.0f;
  }
  constexpr int kOwn = static_cast<int>(kMostParts / kMergeThreads);
  float2 own[kOwn];
  float largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kMergeThreads;
    own[j] = i < parts.count() ? parts.stats(i) : make_float2(-INFINITY, 0.0f);
    largest = fmaxf(largest, own[j].x);
  }
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  __syncthreads();
  if (lane == 0) shared.maxima[warp] = largest;
  __syncthreads();
  for (const float other : shared.maxima) largest = fmaxf(largest, other);
  const float base = softmax_shift(largest);
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const float share = exp2f(own[j].x - base);
    total += share * own[j].y;
    shared.shares[threadIdx.x + j * kMergeThreads] = share;
  }
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  if (lane == 0) shared.totals[warp] = total;
  __syncthreads();

  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    sum = fmaf(shared.shares[warp + j * kMergeWarps], ahead[j], sum);
  }
  if (column < parts.dim) {
#pragma unroll 4
    for (int i = warp + kAhead * kMergeWarps; i < parts.count(); i += kMergeWarps) {
      sum = fmaf(shared.shares[i], parts.sum(i, column), sum);
    }
  }
  shared.sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  total = sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) {
    sum += shared.sums[w][lane];
    total += shared.totals[w];
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

#pragma once
// The splits of a head, and its near and listed keys, merged by their log-sum-exp.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"

namespace rtpurbo::cuda {

constexpr int kMergeColumns = 128;
constexpr int kMergeGroups = 4;  // of parts that are summed side by side
constexpr int kMergeThreads = kMergeColumns * kMergeGroups;

/// Combines a value of every thread of the block.
template <typename Combine>
__device__ float block_reduce(float value, const Combine& combine) {
  __shared__ float warp_values[kMergeThreads / 32];
  for (int step = 16; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) warp_values[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_values[0];
  for (int w = 1; w < kMergeThreads / 32; ++w) value = combine(value, warp_values[w]);
  return value;
}

template <typename T>
__global__ __launch_bounds__(kMergeThreads) void merge_kernel(
    const __grid_constant__ DecodeParams p, Partials partials) {
  constexpr float kLn2 = 0.6931471805599453f;
  extern __shared__ float shares[];  // [parts]
  __shared__ float group_sums[kMergeGroups][kMergeColumns];
  const int64_t head = blockIdx.x, batch = blockIdx.y;
  const int slots[DecodeParams::kHeadSlots] = {p.head_slots[head][0], p.head_slots[head][1]};
  const int parts = (slots[1] < 0 ? 1 : 2) * p.splits;
  const int64_t first = batch * p.splits * p.slots_count;
  const auto place = [&](int part) {
    const bool second = part >= p.splits;
    return first + (part - (second ? p.splits : 0)) * p.slots_count + slots[second];
  };
  float largest = -INFINITY;
  for (int i = threadIdx.x; i < parts; i += kMergeThreads) {
    largest = fmaxf(largest, partials.stats[place(i)].x);
  }
  largest = block_reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  const float base = largest == -INFINITY ? 0.0f : largest;
  float total = 0.0f;
  for (int i = threadIdx.x; i < parts; i += kMergeThreads) {
    const float2 stats = partials.stats[place(i)];
    shares[i] = exp2f(stats.x - base);
    total += shares[i] * stats.y;
  }
  total = block_reduce(total, [](float a, float b) { return a + b; });
  const float norm = total == 0.0f ? 0.0f : 1.0f / total;
  T* out = head_rows<T>(p.out, batch, head);
  const int column = threadIdx.x % kMergeColumns, group = threadIdx.x / kMergeColumns;
  for (int64_t d = column; d - column < p.dim; d += kMergeColumns) {
    float sum = 0.0f;
    if (d < p.dim) {
#pragma unroll 8
      for (int i = group; i < parts; i += kMergeGroups) {
        sum = fmaf(shares[i], partials.sums[place(i) * p.dim + d], sum);
      }
    }
    group_sums[group][column] = sum;
    __syncthreads();
    if (group == 0 && d < p.dim) {
      for (int g = 1; g < kMergeGroups; ++g) sum += group_sums[g][column];
      out[d] = from_float<T>(sum * norm);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) p.lse_ptr[batch * p.heads + head] = (largest + log2f(total)) * kLn2;
}

}  // namespace rtpurbo::cuda

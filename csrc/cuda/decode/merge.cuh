#pragma once
// The splits of a head, and its near and listed keys, merged by their log-sum-exp.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/element.cuh"

namespace rtpurbo::cuda {

constexpr int kMergeThreads = 128;

template <typename T>
__global__ __launch_bounds__(kMergeThreads) void merge_kernel(
    const __grid_constant__ DecodeParams p, Partials partials) {
  constexpr float kLn2 = 0.6931471805599453f;
  const int64_t head = blockIdx.x, batch = blockIdx.y;
  const int16_t* slots = p.head_slots[head];
  const auto place = [&](int slot, int split) {
    return (batch * p.splits + split) * p.slots_count + slots[slot];
  };
  float largest = -INFINITY;
  for (int s = 0; s < DecodeParams::kHeadSlots && slots[s] >= 0; ++s) {
    for (int i = 0; i < p.splits; ++i) largest = fmaxf(largest, partials.stats[place(s, i)].x);
  }
  const float base = largest == -INFINITY ? 0.0f : largest;
  float total = 0.0f;
  for (int s = 0; s < DecodeParams::kHeadSlots && slots[s] >= 0; ++s) {
    for (int i = 0; i < p.splits; ++i) {
      const float2 stats = partials.stats[place(s, i)];
      total += exp2f(stats.x - base) * stats.y;
    }
  }
  const float norm = total == 0.0f ? 0.0f : 1.0f / total;
  T* out = static_cast<T*>(p.out.ptr) + batch * p.out.batch_stride + head * p.out.head_stride;
  for (int64_t d = threadIdx.x; d < p.dim; d += kMergeThreads) {
    float sum = 0.0f;
    for (int s = 0; s < DecodeParams::kHeadSlots && slots[s] >= 0; ++s) {
      for (int i = 0; i < p.splits; ++i) {
        sum += exp2f(partials.stats[place(s, i)].x - base) * partials.sums[place(s, i) * p.dim + d];
      }
    }
    out[d] = from_float<T>(sum * norm);
  }
  if (threadIdx.x == 0) p.lse_ptr[batch * p.heads + head] = (largest + log2f(total)) * kLn2;
}

}  // namespace rtpurbo::cuda
